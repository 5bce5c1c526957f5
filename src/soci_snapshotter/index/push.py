"""Push what is in a store: a SOCI index with its ztocs (v1), or a converted image with everything in it (v2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from ..errors import Integrity, NotFound
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor, Index, Manifest
from ..formats.reference import Reference
from ..formats.sociindex import INDEX_V2
from ..registry.client import RegistryClient
from .outputs import Blob
from .places import ImageContent
from .publish import send

# What `soci push --max-concurrent-uploads` says by default.
CONCURRENT_UPLOADS = 3

# An index of manifests, or of indexes of them; deeper ones exist nowhere.
_DEPTH = 3

Progress = Callable[[Blob, int], None]


class Source(Protocol):
    """Where the blobs are (index.sinks.Store)."""

    def get(self, digest: Digest, limit: int) -> bytes:
        """A blob of at most `limit` bytes, checked."""

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes in pieces."""


def _silent(_blob: Blob, _count: int) -> None:
    return None


def push(
    client: RegistryClient,
    repo: Reference,
    source: Source,
    index: Digest,
    *,
    uploads: int = CONCURRENT_UPLOADS,
    progress: Progress = _silent,
    tag: str | None = None,
    piece: int = 0,
) -> Descriptor:
    """Push the index manifest `index` and all it names; `progress(blob, bytes)` is told of each piece sent.

    By digest, or under `tag`, and then the registry may refuse to list it as a referrer. `piece`: see RegistryClient.

    Raises NotFound for a blob missing in `source`, Remote for a registry that refuses. The manifest goes last, so
    that nobody finds an index whose ztocs are not there.
    """
    data = source.get(index, oci.MANIFEST_LIMIT)
    manifest = oci.decode_manifest(data)
    if not isinstance(manifest, Manifest):
        raise Integrity(f"{index} is no SOCI index")
    content = _StoreContent(source)
    described = Descriptor(manifest.media_type or oci.MANIFEST, index, len(data))
    named = {entry.digest: entry for entry in (manifest.config, *manifest.layers)}
    blobs = [*(Blob(entry, content) for entry in named.values()), Blob(described, data)]
    send(
        client,
        repo,
        blobs,
        tag=tag,
        uploads=uploads,
        progress=progress,
        piece=piece,
        tag_suffices=tag is not None,
    )
    return described


def is_converted(content: ImageContent, root: Descriptor) -> bool:
    """True for an image that `soci convert` made: an index with SOCI indexes (v2) among its manifests."""
    if root.media_type not in oci.INDEX_TYPES:
        return False
    document = oci.decode_manifest(content.get(root, oci.MANIFEST_LIMIT))
    return isinstance(document, Index) and any(each.artifact_type == INDEX_V2 for each in document.manifests)


def push_image(
    client: RegistryClient,
    target: Reference,
    content: ImageContent,
    root: Descriptor,
    *,
    uploads: int = CONCURRENT_UPLOADS,
    progress: Progress = _silent,
    piece: int = 0,
) -> None:
    """Push the image `root` and all it names, `root` last and under the tag of `target`.

    What was never pulled (a platform, say) must be in the repository already; NotFound names it otherwise.
    """
    blobs: dict[Digest, Blob] = {}
    for blob in _tree(content, root, lambda entry: client.exists(target, entry, pushing=True), _DEPTH):
        blobs.setdefault(blob.digest, blob)
    send(client, target, blobs.values(), tag=target.tag, uploads=uploads, progress=progress, piece=piece)


def _tree(
    content: ImageContent, document: Descriptor, elsewhere: Callable[[Descriptor], bool], depth: int
) -> Iterator[Blob]:
    """The blobs of a manifest or index, each after those it names."""
    try:
        data = content.get(document, oci.MANIFEST_LIMIT)
    except NotFound:
        if not elsewhere(document):
            of = f" (platform {document.platform})" if document.platform else ""
            raise NotFound(
                f"manifest {document.digest}{of} is neither here nor in the registry; pull that platform first, "
                f"or convert the image without it"
            ) from None
        return
    decoded = oci.decode_manifest(data)
    if isinstance(decoded, Index):
        if depth == 0:
            raise Integrity(f"index {document.digest} is nested deeper than {_DEPTH} indexes")
        for entry in decoded.manifests:
            yield from _tree(content, entry, elsewhere, depth - 1)
    else:
        yield from _named(content, (decoded.config, *decoded.layers), elsewhere)
    yield Blob(Descriptor(document.media_type, document.digest, len(data)), data)


def _named(
    content: ImageContent, entries: Iterable[Descriptor], elsewhere: Callable[[Descriptor], bool]
) -> Iterator[Blob]:
    for entry in entries:
        if content.has(entry):
            yield Blob(entry, content)
        elif entry.urls:
            continue  # a foreign layer: whoever runs the image gets it from there
        elif not elsewhere(entry):
            raise NotFound(
                f"blob {entry.digest} is neither here nor in the registry (pulled lazily, or discarded after "
                f"unpacking); get it with: ctr content fetch"
            )


class _StoreContent:
    """A store as an ImageContent; what is not there shows when it is read."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def get(self, descriptor: Descriptor, limit: int) -> bytes:
        """See ImageContent."""
        return self._source.get(descriptor.digest, limit)

    def has(self, descriptor: Descriptor) -> bool:
        """See ImageContent. Not known before it is read."""
        return True

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See ImageContent."""
        return self._source.read(descriptor)
