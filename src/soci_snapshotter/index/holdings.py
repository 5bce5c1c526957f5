"""What listing, removing and finding again need of the two content stores (index.sinks writes them)."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..containerd.client import ContainerdClient
from ..errors import Integrity, NotFound, SociError
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Index, Manifest
from ..formats.sociindex import INDEX_V1, INDEX_V2
from ..store.content import ContentStore
from ..store.locks import content_lock
from .outputs import SOCI_INDEX_LABEL

_log = logging.getLogger(__name__)

# Read of every blob that is small enough to be a manifest: enough to see most of them whole.
_HEAD = 64 << 10
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index that lies in a store; `size` in bytes, `created_ns` UTC since 1970 or 0."""

    digest: Digest
    size: int
    created_ns: int
    content: Manifest | Index

    @property
    def soci_version(self) -> str:
        """The media type that makes it a SOCI index; empty when it is none."""
        if isinstance(self.content, Manifest) and self.content.config.media_type in (INDEX_V1, INDEX_V2):
            return self.content.config.media_type
        return ""


class Blobs(Protocol):
    """A content store. `name` is what --content-store calls it; `namespaced`: each namespace has its own blobs."""

    name: str
    namespaced: bool

    def has(self, digest: Digest) -> bool:
        """True when the whole blob is there."""

    def get(self, digest: Digest, limit: int) -> bytes:
        """A blob of at most `limit` bytes, checked; NotFound when it is not there."""

    def documents(self) -> Iterator[Document]:
        """Every manifest and index there is. Other blobs, and damaged ones, are passed over."""

    def remove(self, index: Digest, subject: Digest | None, named: Iterable[Digest]) -> None:
        """Remove an index of the image manifest `subject`, and of the blobs it names those that only it names."""


class ContainerdBlobs:
    """containerd's content store, of one namespace."""

    name = "containerd"
    namespaced = True

    def __init__(self, client: ContainerdClient) -> None:
        self._content = client.content

    def has(self, digest: Digest) -> bool:
        """See Blobs."""
        return self._content.exists(digest)

    def get(self, digest: Digest, limit: int) -> bytes:
        """See Blobs."""
        return self._content.get(digest, limit)

    def documents(self) -> Iterator[Document]:
        """See Blobs. containerd does not keep media types, so all blobs of the size are looked at."""
        # Whole first: containerd lists within a transaction of its database, for which a writer may wait, for
        # which the reads below would.
        for info in list(self._content.find()):
            if not _may_be_manifest(info.size):
                continue
            try:
                data = b"".join(self._content.read(info.digest, 0, min(info.size, _HEAD)))
                if not _begins_like_json(data):
                    continue
                if len(data) < info.size:
                    data = self._content.get(info.digest, oci.MANIFEST_LIMIT)
            except (NotFound, Integrity):
                continue  # collected since it was listed, or damaged
            created = 0 if info.created_at is None else _nanoseconds(info.created_at)
            yield from _document(info.digest, data, created)

    def remove(self, index: Digest, subject: Digest | None, named: Iterable[Digest]) -> None:
        """See Blobs. What the index named is the collector's, which knows who else needs it."""
        del named
        if subject is not None:
            try:
                if self._content.info(subject).labels.get(SOCI_INDEX_LABEL) == index:
                    self._content.update_labels(subject, {SOCI_INDEX_LABEL: ""})
            except NotFound:
                pass  # the image went before its index
        try:
            self._content.delete(index)
        except NotFound:
            pass  # collected, or removed by somebody else a moment ago


class DirectoryBlobs:
    """The snapshotter's own content store: `<root>/content`. The daemon keeps its ztocs there too."""

    name = "soci"
    namespaced = False

    def __init__(self, root: Path) -> None:
        self._root = root / "content"
        self._layers = root / "layers"
        self._store = ContentStore(self._root)

    def has(self, digest: Digest) -> bool:
        """See Blobs."""
        return self._store.exists(digest)

    def get(self, digest: Digest, limit: int) -> bytes:
        """See Blobs."""
        return self._store.get(digest, limit)

    def documents(self) -> Iterator[Document]:
        """See Blobs."""
        for digest in self._store.digests():
            try:
                with self._store.path(digest).open("rb") as file:
                    status = os.fstat(file.fileno())
                    if not _may_be_manifest(status.st_size):
                        continue
                    data = file.read(_HEAD)
                    if not _begins_like_json(data):
                        continue
                    data += file.read(oci.MANIFEST_LIMIT)
            except FileNotFoundError:
                continue  # removed since it was listed
            yield from _document(digest, data, status.st_mtime_ns)

    def remove(self, index: Digest, subject: Digest | None, named: Iterable[Digest]) -> None:
        """See Blobs. Kept are also the ztocs of layers that the daemon has."""
        del subject  # nothing in this store leads from an image to its index
        self.discard((index,), named)

    def discard(self, indexes: Iterable[Digest], named: Iterable[Digest]) -> None:
        """Remove these indexes and, of the blobs `named`, those that no index needs, nor the daemon."""
        with content_lock(self._root, exclusive=True):
            for index in indexes:
                self._store.delete(index)
            needed: set[Digest] = set()
            for document in self.documents():
                needed.add(document.digest)
                if isinstance(document.content, Manifest):
                    needed.add(document.content.config.digest)
                    needed.update(layer.digest for layer in document.content.layers)
            for digest in set(named) - needed:
                if not self._daemon_uses(digest):
                    self._store.delete(digest)

    def _daemon_uses(self, ztoc: Digest) -> bool:
        # <root>/layers/<layer hex>/<ztoc hex>/ (store.layerfiles)
        return next(self._layers.glob(f"*/{ztoc.hex}"), None) is not None


def _may_be_manifest(size: int) -> bool:
    # The empty config `{}` is the one JSON document that every index brings along.
    return len(oci.EMPTY_JSON) < size <= oci.MANIFEST_LIMIT


def _begins_like_json(data: bytes) -> bool:
    return data.lstrip()[:1] == b"{"


def _document(digest: Digest, data: bytes, created_ns: int) -> Iterator[Document]:
    if not digest.matches(data):
        _log.warning("blob %s is damaged; passed over", digest)
        return
    try:
        content = oci.decode_manifest(data)
    except SociError:
        return  # an image config, or another program's JSON
    yield Document(digest, len(data), created_ns, content)


def _nanoseconds(time: datetime.datetime) -> int:
    since = time - _EPOCH
    return (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000
