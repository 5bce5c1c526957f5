"""Reads of one lazy layer: answered at once from data.tar, or parked on the flights of the spans they miss.

    FUSE thread   read(): all spans marked -> pread, answer.  Else: park the request on its missing spans, submit
                  flights for those that nobody brings soon, return None. It never waits.
    flight        GET the run's range -> per span: sha256, inflate, pwrite, mark -> answer those who waited for the
                  last of their spans. On failure: EIO to everybody who waited for a span that did not come.

There is one flight per span however many readers. A span may be overtaken: by a DEMAND flight when it is still far
back in a background one, or queued. Then it belongs to the later flight, whichever brings it first lands it, and the
other passes it by. Only a DEMAND flight answers EIO; readers who joined another kind get a DEMAND flight when that
fails. After a failed flight the next read starts afresh.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from soci_snapshotter.errors import Condemned, Integrity, SociError
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.prefetch import SpanRange, normalize
from soci_snapshotter.formats.zinfo import SpanTable
from soci_snapshotter.layers.checking import HeaderCheck
from soci_snapshotter.layers.flight import Flight, Hold
from soci_snapshotter.layers.pool import FlightPool, Priority
from soci_snapshotter.layers.spandecode import SpanIntake
from soci_snapshotter.policy import readahead
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.policy.readahead import ReadAhead
from soci_snapshotter.policy.runs import MAX_RUN_BYTES, Run, join
from soci_snapshotter.store.layerfiles import SpanFile

_log = logging.getLogger(__name__)

GUESS_SECONDS = 2.0  # a program that starts is elsewhere by then
SPAN_RETRIES = 1  # a digest mismatch may be a bad proxy or a torn answer; twice the same is the blob


class RangeSource(Protocol):
    """Where compressed bytes come from (registry.ranges.BlobReader)."""

    @property
    def group(self) -> Hashable:
        """Equal for sources that fail together: the registry."""

    def read_range(self, start: int, end: int, sink: Callable[[memoryview], None], deadline: float) -> None:
        """Feed bytes [start, end) of the blob to `sink` in order, or raise Remote; `deadline` is time.monotonic()."""

    def warm(self) -> None:
        """Have connections ready. Does not raise."""


class Replies(Protocol):
    """Who answers the kernel (serve.flatfiles.FuseServer)."""

    def reply(self, unique: int, data: Buffer) -> None: ...
    def reply_error(self, unique: int, code: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the configuration says about fetching."""

    flight_seconds: float = 300.0
    """A flight's whole life, queue included ([blob] fetching_timeout_sec); then its readers get EIO."""
    ahead: bool = True
    """Whether what is likely to be read next is fetched before it is."""
    verify: bool = True
    """Whether tar headers are held against the table of contents; spans are held against their digests always."""


class _Parked:
    """One FUSE request and how many of its spans are still missing."""

    __slots__ = ("kept", "missing", "offset", "size", "started", "unique")

    def __init__(self, unique: int, offset: int, size: int, missing: int) -> None:
        self.started = time.monotonic_ns()
        self.unique = unique
        self.offset = offset
        self.size = size
        self.missing = missing
        self.kept: list[tuple[int, bytes]] = []  # what the disk did not take: position in the request, bytes

    def keep(self, begin: int, data: memoryview) -> None:
        """Take what the request wants of verified bytes at offset `begin` of the tar."""
        start, stop = max(begin, self.offset), min(begin + len(data), self.offset + self.size)
        if start < stop:
            self.kept.append((start - self.offset, bytes(data[start - begin : stop - begin])))

    def gather(self, fd: int) -> Buffer:
        """The request's bytes: from data.tar, but for those that were kept."""
        if not self.kept:
            return os.pread(fd, self.size, self.offset)
        data = bytearray(os.pread(fd, self.size, self.offset))
        data.extend(bytes(self.size - len(data)))
        for position, piece in self.kept:
            data[position : position + len(piece)] = piece
        return data


