"""The background fetch's threads over real readers and files, with scripted sources."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from soci_snapshotter.errors import Remote
from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.layers import background
from soci_snapshotter.layers.background import Background
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.layers.pool import FlightPool, Priority
from soci_snapshotter.layers.reader import LayerReader, ReadOptions
from soci_snapshotter.policy.schedule import Rules
from soci_snapshotter.store.layerfiles import SpanFile

CASE = Path(__file__).parents[1] / "vectors" / "gnu6-edge1-span64k"
BLOB = (CASE / "layer.tar.gz").read_bytes()
TABLE = ztoc.decode_spans((CASE / "ztoc.bin").read_bytes())
SPANS = span_table(TABLE)
NOW = Rules(silence=0.0)


@dataclass
class Source:
    """The layer's blob in pieces of 10,000 bytes; `play` is called before each and may wait or raise."""

    play: Callable[[], None] = lambda: None
    asked: list[tuple[int, int]] = field(default_factory=list)
    group: str = "r.example.com"

    def close(self) -> None:
        """Nothing to end."""

    def warm(self) -> None:
        """Nothing to open."""

    def read_range(self, start: int, end: int, sink: Callable[[memoryview], None], deadline: float) -> None:
        self.asked.append((start, end))
        for position in range(start, end, 10_000):
            self.play()
            sink(memoryview(BLOB[position : min(position + 10_000, end)]))


class Kernel:
    """Counts answers."""

    def __init__(self) -> None:
        self.errors: list[int] = []
        self.answered: list[int] = []

    def reply(self, unique: int, data: Buffer) -> None:
        self.answered.append(unique)

    def reply_error(self, unique: int, code: int) -> None:
        self.errors.append(unique)


@dataclass(frozen=True)
class Record:
    """Where the layer comes from."""

    sources: tuple[str, ...]


@dataclass
class Layer:
    """An open layer, as far as the background fetch sees."""

    key: str
    record: Record
    reader: LayerReader
    files: SpanFile
    source: Source
    complete: threading.Event

    @property
    def full(self) -> bool:
        """Whether everything is here."""
        return self.files.has(0, len(SPANS) - 1)


@dataclass
class Node:
    """Some layers around one pool."""

    pool: FlightPool
    kernel: Kernel
    make: Callable[[str, str], Layer]
    layers: list[Layer] = field(default_factory=list)

    def add(self, key: str, image: str = "x") -> Layer:
        """One more layer."""
        layer = self.make(key, image)
        self.layers.append(layer)
        return layer

    def background(self, rules: Rules = NOW, *, enabled: bool = True) -> Background:
        """Over the layers as they are when it looks."""
        return Background(lambda: list(self.layers), self.pool, rules, enabled=enabled)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """Layers are the vector's, all with the same blob."""
    monkeypatch.setattr(background, "LOOK_SECONDS", 0.01)
    fd = os.open(CASE / "ztoc.bin", os.O_RDONLY)
    kernel = Kernel()
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        pool = stack.enter_context(FlightPool(4))

        def make(key: str, image: str) -> Layer:
            directory = tmp_path / key
            directory.mkdir()
            size = data_size(TABLE.uncompressed_size)
            files = stack.enter_context(SpanFile(directory, len(SPANS), size, b"a" * 36))
            source, complete = Source(), threading.Event()
            reader = LayerReader(
                name=key,
                spans=SPANS,
                files=files,
                windows_fd=fd,
                source=source,
                replies=kernel,
                pool=pool,
                options=ReadOptions(flight_seconds=10, ahead=False),
                on_complete=complete.set,
            )
            return Layer(key, Record((image,)), reader, files, source, complete)

        yield Node(pool, kernel, make)


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_everything_comes_with_nobody_reading(node: Node) -> None:
    """Three layers of two images: all complete, each told once, no byte asked for twice; later layers too."""
    first = [node.add("a"), node.add("b"), node.add("c", "y")]
    with node.background() as running:
        for layer in first:
            assert layer.complete.wait(20)
        until(lambda: running.queued == 0)
        late = node.add("d")
        assert late.complete.wait(20)
    for layer in node.layers:
        assert layer.full
        assert sum(end - start for start, end in layer.source.asked) <= len(BLOB) + len(SPANS)
    assert running.failures == 0
    assert running.bytes >= 4 * (len(BLOB) - 10)


