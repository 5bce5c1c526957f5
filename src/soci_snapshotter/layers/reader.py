"""Reads of one lazy layer: answered at once from data.tar, or parked on the flights of the spans they miss.

    FUSE thread   read(): all spans marked -> pread, answer.  Else: park the request on its missing spans, submit
                  flights for those that nobody fetches yet, return None. It never waits.
    flight        GET the run's range -> per span: sha256, inflate, pwrite, mark -> answer those who waited for the
                  last of their spans. On failure: EIO to everybody who waited for a span that did not come.

There is one flight per span however many readers; after a failed flight the next read starts afresh.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from soci_snapshotter.errors import Integrity, SociError
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.zinfo import SpanTable
from soci_snapshotter.layers.pool import FlightPool, Priority
from soci_snapshotter.layers.spandecode import SpanIntake
from soci_snapshotter.policy.runs import Run, join
from soci_snapshotter.store.layerfiles import SpanFile

_log = logging.getLogger(__name__)

SPAN_RETRIES = 1  # a digest mismatch may be a bad proxy or a torn answer; twice the same is the blob


class RangeSource(Protocol):
    """Where compressed bytes come from (registry.ranges.BlobReader)."""

    def read_range(self, start: int, end: int, sink: Callable[[memoryview], None], deadline: float) -> None:
        """Feed bytes [start, end) of the blob to `sink` in order, or raise Remote; `deadline` is time.monotonic()."""


class Replies(Protocol):
    """Who answers the kernel (serve.flatfiles.FuseServer)."""

    def reply(self, unique: int, data: Buffer) -> None: ...
    def reply_error(self, unique: int, code: int) -> None: ...


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the configuration says about fetching."""

    flight_seconds: float = 300.0
    """A flight's whole life, queue included ([blob] fetching_timeout_sec); then its readers get EIO."""


