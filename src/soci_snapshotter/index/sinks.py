"""Where an index's blobs go, and where push finds them: containerd's content store or our own directory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from ..containerd.client import ContainerdClient
from ..errors import NotFound
from ..formats import digest as digests
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..store.content import ContentStore
from ..store.locks import content_lock
from .holdings import DirectoryBlobs
from .outputs import GC_CONTENT, SOCI_INDEX_LABEL, Blob, file_pieces


class Store(Protocol):
    """A content store for indexes and ztocs. `name` is what --content-store calls it.

    What is published and there already is read, and replaced if it is damaged.
    """

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
        """See Store. In order, so that nothing names what is not there; on failure the store is as it was."""
        del image  # the link from image to index is a row in artifacts.sqlite
        try:
            with content_lock(self._store.root, exclusive=False):
                for blob in blobs:
                    self._put(blob)
        except BaseException:
            # Unless another process published an index with them meanwhile.
            DirectoryBlobs(self._store.root.parent).discard((), [blob.digest for blob in blobs])
            raise

    def _put(self, blob: Blob) -> None:
        path = self._store.path(blob.digest)
        if not (path.is_file() and _intact(file_pieces(path, 0), blob.digest)):
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
        _remove_damaged(client, blob.digest)
        labels = {GC_CONTENT + name: str(digest) for name, digest in blob.refs}
        client.content.write(blob.descriptor, blob.pieces, labels=labels)


def _remove_damaged(client: ContainerdClient, digest: Digest) -> None:
    """Remove a blob that no longer has its digest: containerd would take it for the new one."""
    try:
        if _intact(client.content.read(digest), digest):
            return
        client.content.delete(digest)
    except NotFound:
        return
    # The file goes with the next collection only, and until then containerd would find it again.
    client.leases.delete(client.leases.create(), collect=True)


def _intact(pieces: Iterable[bytes], digest: Digest) -> bool:
    hasher = hashlib.new(digest.algorithm)
    for piece in pieces:
        hasher.update(piece)
    return hasher.hexdigest() == digest.hex
