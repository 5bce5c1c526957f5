"""From the compressed bytes of a run of spans, as they stream in, to verified bytes in data.tar."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.zinfo import WINDOW, SpanTable
from soci_snapshotter.linux.inflate import decode_span
from soci_snapshotter.store.layerfiles import SpanFile

MAX_SPAN_COMPRESSED = 64 << 20
MAX_SPAN_UNCOMPRESSED = 256 << 20
"""Bytes a span may take in memory while it is checked, times the flights under way. Spans are 4 MiB unless an index
says otherwise, plus what one deflate block adds; a layer with larger ones is unpacked as a whole."""


def check_sizes(spans: SpanTable) -> None:
    """Raise Unsupported, naming the span, when one is too large to be held while it is verified."""
    for span in range(len(spans)):
        start, end = spans.compressed_range(span)
        begin, stop = spans.uncompressed_range(span)
        if end - start > MAX_SPAN_COMPRESSED or stop - begin > MAX_SPAN_UNCOMPRESSED:
            raise Unsupported(
                f"span {span} has {end - start} bytes ({stop - begin} uncompressed), more than "
                f"{MAX_SPAN_COMPRESSED} ({MAX_SPAN_UNCOMPRESSED}); build the index with a smaller --span-size"
            )


class SpanIntake:
    """Takes the bytes of spans first..last in order; each span that is whole is checked, inflated, written, told."""

    def __init__(
        self,
        spans: SpanTable,
        files: SpanFile,
        windows_fd: int,
        first: int,
        last: int,
        landed: Callable[[int], None],
    ) -> None:
        self.span = first
        """The span being received; last + 1 at the end. On Integrity: the one at fault."""
        self._spans = spans
        self._files = files
        self._windows_fd = windows_fd
        self._last = last
        self._landed = landed
        self._buffer = bytearray()  # begins where the current span does
        self._start, self._end = spans.compressed_range(first)

    @property
    def byte_range(self) -> tuple[int, int]:
        """What to fetch of the blob for the spans still missing, end exclusive."""
        return self._start, self._spans.compressed_range(self._last)[1]

    def feed(self, chunk: memoryview) -> None:
        """Take the next bytes. Raises Integrity for a span that is not what its digest says, OSError from the disk."""
        self._buffer += chunk
        while self.span <= self._last and len(self._buffer) >= self._end - self._start:
            self._take()

    def finish(self) -> None:
        """Raise Integrity when the bytes ended early."""
        if self.span <= self._last:
            raise Integrity(f"span {self.span}: {len(self._buffer)} of {self._end - self._start} bytes came")

    def _take(self) -> None:
        with memoryview(self._buffer) as view:
            self._store(view[: self._end - self._start])
        self._landed(self.span)
        self.span += 1
        if self.span <= self._last:
            start, end = self._spans.compressed_range(self.span)
            del self._buffer[: start - self._start]  # a shared byte stays
            self._start, self._end = start, end

    def _store(self, fetched: memoryview) -> None:
        spans, span = self._spans, self.span
        start, end = spans.digest_range(span)
        found = hashlib.sha256(fetched[start - self._start : end - self._start]).hexdigest()
        if f"sha256:{found}" != spans.digest(span):
            raise Integrity(f"span {span}: its bytes have digest sha256:{found}, not {spans.digest(span)}")
        position = spans.window_position(span)
        window = None if position is None else os.pread(self._windows_fd, WINDOW, position)
        if window is not None and len(window) != WINDOW:
            raise Integrity(f"span {span}: the ztoc file ends inside its window")
        data = memoryview(decode_span(spans, span, fetched, window))
        # The last span goes on behind the tar's end blocks, to the end of the stream: that belongs to the DiffID.
        self._files.write(span, spans.uncompressed_range(span)[0], data)
