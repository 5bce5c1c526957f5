"""Tar headers against the table of contents, as the spans they are in arrive.

A span's thread comes here with its bytes before it writes and marks them. Header regions that lie inside the span are
checked at once. One that crosses into other spans is checked by whoever brings the last of them: the others are read
back from data.tar, or, if they too are only now being written, shared. So when all spans of a region are marked it was
checked, within this process and over restarts, and nothing is remembered per entry: the ztoc file is mapped for the
moment of a check, and searched.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import NamedTuple

from soci_snapshotter.errors import Condemned
from soci_snapshotter.formats.tarcheck import after, compare, compare_end, read_headers, unlike
from soci_snapshotter.formats.toc import Outline
from soci_snapshotter.formats.tree import Clock
from soci_snapshotter.formats.zinfo import SpanTable
from soci_snapshotter.formats.ztoc import Contents, Entry
from soci_snapshotter.store.layerfiles import SpanFile

_PIECE = (
    1 << 20
)  # a region read back at a time: nearly all take one or two blocks, hostile ones have no limit


class _Region(NamedTuple):
    """Bytes start..stop of the tar and the entry they must be the header of; None: the tar's end."""

    start: int
    stop: int
    entry: Entry | None


class _Piece(NamedTuple):
    """Bytes start..stop of the tar, in `span`: `data`, or None when they are in data.tar."""

    span: int
    start: int
    stop: int
    data: memoryview | None