class _Parked:
    """One FUSE request and how many of its spans are still missing."""

    __slots__ = ("missing", "offset", "size", "unique")

    def __init__(self, unique: int, offset: int, size: int, missing: int) -> None:
        self.unique = unique
        self.offset = offset
        self.size = size
        self.missing = missing


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
        on_complete: Callable[[], None] | None = None,
    ) -> None:
        """`name` is for the log (layer digest); `windows_fd` is the ztoc file, whose windows are pread when needed.

        `on_complete` is called, on a flight's thread with the files open, when the last missing span has landed: once,
        and once more each time that marks were taken back (`files.epoch` rose) and all have come again. It must be
        quick. Whoever opens a layer that has all its spans already is not told.
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
        self._on_complete = on_complete
        self._told = -1  # the epoch that on_complete was called in
        self._lock = threading.Lock()
        self._flights = 0
        self._retired: Callable[[], None] | None = None
        self._waiting: dict[
            int, list[_Parked]
        ] = {}  # span -> who waits for its flight; a key = a flight exists

    def read(self, unique: int, offset: int, size: int) -> Buffer | None:
        """The bytes, or None when the request was parked; then `replies` hears of `unique` later. Never blocks."""
        size = min(size, self.size - offset)
        if size <= 0:
            return b""
        wanted = self._spans.spans_for(offset, size)
        if not wanted:
            return bytes(size)  # between the tar's end and its block's: no span, zeros
        data = self._present(wanted, offset, size)
        if data is not None:
            return data
        runs = self._park(unique, offset, size, wanted)
        if runs is None:
            return os.pread(self._fd, size, offset)
        self._submit(runs, Priority.DEMAND)
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

    def fetch_ahead(self, spans: Iterable[int]) -> None:
        """Start flights for those of `spans` that are neither here nor on their way."""
        with self._lock:
            missing = [span for span in spans if not self._files.live[span] and span not in self._waiting]
            for span in missing:
                self._waiting[span] = []
        self._submit(self._runs(missing), Priority.AHEAD)

    def _park(self, unique: int, offset: int, size: int, wanted: range) -> list[Run] | None:
        """Park on the missing spans; the runs nobody fetches yet. None: everything arrived meanwhile."""
        live = self._files.live
        with self._lock:
            missing = [span for span in wanted if not live[span]]
            if not missing:
                return None
            parked = _Parked(unique, offset, size, len(missing))
            fresh = []
            for span in missing:
                queue = self._waiting.get(span)
                if queue is None:
                    self._waiting[span] = [parked]
                    fresh.append(span)
                else:
                    queue.append(parked)
        return self._runs(fresh)

    def _runs(self, spans: list[int]) -> list[Run]:
        sizes = []
        for span in spans:
            start, end = self._spans.compressed_range(span)
            sizes.append(end - start)
        return join(spans, sizes)

    def _submit(self, runs: list[Run], priority: Priority) -> None:
        with self._lock:
            retired = self._retired is not None
            if not retired:
                self._flights += len(runs)
        if retired:
            for run in runs:
                self._failed(range(run.first, run.last + 1), OSError(errno.EIO, "the layer was dropped"))
            return
        deadline = time.monotonic() + self._options.flight_seconds
        for run in runs:
            self._pool.submit(priority, partial(self._flight, run, deadline))

    def _flight(self, run: Run, deadline: float) -> None:
        try:
            self._fly(run, deadline)
        finally:
            with self._lock:
                self._flights -= 1
                then = self._retired if self._flights == 0 else None
            if then is not None:
                then()

    def _fly(self, run: Run, deadline: float) -> None:
        """Fetch a run; whatever happens, everybody who waits for one of its spans is answered."""
        span, retries = run.first, 0
        while span <= run.last:
            intake = SpanIntake(self._spans, self._files, self._windows_fd, span, run.last, self._landed)
            try:
                if time.monotonic() >= deadline:
                    raise TimeoutError("the flight's time was over before it started")
                self.source.read_range(*intake.byte_range, intake.feed, deadline)
                intake.finish()
                return
            except Integrity as error:
                span, retries = intake.span, retries + 1 if intake.span == span else 1
                if retries > SPAN_RETRIES:
                    self._failed([span], error)
                    span, retries = span + 1, 0
            except (SociError, OSError) as error:
                self._failed(range(intake.span, run.last + 1), error)
                return
            except Exception as error:  # a bug here must not leave a reader waiting for ever
                _log.exception("flight failed", extra={"layer": self.name, "span": intake.span})
                self._failed(range(intake.span, run.last + 1), error)
                return

    def _landed(self, span: int) -> None:
        """`span` is marked: answer those who waited for nothing else."""
        with self._lock:
            ready = []
            for parked in self._waiting.pop(span, ()):
                parked.missing -= 1
                if parked.missing == 0:
                    ready.append(parked)
        for parked in ready:
            try:
                data = os.pread(self._fd, parked.size, parked.offset)
            except OSError as error:
                self._log_failure(span, error)
                self._replies.reply_error(parked.unique, errno.EIO)
            else:
                self._replies.reply(parked.unique, data)
        self._tell()

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

    def _failed(self, spans: Iterable[int], error: BaseException) -> None:
        """Give up `spans`: EIO to whoever waits for them (once, though a request may wait for several).

        While the daemon stops nobody gets an error: the kernel keeps the requests for the next daemon (RESEND).
        """
        if self._pool.closed:
            return
        lost: list[_Parked] = []
        spans = list(spans)
        with self._lock:
            for span in spans:
                for parked in self._waiting.pop(span, ()):
                    if parked.missing > 0:
                        parked.missing = -1  # answered: flights of its other spans pass it by
                        lost.append(parked)
        for parked in lost:
            self._replies.reply_error(parked.unique, errno.EIO)
        for span in spans:
            self._log_failure(span, error)

    def _log_failure(self, span: int, error: BaseException) -> None:
        _log.error(
            "span not available: readers get EIO; the next read tries again",
            extra={"layer": self.name, "span": span, "error": str(error)},
        )
