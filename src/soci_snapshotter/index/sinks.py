"""Where an index's blobs go, and where push finds them: containerd's content store or our own directory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ..containerd.client import ContainerdClient
from ..errors import NotFound
from ..formats import digest as digests
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..store.content import ContentStore
from .workers import Built

# containerd's garbage collector follows labels with this prefix from blob to blob; what comes after it must
# only be unique on the blob. The names are the Go tool's.
_GC_CONTENT = "containerd.io/gc.ref.content."
SOCI_INDEX_LABEL = _GC_CONTENT + "soci-index"

# One read of a stored blob on its way to a registry.
_PIECE = 1 << 20


class Store(Protocol):
    """A content store for indexes and ztocs. `name` is what --content-store calls it."""

    name: str

    def put_index(self, image: Digest, index: bytes, ztocs: Sequence[Built]) -> Digest:
        """Store the ztocs, then the index of the image manifest `image`; return the index's digest."""

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

    def put_index(self, image: Digest, index: bytes, ztocs: Sequence[Built]) -> Digest:
        """See Store. A newer index takes the older one's place, which is then collected."""
        with self._client.lease() as leased:
            content = leased.content
            labels = {_GC_CONTENT + "config": content.put(oci.EMPTY_JSON)}
            for position, ztoc in enumerate(ztocs):
                descriptor = Descriptor("application/octet-stream", ztoc.digest, ztoc.size)
                content.write(descriptor, functools.partial(_from_file, ztoc.output))
                labels[f"{_GC_CONTENT}ztoc.{position}"] = ztoc.digest
            digest = content.put(index, labels)
            content.update_labels(image, {SOCI_INDEX_LABEL: digest})
        return digest

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

    def put_index(self, image: Digest, index: bytes, ztocs: Sequence[Built]) -> Digest:
        """See Store. Blobs first, so that an index never names what is not there."""
        del image  # the link from image to index is a row in artifacts.sqlite
        self._store.put(oci.EMPTY_JSON)
        for ztoc in ztocs:
            if not self._store.exists(ztoc.digest):
                self._store.put_stream(_from_file(ztoc.output, 0), ztoc.digest, ztoc.size)
        return self._store.put(index)

    def get(self, digest: Digest, limit: int) -> bytes:
        """See Store."""
        return self._store.get(digest, limit)

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See Store."""
        path = self._store.path(descriptor.digest)
        if not path.is_file():
            raise NotFound(f"blob {descriptor.digest} is not in {path.parent}")
        return _from_file(path, 0)

    def index_of(self, image: Digest) -> Digest | None:
        """Always None: this store has no labels."""
        del image
        return None


def _from_file(path: Path, offset: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE):
            yield piece
