"""The background fetch: what no reader asked for, at the rate of the link, and never in a reader's way.

Two threads take turns from policy.schedule; the second one only while nobody reads, to fill the gaps between the
first one's requests. After each piece that comes a range is held up as long as readers' bytes move (the socket is not
read, so that its window closes), unless a reader waits for this very range. A failure backs off and is nobody's error.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Protocol

from soci_snapshotter.errors import Integrity, SociError
from soci_snapshotter.layers.pool import CALM_SECONDS, FlightPool
from soci_snapshotter.layers.reader import LayerReader
from soci_snapshotter.policy.counters import Counters
from soci_snapshotter.policy.schedule import Layer, Rules, Schedule, Turn

_log = logging.getLogger(__name__)

THREADS = 2

LOOK_SECONDS = 0.5
"""Between two looks at the layers when there is nothing to do: the silence is counted in seconds."""

HOLD_SECONDS = 10.0
"""A range is held up no longer in all, then it goes on to its end: registries close a connection that takes nothing for a
minute, and who reads without end must not keep other images from ever being complete."""

_POLL_SECONDS = 0.02

_QUIET_SECONDS = 10.0
"""So long without a reader, and the second thread joins in."""


class Record(Protocol):
    """layer.json, as far as it matters here."""

    @property
    def sources(self) -> tuple[str, ...]: ...


class Fillable(Protocol):
    """An open layer."""

    @property
    def key(self) -> object: ...
    @property
    def record(self) -> Record: ...
    @property
    def reader(self) -> LayerReader: ...


class _Stopping(OSError):
    """The daemon stops: the range is given up."""


class Background:
    """The threads. A context manager; leaving it gives up the ranges under way."""

    def __init__(
        self,
        layers: Callable[[], Sequence[Fillable]],
        pool: FlightPool,
        rules: Rules,
        *,
        enabled: bool = True,
        counters: Counters | None = None,
    ) -> None:
        """`layers()` are those that may lack something; it is called twice a second."""
        self._layers = layers
        self._pool = pool
        self._enabled = enabled
        self._counters = Counters() if counters is None else counters
        self._begun: dict[object, float] = {}  # layer -> when its first range was asked for
        self._schedule = Schedule(rules)
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"background-{number}", daemon=True)
            for number in range(THREADS)
        ]
        self.ranges = 0
        """Requests that succeeded."""
        self.failures = 0
        """Requests that did not."""
        self.bytes = 0
        """Compressed bytes of the ranges that came."""

    @property
    def queued(self) -> int:
        """Layers that lack something and have not been given up."""
        with self._lock:
            return self._schedule.queued

    @property
    def evicted(self) -> int:
        """Layers given up because the queue was full."""
        with self._lock:
            return self._schedule.evicted

    def __enter__(self) -> Background:
        if self._enabled:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        end = time.monotonic() + 2.0  # a thread inside a read of a silent registry ends with the process
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(end - time.monotonic(), 0))

    def _run(self, number: int) -> None:
        while not self._ending.is_set():
            if number and self._pool.calm_for() < _QUIET_SECONDS:
                self._ending.wait(LOOK_SECONDS)
                continue
            layer, turn = self._choose()
            if layer is None or turn is None:
                self._ending.wait(LOOK_SECONDS)
            else:
                self._fetch(layer, turn)

    def _choose(self) -> tuple[Fillable | None, Turn | None]:
        found = {layer.key: layer for layer in self._layers()}
        now, quiet = time.monotonic(), self._pool.calm_for()
        waiting = []
        for key, layer in found.items():
            missing = layer.reader.missing()
            sources = layer.record.sources
            if missing:
                waiting.append(Layer(key, sources[0] if sources else "", missing, layer.reader.touched))
        with self._lock:
            self._schedule.update(waiting, now)
            self._begun = {key: since for key, since in self._begun.items() if key in found}
            if quiet < CALM_SECONDS:
                return None, None
            turn = self._schedule.next(now, quiet)
        return (None, None) if turn is None else (found[turn.key], turn)

    def _fetch(self, layer: Fillable, turn: Turn) -> None:
        with self._lock:
            begun = self._begun.setdefault(turn.key, time.monotonic())
        try:
            came = layer.reader.fetch_background(turn.limit, partial(self._hold, [HOLD_SECONDS]))
        except _Stopping:
            return
        except (SociError, OSError) as error:
            with self._lock:
                self.failures += 1
                self._schedule.failed(
                    turn.key,
                    time.monotonic(),
                    random.random(),  # noqa: S311 - jitter
                    all_of_image=not isinstance(error, Integrity),
                )
            _log.debug("background fetch failed", extra={"layer": str(turn.key), "error": str(error)})
        else:
            with self._lock:
                self._schedule.succeeded(turn.key)
                self.ranges += came > 0
                self.bytes += came
            if came and not layer.reader.missing():
                took = self._counters.layer(layer.reader.name).duration("background_fetch")
                took.observe((time.monotonic() - begun) * 1000)
            if not came:  # the rest of the layer is on its way to readers
                self._ending.wait(LOOK_SECONDS)

    def _hold(self, left: list[float], may: Callable[[], bool]) -> None:
        """Wait as long as readers' bytes move and `may()`, `left[0]` seconds in all; `LayerReader.fetch_background`."""
        while True:
            if self._ending.is_set():
                raise _Stopping("the daemon stops")
            if self._pool.calm_for() >= CALM_SECONDS or left[0] <= 0 or not may():
                return
            self._ending.wait(_POLL_SECONDS)
            left[0] -= _POLL_SECONDS
