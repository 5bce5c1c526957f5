"""Which idle layers give up their bytes when the layers take more disk than they may."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

GOAL = 0.9  # of the quota: evicting to the very limit would begin anew with the next span


@dataclass(frozen=True)
class Idle(Generic[Key]):
    """A layer that no snapshot of a container or view has: when it was last asked for (any clock), bytes on disk."""

    key: Key
    used_at: float
    size: int


def choose(idle: Iterable[Idle[Key]], *, used: int, quota: int) -> list[Key]:
    """The layers to empty, the longest unused first, until `used` bytes are GOAL of `quota`; none below the quota.

    Whole layers: what a half-empty layer keeps is of little use to a start, and its spans can be had again one by one.
    """
    chosen: list[Key] = []
    if not quota or used <= quota:
        return chosen
    for layer in sorted(idle, key=lambda one: one.used_at):
        if used <= quota * GOAL:
            break
        if layer.size > 0:
            chosen.append(layer.key)
            used -= layer.size
    return chosen
