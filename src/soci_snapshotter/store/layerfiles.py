"""The files of one lazy layer, and what may be believed of them after a crash.

    <root>/layers/<layer hex>/<ztoc hex>/
        data.tar          sparse; the uncompressed tar at its own offsets, what follows its end blocks included
        spans.live        one byte per span behind a header with the boot id: 1 after pwrite
        spans.durable     the same with a checksum, written only after fdatasync(data.tar)
        spans.closed      what data.tar looked like when it was closed in order: gone while it is open
        meta-<h>.erofs    names, inodes, xattrs; h = hash of what the directories inherit
        layer.json        LayerRecord

A mark in spans.live is believed only within the boot that wrote it: the page cache survives a killed process, not a
power loss. Writers set the mark after the data is in the page cache; `make_durable` moves marks to spans.durable after
the data is on the disk. A data.tar whose size cannot be, or that changed while it was closed, is filled afresh.
A complete layer has no spans.*; its record says what data.tar must look like.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from soci_snapshotter.errors import Integrity, NotFound
from soci_snapshotter.formats.digest import Digest, from_hex
from soci_snapshotter.linux.inflate import MAX_TAIL

_log = logging.getLogger(__name__)

_LIVE_MAGIC = b"SOCILIV2"
_DURABLE_MAGIC = b"SOCIDUR2"
# magic, boot id as /proc prints it, number of spans, bytes of the tar as its stream ended (0: the last span is not here)
_HEADER = struct.Struct("<8s36sIQ")
_RECORD_LIMIT = 1 << 20  # layer.json holds two digests and a few references; 1 MiB is three orders above
_HEX = re.compile("[0-9a-f]{64}")
_MAX_SOURCES = 16  # references that are known to serve the layer; the newest are kept


class Stamp(msgspec.Struct, frozen=True):
    """What tells that a file was left alone: bytes, nanoseconds, inode number."""

    size: int
    mtime_ns: int
    inode: int


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp in a stat result."""
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


class LayerRecord(msgspec.Struct, frozen=True):
    """What layer.json says; everything else is derived from the ztoc."""

    layer_digest: str
    ztoc_digest: str
    node_id: int
    """The FUSE node of data.tar: persistent, since EROFS mounts outlive the daemon."""
    data_size: int
    """Bytes of data.tar, a multiple of 512."""
    sources: tuple[str, ...]
    """Image references whose repository serves the layer, newest first."""
    mounts: dict[str, int]
    """meta hash -> the number that the snapshots' rows know."""
    shown: dict[str, int] = {}
    """meta hash -> n of the mount m/<n> that is handed out now, where it is not the number in `mounts`; 0 for none."""
    superseded: tuple[int, ...] = ()
    """n of mounts m/<n> that are handed out no more, but that a snapshot may still use."""
    local: tuple[int, ...] = ()
    """n of those mounts whose device is data.tar itself; the others read through FUSE."""
    diff_id: str = ""
    """sha256 of the tar, once the layer is complete; "" while it is lazy."""
    tar_size: int = 0
    """Bytes that diff_id covers; data.tar is longer where the tar's end is not a multiple of 512."""
    stamp: Stamp | None = None
    """What data.tar looked like when it was hashed."""
    spans: int = 0
    compressed_size: int = 0
    """Bytes of the blob; both, for who asks how far the layer is, once it is complete."""
    condemned: bool = False
    """Not what any snapshot of it said it would be, or a lie: reads through FUSE fail."""
    lie: str = ""
    """In what the ztoc differs from the layer, when it does."""
    made: bool = False
    """The layer was filled as one stream, and its ztoc made here on the way."""
    by_span: bool = True
    """Whether its spans can be fetched; not of a layer that came as zstd, say."""
    boot: str = ""
    """The boot in which it was filled, until its bytes are on the disk: in another one they are not believed."""

    def with_source(self, reference: str) -> LayerRecord:
        rest = tuple(source for source in self.sources if source != reference)
        return msgspec.structs.replace(self, sources=(reference, *rest)[:_MAX_SOURCES])

    def with_shown(
        self, meta_hash: str, number: int, shown: int, superseded: int, *, local: bool
    ) -> LayerRecord:
        """m/<shown> is what row number `number` stands for from now on, instead of m/<superseded> (0: of nothing)."""
        old = (*self.superseded, superseded) if superseded else self.superseded
        standing = self.standing() | {shown}
        return msgspec.structs.replace(
            self,
            mounts={**self.mounts, meta_hash: number},
            shown={**self.shown, meta_hash: shown},
            superseded=old,
            local=tuple(n for n in (*self.local, *((shown,) if local else ())) if n in standing),
        )

    def all_superseded(self) -> LayerRecord:
        """Nothing that is mounted is handed out any more."""
        standing = tuple(sorted(self.standing()))
        return msgspec.structs.replace(self, shown=dict.fromkeys(self.mounts, 0), superseded=standing)

    def asleep(self) -> LayerRecord:
        """Nothing is mounted; the rows' numbers stay."""
        return msgspec.structs.replace(self, shown=dict.fromkeys(self.mounts, 0), superseded=(), local=())

    def without_superseded(self, number: int) -> LayerRecord:
        """m/<number> is gone."""
        return msgspec.structs.replace(
            self,
            superseded=tuple(n for n in self.superseded if n != number),
            local=tuple(n for n in self.local if n != number),
        )

    def without_mount(self, number: int) -> LayerRecord:
        """Forget what a row's number stands for."""
        kept = {h: n for h, n in self.mounts.items() if n != number}
        return msgspec.structs.replace(
            self, mounts=kept, shown={h: n for h, n in self.shown.items() if h in kept}
        )

    @property
    def complete(self) -> bool:
        """Whether all bytes are here and hashed."""
        return bool(self.diff_id)

    def path_number(self, meta_hash: str) -> int:
        """n of the m/<n> that is handed out now; 0 when none is mounted."""
        return self.shown.get(meta_hash, self.mounts[meta_hash])

    def standing(self) -> set[int]:
        """n of every m/<n> that is, or should be, mounted."""
        return ({self.path_number(meta_hash) for meta_hash in self.mounts} | set(self.superseded)) - {0}

    def through_fuse(self) -> set[int]:
        """n of those that need the FUSE node."""
        return self.standing() - set(self.local)

    def last_number(self) -> int:
        """The highest number that was ever given to this layer and may still be known."""
        return max((0, *self.mounts.values(), *self.shown.values(), *self.superseded))


