"""Reads of one lazy layer: answered at once from data.tar, or parked on the flights of the spans they miss.

    FUSE thread   read(): all spans marked -> pread, answer.  Else: park the request on its missing spans, submit
                  flights for those that nobody brings soon, return None. It never waits.
    flight        brings spans and answers who waits (layers.flights)

There is one flight per span however many readers. What is likely to be read next is fetched as well (policy.readahead).
After a failed flight the next read starts afresh.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.prefetch import SpanRange, normalize
from soci_snapshotter.formats.zinfo import SpanTable
from soci_snapshotter.layers.checking import HeaderCheck
from soci_snapshotter.layers.flight import Flight, Hold
from soci_snapshotter.layers.flights import Flights, RangeSource
from soci_snapshotter.layers.parking import Parked, Parking, Replies
from soci_snapshotter.layers.pool import FlightPool, Priority
from soci_snapshotter.policy import readahead
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.policy.readahead import ReadAhead
from soci_snapshotter.store.layerfiles import SpanFile

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the configuration says about fetching."""

    flight_seconds: float = 300.0
    """A flight's whole life, queue included ([blob] fetching_timeout_sec); then its readers get EIO."""
    ahead: bool = True
    """Whether what is likely to be read next is fetched before it is."""
    verify: bool = True
    """Whether tar headers are held against the table of contents; spans are held against their digests always."""


