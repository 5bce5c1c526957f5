"""The daemon's metrics: the Go daemon's names, types, labels and buckets, read from plain counters when asked for.

Source of the names: the Go daemon's fs/metrics. What has no meaning here is left out (COMPATIBILITY.md). Families of our
own follow theirs: soci_fs_layers, soci_fs_layer_spans, soci_fs_layer_spans_present, soci_fs_flight*.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from soci_snapshotter.daemon.processmetrics import process_families
from soci_snapshotter.formats.promtext import Family, encode
from soci_snapshotter.policy.counters import (
    FUSE_FAILURES,
    MICROSECONDS,
    MILLISECONDS,
    PRIORITIES,
    Counters,
    LayerCounters,
)
from soci_snapshotter.policy.status import Background, LayerStatus, State

FAILURE_SECONDS = 300.0
"""fuse_failure_state rises at most once in this time, as the Go daemon's does: an alarm's usual period."""

_DEMAND = PRIORITIES.index("demand")
_BACKGROUND = PRIORITIES.index("background")

# Shown from the start: a query for a counter that is not there finds nothing, not 0.
ALWAYS = (
    "fuse_failure_state",
    "fuse_mount_failure_count",
    "local_mount_failure_count",
    # ours:
    "disk_full",
    "layers_completed",
    "layers_condemned",
    "layers_evicted",
    "layers_refilled",
    "snapshots_condemned",
)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where numbers are: asked at each scrape. None of them waits for anything but a lock that is held briefly."""

    counters: Counters
    layers: Callable[[], Sequence[LayerStatus]]
    background: Callable[[], Background]
    events: Callable[[], Mapping[str, int]]
    """Counts of the daemon as a whole that others keep, by name."""
    flights_queued: Callable[[], int]


