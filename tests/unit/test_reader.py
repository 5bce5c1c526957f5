"""Reads and flights of one layer, with a scripted source and the kernel played by a list."""

from __future__ import annotations

import errno
import gzip
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from soci_snapshotter.errors import Remote
from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.zinfo import SpanTable, span_table
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.layers.pool import FlightPool, Priority
from soci_snapshotter.layers.reader import LayerReader, ReadOptions
from soci_snapshotter.store.layerfiles import SpanFile

CASE = Path(__file__).parents[1] / "vectors" / "gnu6-edge1-span64k"
BLOB = (CASE / "layer.tar.gz").read_bytes()
TAR = gzip.decompress(BLOB)


@dataclass
class Kernel:
    """Hears the answers to parked requests."""

    answers: dict[int, bytes | int] = field(default_factory=dict)
    heard: threading.Condition = field(default_factory=threading.Condition)

    def reply(self, unique: int, data: Buffer) -> None:
        self._answer(unique, bytes(data))

    def reply_error(self, unique: int, code: int) -> None:
        self._answer(unique, code)

    def _answer(self, unique: int, answer: bytes | int) -> None:
        with self.heard:
            assert unique not in self.answers, "answered twice"
            self.answers[unique] = answer
            self.heard.notify_all()

    def wait(self, count: int) -> None:
        """Until `count` requests are answered."""
        with self.heard:
            assert self.heard.wait_for(lambda: len(self.answers) >= count, timeout=20)


@dataclass
class Source:
    """The layer's blob; `play` may change or refuse what a request gets."""

    play: Callable[[int, bytes], bytes] = lambda number, data: data
    gate: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[int, int]] = field(default_factory=list)
    group: str = "r.example.com"
    warmed: int = 0

    def warm(self) -> None:
        self.warmed += 1

    def read_range(self, start: int, end: int, sink: Callable[[memoryview], None], deadline: float) -> None:
        self.asked.append((start, end))
        number = len(self.asked)
        assert self.gate.wait(20)
        data = memoryview(self.play(number, BLOB[start:end]))
        for position in range(0, len(data), 10_000):
            sink(data[position : position + 10_000])


@dataclass
class Bench:
    """One layer under test."""

    reader: LayerReader
    kernel: Kernel
    source: Source
    spans: SpanTable
    files: SpanFile
    pool: FlightPool
    completions: list[str]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    table = ztoc.decode_spans((CASE / "ztoc.bin").read_bytes())
    spans, kernel, source = span_table(table), Kernel(), Source()
    fd = os.open(CASE / "ztoc.bin", os.O_RDONLY)
    completions: list[str] = []
    with (
        SpanFile(tmp_path, len(spans), data_size(table.uncompressed_size), b"a" * 36) as files,
        FlightPool(4) as pool,
    ):
        reader = LayerReader(
            name="layer",
            spans=spans,
            files=files,
            windows_fd=fd,
            source=source,
            replies=kernel,
            pool=pool,
            options=ReadOptions(flight_seconds=10, ahead=False),
            on_complete=lambda: completions.append(threading.current_thread().name),
        )
        yield Bench(reader, kernel, source, spans, files, pool, completions)
        source.gate.set()
    os.close(fd)


def test_every_byte_comes_right(bench: Bench) -> None:
    """Reads all over the layer, each over several spans: parked at first, then at once, always the tar's bytes."""
    bench.source.gate.set()
    wanted = {
        unique: unique * 60_000 for unique in range(1, 100) if unique * 60_000 + 150_000 < bench.reader.size
    }
    for unique, offset in wanted.items():
        data = bench.reader.read(unique, offset, 150_000)
        if data is not None:
            bench.kernel.answers[unique] = bytes(data)
    bench.kernel.wait(len(wanted))
    padded = TAR + bytes(1024)
    for unique, offset in wanted.items():
        assert bench.kernel.answers[unique] == padded[offset : offset + 150_000], unique
    assert bench.reader.read(999, 60_000, 150_000) == padded[60_000:210_000]


def test_one_flight_however_many_readers(bench: Bench) -> None:
    """50 readers of one span: one request to the registry, 50 right answers."""
    for unique in range(50):
        assert bench.reader.read(unique, 4096 * (unique % 3), 512) is None
    bench.source.gate.set()
    bench.kernel.wait(50)
    assert len(bench.source.asked) == 1
    assert all(bench.kernel.answers[unique] == TAR[4096 * (unique % 3) :][:512] for unique in range(50))


def test_neighbors_come_in_one_request(bench: Bench) -> None:
    """A read over five missing spans makes one ranged GET from the first one's start to the last one's end."""
    start = bench.spans.uncompressed_range(2)[0]
    end = bench.spans.uncompressed_range(6)[1]
    bench.source.gate.set()
    assert bench.reader.read(1, start, end - start) is None
    bench.kernel.wait(1)
    assert bench.source.asked == [(bench.spans.compressed_range(2)[0], bench.spans.compressed_range(6)[1])]
    assert bench.kernel.answers[1] == TAR[start:end]