def boot_id() -> bytes:
    """This boot's id, 36 bytes (random(4), /proc/sys/kernel/random/boot_id)."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read(36)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves the old content or the new, on the disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:  # a full disk: leave it what there is
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def layer_directory(root: Path, layer: Digest, ztoc: Digest) -> Path:
    """Where the files of (layer, ztoc) live: whoever names both shares them, nobody else."""
    return root / "layers" / layer.hex / ztoc.hex


def read_record(directory: Path) -> LayerRecord:
    """layer.json of `directory`. Raises NotFound, or Integrity when it cannot be one."""
    path = directory / "layer.json"
    try:
        if path.stat().st_size > _RECORD_LIMIT:
            raise Integrity(f"{path}: too large for a layer record")
        record = msgspec.json.decode(path.read_bytes(), type=LayerRecord)
    except FileNotFoundError:
        raise NotFound(f"{path}: no such layer record") from None
    except msgspec.MsgspecError as error:
        raise Integrity(f"{path}: not a layer record: {error}") from None
    if record.layer_digest != from_hex(directory.parent.name) or record.ztoc_digest != from_hex(
        directory.name
    ):
        raise Integrity(f"{path}: names another layer or ztoc than its directory")
    return record


def write_record(directory: Path, record: LayerRecord) -> None:
    """Write layer.json durably."""
    write_atomically(directory / "layer.json", msgspec.json.encode(record))


def scan(root: Path) -> Iterator[Path]:
    """Every layer directory under `root`, whether its record can be read or not."""
    top = root / "layers"
    if top.is_dir():
        for layer in _digest_directories(top):
            yield from _digest_directories(layer)


def remove_empty(root: Path) -> None:
    """Remove directories of layers that have no ztoc's directory: whoever removed the last was killed then."""
    for layer in _digest_directories(root / "layers"):
        try:
            layer.rmdir()
        except OSError:  # the rule: it is not empty
            pass


