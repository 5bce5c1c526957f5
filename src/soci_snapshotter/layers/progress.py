"""How far each layer is, read from the objects themselves; no lock is held for long."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from soci_snapshotter.layers.openlayer import Layer
from soci_snapshotter.policy.counters import Counters, Reads
from soci_snapshotter.policy.status import LayerStatus, State


def statuses(
    layers: Iterable[Layer], counters: Counters, mount_root: Path, *, disk: bool = False
) -> list[LayerStatus]:
    """One for each layer. `mount_root` has the mounts; with `disk` each layer's directory is looked at, too."""
    return [_status(layer, counters, mount_root, disk=disk) for layer in layers]


def _status(layer: Layer, counters: Counters, mount_root: Path, *, disk: bool) -> LayerStatus:
    lazy = layer.lazy  # first: what is complete is recorded before this goes
    record = layer.record
    counted = counters.layers.get(record.layer_digest)
    reads = Reads() if counted is None else counted.reads
    if lazy is not None:
        spans, present, size = len(lazy.spans), lazy.files.live.count(1), lazy.compressed_size
        # Neighbors share a byte, and the stream's frame belongs to no span: none and all are exact, the rest nearly.
        fetched = min(max(size - lazy.reader.missing(), 0), size) if present else 0
        flights = lazy.reader.flying
        state = State.PROVING if present == spans else State.FILLING if flights else State.LAZY
    else:
        spans, size, flights = record.spans, record.compressed_size, 0
        present, fetched = (spans, size) if record.complete else (0, 0)
        state = State.COMPLETE if record.complete else State.LAZY
    if record.condemned:
        state = State.CONDEMNED
    return LayerStatus(
        images=record.sources,
        layer=record.layer_digest,
        ztoc=record.ztoc_digest,
        state=state,
        spans=spans,
        spans_present=present,
        size=size,
        fetched=fetched,
        disk=_disk(layer) if disk else 0,
        mounts=tuple(str(mount_root / str(number)) for number in sorted(record.standing())),
        flights=flights,
        reads=reads.count,
        served=reads.served,
        errors=reads.failed,
    )


def _disk(layer: Layer) -> int:
    try:
        return layer.allocated()[0]
    except OSError:  # dropped meanwhile
        return 0
