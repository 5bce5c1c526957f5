"""Work in the order it came, so many at once, in threads that end when nothing is left to do."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager

_log = logging.getLogger(__name__)


class Lane:
    """Thread safe. Calls take care of their own errors; the threads are daemons and hold nothing up."""

    def __init__(self, name: str, width: int, slots: AbstractContextManager[object]) -> None:
        """`width`: calls at once; each also enters `slots`, which several lanes may share."""
        self._name = name
        self._width = width
        self._slots = slots
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads = 0

    def add(self, call: Callable[[], None]) -> None:
        """Run `call` when its turn comes."""
        with self._lock:
            self._waiting.append(call)
            if self._threads == self._width:
                return
            self._threads += 1
        threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._slots:
                with self._lock:
                    if not self._waiting:
                        self._threads -= 1
                        return
                    call = self._waiting.popleft()
                try:
                    call()
                except Exception:  # a bug: the other calls must not suffer
                    _log.exception("%s failed", self._name)