class Metrics:
    """Makes the exposition. Thread safe."""

    def __init__(
        self, sources: Sources, *, image_wait: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`image_wait`: seconds after an image's first mount until its reads are counted, once
        (fuse_metrics_emit_wait_duration_sec)."""
        self._sources = sources
        self._image_wait = image_wait
        self._clock = clock
        self._lock = threading.Lock()  # of what follows
        self._failures = 0
        self._failure_state = 0
        self._failure_until = float("-inf")
        self._image_reads: dict[str, int] = {}

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return encode([*self.families(), *process_families()])

    def families(self) -> list[Family]:
        """Everything about layers and images."""
        counters = dict(self._sources.counters.layers)
        layers = self._sources.layers()
        return [
            self._durations(counters),
            self._read_durations(counters),
            self._operations(counters),
            self._served(counters),
            self._images(counters),
            *_sizes(layers),
            *_states(layers),
            *self._flights(counters),
        ]

    def operations(self) -> dict[str, int]:
        """The operation counts, all layers together."""
        totals: dict[str, int] = {}
        for sample in self._operations(dict(self._sources.counters.layers)).samples:
            name = dict(sample.labels)["operation_type"]
            totals[name] = totals.get(name, 0) + int(sample.value)
        return totals

    def _durations(self, counters: Mapping[str, LayerCounters]) -> Family:
        family = Family(
            "soci_fs_operation_duration_milliseconds",
            "histogram",
            "Latency in milliseconds of soci snapshotter operations. Broken down by operation type and layer sha.",
        )
        for digest, layer in counters.items():
            for operation, found in dict(layer.durations).items():
                slots, total = list(found.slots), found.total
                family.add_histogram(MILLISECONDS, slots, total, operation_type=operation, layer=digest)
        return family

    def _read_durations(self, counters: Mapping[str, LayerCounters]) -> Family:
        family = Family(
            "soci_fs_operation_duration_microseconds",
            "histogram",
            "Latency in microseconds of soci snapshotter operations. Broken down by operation type and layer sha.",
        )
        for digest, layer in counters.items():
            if layer.reads.count:
                slots, total = layer.reads.microseconds(), layer.reads.nanoseconds / 1000
                family.add_histogram(
                    MICROSECONDS, slots, total, operation_type="synchronous_read", layer=digest
                )
        return family

    def _operations(self, counters: Mapping[str, LayerCounters]) -> Family:
        family = Family(
            "soci_fs_operation_count",
            "counter",
            "The count of soci snapshotter operations. Broken down by operation type and layer sha.",
        )
        whole = dict.fromkeys(ALWAYS, 0)
        whole["background_fetch_work_queue_evicted"] = self._sources.background().evicted
        events = self._sources.events()
        whole.update(events)
        for digest, layer in counters.items():
            for operation, value in _counts_of(layer):
                if digest:
                    family.add(value, operation_type=operation, layer=digest)
                else:
                    whole[operation] = whole.get(operation, 0) + value
        failures = sum(layer.reads.failed for layer in counters.values())
        failures += sum(events.get(name, 0) for name in FUSE_FAILURES)
        whole["fuse_failure_state"] = self._failed(failures)
        for operation, value in whole.items():
            family.add(value, operation_type=operation, layer="")
        return family

    def _failed(self, failures: int) -> int:
        with self._lock:
            now = self._clock()
            if failures > self._failures and now >= self._failure_until:
                self._failure_state += 1
                self._failure_until = now + FAILURE_SECONDS
            self._failures = failures
            return self._failure_state

    def _served(self, counters: Mapping[str, LayerCounters]) -> Family:
        family = Family(
            "soci_fs_bytes_served",
            "gauge",
            "The number of bytes served per soci snapshotter operations. Broken down by operation type and layer sha.",
        )
        for digest, layer in counters.items():
            if layer.reads.count:
                family.add(layer.reads.served, operation_type="synchronous_bytes_served", layer=digest)
        return family

    def _images(self, counters: Mapping[str, LayerCounters]) -> Family:
        family = Family(
            "soci_fs_image_operation_count_key",
            "gauge",
            "The count of soci snapshotter operations. Broken down by operation type and image digest.",
        )
        family.add(
            self._sources.background().queued, operation_type="background_fetch_work_queue_size", image=""
        )
        with self._lock:
            images = dict(self._sources.counters.images)
            now = self._clock()
            for manifest in self._image_reads.keys() - images.keys():
                del self._image_reads[manifest]
            for manifest, image in images.items():
                if manifest not in self._image_reads and now - image.first >= self._image_wait:
                    known = [counters[digest] for digest in list(image.layers) if digest in counters]
                    self._image_reads[manifest] = sum(layer.reads.count for layer in known)
            for manifest, reads in self._image_reads.items():
                family.add(reads, operation_type="file.Read", image=manifest)
        return family

    def _flights(self, counters: Mapping[str, LayerCounters]) -> Iterable[Family]:
        queued = Family("soci_fs_flights_queued", "gauge", "Flights that wait for a thread.")
        queued.add(self._sources.flights_queued())
        begun = Family("soci_fs_flight_count", "counter", "Flights begun: runs of spans asked for together.")
        spans = Family("soci_fs_flight_spans_count", "counter", "Spans that flights brought.")
        received = Family("soci_fs_flight_bytes", "counter", "Compressed bytes that flights received.")
        for number, priority in enumerate(PRIORITIES):
            flights = [layer.flights for layer in counters.values()]
            begun.add(sum(each.flights[number] for each in flights), priority=priority)
            spans.add(sum(each.spans[number] for each in flights), priority=priority)
            received.add(sum(each.bytes[number] for each in flights), priority=priority)
        return queued, begun, spans, received


def _counts_of(layer: LayerCounters) -> Iterator[tuple[str, int]]:
    """The operation counts of one layer; what never happened is left out."""
    reads, flights = layer.reads, layer.flights
    demanded = flights.spans[_DEMAND] + flights.failures[_DEMAND]
    derived = {
        "synchronous_read_count": reads.count,
        "synchronous_read_remote_registry_fetch_count": demanded,
        "fuse_file_read_failure_count": reads.failed,
        "background_span_fetch_count": flights.spans[_BACKGROUND],
        "background_span_fetch_failure_count": flights.failures[_BACKGROUND],
        "parked_read_count": flights.parked,
    }
    yield from ((operation, value) for operation, value in derived.items() if value)
    yield from ((operation, count.value) for operation, count in dict(layer.counts).items() if count.value)


def _sizes(layers: Iterable[LayerStatus]) -> Iterable[Family]:
    fetched = Family("soci_fs_layer_fetched_size_bytes", "counter", "Total fetched size of the layer")
    size = Family("soci_fs_layer_size_bytes", "counter", "Total size of the layer")
    for layer in layers:
        for mount in layer.mounts:
            fetched.add(layer.fetched, digest=layer.layer, mountpoint=mount)
            size.add(layer.size, digest=layer.layer, mountpoint=mount)
    return fetched, size


def _states(layers: Iterable[LayerStatus]) -> Iterable[Family]:
    states = Family("soci_fs_layers", "gauge", "Layers by state.")
    spans = Family("soci_fs_layer_spans", "gauge", "Spans of the layer.")
    present = Family("soci_fs_layer_spans_present", "gauge", "Spans of the layer that are on the disk.")
    found = dict.fromkeys(State, 0)
    for layer in layers:
        found[layer.state] += 1
        spans.add(layer.spans, digest=layer.layer, ztoc=layer.ztoc)
        present.add(layer.spans_present, digest=layer.layer, ztoc=layer.ztoc)
    for state, number in found.items():
        states.add(number, state=state.value)
    return states, spans, present
