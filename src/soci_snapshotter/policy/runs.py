"""Which missing spans are asked for together: one ranged GET per run of neighbors, within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_RUN_BYTES = 8 << 20
"""Compressed bytes of one GET: a reader of the run's last span waits for all before it, 0.13 s at 500 Mbit/s."""


class Run(NamedTuple):
    """Spans first..last, inclusive."""

    first: int
    last: int


def join(missing: Sequence[int], sizes: Sequence[int], limit: int = MAX_RUN_BYTES) -> list[Run]:
    """Group `missing` span numbers (rising) into runs of neighbors.

    `sizes[i]` is the compressed size of missing[i]; a run holds at most `limit` bytes unless one span alone is larger.
    """
    runs: list[Run] = []
    held = 0
    for span, size in zip(missing, sizes, strict=True):
        if runs and runs[-1].last == span - 1 and held + size <= limit:
            runs[-1] = Run(runs[-1].first, span)
            held += size
        else:
            runs.append(Run(span, span))
            held = size
    return runs
