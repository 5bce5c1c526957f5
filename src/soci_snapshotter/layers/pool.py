"""The threads that fetch spans: started on demand, most urgent first, gone when idle.

A thread that fetches waits for a registry, so jobs come in groups (one per registry) with a bound of their own: a
registry that does not answer holds its own threads only, and readers of the others find some.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple

IDLE_SECONDS = 30.0  # a start comes in bursts; a parked thread costs 100 KB

GROUP_THREADS = 24
"""Requests to one registry at once. Of 1.3 MB each, two fill a link of 10 ms and 500 Mbit/s, and 24 one of 100 ms and
2.5 Gbit/s; more of them only share."""

CALM_SECONDS = 0.25
"""So long after readers' bytes last moved the link counts as free: longer than a registry takes for its first byte."""


class Priority(IntEnum):
    """Lower goes first."""

    DEMAND = 0
    """Somebody waits."""
    AHEAD = 1
    """A stream of reads goes there."""
    LISTED = 2
    """A prefetch artifact names it."""
    GUESS = 3
    """Likely: begun only while no DEMAND job is queued or running."""
    BACKGROUND = 4
    """Never queued here: layers.background has threads of its own."""


Job = Callable[[], object]


class _Item(NamedTuple):
    job: Job
    dropped: Job | None


class FlightPool:
    """Runs jobs on at most `limit` threads (None: as many as there are jobs). A context manager."""

    def __init__(self, limit: int | None, *, per_group: int = GROUP_THREADS, listed: int = 0) -> None:
        """`listed`: how many LISTED jobs run at once at most, 0 for no bound of their own."""
        self._limit = limit
        self._per_group = per_group
        self._listed = listed
        self._changed = threading.Condition()
        self._queues: tuple[dict[Hashable, deque[_Item]], ...] = tuple({} for _ in range(Priority.BACKGROUND))
        self._running: Counter[Priority] = Counter()
        self._groups: Counter[Hashable] = Counter()
        self._threads = 0
        self._waiting = 0
        self._closed = False
        self.active_at = float("-inf")
        """time.monotonic() when a reader's bytes last moved, or a reader came: see `calm_for`."""

    def __enter__(self) -> FlightPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, seconds: float = 2.0) -> None:
        """Drop what is queued; give running jobs `seconds` to end (they are daemon threads and hold no lock)."""
        with self._changed:
            self._closed = True
            left = [item for queue in self._queues for items in queue.values() for item in items]
            for queue in self._queues:
                queue.clear()
            self._changed.notify_all()
        for item in left:
            if item.dropped is not None:
                item.dropped()
        with self._changed:
            self._changed.wait_for(lambda: self._threads == 0, timeout=seconds)

    @property
    def closed(self) -> bool:
        """Whether the daemon is stopping: what is still in flight is the next daemon's."""
        return self._closed

    @property
    def idle(self) -> bool:
        """Whether no thread is left."""
        with self._changed:
            return self._threads == 0

    @property
    def queued(self) -> int:
        """Jobs that wait for a thread."""
        with self._changed:
            return sum(len(items) for queue in self._queues for items in queue.values())

    def moved(self) -> None:
        """Bytes that somebody waits for have come."""
        self.active_at = time.monotonic()

    def calm_for(self) -> float:
        """Seconds since a reader needed the link. A flight on a registry that is silent does not count."""
        return time.monotonic() - self.active_at

    def submit(
        self, priority: Priority, job: Job, group: Hashable = "", *, dropped: Job | None = None
    ) -> None:
        """Queue `job`. It must not raise. Never blocks. `dropped` is called instead if the pool closes before."""
        if priority is not Priority.GUESS:
            self.moved()
        if self._queue(priority, _Item(job, dropped), group):
            threading.Thread(target=self._run, name="flight", daemon=True).start()

    def _queue(self, priority: Priority, item: _Item, group: Hashable) -> bool:
        """Whether a new thread, counted already, is to be started for it."""
        with self._changed:
            if not self._closed:
                self._queues[priority].setdefault(group, deque()).append(item)
                return self._may_run(priority, group) and self._needs_thread()
        if item.dropped is not None:
            item.dropped()
        return False

    def _needs_thread(self) -> bool:
        queued = sum(len(items) for queue in self._queues for items in queue.values())
        if self._waiting >= queued or (self._limit is not None and self._threads >= self._limit):
            self._changed.notify()
            return False
        self._threads += 1
        return True

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            priority, group, job = taken
            try:
                job()
            finally:
                self._done(priority, group)

    def _next(self) -> tuple[Priority, Hashable, Job] | None:
        end = time.monotonic() + IDLE_SECONDS
        with self._changed:
            while (taken := self._take()) is None:
                left = end - time.monotonic()
                if self._closed or left <= 0:
                    self._threads -= 1
                    self._changed.notify_all()
                    return None
                self._waiting += 1
                self._changed.wait(left)
                self._waiting -= 1
            return taken

    def _take(self) -> tuple[Priority, Hashable, Job] | None:
        for priority, queue in zip(Priority, self._queues, strict=False):
            for group, items in queue.items():
                if not self._may_run(priority, group):
                    continue
                job = items.popleft().job
                del queue[group]
                if items:
                    queue[group] = items  # behind the others: groups take turns
                self._running[priority] += 1
                self._groups[group] += 1
                return priority, group, job
        return None

    def _may_run(self, priority: Priority, group: Hashable) -> bool:
        if self._groups[group] >= self._per_group:
            return False
        if priority is Priority.LISTED:
            return not self._listed or self._running[priority] < self._listed
        if priority is Priority.GUESS:
            return not self._running[Priority.DEMAND] and not self._queues[Priority.DEMAND]
        return True

    def _done(self, priority: Priority, group: Hashable) -> None:
        with self._changed:
            self._running[priority] -= 1
            self._groups[group] -= 1
            if not self._groups[group]:
                del self._groups[group]
            # This thread takes the next job; a second one may have become possible (a guess behind the last demand).
            if self._waiting and any(self._queues):
                self._changed.notify()
