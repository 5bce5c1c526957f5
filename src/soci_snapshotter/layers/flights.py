"""How the spans of one layer come: flights, which of them a span belongs to, and what becomes of who waits for it.

A flight GETs the range of a run of spans; as each is whole it is checked, inflated, written and marked
(layers.spandecode), and who waited for the last of his spans is answered. A span may be overtaken: by a flight of a
higher priority while it is queued, or far back in a background range. Then it belongs to the later flight, whichever
brings it first lands it, and the other passes it by. Only a DEMAND flight answers EIO; readers who joined another kind
get a DEMAND flight when that fails.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Protocol

from soci_snapshotter.errors import Condemned, Integrity, SociError
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.zinfo import SpanTable
from soci_snapshotter.layers.checking import HeaderCheck
from soci_snapshotter.layers.flight import Flight, Hold
from soci_snapshotter.layers.parking import Parking
from soci_snapshotter.layers.pool import FlightPool, Priority
from soci_snapshotter.layers.spandecode import SpanIntake
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.policy.runs import MAX_RUN_BYTES, Run, join
from soci_snapshotter.store.layerfiles import SpanFile

_log = logging.getLogger(__name__)

GUESS_SECONDS = 2.0  # a program that starts is elsewhere by then
NO_ROOM_SECONDS = (
    60.0  # a disk that is full takes a small span now and then: that is still the same full disk
)
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

    def close(self) -> None:
        """End requests under way; none is wanted any more."""


class _Dropped(OSError):
    """The layer goes, or the daemon stops: the flight is not wanted any more."""


class Flights:
    """The flights of one layer. Thread safe, but for what says that it is called under `lock`."""

    def __init__(
        self,
        *,
        name: str,
        spans: SpanTable,
        files: SpanFile,
        windows_fd: int,
        source: RangeSource,
        pool: FlightPool,
        seconds: float,
        parking: Parking,
        headers: HeaderCheck | None,
        counters: LayerCounters,
        on_landed: Callable[[], None],
        on_lie: Callable[[str], None] | None,
    ) -> None:
        """`seconds`: a flight's whole life. `on_landed` runs after each span. The rest: layers.reader.LayerReader."""
        self.name = name
        self.source = source
        self.lock = threading.Lock()
        self.flying = 0
        """How many flights are queued or under way."""
        self.lie = ""
        """What the tar headers proved wrong; then nothing is served any more."""
        self.counts = counters.flights
        self._spans = spans
        self._files = files
        self._windows_fd = windows_fd
        self._pool = pool
        self._seconds = seconds
        self._parking = parking
        self._headers = headers
        self._full = counters.count("disk_full")
        self._no_room = float("-inf")  # when a span was last not kept
        self._on_landed = on_landed
        self._on_lie = on_lie
        self._retired: Callable[[], None] | None = None
        self._owners: dict[int, Flight] = {}  # span -> the flight that is to bring it; who waits has one

    def retire(self, then: Callable[[], None]) -> None:
        """Start no more; call `then` when none is left: now, or behind the last. Nobody waits: what flies is cut off."""
        with self.lock:
            self._retired = then
            flying, wanted = self.flying, bool(self._parking)
        if not flying:
            then()
        elif not wanted:
            self.source.close()

    def claim(self, spans: Iterable[int], priority: Priority) -> list[Flight]:
        """Flights, to be submitted, for those of `spans` that are not here and that nobody brings soon. Under `lock`."""
        live = self._files.live
        return self._own([span for span in spans if not live[span] and self._free(span, priority)], priority)

    def _free(self, span: int, priority: Priority) -> bool:
        """Whether a flight of `priority` may take `span`. Under the lock."""
        owner = self._owners.get(span)
        if owner is None:
            return True
        return owner.priority > priority and not owner.brings_soon(self._spans.compressed_range(span)[1])

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
        with self.lock:
            run = None if self._retired is not None else self._next_run(limit)
            if run is None:
                return 0
            flight = Flight(run, Priority.BACKGROUND)
            self._owners.update(dict.fromkeys(range(run.first, run.last + 1), flight))
            self.flying += 1
        error = self._flight(flight, time.monotonic() + self._seconds, hold)
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

    def submit(self, flights: list[Flight]) -> None:
        """Start these, if the layer is not dropped: then who waits for them gets EIO."""
        with self.lock:
            retired = self._retired is not None
            if not retired:
                self.flying += len(flights)
        if retired:
            for flight in flights:
                self._failed(
                    flight, range(flight.first, flight.last + 1), _Dropped(errno.EIO, "the layer was dropped")
                )
            return
        deadline = time.monotonic() + self._seconds
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
            with self.lock:
                flight.started = True
                self.counts.flights[flight.priority] += 1
                mine = [
                    span
                    for span in range(flight.first, flight.last + 1)
                    if self._owners.get(span) is flight and not self._files.live[span]
                ]
                stale = flight.priority is Priority.GUESS and time.monotonic() > flight.born + GUESS_SECONDS
                if stale or self._retired is not None:
                    mine = [span for span in mine if span in self._parking]
            for run in self._runs(mine):
                error = self._fly(flight, run, deadline, hold) or error
        finally:
            self._leave_nobody(flight)
            self._ended(flight)
        return error

    def _leave_nobody(self, flight: Flight) -> None:
        """What was passed by because it was here, and whose mark the disk took back since, still has those who wait."""
        with self.lock:
            left = [
                span
                for span in range(flight.first, flight.last + 1)
                if span in self._parking and self._owners.get(span) is flight
            ]
        if left:
            self._failed(flight, left, OSError(errno.EIO, "the disk lost it"))

    def _ended(self, flight: Flight) -> None:
        """`flight` is over, or was never begun because the daemon stops."""
        with self.lock:
            self.counts.bytes[flight.priority] += flight.fetched
            for span in range(flight.first, flight.last + 1):
                if self._owners.get(span) is flight and span not in self._parking:
                    del self._owners[span]
            self.flying -= 1
            then = self._retired if self.flying == 0 else None
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
                verified=partial(self._verified, flight),
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
        if (self._retired is not None and not self._parking) or self.lie:
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
        with self.lock:
            flight.held = not any(
                span in self._parking and self._owners.get(span) is flight
                for span in range(flight.at, flight.last + 1)
            )
            return flight.held

    def _verified(self, flight: Flight, span: int, begin: int, data: Buffer) -> None:
        """The bytes of `span`, `data`, are right and about to be written: answer those who wait for nothing else."""
        with self.lock:
            ready = self._parking.land_early(span, (begin, memoryview(data)))
            if ready:
                flight.served = span
        self._parking.answer(ready)

    def _landed(self, flight: Flight, span: int) -> None:
        """`span` is marked: answer those who waited for nothing else."""
        self._arrived(flight, span)
        self._on_landed()

    def _unstored(self, flight: Flight, span: int, begin: int, data: Buffer, why: OSError) -> None:
        """The disk does not take `span`, whose verified bytes are `data`: those who wait get them from here, and the next
        reader fetches them again. Raises `why` when nobody waits.
        """
        now = time.monotonic()
        since, self._no_room = now - self._no_room, now
        if since > NO_ROOM_SECONDS:
            self._full.add()
            _log.error(
                "the disk takes no spans: they are served without being kept until it does",
                extra={"layer": self.name, "error": str(why)},
            )
        with self.lock:
            wanted = span in self._parking or flight.served == span
        if not wanted:
            raise why
        self._arrived(flight, span, (begin, memoryview(data)))

    def _arrived(self, flight: Flight, span: int, unkept: tuple[int, memoryview] | None = None) -> None:
        """`span` is here, or only passes by: answer those who waited for nothing else."""
        with self.lock:
            self.counts.spans[flight.priority] += 1
            self._owners.pop(span, None)
            ready = self._parking.land(span, unkept)
        self._parking.answer(ready)

    def _condemn(self, lie: str) -> None:
        """The table of contents was proven wrong: EIO to everybody who waits or comes later; no flight starts."""
        with self.lock:
            if self.lie:
                return
            self.lie = lie
            if self._retired is None:
                self._retired = lambda: None  # whoever closes the files replaces it
            lost = self._parking.withdraw()
            self._owners.clear()
        self._parking.refuse(lost)
        if self._on_lie is not None:
            self._on_lie(lie)

    def _failed(self, flight: Flight, spans: Iterable[int], error: BaseException) -> None:
        """Give up those of `spans` that are still `flight`'s.

        DEMAND: EIO to whoever waits. Another kind: a DEMAND flight for the spans that somebody waits for. While the
        daemon stops nobody gets an error: the kernel keeps the requests for the next daemon (RESEND).
        """
        if self._pool.closed:
            return
        demand = flight.priority is Priority.DEMAND
        with self.lock:
            spans = [span for span in spans if self._owners.get(span) is flight]
            self.counts.failures[flight.priority] += len(spans)
            for span in spans:
                del self._owners[span]
            lost = self._parking.withdraw(spans) if demand else []
            fresh = (
                []
                if demand
                else self._own([span for span in spans if span in self._parking], Priority.DEMAND)
            )
        self.submit(fresh)
        self._parking.refuse(lost)
        about = {"layer": self.name, "error": str(error)}
        if not demand or (self._retired is not None and not lost):
            kind = flight.priority.name
            _log.debug("spans did not come ahead", extra=about | {"spans": spans, "priority": kind})
            return
        for span in spans:
            _log.error(
                "span not available: readers get EIO; the next read tries again", extra=about | {"span": span}
            )