def _digest_directories(above: Path) -> list[Path]:
    """The directories in `above` that are named by a digest. Anything else is not ours, and left alone."""
    found = []
    with os.scandir(above) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if _HEX.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                found.append(above / entry.name)
            else:
                _log.warning("a file of somebody else's is left alone", extra={"path": entry.path})
    return found


class SpanFile:
    """data.tar of one lazy layer and the marks of the spans in it. Thread safe; a context manager."""

    def __init__(self, directory: Path, spans: int, data_size: int, boot: bytes) -> None:
        """Open or create. `spans` and `data_size` (bytes) come from the ztoc; marks that do not fit are dropped."""
        self.directory = directory
        self.data_size = data_size
        self._boot = boot
        self.tar_size = 0
        """Bytes of the tar with what follows its end, as the last span told; 0 while that is not here."""
        self._fd = os.open(directory / "data.tar", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            believed = self._left_alone()
            self._durable, durable_size = self._read_durable(spans) if believed else (bytes(spans), 0)
            live = self._read_live(spans) if believed else None
            marks, self.tar_size = live or (self._durable, durable_size)
            self.inherited = any(marks)
            """Whether another process wrote some of the bytes: what happened to them since is its word, not ours."""
            self.live = bytearray(marks)
            """One byte per span, 1 = its bytes are in data.tar. Read without a lock; written by `mark` only."""
            self._live_fd = os.open(directory / "spans.live", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._fd)
            raise
        if live is None:
            self._rewrite_live()
        self.epoch = 0
        """Counts failed write-backs: bytes written or read before one may not be believed after it."""
        self._mark_lock = threading.Lock()
        self._closed = False
        # One make_durable at a time, and no close under it: held over I/O on purpose, no reader or flight takes it.
        self._sync_lock = threading.Lock()
        self.unsynced = 0
        """Bytes written since the last success of `make_durable`, roughly (several writers, no lock)."""

    def _left_alone(self) -> bool:
        """Whether the bytes in data.tar may be what the marks say; if not it is emptied. Its size is right after."""
        status = os.fstat(self._fd)
        closed = self.directory / "spans.closed"
        raw = _read_small(closed)
        if raw is not None:
            closed.unlink()  # before the first write
        new = status.st_size == 0
        fits = self.data_size <= status.st_size <= self.data_size + MAX_TAIL
        if not new and (not fits or (raw is not None and raw != msgspec.json.encode(stamp_of(status)))):
            _log.error(
                "data.tar was changed by somebody else: it is filled afresh",
                extra={"directory": str(self.directory), "size": status.st_size},
            )
            os.ftruncate(self._fd, 0)
            new = True
        if new:
            old = [self.directory / name for name in ("spans.durable", "spans.live")]
            if raw is not None or any(path.exists() for path in old):
                for path in old:
                    path.unlink(missing_ok=True)
                # Before any span is written: no later start may believe the old marks.
                sync_directory(self.directory)
            os.ftruncate(self._fd, self.data_size)
        return not new

    def __enter__(self) -> SpanFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors, once; marks stay as they are on disk. Nobody writes any more."""
        with self._sync_lock:
            if self._closed:
                return
            self._closed = True
            try:
                os.fsync(self._fd)  # the times, too
                _write_new(self.directory / "spans.closed", msgspec.json.encode(stamp_of(os.fstat(self._fd))))
            except OSError as error:  # as after a crash, then
                _log.debug("no stamp on data.tar", extra={"error": str(error)})
            os.close(self._fd)
            os.close(self._live_fd)

    def hand_over(self) -> int:
        """Close all but data.tar, whose descriptor is the caller's from now on. Every span is here."""
        with self._sync_lock:
            self._closed = True
            os.close(self._live_fd)
        return self._fd

    @property
    def fd(self) -> int:
        """Descriptor of data.tar, for pread."""
        return self._fd

    def has(self, first: int, last: int) -> bool:
        """Whether spans first..last (inclusive) are all here."""
        return self.live.find(0, first, last + 1) < 0

    def whole(self) -> int:
        """The epoch in which every span is here; -1 when one is missing."""
        with self._mark_lock:  # or the epoch might be new, and the marks not yet those that it has
            return self.epoch if self.live.find(0) < 0 else -1

    def write(self, span: int, offset: int, data: memoryview) -> None:
        """Put the verified bytes of `span` at `offset` and mark it. Raises OSError; then nothing is marked.

        The last span's bytes reach to the end of the layer's stream: they tell `tar_size`.
        """
        epoch = self.epoch
        end = offset + len(data)
        data = data[: max(self.data_size + MAX_TAIL - offset, 0)]
        position = 0
        while position < len(data):
            position += os.pwrite(self._fd, data[position:], offset + position)
        if span == len(self.live) - 1:
            os.pwrite(self._live_fd, _HEADER.pack(_LIVE_MAGIC, self._boot, len(self.live), end), 0)
            self.tar_size = end
        self._mark(span, epoch)
        self.unsynced += len(data)

    def _mark(self, span: int, epoch: int) -> None:
        """Say that the bytes of `span` are in data.tar: on disk first (it survives our own death), then in memory."""
        os.pwrite(self._live_fd, b"\x01", _HEADER.size + span)
        with self._mark_lock:
            if self.epoch == epoch:
                self.live[span] = 1
                return
        os.pwrite(self._live_fd, b"\x00", _HEADER.size + span)
        raise OSError(errno.EIO, f"{self.directory}: the disk lost writes while span {span} was written")

    def make_durable(self) -> int:
        """fdatasync, then write spans.durable. Returns how many spans are durable.

        When the kernel reports a failed write-back, it may already have dropped the dirty pages: every mark since the
        last success is taken back, and OSError is raised. Readers then fetch those spans again.
        """
        with self._sync_lock:
            if self._closed:
                return 0  # their numbers may be another file's by now
            marks = bytes(self.live)
            tar_size = self.tar_size
            unsynced, self.unsynced = self.unsynced, 0
            if marks == self._durable:
                return sum(marks)
            try:
                os.fdatasync(self._fd)
            except OSError:
                with self._mark_lock:
                    self.epoch += 1
                    self.live[:] = self._durable
                self._rewrite_live()
                raise
            try:
                self._write_durable(marks, tar_size)
            except OSError:
                self.unsynced += unsynced  # the next round tries again
                raise
            return sum(marks)

    def _write_durable(self, marks: bytes, tar_size: int) -> None:
        body = _HEADER.pack(_DURABLE_MAGIC, b"", len(marks), tar_size) + marks
        write_atomically(self.directory / "spans.durable", body + hashlib.sha256(body).digest())
        self._durable = marks

    def _rewrite_live(self) -> None:
        os.pwrite(self._live_fd, bytes(self.live), _HEADER.size)
        os.ftruncate(self._live_fd, _HEADER.size + len(self.live))
        header = _HEADER.pack(_LIVE_MAGIC, self._boot, len(self.live), self.tar_size)
        os.pwrite(self._live_fd, header, 0)

    def _read_live(self, spans: int) -> tuple[bytes, int] | None:
        raw = _read_small(self.directory / "spans.live", _HEADER.size + spans)
        if raw is None or len(raw) != _HEADER.size + spans:
            return None
        *known, tar_size = _HEADER.unpack_from(raw)
        return (_marks(raw[_HEADER.size :]), tar_size) if known == [_LIVE_MAGIC, self._boot, spans] else None

    def _read_durable(self, spans: int) -> tuple[bytes, int]:
        nothing = bytes(spans), 0
        raw = _read_small(self.directory / "spans.durable", _HEADER.size + spans + 32)
        if raw is None or len(raw) != _HEADER.size + spans + 32:
            return nothing
        if hashlib.sha256(raw[:-32]).digest() != raw[-32:]:
            return nothing
        magic, _, count, tar_size = _HEADER.unpack_from(raw)
        return (
            (_marks(raw[_HEADER.size : -32]), tar_size)
            if (magic, count) == (_DURABLE_MAGIC, spans)
            else nothing
        )


def _read_small(path: Path, limit: int = 4096) -> bytes | None:
    """The file's content, at most one byte more than `limit` of it; None when there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        return None


def _write_new(path: Path, data: bytes) -> None:
    """A small file whose loss costs little: torn, it is as good as none."""
    with open(path, "wb") as file:
        file.write(data)


def _marks(raw: bytes) -> bytes:
    """Only the value 1 counts as a mark: a torn or foreign byte is a span that is fetched again."""
    return bytes(1 if value == 1 else 0 for value in raw)
