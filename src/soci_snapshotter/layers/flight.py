"""One flight: a run of spans on its way, and what it may be joined or held up for."""

from __future__ import annotations

import time
from collections.abc import Callable

from soci_snapshotter.layers.pool import Priority
from soci_snapshotter.policy.runs import Run

JOIN_BYTES = 1 << 20
"""How far behind what has come a span may end that a reader waits for on a background flight. More takes longer than
the round trip that a flight of its own costs: 1 MiB is 17 ms at 500 Mbit/s."""


class Flight:
    """Spans first..last (inclusive) of a layer. The reader's lock guards it, `received` excepted (written by one)."""

    __slots__ = (
        "at",
        "born",
        "fetched",
        "first",
        "held",
        "last",
        "priority",
        "received",
        "served",
        "started",
    )

    def __init__(self, run: Run, priority: Priority) -> None:
        self.first, self.last = run
        self.priority = priority
        self.born = time.monotonic()
        self.started = False
        self.at = run.first
        """The span that is being received."""
        self.fetched = 0
        """Bytes received, those of repeated requests included."""
        self.received = 0
        """Up to which offset of the blob its bytes have come."""
        self.served = -1
        """The span whose bytes readers got before they were written."""
        self.held = False
        """It waits until readers have what they need."""

    def brings_soon(self, end: int) -> bool:
        """Whether a reader of the span that ends at offset `end` of the blob had better wait for it."""
        if self.priority is Priority.DEMAND:
            return True
        if not self.started or self.held:
            return False
        return self.priority is not Priority.BACKGROUND or end - self.received <= JOIN_BYTES


Hold = Callable[[Callable[[], bool]], None]
"""Told after each piece of a background flight whether somebody waits for it; returns when it may go on, or raises."""
