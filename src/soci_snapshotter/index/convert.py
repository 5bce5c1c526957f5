"""An image with its SOCI indexes inside: every blob of it, for whatever store or registry it goes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec

from ..errors import NotFound
from ..formats import oci, sociconvert
from ..formats.digest import Digest
from ..formats.oci import Descriptor, Index, Manifest, Platform
from ..formats.sociconvert import Document, PlatformIndex
from ..formats.sociindex import MANIFEST_DIGEST
from .create import Indexed, soci_index
from .outputs import Blob
from .places import ImageContent


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """`soci`: the blobs of each SOCI index, its manifest last. `manifests`: the image's, rewritten; `root` names all.

    `platforms` in the order of `soci`: the SOCI index's descriptor and the new digest of the manifest it describes.
    """

    soci: tuple[tuple[Blob, ...], ...]
    platforms: tuple[tuple[Descriptor, Digest, Platform], ...]
    manifests: tuple[Blob, ...]
    root: Blob

    @property
    def own(self) -> tuple[Blob, ...]:
        """What the conversion made, each blob after those it names."""
        return (*(blob for blobs in self.soci for blob in blobs), *self.manifests, self.root)


def convert(
    content: ImageContent,
    root: Descriptor | Index,
    indexed: Sequence[Indexed],
    build_tool: str,
    *,
    asked: bool | None,
) -> ConvertedImage:
    """The converted image of `root`, which is in `content`.

    `asked`: its platforms were named, not found; None when nobody said anything, and then an image without an index
    is for what it says. Raises Integrity when a manifest that was indexed is gone.
    """
    listed = _listed(content, root)
    if asked is None:
        asked = listed is not None
    soci = tuple(soci_index(image, build_tool, version=2) for image in indexed)
    platforms = tuple(
        PlatformIndex(
            image.image.descriptor.digest,
            blobs[-1].digest,
            blobs[-1].descriptor.size,
            _platform(image, asked=asked),
            exact=not asked,
        )
        for image, blobs in zip(indexed, soci, strict=True)
    )

    def read(entry: Descriptor) -> bytes | None:
        try:
            return content.get(entry, oci.MANIFEST_LIMIT)
        except NotFound:
            return None

    if listed is None:
        assert isinstance(root, Descriptor)  # noqa: S101 -- an Index is its own list
        listed = sociconvert.single(root, indexed[0].image.config.platform)
    converted = sociconvert.convert(listed, read, platforms)
    entries = {entry.digest: entry for entry in _entries(converted.root.data)}
    described = tuple(
        (
            entries[index.digest],
            Digest(entries[index.digest].annotations[MANIFEST_DIGEST]),
            index.platform,
        )
        for index in platforms
    )
    return ConvertedImage(soci, described, tuple(map(_blob, converted.manifests)), _blob(converted.root))


def parts(content: ImageContent, image: ConvertedImage) -> Iterator[Blob]:
    """What the converted image needs of the old one: configs, layers, and the SOCI indexes it had already.

    Each once. What was never pulled is left out, as its manifest's absence allows.
    """
    own = {blob.digest for blob in image.own}
    seen = set(own)
    for manifest in (*_manifests(image.manifests), *_kept(content, image, own)):
        for entry in (manifest.config, *manifest.layers):
            if entry.digest not in seen and content.has(entry):
                seen.add(entry.digest)
                yield Blob(entry, content)
    for entry in _entries(_bytes(image.root)):
        if entry.digest not in seen and content.has(entry):
            seen.add(entry.digest)
            yield Blob(entry, content)


def _kept(content: ImageContent, image: ConvertedImage, own: set[Digest]) -> Iterator[Manifest]:
    """Manifests of the root that the conversion left as they were: SOCI indexes of other platforms."""
    for entry in _entries(_bytes(image.root)):
        if entry.digest not in own and entry.media_type in oci.MANIFEST_TYPES and content.has(entry):
            document = oci.decode_manifest(content.get(entry, oci.MANIFEST_LIMIT))
            if isinstance(document, Manifest):
                yield document


def _manifests(blobs: Sequence[Blob]) -> Iterator[Manifest]:
    for blob in blobs:
        document = oci.decode_manifest(_bytes(blob))
        if isinstance(document, Manifest):
            yield document


def _bytes(blob: Blob) -> bytes:
    return b"".join(blob.pieces())


def _entries(root: bytes) -> tuple[Descriptor, ...]:
    document = oci.decode_manifest(root)
    return document.manifests if isinstance(document, Index) else ()


def _listed(content: ImageContent, root: Descriptor | Index) -> Index | None:
    """The root's index of platforms; None when the root is an image."""
    if isinstance(root, Index):
        return root
    document = oci.decode_manifest(content.get(root, oci.MANIFEST_LIMIT))
    return document if isinstance(document, Index) else None


def _platform(image: Indexed, *, asked: bool) -> Platform:
    """Platforms are asked for without a version of the system; the ones found are as the index writes them."""
    if not asked:
        return image.image.listed or image.image.platform
    return msgspec.structs.replace(image.image.platform, os_version="", os_features=())


def _blob(document: Document) -> Blob:
    descriptor = Descriptor(
        document.descriptor.media_type, document.descriptor.digest, document.descriptor.size
    )
    return Blob(descriptor, document.data, document.refs)
