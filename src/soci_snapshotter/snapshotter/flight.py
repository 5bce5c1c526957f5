"""Single flight: of threads that want the same thing done, one does it and all get its result."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Flight(Generic[T]):
    def __init__(self) -> None:
        self.landed = threading.Event()
        self.result: T | None = None
        self.error: BaseException | None = None


class Flights(Generic[T]):
    """Runs at most one call per key at a time. An error reaches everyone who waited, like a result."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flying: dict[Hashable, _Flight[T]] = {}

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`, run here or by whoever came first; a later call runs it again."""
        with self._lock:
            flight = self._flying.get(key)
            leading = flight is None
            if flight is None:
                flight = self._flying[key] = _Flight()
        if leading:
            try:
                flight.result = work()
            except BaseException as error:
                flight.error = error
                raise
            finally:
                with self._lock:
                    del self._flying[key]
                flight.landed.set()
        else:
            flight.landed.wait()
            if flight.error is not None:
                raise flight.error
        return flight.result  # type: ignore[return-value]
