"""What the daemon says of itself at its status socket, and `soci status` shows: JSON through msgspec."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from msgspec import Struct

SOCKET = "status.sock"
"""The socket's name, beside the daemon's own."""
LIMIT = 64 << 20
"""Bytes of an answer: a layer takes about 1 KB, and no node has 60,000."""


class State(Enum):
    """Where a layer is on its way."""

    LAZY = "lazy"
    """Bytes are missing, and come when they are read."""
    FILLING = "filling"
    """Bytes are missing, and some are on their way now."""
    PROVING = "proving"
    """All bytes are here; whether they are the layer's is being found out."""
    COMPLETE = "complete"
    """All bytes are here and proven: nothing of it needs the daemon."""
    CONDEMNED = "condemned"
    """Its bytes are not what its image says: none is served."""


class LayerStatus(Struct, frozen=True):
    """One layer under one ztoc. Sizes are bytes."""

    images: tuple[str, ...]
    """References whose repository serves it, newest first."""
    layer: str
    ztoc: str
    state: State
    spans: int
    spans_present: int
    size: int
    """Of the layer's blob, compressed."""
    fetched: int
    """Of those, what is here."""
    disk: int
    """What its files take."""
    mounts: tuple[str, ...] = ()
    flights: int = 0
    """Queued or under way now."""
    reads: int = 0
    """Requests of the kernel since the daemon started."""
    served: int = 0
    """Bytes they were given."""
    errors: int = 0
    """Those that failed."""


class Background(Struct, frozen=True):
    """The background fetch."""

    enabled: bool = False
    queued: int = 0
    """Layers that wait for it."""
    evicted: int = 0
    """Layers it gave up because too many waited."""


class DaemonStatus(Struct, frozen=True):
    """Everything."""

    version: str
    pid: int
    root: str
    uptime: float
    """Seconds."""
    layers: tuple[LayerStatus, ...]
    background: Background
    flights_queued: int
    """Flights that wait for a thread."""
    counters: dict[str, int]
    """Operations since the daemon started, all layers together, by the names that the metrics have."""


def of_image(layers: Iterable[LayerStatus], reference: str) -> list[LayerStatus]:
    """Those that this image has."""
    return [layer for layer in layers if reference in layer.images]
