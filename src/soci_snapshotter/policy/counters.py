"""The daemon's own numbers, as plain objects: whoever does something adds to them, daemon.metrics reads them.

Nothing here locks. Under CPython's GIL no other thread comes between the load and the store of `x += 1` on an attribute
or an element (the interpreter changes threads at calls and backward jumps only), so that no count is lost; readers may
see one number a moment before another. On the path of a page fault only `Reads` and `Flights` are touched.
"""

from __future__ import annotations

from bisect import bisect_left

MILLISECONDS = tuple(1 << power for power in range(15))
"""The Go daemon's bounds for operations, 1 to 16384 ms; a value on a bound belongs below it."""
MICROSECONDS = tuple(1 << power for power in range(11))
"""Those for reads, 1 to 1024 us."""

PRIORITIES = ("demand", "ahead", "listed", "guess", "background")
"""What `Flights` counts separately: the names of layers.pool.Priority, most urgent first."""

FUSE_FAILURES = (
    "fuse_file_read_failure_count",
    "fuse_node_getattr_failure_count",
    "fuse_node_listxattr_failure_count",
    "fuse_node_lookup_failure_count",
    "fuse_node_open_failure_count",
    "fuse_node_readdir_failure_count",
    "fuse_unknown_operation_failure_count",
)
"""Requests of the kernel that got an error they should not have: the Go daemon's names, as far as they happen here."""

_SLOTS = 48  # a wait of 2**47 us is 4 years

MAX_LAYERS = 4096
"""Layers whose numbers are kept, as far as nobody uses them any more; the oldest go first. Of 3 KB each."""
MAX_IMAGES = 1024
"""The same for images."""


class Count:
    """Something that happened so often."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int = 1) -> None:
        """It happened once more."""
        self.value += amount


class Histogram:
    """How long an operation took, in the milliseconds of `MILLISECONDS`."""

    __slots__ = ("slots", "total")

    def __init__(self) -> None:
        self.slots = [0] * (len(MILLISECONDS) + 1)
        """Values up to each bound and above the one before; the last are those above all of them."""
        self.total = 0.0
        """Their sum."""

    def observe(self, value: float) -> None:
        """It took `value` milliseconds."""
        self.slots[bisect_left(MILLISECONDS, value)] += 1
        self.total += value


class Reads:
    """What the kernel asked of one layer's file, and how long it waited."""

    __slots__ = ("failed", "nanoseconds", "served", "slots")

    def __init__(self) -> None:
        self.served = 0
        """Bytes they were given."""
        self.failed = 0
        """Those that got an error."""
        self.nanoseconds = 0
        """The sum of their waits."""
        self.slots = [0] * _SLOTS
        """Requests by wait: slot k has those of at most 2**k us and more than the slot before."""

    def answered(self, nanoseconds: int, size: int) -> None:
        """A request got `size` bytes after so long, 1 ns at least."""
        self.served += size
        self.nanoseconds += nanoseconds
        self.slots[((nanoseconds - 1) // 1000).bit_length()] += 1

    def refused(self) -> None:
        """A request got an error."""
        self.failed += 1

    @property
    def count(self) -> int:
        """Requests answered, errors too."""
        return sum(self.slots) + self.failed

    def microseconds(self) -> list[int]:
        """`slots` as `MICROSECONDS` has them, one more for those above."""
        bounds = len(MICROSECONDS)
        return [*self.slots[:bounds], sum(self.slots[bounds:])]


class Flights:
    """What one layer's flights did, by priority (`PRIORITIES`). Written under the reader's lock, read without."""

    __slots__ = ("bytes", "failures", "flights", "parked", "spans")

    def __init__(self) -> None:
        self.flights = [0] * len(PRIORITIES)
        """Begun."""
        self.bytes = [0] * len(PRIORITIES)
        """Compressed bytes received."""
        self.spans = [0] * len(PRIORITIES)
        """Verified and written."""
        self.failures = [0] * len(PRIORITIES)
        """Spans given up."""
        self.parked = 0
        """Requests of the kernel that had to wait."""


class LayerCounters:
    """Everything that is counted of one layer, under whichever ztoc; of "" what belongs to none."""

    __slots__ = ("counts", "durations", "flights", "reads")

    def __init__(self) -> None:
        self.counts: dict[str, Count] = {}
        self.durations: dict[str, Histogram] = {}
        self.flights = Flights()
        self.reads = Reads()

    def count(self, operation: str) -> Count:
        """The count called so."""
        found = self.counts.get(operation)
        return self.counts.setdefault(operation, Count()) if found is None else found

    def duration(self, operation: str) -> Histogram:
        """The durations of the operation called so."""
        found = self.durations.get(operation)
        return self.durations.setdefault(operation, Histogram()) if found is None else found


class ImageCounters:
    """Which layers an image has here, and since when (seconds, of whatever clock the caller has)."""

    __slots__ = ("first", "layers")

    def __init__(self, first: float) -> None:
        self.first = first
        self.layers: dict[str, None] = {}


class Counters:
    """The daemon's numbers: one object, made by daemon.wiring and handed down."""

    def __init__(self) -> None:
        self.layers: dict[str, LayerCounters] = {}
        """Layer digest -> its numbers. Copy it (list, dict) before going through it."""
        self.images: dict[str, ImageCounters] = {}
        """Manifest digest -> its layers. The same."""

    def layer(self, digest: str) -> LayerCounters:
        """The numbers of a layer; "" for what belongs to no layer."""
        found = self.layers.get(digest)
        if found is None:
            _make_room(self.layers, MAX_LAYERS)
            found = self.layers.setdefault(digest, LayerCounters())
        return found

    def mounted(self, manifest: str, layer: str, now: float) -> None:
        """A layer of this image was mounted."""
        found = self.images.get(manifest)
        if found is None:
            _make_room(self.images, MAX_IMAGES)
            found = self.images.setdefault(manifest, ImageCounters(now))
        found.layers[layer] = None


def _make_room(table: dict[str, LayerCounters] | dict[str, ImageCounters], limit: int) -> None:
    """Let the oldest go; whoever holds its counters goes on counting where nobody looks."""
    while len(table) >= limit:
        oldest = next(iter(table), None)
        if oldest is None or table.pop(oldest, None) is None:
            return