def test_a_span_that_is_wrong_once_is_fetched_again(bench: Bench) -> None:
    """One flipped bit in one answer: asked again, the right bytes."""
    bench.source.play = lambda number, data: data if number > 1 else bytes([data[0] ^ 1]) + data[1:]
    bench.source.gate.set()
    assert bench.reader.read(1, 0, 4096) is None
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == TAR[:4096]
    assert len(bench.source.asked) == 2


def test_a_span_that_is_wrong_twice_is_an_error(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """EIO after one retry, a log line with layer and span, nothing marked; the next read starts afresh."""
    bench.source.play = lambda number, data: bytes([data[0] ^ 1]) + data[1:]
    bench.source.gate.set()
    assert bench.reader.read(1, 0, 4096) is None
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == errno.EIO
    assert len(bench.source.asked) == 2
    end = time.monotonic() + 5
    while not caplog.records and time.monotonic() < end:
        time.sleep(0.01)
    assert (vars(caplog.records[0])["layer"], vars(caplog.records[0])["span"]) == ("layer", 0)
    assert not any(bench.files.live)
    bench.source.play = lambda number, data: data
    assert bench.reader.read(2, 0, 4096) is None
    bench.kernel.wait(2)
    assert bench.kernel.answers[2] == TAR[:4096]


def test_a_dead_registry_costs_its_readers_only(bench: Bench) -> None:
    """While flights fail or hang, what is here is served at once; a read of two lost spans is answered once."""
    bench.source.gate.set()
    assert bench.reader.read(1, 0, 512) is None
    bench.kernel.wait(1)

    def dead(number: int, data: bytes) -> bytes:
        raise Remote("r.example.com: no answer")

    bench.source.play = dead
    start = bench.spans.uncompressed_range(10)[0]
    assert bench.reader.read(2, start, 200_000) is None
    assert bench.reader.read(3, 0, 512) == TAR[:512]
    bench.kernel.wait(2)
    assert bench.kernel.answers[2] == errno.EIO


def test_reads_ahead_wake_nobody_and_are_used(bench: Bench) -> None:
    """Spans fetched ahead are there when they are read."""
    bench.source.gate.set()
    bench.reader.fetch_ahead(range(3, 6))
    end = time.monotonic() + 10
    while not bench.files.has(3, 5) and time.monotonic() < end:
        time.sleep(0.01)
    start = bench.spans.uncompressed_range(3)[0]
    assert bench.reader.read(1, start, 1000) == TAR[start : start + 1000]


def test_completion_is_told_once(bench: Bench) -> None:
    """Whoever must know hears of the last span once, from a flight; and again only after marks were taken back."""
    bench.source.gate.set()
    last = len(bench.spans) - 1
    bench.reader.fetch_ahead(range(last))
    until(lambda: bench.files.has(0, last - 1))
    assert bench.completions == []
    bench.reader.fetch_ahead(range(last + 1))
    until(lambda: bool(bench.completions))
    bench.reader.fetch_ahead(range(last + 1))
    until(lambda: not bench.reader.flying)
    assert bench.completions == ["flight"]
    bench.files.epoch += 1
    bench.files.live[3] = 0
    bench.reader.fetch_ahead([3])
    until(lambda: len(bench.completions) == 2)


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_files_close_behind_the_last_flight(bench: Bench) -> None:
    """A layer dropped while a flight is under way: nothing is closed before it ended, and no flight starts after."""
    closed = threading.Event()
    assert bench.reader.read(1, 0, 512) is None
    bench.reader.retire(closed.set)
    assert not closed.wait(0.2)
    bench.source.gate.set()
    bench.kernel.wait(1)
    assert closed.wait(10)
    assert bench.kernel.answers[1] == TAR[:512]
    start = bench.spans.uncompressed_range(10)[0]
    assert bench.reader.read(2, start, 512) is None
    assert bench.kernel.answers[2] == errno.EIO
    assert len(bench.source.asked) == 1


def test_a_stopping_daemon_leaves_reads_to_the_next(bench: Bench) -> None:
    """A flight that fails while the daemon stops answers nobody: the kernel sends the request again."""

    def dead(number: int, data: bytes) -> bytes:
        raise Remote("r.example.com: connection closed")

    bench.source.play = dead
    assert bench.reader.read(1, 0, 512) is None
    bench.pool.close(0.1)
    assert not bench.pool.idle
    bench.source.gate.set()
    end = time.monotonic() + 10
    while not bench.pool.idle and time.monotonic() < end:
        time.sleep(0.01)
    assert bench.pool.idle
    assert bench.kernel.answers == {}


def test_demand_goes_before_what_is_only_likely() -> None:
    """With one thread busy, a demand job queued last runs before jobs queued ahead of it."""
    order: list[str] = []
    gate = threading.Event()
    with FlightPool(1) as pool:
        pool.submit(Priority.AHEAD, lambda: gate.wait(10))  # type: ignore[arg-type, return-value]
        for number in range(3):
            pool.submit(Priority.AHEAD, lambda number=number: order.append(f"ahead {number}"))  # type: ignore[misc]
        pool.submit(Priority.DEMAND, lambda: order.append("demand"))
        gate.set()
        end = time.monotonic() + 10
        while len(order) < 4 and time.monotonic() < end:
            time.sleep(0.01)
    assert order == ["demand", "ahead 0", "ahead 1", "ahead 2"]