class _Dropped(OSError):
    """The layer goes, or the daemon stops: the flight is not wanted any more."""


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
        self.name = name
        self.size = files.data_size
        self.source = source
        self._spans = spans
        self._files = files
        self._fd = files.fd
        self._windows_fd = windows_fd
        self._replies = replies
        self._pool = pool
        self._options = options
        self._headers = headers
        self._on_complete = on_complete
        self._on_lie = on_lie
        self._lie = ""
        self._told = -1  # the epoch that on_complete was called in
        self._lock = threading.Lock()
        self._flights = 0
        self._retired: Callable[[], None] | None = None
        self._owners: dict[int, Flight] = {}  # span -> the flight that is to bring it
        self._waiting: dict[int, list[_Parked]] = {}  # span -> who waits for it; each has an owner
        self._ahead = ReadAhead(
            len(spans),
            lambda span: spans.compressed_range(span)[1],
            most=readahead.WINDOW_MOST if options.ahead else 0,
        )
        self._watched = self._ahead.watched
        counters = LayerCounters() if counters is None else counters
        self.counts, self._reads = counters.flights, counters.reads
        self._full = counters.count("disk_full")
        self._no_room = False  # whether the last span that came was not kept
        self.touched = time.monotonic()
        """When somebody last had to wait, or the layer was opened (time.monotonic())."""

    def read(self, unique: int, offset: int, size: int) -> Buffer | None:
        """The bytes, or None when the request was parked; then `replies` hears of `unique` later. Never blocks."""
        started = time.monotonic_ns()
        if self._lie:
            self._reads.refused()
            raise OSError(errno.EIO, self._lie)
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
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
        self._submit(fresh)
        self._run_ahead(wanted, missed=True)
        return None

    def _present(self, wanted: range, offset: int, size: int) -> bytes | None:
        epoch = self._files.epoch
        if not self._files.has(wanted.start, wanted.stop - 1):
            return None
        data = os.pread(self._fd, size, offset)
        return (
            data if self._files.epoch == epoch else None
        )  # a failed write-back in between: the pages may be gone

    @property
    def flying(self) -> int:
        """How many flights are queued or under way."""
        return self._flights

    def retire(self, then: Callable[[], None]) -> None:
        """Start no more flights; call `then` (which closes the files) when none is left: now, or behind the last.

        A descriptor closed under a flight might be another file's by the time it is written to.
        """
        with self._lock:
            self._retired = then
            if self._flights:
                return
        then()

    def warm(self) -> None:
        """Have connections to the registry opened, before somebody waits for them."""
        self._pool.submit(Priority.GUESS, self.source.warm, self.source.group)

    def fetch_ahead(self, spans: Iterable[int], priority: Priority = Priority.AHEAD) -> None:
        """Start flights, in the order given, for those of `spans` that are neither here nor on their way."""
        with self._lock:
            missing = [span for span in spans if not self._files.live[span] and self._free(span, priority)]
            flights = self._own(missing, priority)
        self._submit(flights)

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

    def _free(self, span: int, priority: Priority) -> bool:
        """Whether a flight of `priority` may take `span`. Under the lock."""
        owner = self._owners.get(span)
        if owner is None:
            return True
        return owner.priority > priority and not owner.brings_soon(self._spans.compressed_range(span)[1])

    def missing(self) -> int:
        """Compressed bytes of the spans that are not here; 0 when the layer is dropped."""
        if self._retired is not None or self._files.live.find(0) < 0:
            return 0
        ranges = (
            self._spans.compressed_range(span) for span, here in enumerate(self._files.live) if not here
        )
        return sum(end - start for start, end in ranges)

    def fetch_background(self, limit: int, hold: Hold) -> int:
        """Fetch the next spans that nobody brings, up to `limit` compressed bytes or one span, on this thread.

        `hold` is called after each piece, and may wait or raise. Returns how many bytes were asked for, 0 when nothing
        is left to do. Raises what went wrong: readers who joined are served by a flight of their own then.
        """
        with self._lock:
            run = None if self._retired is not None else self._next_run(limit)
            if run is None:
                return 0
            flight = Flight(run, Priority.BACKGROUND)
            self._owners.update(dict.fromkeys(range(run.first, run.last + 1), flight))
            self._flights += 1
        error = self._flight(flight, time.monotonic() + self._options.flight_seconds, hold)
        if error is not None:
            raise error
        return self._spans.compressed_range(run.last)[1] - self._spans.compressed_range(run.first)[0]

    def _next_run(self, limit: int) -> Run | None:
        live, owners = self._files.live, self._owners
        first = live.find(0)
        while first >= 0 and first in owners:
            first = live.find(0, first + 1)
        if first < 0:
            return None
        last, start = first, self._spans.compressed_range(first)[0]
        while (
            last + 1 < len(self._spans)
            and not live[last + 1]
            and last + 1 not in owners
            and self._spans.compressed_range(last + 1)[1] - start <= limit
        ):
            last += 1
        return Run(first, last)

    def _run_ahead(self, wanted: range, *, missed: bool) -> None:
        with self._lock:
            ahead = self._ahead.read(wanted[0], wanted[-1], missed=missed)
        if ahead.spans:
            self.fetch_ahead(ahead.spans, Priority.AHEAD if ahead.sure else Priority.GUESS)

    def _park(self, unique: int, offset: int, size: int, wanted: range) -> list[Flight] | None:
        """Park on the missing spans; flights for those that nobody brings soon. None: everything arrived meanwhile."""
        live = self._files.live
        self.touched = time.monotonic()
        with self._lock:
            if self._lie:
                self._reads.refused()
                raise OSError(errno.EIO, self._lie)
            missing = [span for span in wanted if not live[span]]
            if not missing:
                return None
            parked = _Parked(unique, offset, size, len(missing))
            fresh = []
            for span in missing:
                self._waiting.setdefault(span, []).append(parked)
                if self._free(span, Priority.DEMAND):
                    fresh.append(span)
            self.counts.parked += 1
            return self._own(fresh, Priority.DEMAND)

    def _own(self, spans: list[int], priority: Priority) -> list[Flight]:
        """Flights for `spans`, which are theirs from now on. Under the lock."""
        flights = []
        for run in self._runs(spans):
            flight = Flight(run, priority)
            flights.append(flight)
            for span in range(run.first, run.last + 1):
                self._owners[span] = flight
        return flights

    def _runs(self, spans: Iterable[int]) -> list[Run]:
        spans, sizes = list(spans), []
        for span in spans:
            start, end = self._spans.compressed_range(span)
            sizes.append(end - start)
        return join(spans, sizes, MAX_RUN_BYTES)

    def _submit(self, flights: list[Flight]) -> None:
        with self._lock:
            retired = self._retired is not None
            if not retired:
                self._flights += len(flights)
        if retired:
            for flight in flights:
                self._failed(
                    flight, range(flight.first, flight.last + 1), _Dropped(errno.EIO, "the layer was dropped")
                )
            return
        deadline = time.monotonic() + self._options.flight_seconds
        group = self.source.group
        for flight in flights:
            self._pool.submit(
                flight.priority,
                partial(self._flight, flight, deadline),
                group,
                dropped=partial(self._ended, flight),
            )

    def _flight(self, flight: Flight, deadline: float, hold: Hold | None = None) -> BaseException | None:
        """Bring what is still `flight`'s. Returns what went wrong."""
        error: BaseException | None = None
        try:
            with self._lock:
                flight.started = True
                self.counts.flights[flight.priority] += 1
                mine = [
                    span
                    for span in range(flight.first, flight.last + 1)
                    if self._owners.get(span) is flight and not self._files.live[span]
                ]
                stale = flight.priority is Priority.GUESS and time.monotonic() > flight.born + GUESS_SECONDS
                if stale or self._retired is not None:
                    mine = [span for span in mine if span in self._waiting]
            for run in self._runs(mine):
                error = self._fly(flight, run, deadline, hold) or error
        finally:
            self._ended(flight)
        return error

    def _ended(self, flight: Flight) -> None:
        """`flight` is over, or was never begun because the daemon stops."""
        with self._lock:
            self.counts.bytes[flight.priority] += flight.fetched
            for span in range(flight.first, flight.last + 1):
                if self._owners.get(span) is flight and span not in self._waiting:
                    del self._owners[span]
            self._flights -= 1
            then = self._retired if self._flights == 0 else None
        if then is not None:
            then()

    def _fly(self, flight: Flight, run: Run, deadline: float, hold: Hold | None) -> BaseException | None:
        """Fetch a run; whatever happens, everybody who waits for one of its spans is answered, now or later."""
        span, retries = run.first, 0
        failure: BaseException | None = None
        while span <= run.last:
            landed = partial(self._landed, flight)
            intake = SpanIntake(
                self._spans,
                self._files,
                self._windows_fd,
                span,
                run.last,
                landed,
                self._headers,
                unstored=partial(self._unstored, flight),
            )
            flight.at, flight.received = span, intake.byte_range[0]
            try:
                if time.monotonic() >= deadline:
                    raise TimeoutError("the flight's time was over before it started")
                sink = partial(self._take, flight, intake, hold)
                self.source.read_range(*intake.byte_range, sink, deadline)
                intake.finish()
                return failure
            except Condemned as error:
                self._condemn(str(error))
                return error
            except Integrity as error:
                span, retries = intake.span, retries + 1 if intake.span == span else 1
                if retries > SPAN_RETRIES:
                    self._failed(flight, [span], error)
                    span, retries, failure = span + 1, 0, error
            except (SociError, OSError) as error:
                self._failed(flight, range(intake.span, run.last + 1), error)
                return error
            except Exception as error:  # a bug here must not leave a reader waiting for ever
                _log.exception("flight failed", extra={"layer": self.name, "span": intake.span})
                self._failed(flight, range(intake.span, run.last + 1), error)
                return error
        return failure

    def _take(self, flight: Flight, intake: SpanIntake, hold: Hold | None, piece: memoryview) -> None:
        """The sink of a flight: runs once for each piece."""
        if (self._retired is not None and not self._waiting) or self._lie:
            raise _Dropped(errno.EIO, "the layer was dropped")
        flight.received += len(piece)
        if flight.priority < Priority.GUESS:
            self._pool.moved()
        flight.fetched += len(piece)
        intake.feed(piece)
        flight.at = intake.span
        if hold is not None:
            hold(partial(self._hold, flight))
            flight.held = False

    def _hold(self, flight: Flight) -> bool:
        """Whether `flight` may be held up: nobody waits for it. As long as it is, nobody joins it."""
        with self._lock:
            flight.held = not any(
                span in self._waiting and self._owners.get(span) is flight
                for span in range(flight.at, flight.last + 1)
            )
            return flight.held

    def _landed(self, flight: Flight, span: int) -> None:
        """`span` is marked: answer those who waited for nothing else."""
        self._no_room = False
        self._arrived(flight, span)
        self._tell()

    def _unstored(self, flight: Flight, span: int, begin: int, data: Buffer, why: OSError) -> None:
        """The disk does not take `span`, whose verified bytes are `data`: those who wait get them from here, and the next
        reader fetches them again. Raises `why` when nobody waits.
        """
        if not self._no_room:
            self._no_room = True
            self._full.add()
            _log.error(
                "the disk takes no spans: they are served without being kept until it does",
                extra={"layer": self.name, "error": str(why)},
            )
        if not self._arrived(flight, span, (begin, memoryview(data))):
            raise why

    def _arrived(self, flight: Flight, span: int, unkept: tuple[int, memoryview] | None = None) -> bool:
        """Answer those who waited for nothing else; False, and nothing done, if `unkept` is given and nobody waits."""
        with self._lock:
            if unkept is not None and span not in self._waiting:
                return False
            self.counts.spans[flight.priority] += 1
            ready = []
            self._owners.pop(span, None)
            for parked in self._waiting.pop(span, ()):
                if unkept is not None:
                    parked.keep(*unkept)
                parked.missing -= 1
                if parked.missing == 0:
                    ready.append(parked)
        for parked in ready:
            try:
                data = parked.gather(self._fd)
            except OSError as error:
                self._log_failure(span, error)
                self._reads.refused()
                self._replies.reply_error(parked.unique, errno.EIO)
            else:
                self._reads.answered(time.monotonic_ns() - parked.started, parked.size)
                self._replies.reply(parked.unique, data)
        return True

    def _tell(self) -> None:
        """Call on_complete if nothing is missing any more."""
        if self._on_complete is None or self._files.live.find(0) >= 0:
            return
        with self._lock:
            epoch = self._files.epoch
            if self._told == epoch:
                return
            self._told = epoch
        try:
            self._on_complete()
        except Exception:
            _log.exception("completing a layer failed", extra={"layer": self.name})

    def _condemn(self, lie: str) -> None:
        """The table of contents was proven wrong: EIO to everybody who waits or comes later; no flight starts."""
        with self._lock:
            if self._lie:
                return
            self._lie = lie
            if self._retired is None:
                self._retired = lambda: None  # whoever closes the files replaces it
            lost = {parked for queue in self._waiting.values() for parked in queue if parked.missing > 0}
            for parked in lost:
                parked.missing = -1
            self._waiting.clear()
            self._owners.clear()
        for parked in lost:
            self._reads.refused()
            self._replies.reply_error(parked.unique, errno.EIO)
        if self._on_lie is not None:
            self._on_lie(lie)

    def _failed(self, flight: Flight, spans: Iterable[int], error: BaseException) -> None:
        """Give up those of `spans` that are still `flight`'s.

        DEMAND: EIO to whoever waits (once, though a request may wait for several). Another kind: a DEMAND flight for
        the spans that somebody waits for. While the daemon stops nobody gets an error: the kernel keeps the requests
        for the next daemon (RESEND).
        """
        if self._pool.closed:
            return
        lost: list[_Parked] = []
        with self._lock:
            spans = [span for span in spans if self._owners.get(span) is flight]
            self.counts.failures[flight.priority] += len(spans)
            again = [
                span for span in spans if flight.priority is not Priority.DEMAND and span in self._waiting
            ]
            for span in spans:
                del self._owners[span]
            fresh = self._own(again, Priority.DEMAND)
            for span in spans:
                if span in self._owners:
                    continue
                for parked in self._waiting.pop(span, ()):
                    if parked.missing > 0:
                        parked.missing = -1  # answered: flights of its other spans pass it by
                        lost.append(parked)
        self._submit(fresh)
        for parked in lost:
            self._reads.refused()
            self._replies.reply_error(parked.unique, errno.EIO)
        if flight.priority is not Priority.DEMAND:
            _log.debug(
                "spans did not come ahead",
                extra={
                    "layer": self.name,
                    "spans": spans,
                    "priority": flight.priority.name,
                    "error": str(error),
                },
            )
            return
        for span in spans:
            self._log_failure(span, error)

    def _log_failure(self, span: int, error: BaseException) -> None:
        _log.error(
            "span not available: readers get EIO; the next read tries again",
            extra={"layer": self.name, "span": span, "error": str(error)},
        )
