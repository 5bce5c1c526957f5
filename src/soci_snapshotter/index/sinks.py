"""Where an index's blobs go, and where push finds them: containerd's content store or our own directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from ..containerd.client import ContainerdClient
from ..errors import NotFound
from ..formats import digest as digests
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..store.content import ContentStore
from ..store.locks import content_lock
from .outputs import Blob, file_pieces

# containerd's garbage collector follows labels with this prefix from blob to blob; what comes after it must
# only be unique on the blob. The names are the Go tool's.
_GC_CONTENT = "containerd.io/gc.ref.content."
SOCI_INDEX_LABEL = _GC_CONTENT + "soci-index"


class Store(Protocol):
    """A content store for indexes and ztocs. `name` is what --content-store calls it."""

    name: str

    def publish(self, blobs: Sequence[Blob], image: Digest | None) -> None:
        """Store the blobs, each after what it needs; the last is an index of the image manifest `image`, if given."""

    def get(self, digest: Digest, limit: int) -> bytes:
        """A blob of at most `limit` bytes, checked; NotFound when it is not there."""

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes in pieces, unchecked."""

    def index_of(self, image: Digest) -> Digest | None:
        """The index this store itself says belongs to the image, None when it does not say."""


class ContainerdStore:
    """containerd's content store: an index lives as long as the image manifest that it is labelled on."""

    name = "containerd"

    def __init__(self, client: ContainerdClient) -> None:
        self._client = client

    def publish(self, blobs: Sequence[Blob], image: Digest | None) -> None:
        """See Store. A newer index of an image takes the older one's place, which is then collected."""
        with self._client.lease() as leased:
            _write(leased, blobs)
            if image is not None:
                leased.content.update_labels(image, {SOCI_INDEX_LABEL: blobs[-1].digest})

    def publish_image(self, blobs: Sequence[Blob], name: str) -> None:
        """Store the blobs and give the last, an image's root, this name; the name is moved if it exists."""
        with self._client.lease() as leased:
            _write(leased, blobs)
            leased.images.put(name, blobs[-1].descriptor)

    def get(self, digest: Digest, limit: int) -> bytes:
        """See Store."""
        return self._client.content.get(digest, limit)

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Store."""
        return self._client.content.read(descriptor.digest)

    def index_of(self, image: Digest) -> Digest | None:
        """The label on the image manifest, if there is one."""
        try:
            label = self._client.content.info(image).labels.get(SOCI_INDEX_LABEL)
        except NotFound:
            return None
        return digests.parse(label) if label else None


class DirectoryStore:
    """The daemon's own content store under <root>/content, which no garbage collector visits."""

    name = "soci"

    def __init__(self, store: ContentStore) -> None:
        self._store = store

    def publish(self, blobs: Sequence[Blob], image: Digest | None) -> None:
        """See Store. In order, so that nothing names what is not there."""
        del image  # the link from image to index is a row in artifacts.sqlite
        with content_lock(self._store.root, exclusive=False):
            self._put(blobs)

    def _put(self, blobs: Sequence[Blob]) -> None:
        for blob in blobs:
            if not self._store.exists(blob.digest):
                self._store.put_stream(blob.pieces(), blob.digest, blob.descriptor.size)

    def get(self, digest: Digest, limit: int) -> bytes:
        """See Store."""
        return self._store.get(digest, limit)

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Store."""
        path = self._store.path(descriptor.digest)
        if not path.is_file():
            raise NotFound(f"blob {descriptor.digest} is not in {path.parent}")
        return file_pieces(path, 0)

    def index_of(self, image: Digest) -> Digest | None:
        """Always None: this store has no labels."""
        del image
        return None


def _write(client: ContainerdClient, blobs: Sequence[Blob]) -> None:
    for blob in blobs:
        labels = {_GC_CONTENT + name: str(digest) for name, digest in blob.refs}
        client.content.write(blob.descriptor, blob.pieces, labels=labels)
