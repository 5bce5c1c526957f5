"""One layer: its directory and record; while it is lazy and mounted its files, spans and reader."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.digest import Digest, parse
from soci_snapshotter.formats.zinfo import SpanTable, span_table
from soci_snapshotter.formats.ztoc import Contents
from soci_snapshotter.layers.checking import HeaderCheck
from soci_snapshotter.layers.flights import RangeSource
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.layers.parking import Replies
from soci_snapshotter.layers.pool import FlightPool
from soci_snapshotter.layers.reader import LayerReader, ReadOptions
from soci_snapshotter.layers.spandecode import check_sizes
from soci_snapshotter.layers.timing import measured
from soci_snapshotter.policy.counters import Counters, Reads
from soci_snapshotter.store.layerfiles import (
    LayerRecord,
    SpanFile,
    Stamp,
    stamp_of,
    sync_directory,
    write_record,
)

_log = logging.getLogger(__name__)


class LayerKey(NamedTuple):
    """What a layer directory is for: bytes are shared by whoever names both, and by nobody else."""

    layer: Digest
    ztoc: Digest

    def __str__(self) -> str:
        return f"{self.layer}+{self.ztoc}"


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every open layer needs of the daemon."""

    replies: Replies
    pool: FlightPool
    options: ReadOptions
    boot: bytes
    source: Callable[[LayerRecord, int], RangeSource]
    """Makes the source of a layer's bytes from its record and its compressed size."""
    counters: Counters = field(default_factory=Counters)
    keeps: Callable[[Digest], bool] = lambda ztoc: False
    """Whether a ztoc stays in the content store though no layer uses it."""


