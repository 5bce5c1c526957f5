"""An image with its SOCI indexes inside (version 2): which documents the conversion writes (FORMATS.md 5).

Every image manifest that is there is written anew, compactly and with OCI media types, so that no registry has to
take Docker's types beside OCI's; indexed ones gain an annotation that binds them to their SOCI index. The layers
stay as they are. SOCI indexes of an earlier conversion are kept, or replaced for the platforms indexed now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from soci_snapshotter.errors import Integrity, Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Index, Manifest, Platform
from soci_snapshotter.formats.sociindex import INDEX_DIGEST, INDEX_V2, MANIFEST_DIGEST


@dataclass(frozen=True, slots=True)
class PlatformIndex:
    """A SOCI index (its manifest's digest and size in bytes) of one image manifest, for one platform.

    `exact`: the platform is as the image writes it, and not as somebody asked for it.
    """

    manifest: Digest
    digest: Digest
    size: int
    platform: Platform
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A document to store: its descriptor, its bytes, and what it refers to, by the name of the reference.

    The names are those of containerd's labels `containerd.io/gc.ref.content.<name>`: config, l.N, m.N.
    """

    descriptor: Descriptor
    data: bytes
    refs: tuple[tuple[str, Digest], ...]


@dataclass(frozen=True, slots=True)
class Converted:
    """The documents of a converted image, the index that is its root last."""

    manifests: tuple[Document, ...]
    root: Document


def convert(
    root: Index, read: Callable[[Descriptor], bytes | None], indexes: Sequence[PlatformIndex]
) -> Converted:
    """The converted image of `root`; `read` gives a manifest's bytes, None when it was never pulled.

    Invalid without any index, Integrity when an indexed manifest is missing. The result depends on nothing else, so
    that converting twice, and converting the result, give the same bytes.
    """
    if not indexes:
        raise Invalid("no SOCI index to put into the image")
    by_manifest = {index.manifest: index for index in indexes}
    if missing := set(by_manifest) - {entry.digest for entry in root.manifests}:
        raise Integrity(f"manifest {min(missing)} was indexed but is not part of the image")
    documents: list[Document] = []
    renamed: dict[Digest, Digest] = {}
    entries: list[Descriptor] = []
    for entry in root.manifests:
        data = None if _is_soci(entry) or entry.media_type not in oci.MANIFEST_TYPES else read(entry)
        index = by_manifest.get(entry.digest)
        if data is None:
            if index is not None:
                raise Integrity(f"manifest {entry.digest} was indexed but cannot be read any more")
            entries.append(entry)
            continue
        document, descriptor = _annotated(entry, data, index)
        documents.append(document)
        renamed[entry.digest] = descriptor.digest
        entries.append(descriptor)
    for index in indexes:
        _place(entries, _soci_entry(index, renamed), exact=index.exact)
    return Converted(tuple(documents), _root(root, entries))


def single(descriptor: Descriptor, platform: Platform) -> Index:
    """The index that an image without one becomes; `platform` is the one its config names, if none is known."""
    entry = msgspec.structs.replace(descriptor, platform=descriptor.platform or platform.normalized())
    return Index(schema_version=2, media_type=oci.INDEX, manifests=(entry,))


def _is_soci(entry: Descriptor) -> bool:
    return entry.artifact_type == INDEX_V2


def _annotated(entry: Descriptor, data: bytes, index: PlatformIndex | None) -> tuple[Document, Descriptor]:
    manifest = oci.decode_manifest(data)
    if not isinstance(manifest, Manifest):
        raise Integrity(f"manifest {entry.digest}: an index where an image manifest was announced")
    annotations = dict(manifest.annotations)
    if index is not None:
        annotations[INDEX_DIGEST] = index.digest
    written = msgspec.structs.replace(
        manifest,
        media_type=oci.MANIFEST,
        config=msgspec.structs.replace(manifest.config, media_type=oci.CONFIG),
        annotations=annotations,
    )
    new = oci.encode(written)
    descriptor = msgspec.structs.replace(
        entry,
        media_type=oci.MANIFEST,
        digest=digests.sha256(new),
        size=len(new),
        annotations=annotations,
    )
    refs = [("config", manifest.config.digest)]
    refs += [(f"l.{position}", layer.digest) for position, layer in enumerate(manifest.layers)]
    return Document(descriptor, new, tuple(refs)), descriptor


def _soci_entry(index: PlatformIndex, renamed: Mapping[Digest, Digest]) -> Descriptor:
    return Descriptor(
        oci.MANIFEST,
        index.digest,
        index.size,
        annotations={MANIFEST_DIGEST: renamed[index.manifest]},
        platform=index.platform,
        artifact_type=INDEX_V2,
    )


def _place(entries: list[Descriptor], soci: Descriptor, *, exact: bool) -> None:
    """Append the SOCI index, or put it where the one of the same platform stood; the same one stays as it is."""
    own = soci.platform.normalized() if soci.platform else None
    for position, entry in enumerate(entries):
        if _is_soci(entry) and entry.platform and own and entry.platform.normalized().same_as(own):
            again = entry.digest == soci.digest and not exact
            kept = entry.platform if again else soci.platform
            entries[position] = msgspec.structs.replace(soci, platform=kept)
            return
    entries.append(soci)


def _root(root: Index, entries: Sequence[Descriptor]) -> Document:
    data = oci.encode(msgspec.structs.replace(root, media_type=oci.INDEX, manifests=tuple(entries)))
    descriptor = Descriptor(oci.INDEX, digests.sha256(data), len(data))
    return Document(descriptor, data, tuple((f"m.{n}", entry.digest) for n, entry in enumerate(entries)))
