"""From the compressed bytes of a run of spans, as they stream in, to verified bytes in data.tar."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import nullcontext

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.zinfo import WINDOW, SpanTable
from soci_snapshotter.layers.checking import HeaderCheck
from soci_snapshotter.linux.inflate import SpanDecoder
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
    """Takes the bytes of spans first..last in order, hashing and inflating as they come; each span that is whole and has
    its digest is written and told. What was inflated until then is bounded by the ztoc's sizes, and seen by nobody.
    """

    def __init__(
        self,
        spans: SpanTable,
        files: SpanFile,
        windows_fd: int,
        first: int,
        last: int,
        landed: Callable[[int], None],
        headers: HeaderCheck | None = None,
        verified: Callable[[int, int, Buffer], None] | None = None,
        unstored: Callable[[int, int, Buffer, OSError], None] | None = None,
    ) -> None:
        """`headers`: None when tar headers are not to be checked. `verified(span, offset, bytes)` is told before a span
        is written: nobody need wait for the disk. `unstored(span, offset, bytes, why)` is told instead of
        `landed` of a verified span that the disk does not take; it may raise to give up.
        """
        self.span = first
        """The span being received; last + 1 at the end. On Integrity: the one at fault."""
        self._spans = spans
        self._files = files
        self._windows_fd = windows_fd
        self._last = last
        self._landed = landed
        self._verified = verified
        self._unstored = unstored
        self._headers = headers
        self._start = spans.compressed_range(first)[0]
        self._begin(b"")

    @property
    def byte_range(self) -> tuple[int, int]:
        """What to fetch of the blob for the spans still missing, end exclusive."""
        return self._start, self._spans.compressed_range(self._last)[1]

    def feed(self, chunk: memoryview) -> None:
        """Take the next bytes. Raises Integrity for a span that is not what its digest says, Condemned for
        one whose tar headers are not what the table of contents says, OSError from the disk.
        """
        while len(chunk) and self.span <= self._last:
            count = min(len(chunk), self._size - self._held)
            self._put(chunk[:count])
            chunk = chunk[count:]
            while self.span <= self._last and self._held == self._size:
                self._take()

    def finish(self) -> None:
        """Raise Integrity when the bytes ended early."""
        if self.span <= self._last:
            raise Integrity(f"span {self.span}: {self._held} of {self._size} bytes came")

    def _begin(self, carried: Buffer) -> None:
        """Get ready for `span`, of whose bytes the one it shares with the span before may be here."""
        start, end = self._spans.compressed_range(self.span)
        self._start, self._size, self._held = start, end - start, 0
        self._undigested = self._spans.digest_range(self.span)[0] - start
        self._hash = hashlib.sha256()
        self._wrong: Integrity | None = None
        self._decoder = None
        if not self._files.live[self.span]:  # another flight may have been faster
            self._decoder = SpanDecoder(self._spans, self.span, self._window())
        self._put(carried)

    def _window(self) -> bytes | None:
        position = self._spans.window_position(self.span)
        window = None if position is None else os.pread(self._windows_fd, WINDOW, position)
        if window is not None and len(window) != WINDOW:
            raise Integrity(f"span {self.span}: the ztoc file ends inside its window")
        return window

    def _put(self, piece: Buffer) -> None:
        """Hash and inflate a piece as it comes: a reader waits for what is left to do when the last one is here."""
        view = memoryview(piece)
        skip = max(self._undigested - self._held, 0)
        self._held += len(view)
        self._hash.update(view[skip:] if skip else view)
        self._final = view[-1:].tobytes()
        if self._decoder is not None and self._wrong is None:
            try:
                self._decoder.feed(view)
            except Integrity as error:  # told when the digest is right; else that is what is wrong
                self._wrong = error

    def _take(self) -> None:
        if self._decoder is not None and not self._files.live[self.span]:
            self._store(self._decoder)
        end, final = self._start + self._size, self._final
        self.span += 1
        if self.span <= self._last:
            self._begin(final if self._spans.compressed_range(self.span)[0] < end else b"")

    def _store(self, decoder: SpanDecoder) -> None:
        spans, span = self._spans, self.span
        found = self._hash.hexdigest()
        if f"sha256:{found}" != spans.digest(span):
            raise Integrity(f"span {span}: its bytes have digest sha256:{found}, not {spans.digest(span)}")
        if self._wrong is not None:
            raise self._wrong
        data = decoder.finish()
        # The last span goes on behind the tar's end blocks, to the end of the stream: that belongs to the DiffID.
        with self._headers.arriving(span, data) if self._headers else nullcontext():
            if self._verified is not None:
                self._verified(span, spans.uncompressed_range(span)[0], data)
            refusal = self._write(spans.uncompressed_range(span)[0], memoryview(data))
        if refusal is None:
            self._landed(span)
        elif self._unstored is None:
            raise refusal
        else:
            self._unstored(span, spans.uncompressed_range(span)[0], data, refusal)

    def _write(self, offset: int, data: memoryview) -> OSError | None:
        """Put the span's bytes into data.tar and mark it; why the disk did not take them."""
        try:
            self._files.write(self.span, offset, data)
        except OSError as error:
            return error
        return None
