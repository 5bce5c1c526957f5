"""What the background fetch does next: pure; whoever calls says what time it is (seconds, any origin).

An image's layers may be fetched once its first reads have calmed down: `silence` seconds without a mount or a missed
read, or `patience` seconds after the image was first seen, whatever is read. Images take turns, a range each. Within
an image the layer with the least left goes first: it is complete, and independent of this daemon, soonest. What fails
waits twice as long each time; a registry that does not answer holds up all layers of the image, bad bytes only theirs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

RANGE_BYTES = 16 << 20
"""One request when nobody reads: 0.27 s at 500 Mbit/s, so that a round trip of 10 ms costs 4 %."""

_RANGE_SHORT = 1 << 20
_RANGE_MEDIUM = 4 << 20
_QUIET_SHORT = 3.0
_QUIET_MEDIUM = 10.0
"""While somebody reads now and then, what is in the network already is what he waits behind: so little is asked for."""

_BACKOFF_FIRST = 1.0
_BACKOFF_MOST = 300.0


@dataclass(frozen=True, slots=True)
class Rules:
    """What the configuration says. Seconds."""

    silence: float = 3.0
    """Three times what a program's import of a large package computes between two reads."""
    patience: float = 30.0
    """An image that never calms down: containerd's default for the Go tool's silence, then it starts all the same."""
    period: float = 0.0
    """At least so long between the beginnings of two requests; if set, a request is one span, as with the Go daemon."""
    queue: int = 0
    """Layers that may wait; 0: all."""
    drop_newest: bool = True
    """Which layer is given up when there are more: the one that comes, else the one that waits longest."""


class Layer(NamedTuple):
    """A layer that lacks `missing` compressed bytes; `touched`: when it was mounted or somebody last missed a span."""

    key: Hashable
    image: str
    missing: int
    touched: float


class Turn(NamedTuple):
    """Fetch up to `limit` bytes (one span at least) of this layer now."""

    key: Hashable
    limit: int


class _Backoff:
    __slots__ = ("tries", "until")

    def __init__(self) -> None:
        self.tries = 0
        self.until = 0.0

    def failed(self, now: float, jitter: float) -> None:
        wait = min(_BACKOFF_FIRST * 2.0 ** min(self.tries, 32), _BACKOFF_MOST)
        self.tries += 1
        self.until = now + wait * (0.5 + jitter / 2)


class Schedule:
    """Remembers what waits, who had the last turn, what failed. Not thread safe."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._waiting: dict[Hashable, Layer] = {}  # in the order of their coming
        self._dropped: set[Hashable] = set()
        self._since: dict[str, float] = {}  # image -> when first seen
        self._turns: dict[str, int] = {}  # image -> number of its last turn
        self._turn = 0
        self._last = float("-inf")
        self._layers_off: dict[Hashable, _Backoff] = {}
        self._images_off: dict[str, _Backoff] = {}
        self.evicted = 0
        """Layers given up because the queue was full."""

    @property
    def queued(self) -> int:
        """How many layers wait."""
        return len(self._waiting)

    def update(self, layers: Iterable[Layer], now: float) -> None:
        """These are the layers with something missing; others are forgotten."""
        found = {layer.key: layer for layer in layers}
        self._dropped &= found.keys()
        for key in [key for key in self._waiting if key not in found]:
            del self._waiting[key]
            self._layers_off.pop(key, None)
        for key, layer in found.items():
            if key not in self._dropped:
                self._add(layer)
        images = {layer.image for layer in self._waiting.values()}
        for known in (self._since, self._turns, self._images_off):
            for image in [image for image in known if image not in images]:
                del known[image]
        for image in images:
            self._since.setdefault(image, now)

    def _add(self, layer: Layer) -> None:
        full = self._rules.queue and len(self._waiting) >= self._rules.queue
        if full and layer.key not in self._waiting:
            self.evicted += 1
            if self._rules.drop_newest:
                self._dropped.add(layer.key)
                return
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            self._dropped.add(oldest)
        self._waiting[layer.key] = layer

    def next(self, now: float, quiet: float) -> Turn | None:
        """Whose turn it is, None when nobody's yet. `quiet`: since when nobody fetches for a reader, seconds."""
        if now < self._last + self._rules.period:
            return None
        best: tuple[int, int, Layer] | None = None
        ready = {image for image in self._since if self._ready(image, now)}
        for layer in self._waiting.values():
            if layer.image not in ready or self._off(self._layers_off.get(layer.key), now):
                continue
            rank = (self._turns.get(layer.image, 0), layer.missing, layer)
            if best is None or rank[:2] < best[:2]:
                best = rank
        if best is None:
            return None
        layer = best[2]
        self._turn += 1
        self._turns[layer.image] = self._turn
        self._last = now
        return Turn(layer.key, 0 if self._rules.period else range_bytes(quiet))

    def _ready(self, image: str, now: float) -> bool:
        if self._off(self._images_off.get(image), now):
            return False
        if now >= self._since[image] + self._rules.patience:
            return True
        touched = max(layer.touched for layer in self._waiting.values() if layer.image == image)
        return now >= touched + self._rules.silence

    @staticmethod
    def _off(backoff: _Backoff | None, now: float) -> bool:
        return backoff is not None and now < backoff.until

    def succeeded(self, key: Hashable) -> None:
        """A range of this layer came."""
        layer = self._waiting.get(key)
        if layer is not None:
            self._layers_off.pop(key, None)
            self._images_off.pop(layer.image, None)

    def failed(self, key: Hashable, now: float, jitter: float, *, all_of_image: bool) -> None:
        """A range of this layer did not come. `jitter`: random in [0, 1)."""
        layer = self._waiting.get(key)
        if layer is None:
            return
        if all_of_image:
            self._images_off.setdefault(layer.image, _Backoff()).failed(now, jitter)
        else:
            self._layers_off.setdefault(key, _Backoff()).failed(now, jitter)


def range_bytes(quiet: float) -> int:
    """How much to ask for at once, `quiet` seconds after somebody last waited for the link."""
    if quiet < _QUIET_SHORT:
        return _RANGE_SHORT
    return _RANGE_MEDIUM if quiet < _QUIET_MEDIUM else RANGE_BYTES
