"""What long work says of itself: values that cross threads and processes; cli/progress.py shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

RELAY_BYTES = 1 << 20
"""How much a worker does between two messages: at 300 MB/s a message each 3 ms, and a bar that still moves."""


class Step(NamedTuple):
    """How far a task is. `done` counts from its start, so that a lost or repeated message does no harm.

    `total` is in bytes, None when nobody knows; `state` is a word such as `indexing`, "" to leave it as it was.
    """

    task: str
    done: int
    total: int | None = None
    state: str = ""


class Relay:
    """Turns the small advances of a worker into a few Steps. Not thread safe: one task, one worker."""

    def __init__(
        self, send: Callable[[Step], object], task: str, total: int | None = None, state: str = ""
    ) -> None:
        self._send = send
        self._step = Step(task, 0, total, state)
        self._sent = 0
        send(self._step)

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        done = self._step.done + count
        self._step = self._step._replace(done=done)
        if done - self._sent >= RELAY_BYTES or done == self._step.total:
            self._sent = done
            self._send(self._step)

    def finish(self, state: str = "done") -> None:
        """The task is over; `state` says how."""
        self._send(self._step._replace(state=state))