class HeaderCheck:
    """Checks one layer. Thread safe; it holds no descriptor and no memory but that of spans being written."""

    def __init__(
        self, name: str, ztoc_fd: int, contents: Contents, spans: SpanTable, files: SpanFile
    ) -> None:
        """`name` begins messages; `ztoc_fd`, of the ztoc with these `contents`, and `files` stay the caller's."""
        self._name = name
        self._ztoc_fd = ztoc_fd
        self._spans = spans
        self._files = files
        self._lock = threading.Lock()
        self._arriving: dict[int, bytes] = {}
        self._contents = contents
        self._size = contents.uncompressed_size
        # A table may hide the last entries by a size that ends before them: what has no end blocks must be the end.
        self._unended = False
        starts = spans.uncompressed_range(len(spans) - 1)[0] if len(spans) else 0
        self._beyond = max(starts, files.tar_size) > self._size
        self.checked = 0
        """Headers compared so far, roughly (several writers, no lock)."""

    @contextmanager
    def arriving(self, span: int, data: bytes) -> Iterator[None]:
        """Check the headers of `span`, whose bytes are `data` (more than its range if it is the last: what follows the
        tar's end); the block writes and marks it. Raises Condemned naming the entry and the field, OSError.
        """
        begin, _ = self._spans.uncompressed_range(span)
        end = begin + len(data)
        crossing = self._check_inside(begin, end, data) if data else []
        if self._spans.is_last(span) and end > self._size:
            self._at_end(beyond=True)
        if not crossing:
            yield
            return
        with self._lock:
            self._arriving[span] = data
            ready = [(region, self._pieces(region)) for region in crossing]
        try:
            for region, pieces in ready:
                if pieces is not None:
                    self._compare_crossing(region, pieces)
                    self.checked += region.entry is not None
            yield
        finally:
            with self._lock:
                if self._arriving.get(span) is data:  # a span may arrive twice at once
                    del self._arriving[span]

    def _check_inside(self, begin: int, end: int, data: bytes) -> list[_Region]:
        """Check the regions that lie within begin..end, whose bytes are `data`; those that cross one of the two."""
        mapped = mmap.mmap(self._ztoc_fd, 0, prot=mmap.PROT_READ)
        try:
            return self._search(mapped, begin, end, data)
        finally:
            try:
                mapped.close()
            except BufferError:  # an exception's frames still look at it; it goes with them
                pass

    def _search(self, mapped: mmap.mmap, begin: int, end: int, data: bytes) -> list[_Region]:
        contents = self._contents
        reader = contents.reader(mapped)
        # Entries first..stop-1 have their region's end within; stop's may begin there.
        first, stop = contents.first_after(mapped, begin), contents.first_after(mapped, end)
        before = max(first - 1, 0)
        rows = contents.outlines(reader, before, min(stop + 1, contents.count))
        start = _after(rows.pop(0)) if first else 0
        crossing = []
        if first < stop and start < begin:
            crossing.append(_Region(start, rows[0].offset, contents.entries(reader, first, first + 1)[0]))
            start = _after(rows.pop(0))
            first += 1
        inside = rows[: stop - first]
        starts = list(accumulate(inside, lambda _, row: _after(row), initial=start))
        for one, past in _runs(unlike(inside, start, data, begin)):
            entries = contents.entries(reader, first + one, first + past)
            chunk = memoryview(data)[starts[one] - begin : entries[-1].offset - begin]
            self._compare(starts[one], entries, (chunk,))
        self.checked += len(inside)
        start = starts[-1]
        if stop < contents.count:
            if start < end:
                crossing.append(_Region(start, rows[-1].offset, contents.entries(reader, stop, stop + 1)[0]))
        elif begin <= start <= end and self._size <= end:
            self._compare(start, None, (memoryview(data)[start - begin :],))
        elif start < end and self._size > begin:
            crossing.append(_Region(start, self._size, None))
        return crossing

    def _compare(
        self, start: int, entries: Sequence[Entry] | None, chunks: Iterable[bytes | memoryview]
    ) -> None:
        """Raise Condemned when `chunks`, the tar from `start` on, are not the regions of `entries`, or the tar's end
        (None).
        """
        headers = read_headers(start, chunks)
        difference = compare_end(headers, 0) if entries is None else compare(entries, headers, Clock())
        if difference is not None:
            raise Condemned(f"{self._name}: {difference}")
        if entries is None and not headers.ended:
            self._at_end(unended=True)

    def _at_end(self, *, unended: bool = False, beyond: bool = False) -> None:
        """Note one of the two; both together are a tar that goes on where the table says that it ends."""
        self._unended |= unended
        self._beyond |= beyond
        if self._unended and self._beyond:
            raise Condemned(f"{self._name}: the tar goes on after {self._size} bytes, where the table ends")

    def _pieces(self, region: _Region) -> list[_Piece] | None:
        """Where a region's bytes are, in order; None when some are still to come. Under the lock, without I/O."""
        pieces = []
        for span in self._spans.spans_for(region.start, region.stop - region.start):
            begin, end = self._spans.uncompressed_range(span)
            start, stop = max(begin, region.start), min(end, region.stop)
            if start < stop:
                data = self._arriving.get(span)
                if data is not None:
                    pieces.append(_Piece(span, start, stop, memoryview(data)[start - begin : stop - begin]))
                elif self._files.live[span]:
                    pieces.append(_Piece(span, start, stop, None))
                else:
                    return None
        return pieces

    def _compare_crossing(self, region: _Region, pieces: list[_Piece]) -> None:
        epoch = self._files.epoch
        try:
            self._compare(region.start, None if region.entry is None else [region.entry], self._read(pieces))
        except Condemned as error:
            kept = all(self._files.live[piece.span] for piece in pieces if piece.data is None)
            if (
                self._files.epoch != epoch or not kept
            ):  # lost or evicted while it was read: no fault of the table
                raise OSError(errno.EIO, f"{self._name}: spans went while their headers were read") from error
            raise

    def _read(self, pieces: list[_Piece]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            if piece.data is not None:
                yield piece.data
                continue
            position = piece.start
            while position < piece.stop:
                chunk = os.pread(self._files.fd, min(piece.stop - position, _PIECE), position)
                if not chunk:
                    raise OSError(
                        errno.EIO, f"{self._name}: data.tar ends at {position}, inside span {piece.span}"
                    )
                yield chunk
                position += len(chunk)


def _after(row: Outline) -> int:
    """Where the region of the next entry begins."""
    return after(row.offset, row.size, has_data=row.type == b"reg")


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours together: first, and one past the last."""
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        yield members[0], members[-1] + 1
