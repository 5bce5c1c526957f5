"""Counters and what is made of them for Prometheus, against the Go daemon's names and a parser not our own."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from soci_snapshotter.daemon.metrics import ALWAYS, FAILURE_SECONDS, Metrics, Sources
from soci_snapshotter.formats.promtext import Family, encode
from soci_snapshotter.policy.counters import (
    MAX_IMAGES,
    MAX_LAYERS,
    MICROSECONDS,
    MILLISECONDS,
    Counters,
    Histogram,
    Reads,
)
from soci_snapshotter.policy.status import Background, LayerStatus, State

LAYER = "sha256:" + "a" * 64
ZTOC = "sha256:" + "b" * 64
IMAGE = "sha256:" + "c" * 64

# What the Go daemon's fs/metrics registers: name -> type, labels.
GO = {
    "soci_fs_operation_duration_milliseconds": ("histogram", {"operation_type", "layer"}),
    "soci_fs_operation_duration_microseconds": ("histogram", {"operation_type", "layer"}),
    "soci_fs_operation_count": ("counter", {"operation_type", "layer"}),
    "soci_fs_bytes_served": ("gauge", {"operation_type", "layer"}),
    "soci_fs_image_operation_count_key": ("gauge", {"operation_type", "image"}),
    "soci_fs_layer_fetched_size_bytes": ("counter", {"digest", "mountpoint"}),
    "soci_fs_layer_size_bytes": ("counter", {"digest", "mountpoint"}),
}
GO_MILLISECONDS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384]
GO_MICROSECONDS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(
    counters: Counters | None = None,
    layers: Iterable[LayerStatus] = (),
    *,
    background: Background | None = None,
    events: dict[str, int] | None = None,
    clock: Clock | None = None,
) -> Metrics:
    """Metrics over values that a test chose."""
    sources = Sources(
        counters=counters or Counters(),
        layers=lambda: list(layers),
        background=lambda: background or Background(),
        events=lambda: events or {},
        flights_queued=lambda: 3,
    )
    return Metrics(sources, image_wait=60.0, clock=clock or Clock())


def values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a family by the values of their labels."""
    found = next(family for family in metrics.families() if family.name == name)
    return {
        tuple(text for _, text in sample.labels): sample.value
        for sample in found.samples
        if not sample.suffix
    }


def busy() -> tuple[Counters, LayerStatus]:
    """Something of everything."""
    counters = Counters()
    layer = counters.layer(LAYER)
    layer.duration("mount").observe(3.5)
    layer.reads.answered(1500, 4096)
    layer.count("resolve_cache_hit").add()
    layer.flights.spans[0] = 2
    layer.flights.failures[0] = 1
    layer.flights.spans[4] = 5
    counters.layer("").count("fuse_mount_failure_count").add()
    status = LayerStatus(
        images=("r.example.com/a:1",),
        layer=LAYER,
        ztoc=ZTOC,
        state=State.LAZY,
        spans=10,
        spans_present=7,
        size=1000,
        fetched=700,
        disk=0,
        mounts=("/root/m/1", "/root/m/2"),
    )
    return counters, status