class LayerReader:
    """The flat file of one layer. Thread safe."""

    def __init__(
        self,
        *,
        name: str,
        spans: SpanTable,
        files: SpanFile,
        windows_fd: int,
        source: RangeSource,
        replies: Replies,
        pool: FlightPool,
        options: ReadOptions,
        headers: HeaderCheck | None = None,
        on_complete: Callable[[], None] | None = None,
        on_lie: Callable[[str], None] | None = None,
        counters: LayerCounters | None = None,
    ) -> None:
        """`name` is for the log (layer digest); `windows_fd` is the ztoc file, whose windows are pread when needed.

        `on_complete` is called, on a flight's thread with the files open, when the last missing span has landed: once,
        and once more each time that marks were taken back (`files.epoch` rose) and all have come again. It must be
        quick. Whoever opens a layer that has all its spans already is not told.

        `headers` checks tar headers as spans arrive. `on_lie` is called once, likewise, with what it found wrong: every
        read has failed since, and does for as long as this object lives.
        """
        counters = LayerCounters() if counters is None else counters
        self.name = name
        self.size = files.data_size
        self._spans = spans
        self._files = files
        self._fd = files.fd
        self._pool = pool
        self._reads = counters.reads
        self._parking = Parking(name, files.fd, replies, counters.reads)
        self._on_complete = on_complete
        self._told = -1  # the epoch that on_complete was called in
        self._whole = files.whole()  # the epoch in which every span was here
        self._end = spans.uncompressed_range(len(spans) - 1)[1] if len(spans) else 0
        self._flights = Flights(
            name=name,
            spans=spans,
            files=files,
            windows_fd=windows_fd,
            source=source,
            pool=pool,
            seconds=options.flight_seconds,
            parking=self._parking,
            headers=headers,
            counters=counters,
            on_landed=self._tell,
            on_lie=on_lie,
        )
        self.counts = counters.flights
        self._ahead = ReadAhead(
            len(spans),
            lambda span: spans.compressed_range(span)[1],
            most=readahead.WINDOW_MOST if options.ahead else 0,
        )
        self._watched = self._ahead.watched
        self.touched = time.monotonic()
        """When somebody last had to wait, or the layer was opened (time.monotonic())."""

    @property
    def source(self) -> RangeSource:
        """Where bytes come from; may be replaced at any time."""
        return self._flights.source

    @source.setter
    def source(self, source: RangeSource) -> None:
        self._flights.source = source

    @property
    def flying(self) -> int:
        """How many flights are queued or under way."""
        return self._flights.flying

    def read(self, unique: int, offset: int, size: int) -> Buffer | None:
        """The bytes, or None when the request was parked; then `replies` hears of `unique` later. Never blocks."""
        started = time.monotonic_ns()
        if self._flights.lie:
            self._reads.refused()
            raise OSError(errno.EIO, self._flights.lie)
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        epoch = self._files.epoch
        if self._whole == epoch and offset < self._end:  # looking spans up takes as long as reading them
            data = self._steady(epoch, offset, size)
            if data is not None:
                self._reads.answered(time.monotonic_ns() - started, size)
                return data
        wanted = self._spans.spans_for(offset, size)
        if not wanted:
            return bytes(size)  # between the tar's end and its block's: no span, zeros
        data = self._present(wanted, offset, size)
        if data is not None:
            if wanted[0] in self._watched or wanted[-1] in self._watched:
                self._run_ahead(wanted, missed=False)
            self._reads.answered(time.monotonic_ns() - started, size)
            return data
        fresh = self._park(unique, offset, size, wanted)
        if fresh is None:
            data = os.pread(self._fd, size, offset)
            self._reads.answered(time.monotonic_ns() - started, size)
            return data
        self._flights.submit(fresh)
        self._run_ahead(wanted, missed=True)
        return None

    def _present(self, wanted: range, offset: int, size: int) -> bytes | None:
        epoch = self._files.epoch
        if not self._files.has(wanted.start, wanted.stop - 1):
            return None
        return self._steady(epoch, offset, size)

    def _steady(self, epoch: int, offset: int, size: int) -> bytes | None:
        """The bytes, which were here in `epoch`, unless that is over."""
        try:
            data = os.pread(self._fd, size, offset)
        except OSError:
            self._reads.refused()
            raise
        # A failed write-back in between: the pages may be gone.
        return data if self._files.epoch == epoch else None

    def retire(self, then: Callable[[], None]) -> None:
        """Start no more flights; call `then` (which closes the files) when none is left: now, or behind the last.

        A descriptor closed under a flight might be another file's by the time it is written to.
        """
        self._flights.retire(then)

    def warm(self) -> None:
        """Have connections to the registry opened, before somebody waits for them."""
        self._pool.submit(Priority.GUESS, self.source.warm, self.source.group)

    def fetch_ahead(self, spans: Iterable[int], priority: Priority = Priority.AHEAD) -> None:
        """Start flights, in the order given, for those of `spans` that are neither here nor on their way."""
        with self._flights.lock:
            flights = self._flights.claim(spans, priority)
        self._flights.submit(flights)

    def fetch_listed(self, ranges: Iterable[SpanRange]) -> None:
        """Start flights for the spans of a prefetch artifact, the lowest priority first.

        Raises Integrity for a span that the layer does not have; then none is started.
        """
        wanted = sorted(normalize(ranges), key=lambda item: (item.priority, item.start))
        count = len(self._spans)
        for item in wanted:
            if item.end >= count:
                raise Integrity(f"span {item.end} of a layer that has {count}")
        self.fetch_ahead(
            (span for item in wanted for span in range(item.start, item.end + 1)), Priority.LISTED
        )

    def missing(self) -> int:
        """Compressed bytes of the spans that are not here; 0 when the layer is dropped."""
        return self._flights.missing()

    def fetch_background(self, limit: int, hold: Hold) -> int:
        """See `Flights.fetch_background`."""
        return self._flights.fetch_background(limit, hold)

    def _run_ahead(self, wanted: range, *, missed: bool) -> None:
        with self._flights.lock:
            ahead = self._ahead.read(wanted[0], wanted[-1], missed=missed)
        if ahead.spans:
            self.fetch_ahead(ahead.spans, Priority.AHEAD if ahead.sure else Priority.GUESS)

    def _park(self, unique: int, offset: int, size: int, wanted: range) -> list[Flight] | None:
        """Park on the missing spans; flights for those that nobody brings soon. None: everything arrived meanwhile."""
        live, flights = self._files.live, self._flights
        self.touched = time.monotonic()
        with flights.lock:
            if flights.lie:
                self._reads.refused()
                raise OSError(errno.EIO, flights.lie)
            missing = [span for span in wanted if not live[span]]
            if not missing:
                return None
            self._parking.park(Parked(unique, offset, size), missing)
            self.counts.parked += 1
            return flights.claim(missing, Priority.DEMAND)

    def _tell(self) -> None:
        """Call on_complete if nothing is missing any more."""
        epoch = self._files.whole()
        if epoch < 0:
            return
        self._whole = epoch
        if self._on_complete is None:
            return
        with self._flights.lock:
            if self._told == epoch:
                return
            self._told = epoch
        try:
            self._on_complete()
        except Exception:
            _log.exception("completing a layer failed", extra={"layer": self.name})
