"""The mounts that containerd is told to make for a snapshot, as its own overlayfs snapshotter gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..store.snapshots import Kind


@dataclass(frozen=True)
class Mount:
    """One mount for containerd: filesystem type, source, options."""

    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """What a mount is made of: the snapshot's own directories and its parents' tops, topmost first."""

    kind: Kind
    upper: str
    work: str
    lowers: tuple[str, ...]
    rebased: bool = False
    """Its parent is named at Commit, and until then the layer is unpacked alone."""


def mounts(stack: Stack, overlay_options: Sequence[str] = ()) -> tuple[Mount, ...]:
    """Without parents, or for a view of one, a bind mount (overlayfs wants two layers); else an overlay.

    Of equal lowerdirs the topmost stays: overlayfs refuses a repeated one with ELOOP, and what lies below an
    equal layer is hidden by it. What will be rebased is an overlay all the same, of which containerd takes the upper
    directory: in a bind mount it would carry whiteouts out, and leave none for the layers below.
    """
    lowers = tuple(dict.fromkeys(stack.lowers))
    view = stack.kind == Kind.VIEW
    if not lowers and stack.rebased and not view:
        return (Mount("overlay", "overlay", (f"workdir={stack.work}", f"upperdir={stack.upper}")),)
    if not lowers:
        return (Mount("bind", stack.upper, ("ro" if view else "rw", "rbind")),)
    if view and len(lowers) == 1:
        return (Mount("bind", lowers[0], ("ro", "rbind")),)
    own = () if view else (f"workdir={stack.work}", f"upperdir={stack.upper}")
    return (Mount("overlay", "overlay", (*own, f"lowerdir={':'.join(lowers)}", *overlay_options)),)