def test_names_types_and_labels_are_the_go_daemons() -> None:
    """Every family of the Go daemon is there, under its name (no _total), with its type and its labels."""
    counters, status = busy()
    text = made(counters, [status]).exposition().decode()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    found = {name: set[str]() for name in GO}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removesuffix(
                "_total"
            )  # which this parser adds to counters, as its writer does
            if name not in GO:
                name = family.name
            if name in GO:
                found[name] |= set(sample.labels) - {"le"}
    plain = {line.partition("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert plain >= {name for name, (kind, _) in GO.items() if kind != "histogram"}
    assert found == {name: labels for name, (_, labels) in GO.items()}
    assert {name: types[name] for name in GO} == {name: kind for name, (kind, _) in GO.items()}


def test_buckets_are_the_go_daemons() -> None:
    """The bounds as they appear in the text, and +Inf behind them, in both units."""
    counters, _ = busy()
    text = made(counters).exposition().decode()
    for name, bounds in (("milliseconds", GO_MILLISECONDS), ("microseconds", GO_MICROSECONDS)):
        lines = [
            line for line in text.splitlines() if line.startswith(f"soci_fs_operation_duration_{name}_bucket")
        ]
        assert [line.split('le="')[1].split('"')[0] for line in lines] == [*map(str, bounds), "+Inf"]
    assert (list(MILLISECONDS), list(MICROSECONDS)) == (GO_MILLISECONDS, GO_MICROSECONDS)


@given(st.lists(st.floats(0, 1e6)))
def test_histograms_count_as_prometheus_does(observed: list[float]) -> None:
    """Each bucket has the values up to its bound, bound included."""
    histogram = Histogram()
    for value in observed:
        histogram.observe(value)
    family = Family("x", "histogram", "")
    family.add_histogram(MILLISECONDS, histogram.slots, histogram.total)
    by_bound = {s.bound: s.value for s in family.samples if s.suffix == "_bucket"}
    for bound in MILLISECONDS:
        assert by_bound[str(bound)] == sum(value <= bound for value in observed)
    assert by_bound["+Inf"] == len(observed)


@given(st.lists(st.integers(1, 1 << 50)))
def test_reads_are_sorted_by_microseconds(waits: list[int]) -> None:
    """Nanoseconds land in the slot of the first bound that they do not exceed; sums are exact."""
    reads = Reads()
    for wait in waits:
        reads.answered(wait, 10)
    below = 0
    for bound, slot in zip(MICROSECONDS, reads.microseconds(), strict=False):
        below += slot
        assert below == sum(wait <= bound * 1000 for wait in waits)
    assert (sum(reads.microseconds()), reads.count) == (len(waits), len(waits))
    assert (reads.nanoseconds, reads.served) == (sum(waits), 10 * len(waits))


def test_no_count_is_lost_between_threads() -> None:
    """Eight threads adding at once: every addition is there, with the interpreter changing threads all the time."""
    import sys

    counters, each = Counters(), 20_000
    interval = sys.getswitchinterval()

    def work() -> None:
        layer = counters.layer(LAYER)
        for _ in range(each):
            layer.reads.answered(900, 1)
            layer.count("x").add()
            layer.duration("y").observe(1.0)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    layer = counters.layers[LAYER]
    assert (layer.reads.count, layer.reads.served) == (8 * each, 8 * each)
    assert layer.count("x").value == sum(layer.duration("y").slots) == 8 * each


@given(st.text(), st.text(), st.floats(allow_nan=False))
def test_any_text_survives_another_parser(label: str, help_text: str, value: float) -> None:
    """Whatever a label holds is what a Prometheus parser reads back, and the number, too."""
    family = Family("x", "gauge", help_text)
    family.add(value, name=label)
    parsed = list(text_string_to_metric_families(encode([family]).decode()))
    samples = [sample for family in parsed for sample in family.samples]
    assert [(sample.labels, sample.value) for sample in samples] == [({"name": label}, value)]


def test_operations_of_a_layer() -> None:
    """Counts that are derived from flights and reads have the Go names; those of the whole daemon an empty layer."""
    counters, status = busy()
    metrics = made(counters, [status], background=Background(evicted=4), events={"layers_completed": 2})
    assert values(metrics, "soci_fs_operation_count") == {(name, ""): 0 for name in ALWAYS} | {
        ("synchronous_read_count", LAYER): 1,
        ("synchronous_read_remote_registry_fetch_count", LAYER): 3,
        ("background_span_fetch_count", LAYER): 5,
        ("resolve_cache_hit", LAYER): 1,
        ("fuse_mount_failure_count", ""): 1,
        ("background_fetch_work_queue_evicted", ""): 4,
        ("layers_completed", ""): 2,
    }
    assert metrics.operations()["background_span_fetch_count"] == 5
    assert values(metrics, "soci_fs_bytes_served") == {("synchronous_bytes_served", LAYER): 4096}
    assert values(metrics, "soci_fs_layer_fetched_size_bytes") == {
        (LAYER, "/root/m/1"): 700,
        (LAYER, "/root/m/2"): 700,
    }
    assert values(metrics, "soci_fs_layers") == {
        ("lazy",): 1,
        ("filling",): 0,
        ("proving",): 0,
        ("complete",): 0,
        ("condemned",): 0,
    }


def test_failure_state_rises_once_in_five_minutes() -> None:
    """As the Go daemon's: a burst of failures is one; a failure after the pause is another, one within it none."""
    counters, clock = Counters(), Clock()
    metrics = made(counters, clock=clock)

    def state() -> float:
        return values(metrics, "soci_fs_operation_count")["fuse_failure_state", ""]

    assert state() == 0
    for _ in range(50):
        counters.layer(LAYER).reads.refused()
    assert (state(), state()) == (1, 1)
    clock.now += 10
    counters.layer(LAYER).reads.refused()
    assert state() == 1
    clock.now += FAILURE_SECONDS
    assert state() == 1
    counters.layer(LAYER).reads.refused()
    assert state() == 2


def test_reads_of_an_image_are_counted_once_after_the_wait() -> None:
    """fuse_metrics_emit_wait_duration_sec: nothing before it, then the reads of the image's layers, for good."""
    counters, clock = Counters(), Clock()
    counters.mounted(IMAGE, LAYER, clock.now)
    metrics = made(counters, background=Background(queued=7), clock=clock)
    counters.layer(LAYER).reads.answered(1000, 1)
    queue = {("background_fetch_work_queue_size", ""): 7}
    assert values(metrics, "soci_fs_image_operation_count_key") == queue
    clock.now += 60
    expected = queue | {("file.Read", IMAGE): 1}
    assert values(metrics, "soci_fs_image_operation_count_key") == expected
    counters.layer(LAYER).reads.answered(1000, 1)
    assert values(metrics, "soci_fs_image_operation_count_key") == expected


def test_old_layers_and_images_make_room() -> None:
    """A node that sees many images for months keeps a bounded number of series, the newest."""
    counters = Counters()
    for number in range(max(MAX_LAYERS, MAX_IMAGES) + 10):
        counters.layer(f"layer-{number}")
        counters.mounted(f"image-{number}", "layer", 0.0)
    assert (len(counters.layers), len(counters.images)) == (MAX_LAYERS, MAX_IMAGES)
    assert "layer-0" not in counters.layers
    assert f"layer-{MAX_LAYERS + 9}" in counters.layers


def test_process_metrics_are_there() -> None:
    """What dashboards know from every process, with sane values."""
    text = made().exposition().decode()
    found = {
        f.name: f.samples[0].value for f in text_string_to_metric_families(text) if f.name[:8] == "process_"
    }
    assert found["process_resident_memory_bytes"] > 1 << 20
    assert found["process_open_fds"] > 2
    assert found["process_start_time_seconds"] > 1.6e9
    assert found.keys() >= {"process_cpu_seconds", "process_max_fds", "process_virtual_memory_bytes"}


def test_failures_without_a_layer_count_for_the_state() -> None:
    """What the FUSE loop itself had to refuse is shown under an empty layer, and raises the failure state."""
    events = {"fuse_node_lookup_failure_count": 0}
    metrics = made(events=events)
    assert values(metrics, "soci_fs_operation_count")["fuse_failure_state", ""] == 0
    events["fuse_node_lookup_failure_count"] = 3
    counts = values(metrics, "soci_fs_operation_count")
    assert counts["fuse_node_lookup_failure_count", ""] == 3
    assert counts["fuse_failure_state", ""] == 1
