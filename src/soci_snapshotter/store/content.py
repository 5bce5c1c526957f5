"""Blobs by digest in a directory, laid out as an OCI image layout's:

    <root>/blobs/sha256/<hex>     one immutable file per blob, 0444
    <root>/ingest/                files being written, locked by who writes them

A blob's file appears under its name complete and flushed, or not at all. What a disk did to it later is found
out when it is read: `get` always checks the digest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from soci_snapshotter.errors import Integrity, NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.digest import Buffer, Digest

# One read; enough to keep hashing ahead of the disk without holding a blob twice in memory.
_PIECE = 1 << 20


class ContentStore:
    """Content-addressed files under `root`. Safe for threads and for several processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = root / "blobs"
        self._ingest = root / "ingest"
        for directory in (self._blobs / "sha256", self._ingest):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, digest: Digest) -> Path:
        """Where the blob is, or would be."""
        return self._blobs / digest.algorithm / digest.hex

    def exists(self, digest: Digest) -> bool:
        """True when the blob is here (its content is checked by `get`)."""
        return self.path(digest).is_file()

    def size(self, digest: Digest) -> int:
        """The blob's size in bytes; NotFound when it is not here."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise NotFound(f"blob {digest} is not in {self._blobs}") from None

    def put(self, data: Buffer) -> Digest:
        """Store `data` under its sha256 digest; a no-op when it is here already."""
        digest = digests.sha256(data)
        if not self.exists(digest):
            self.put_stream((data,), digest, len(data))
        return digest

    def put_stream(self, chunks: Iterable[Buffer], expected: Digest, size: int) -> Path:
        """Store exactly `size` bytes arriving in `chunks`; return the blob's path.

        Raises Integrity, and stores nothing, unless both size and digest are as expected; OSError, naming the blob,
        for a full disk.
        """
        try:
            return self._write(chunks, expected, size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(error.filename or self.path(expected))) from None

    def _write(self, chunks: Iterable[Buffer], expected: Digest, size: int) -> Path:
        target = self.path(expected)
        hasher = hashlib.new(expected.algorithm)
        received = 0
        with self._ingesting() as (descriptor, temporary):
            for chunk in chunks:
                received += len(chunk)
                if received > size:
                    raise Integrity(f"blob {expected}: more than the {size} bytes announced")
                hasher.update(chunk)
                _write_all(descriptor, chunk)
            if received != size:
                raise Integrity(f"blob {expected}: {received} bytes of the {size} announced")
            if hasher.hexdigest() != expected.hex:
                raise Integrity(f"blob {expected}: content has another digest, {hasher.hexdigest()}")
            os.fchmod(descriptor, 0o444)
            os.fsync(descriptor)
            target.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(temporary, target)
        _sync_directory(target.parent)
        return target

    def get(self, digest: Digest, limit: int) -> bytes:
        """The blob's bytes, at most `limit` of them, checked against the digest.

        NotFound when it is not here. A blob that no longer has its digest is removed, so that it is fetched
        again, and Integrity is raised.
        """
        path = self.path(digest)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise Integrity(f"blob {digest}: {size} bytes, more than the {limit} allowed")
                data = file.read(limit)
        except FileNotFoundError:
            raise NotFound(f"blob {digest} is not in {self._blobs}") from None
        if not digest.matches(data):
            self.delete(digest)
            raise Integrity(f"blob {digest}: damaged on disk, removed; fetch it again")
        return data

    def delete(self, digest: Digest) -> None:
        """Remove the blob; a no-op when it is not here."""
        with contextlib.suppress(FileNotFoundError):
            self.path(digest).unlink()

    def digests(self) -> list[Digest]:
        """Every sha256 blob here, sorted; names that are no digests are ignored."""
        names = sorted(entry.name for entry in (self._blobs / "sha256").iterdir() if entry.is_file())
        return [Digest("sha256:" + name) for name in names if len(name) == 64]

    def sweep(self) -> int:
        """Remove what interrupted writers left, of whatever process. Returns the number of files."""
        leftovers = [entry for entry in self._ingest.iterdir() if stat.S_ISREG(entry.lstat().st_mode)]
        return sum(_remove_abandoned(entry) for entry in leftovers)

    @contextlib.contextmanager
    def _ingesting(self) -> Iterator[tuple[int, str]]:
        descriptor, temporary = _locked_file(self._ingest)
        try:
            yield descriptor, temporary
        finally:
            os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):  # renamed: the good case
                os.unlink(temporary)


def _locked_file(directory: Path) -> tuple[int, str]:
    """A new file that `sweep` leaves alone while this process has it open: it holds the file's lock (flock(2))."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=directory)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # swept between its creation and its lock


def _remove_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except BlockingIOError:
        return False  # somebody is writing it
    finally:
        os.close(descriptor)
    return True


def _write_all(descriptor: int, chunk: Buffer) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view[:_PIECE]) :]


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
