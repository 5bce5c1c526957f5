"""How long something takes, for policy.counters. Not for the path of a page fault."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from soci_snapshotter.policy.counters import Histogram


@contextmanager
def measured(durations: Histogram) -> Iterator[None]:
    """Add what the block takes, when it succeeds."""
    started = time.monotonic()
    yield
    durations.observe((time.monotonic() - started) * 1000)
