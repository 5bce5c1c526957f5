"""One open lazy layer: its files, its spans, its reader, its mounts."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.digest import Digest, parse
from soci_snapshotter.formats.zinfo import SpanTable, span_table
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.layers.pool import FlightPool
from soci_snapshotter.layers.reader import LayerReader, RangeSource, ReadOptions, Replies
from soci_snapshotter.layers.spandecode import check_sizes
from soci_snapshotter.store.layerfiles import LayerRecord, SpanFile, write_record


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


class OpenLayer:
    """Files and reader of one (layer, ztoc). Close it when no FUSE handle is left."""

    def __init__(self, directory: Path, record: LayerRecord, ztoc_path: Path, around: Surroundings) -> None:
        """Open from disk. Raises Integrity or Unsupported for a ztoc that cannot be served, OSError from the disk."""
        self.directory = directory
        self.record = record
        self.key = LayerKey(parse(record.layer_digest), parse(record.ztoc_digest))
        self._around = around
        self._windows_fd = os.open(ztoc_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.spans, self.compressed_size = _read_spans(self._windows_fd, record)
            check_sizes(self.spans)
            self.files = SpanFile(directory, len(self.spans), record.data_size, around.boot)
        except BaseException:
            os.close(self._windows_fd)
            raise
        self.reader = LayerReader(
            name=record.layer_digest,
            spans=self.spans,
            files=self.files,
            windows_fd=self._windows_fd,
            source=around.source(record, self.compressed_size),
            replies=around.replies,
            pool=around.pool,
            options=around.options,
        )

    def save(self, record: LayerRecord) -> None:
        """Make `record` the layer's, durably; a new first source is fetched from at once."""
        if record == self.record:
            return
        write_record(self.directory, record)
        if record.sources != self.record.sources:
            self.reader.source = self._around.source(record, self.compressed_size)
        self.record = record

    def close(self) -> None:
        """Close the descriptors, when the last flight has ended. The node is not served any more."""
        self.reader.retire(self._close_files)

    def _close_files(self) -> None:
        self.files.close()
        os.close(self._windows_fd)

    def delete(self) -> None:
        """Close, and remove the directory (and the layer's own when it was the last ztoc of it)."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)
        try:
            self.directory.parent.rmdir()
        except OSError:  # another ztoc of the same layer lives there
            pass

    def allocated(self) -> int:
        """Bytes on disk: the tar's blocks and the EROFS images."""
        total = 0
        with os.scandir(self.directory) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_blocks * 512
        return total


def _read_spans(fd: int, record: LayerRecord) -> tuple[SpanTable, int]:
    """The span table, without reading the windows: only the pages that hold checkpoint heads are touched."""
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
            return span_table(table), table.compressed_size
        finally:
            if isinstance(table.checkpoints, memoryview):
                table.checkpoints.release()
            data.release()
