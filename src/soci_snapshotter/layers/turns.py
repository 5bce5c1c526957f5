"""One at a time per key, without a lock held over the work: whoever comes second waits for the first to end."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Turns:
    """Gives turns. Thread safe; keys are forgotten when nobody uses them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: set[Hashable] = set()

    @contextmanager
    def turn(self, key: Hashable) -> Iterator[None]:
        """Wait for the key, hold it for the block. The block bounds its own time: everything in it has a deadline."""
        with self._changed:
            self._changed.wait_for(lambda: key not in self._busy)
            self._busy.add(key)
        try:
            yield
        finally:
            with self._changed:
                self._busy.discard(key)
                self._changed.notify_all()