def test_the_off_switch(node: Node) -> None:
    """Disabled, nothing is asked for."""
    layer = node.add("a")
    with node.background(enabled=False):
        time.sleep(0.2)
    assert layer.source.asked == []


def test_silence_is_kept(node: Node) -> None:
    """Nothing is asked for until nobody has missed a span for the configured time."""
    layer = node.add("a")
    with node.background(Rules(silence=0.5)):
        begun = time.monotonic()
        while time.monotonic() < begun + 1.0:
            layer.reader.touched = time.monotonic()
            time.sleep(0.02)
        assert layer.source.asked == []
        assert layer.complete.wait(20)


def test_a_range_is_held_up_while_readers_bytes_move(node: Node) -> None:
    """As long as readers need the link a range under way gets no further piece; then it goes on by itself."""
    layer, pieces = node.add("a"), [0]

    def play() -> None:
        pieces[0] += 1
        if pieces[0] == 3:
            node.pool.moved()

    layer.source.play = play
    with node.background():
        until(lambda: pieces[0] >= 3)
        for _ in range(30):
            node.pool.moved()
            time.sleep(0.01)
            assert pieces[0] == 3
        assert layer.complete.wait(20)
    assert len(layer.source.asked) == 1


def test_a_reader_without_end_does_not_hold_a_range_up_for_ever(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After HOLD_SECONDS the range goes on though bytes still move for others."""
    monkeypatch.setattr(background, "HOLD_SECONDS", 0.1)
    layer = node.add("a")

    def play() -> None:
        node.pool.moved()

    layer.source.play = play
    with node.background(Rules(silence=0.0)):
        until(lambda: bool(layer.source.asked))
        assert layer.complete.wait(20)
    assert len(layer.source.asked) == 1


def test_a_registry_that_is_away_costs_nobody_anything(node: Node) -> None:
    """Failures back off, are counted, answer no reader; when the registry is back, everything comes."""
    layer, other, away = node.add("a"), node.add("z", "y"), threading.Event()

    def play() -> None:
        if not away.is_set():
            raise Remote("r.example.com: no answer")

    layer.source.play = play
    with node.background() as running:
        assert other.complete.wait(20)
        time.sleep(0.3)
        assert 1 <= running.failures <= 2
        assert len(layer.source.asked) <= 2
        away.set()
        assert layer.complete.wait(20)
    assert node.kernel.errors == []


def test_stopping_gives_a_range_up_soon(node: Node) -> None:
    """A range under way ends at its next piece when the block is left; files close behind it."""
    layer, closed = node.add("a"), threading.Event()
    layer.source.play = lambda: time.sleep(0.02)
    with node.background():
        until(lambda: bool(layer.source.asked))
    layer.reader.retire(closed.set)
    assert closed.wait(1)
    assert not layer.full
    assert layer.reader.flying == 0


def test_a_layer_dropped_under_a_range_is_left_alone(node: Node) -> None:
    """Retired while it is fetched: the range ends, the files close, other layers are fetched on."""
    layer, closed = node.add("a"), threading.Event()
    layer.source.play = lambda: time.sleep(0.02)
    with node.background():
        until(lambda: bool(layer.source.asked))
        layer.reader.retire(closed.set)
        assert closed.wait(5)
        node.layers.remove(layer)
        assert node.add("b").complete.wait(20)
    assert len(layer.source.asked) == 1


def test_a_reader_is_served_first(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read in the middle of a slow range: its own request, answered while the range is still under way."""
    layer = node.add("a")
    layer.source.play = lambda: time.sleep(0.01 if threading.current_thread().name.startswith("b") else 0)
    monkeypatch.setattr("soci_snapshotter.layers.flight.JOIN_BYTES", 70_000)
    with node.background():
        until(lambda: bool(layer.source.asked))
        start = SPANS.uncompressed_range(14)[0]
        assert layer.reader.read(1, start, 100) is None
        until(lambda: node.kernel.answered == [1])
        assert not layer.full
        assert layer.source.asked[1] == SPANS.compressed_range(14)
        assert layer.complete.wait(20)
    assert layer.reader.counts.flights[Priority.DEMAND] == 1