class OpenLayer:
    """Files and reader of a lazy (layer, ztoc) that is served. Close it when no FUSE handle is left."""

    def __init__(
        self,
        directory: Path,
        record: LayerRecord,
        ztoc_path: Path,
        around: Surroundings,
        on_complete: Callable[[], None] | None = None,
        on_lie: Callable[[str], None] | None = None,
    ) -> None:
        """Open from disk. `on_lie` hears in what the ztoc differs from the layer.

        Raises Integrity or Unsupported for a ztoc that cannot be served, OSError from the disk.
        """
        self.directory = directory
        self.record = record
        self.key = LayerKey(parse(record.layer_digest), parse(record.ztoc_digest))
        self._around = around
        self._windows_fd = os.open(ztoc_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            counters = around.counters.layer(record.layer_digest)
            with measured(counters.duration("ztoc_unmarshal")):
                self.spans, self.compressed_size, contents = _read_ztoc(self._windows_fd, record)
            check_sizes(self.spans)
            self.files = SpanFile(directory, len(self.spans), record.data_size, around.boot)
        except BaseException:
            os.close(self._windows_fd)
            raise
        name = f"ztoc {record.ztoc_digest} does not describe layer {record.layer_digest}"
        headers = HeaderCheck(name, self._windows_fd, contents, self.spans, self.files)
        self.reader = LayerReader(
            name=record.layer_digest,
            spans=self.spans,
            files=self.files,
            windows_fd=self._windows_fd,
            source=around.source(record, self.compressed_size),
            replies=around.replies,
            pool=around.pool,
            options=around.options,
            headers=headers if around.options.verify else None,
            on_complete=on_complete,
            on_lie=on_lie,
            counters=counters,
        )

    @property
    def full(self) -> bool:
        """Whether every span is here."""
        return self.files.live.find(0) < 0

    def renew(self, record: LayerRecord) -> None:
        """The record changed; a new first source is fetched from at once."""
        if record.sources != self.record.sources:
            self.reader.source = self._around.source(record, self.compressed_size)
        self.record = record

    def close(self) -> None:
        """Close the descriptors, when the last flight has ended. The node is not served any more."""
        self.reader.retire(self._close_files)

    def hand_over(self) -> int:
        """Close what only a lazy layer needs; the descriptor of data.tar stays open and is the caller's.

        Every span is here, so that nobody reads anything else, and a FUSE thread may be in pread at this moment.
        """
        self.reader.retire(self._hand_over)
        return self.files.fd

    def _hand_over(self) -> None:
        self.files.hand_over()
        os.close(self._windows_fd)

    def _close_files(self) -> None:
        self.files.close()
        os.close(self._windows_fd)


class WholeFile:
    """The flat file of a complete layer, for mounts that were made while it was lazy (serve.flatfiles.FlatFile)."""

    def __init__(self, fd: int, size: int, *, condemned: bool, reads: Reads) -> None:
        """`fd` is of data.tar, and closed by `close`; `size` is what mounts know, in bytes."""
        self.size = size
        self.condemned = condemned
        self._fd = fd
        self._reads = reads

    def read(self, unique: int, offset: int, size: int) -> bytes:
        """The bytes, at once; EIO from a condemned layer."""
        del unique
        started = time.monotonic_ns()
        if self.condemned:
            self._reads.refused()
            raise OSError(errno.EIO, "the layer is not what its image says")
        try:
            data = os.pread(self._fd, size, offset)
        except OSError:
            self._reads.refused()
            raise
        self._reads.answered(time.monotonic_ns() - started, size)
        return data

    def close(self) -> None:
        """Close the descriptor. FUSE has released the node."""
        os.close(self._fd)


class Layer:
    """The directory of one (layer, ztoc), its record, and what is open of it. Changed in the layer's turn only."""

    def __init__(self, directory: Path, record: LayerRecord) -> None:
        self.directory = directory
        self.record = record
        self.key = LayerKey(parse(record.layer_digest), parse(record.ztoc_digest))
        self.lazy: OpenLayer | None = None
        self.whole: WholeFile | None = None

    @property
    def data(self) -> Path:
        """data.tar."""
        return self.directory / "data.tar"

    def save(self, record: LayerRecord) -> None:
        """Make `record` the layer's, durably."""
        if record == self.record:
            return
        write_record(self.directory, record)
        self.record = record
        if self.lazy is not None:
            self.lazy.renew(record)

    def save_if_possible(self, record: LayerRecord) -> None:
        """The same for a record of less than before: letting go must work on a full disk, and the next start finds out
        by itself what is not there any more.
        """
        try:
            self.save(record)
        except OSError as error:
            _log.warning("cannot write layer.json", extra={"layer": str(self.key), "error": str(error)})
            self.record = record

    def intact(self) -> bool:
        """Whether a complete layer's data.tar is the file that was hashed."""
        try:
            return self.stamp() == self.record.stamp
        except FileNotFoundError:
            return False

    def stamp(self) -> Stamp:
        """What data.tar looks like now."""
        return stamp_of(os.lstat(self.data))

    def flush(self) -> None:
        """Wait until data.tar is on the disk, its times, too. Raises OSError."""
        fd = os.open(self.data, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close what is open."""
        if self.lazy is not None:
            self.lazy.close()
        if self.whole is not None:
            self.whole.close()
        self.lazy = self.whole = None

    def forget_bytes(self) -> None:
        """Make the layer lazy and empty. Nothing of it is open here; a file that mounts hold, or that other layers
        share, lives on, and such mounts are not handed out any more.

        First what says that bytes are here goes, durably, then the bytes.
        """
        record = self.record.all_superseded()
        self.save(
            msgspec.structs.replace(record, diff_id="", tar_size=0, stamp=None, condemned=False, boot="")
        )
        self.remove_marks()
        sync_directory(self.directory)
        self.data.unlink(missing_ok=True)

    def remove_marks(self) -> None:
        """Remove what says which spans are here: of a complete layer all are."""
        for name in ("spans.durable", "spans.live", "spans.closed"):
            (self.directory / name).unlink(missing_ok=True)

    def delete(self) -> None:
        """Close, and remove the directory (and the layer's own when it was the last ztoc of it)."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            self.directory.parent.rmdir()
        except OSError:  # another ztoc of the same layer lives there
            pass

    def allocated(self) -> tuple[int, int]:
        """Bytes allocated on disk and inodes: the tar's blocks, the EROFS images and the small files.

        A data.tar that several directories share counts for each of them in part.
        """
        total = inodes = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # a temporary file
                    continue
                total += status.st_blocks * 512 // max(status.st_nlink, 1)
                inodes += 1
        return total, inodes


def _read_ztoc(fd: int, record: LayerRecord) -> tuple[SpanTable, int, Contents]:
    """The span table, the blob's size, and where the table of contents is.

    Windows and entries are not read: only the pages that hold checkpoint heads are touched.
    """
    if os.fstat(fd).st_size == 0:
        raise Integrity(f"layer {record.layer_digest}: its ztoc {record.ztoc_digest} is an empty file")
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
        data = memoryview(view)
        table = ztoc.decode_spans(data)
        try:
            if data_size(table.uncompressed_size) != record.data_size:
                raise Integrity(
                    f"layer {record.layer_digest}: its record and its ztoc differ about the tar's size"
                )
            return span_table(table), table.compressed_size, ztoc.locate_contents(data)
        finally:
            if isinstance(table.checkpoints, memoryview):
                table.checkpoints.release()
            data.release()
