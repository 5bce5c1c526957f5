"""The threads that fetch spans: started on demand, demand before read-ahead, gone when idle."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from types import TracebackType

IDLE_SECONDS = 30.0  # a start comes in bursts; a parked thread costs 100 KB


class Priority(IntEnum):
    """Lower goes first."""

    DEMAND = 0
    AHEAD = 1


Job = Callable[[], None]


class FlightPool:
    """Runs jobs on at most `limit` threads, all DEMAND jobs before any AHEAD one. A context manager."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._queues: tuple[deque[Job], deque[Job]] = (deque(), deque())
        self._threads = 0
        self._waiting = 0
        self._closed = False

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
            for queue in self._queues:
                queue.clear()
            self._changed.notify_all()
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

    def submit(self, priority: Priority, job: Job) -> None:
        """Queue `job`. It must not raise. Never blocks."""
        with self._changed:
            if self._closed:
                return
            self._queues[priority].append(job)
            queued = sum(len(queue) for queue in self._queues)
            if self._waiting >= queued or self._threads >= self._limit:
                self._changed.notify()
                return
            self._threads += 1
        threading.Thread(target=self._run, name="flight", daemon=True).start()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            job()

    def _next(self) -> Job | None:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._closed or any(self._queues), timeout=IDLE_SECONDS)
            self._waiting -= 1
            for queue in self._queues:
                if queue:
                    return queue.popleft()
            self._threads -= 1
            self._changed.notify_all()
            return None
