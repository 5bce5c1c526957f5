"""Answers that are got by one thread for all that want them at the same time, and remembered for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# Beyond this many remembered answers the stale ones are dropped.
_KEPT = 256
# Seconds for which another thread's answer is waited for: whatever asks has a shorter patience of its own.
_WAIT = 60.0


class Once(Generic[K, T]):
    """Answers by key. Thread safe; `ask` runs outside its lock. An error reaches everyone who waited.

    TimeoutError reaches who waited a minute for another thread's answer.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking: dict[K, Future[T]] = {}
        self._known: dict[K, tuple[float, float, T]] = {}  # got at, good until, answer

    def get(self, key: K, ask: Callable[[], tuple[T, float]], *, newer_than: float | None = None) -> T:
        """A remembered answer (with `newer_than`, one that old in seconds at most), or `ask`'s: it returns the
        answer and for how many seconds it is good."""
        mine: Future[T] = Future()
        now = time.monotonic()
        with self._lock:
            known = self._known.get(key)
            if known is not None and now < known[1] and (newer_than is None or now - known[0] <= newer_than):
                return known[2]
            others = self._asking.setdefault(key, mine)
        if others is not mine:
            return others.result(_WAIT)
        try:
            answer, life = ask()
        except BaseException as error:
            with self._lock:
                del self._asking[key]
            mine.set_exception(error)
            raise
        now = time.monotonic()
        with self._lock:
            if len(self._known) >= _KEPT:
                self._known = {each: entry for each, entry in self._known.items() if now < entry[1]}
            self._known[key] = now, now + life, answer
            del self._asking[key]
        mine.set_result(answer)
        return answer
