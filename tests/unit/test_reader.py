"""Reads and flights of one layer, with a scripted source and the kernel played by a list."""

from __future__ import annotations

import errno
import gzip
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from soci_snapshotter.errors import Integrity, Remote
from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.prefetch import SpanRange
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
    pieces: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1_000_000))
    """How many pieces of 10,000 bytes the first request still gets."""
    reached: threading.Event = field(default_factory=threading.Event)
    """The first request stands before a piece."""
    group: str = "r.example.com"
    warmed: int = 0
    closed: int = 0

    def close(self) -> None:
        self.closed += 1

    def warm(self) -> None:
        self.warmed += 1

    def read_range(self, start: int, end: int, sink: Callable[[memoryview], None], deadline: float) -> None:
        self.asked.append((start, end))
        number = len(self.asked)
        assert self.gate.wait(20)
        data = memoryview(self.play(number, BLOB[start:end]))
        for position in range(0, len(data), 10_000):
            if number == 1:
                self.reached.set()
                assert self.pieces.acquire(timeout=20)
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
    """A reader that fetches what it is asked for, no more."""
    with opened(tmp_path, ReadOptions(flight_seconds=10, ahead=False)) as found:
        yield found


@pytest.fixture
def ahead(tmp_path: Path) -> Iterator[Bench]:
    """A reader that reads ahead, too."""
    with opened(tmp_path, ReadOptions(flight_seconds=10)) as found:
        yield found


@contextmanager
def opened(directory: Path, options: ReadOptions) -> Iterator[Bench]:
    """The vector's layer, empty."""
    table = ztoc.decode_spans((CASE / "ztoc.bin").read_bytes())
    spans, kernel, source = span_table(table), Kernel(), Source()
    fd = os.open(CASE / "ztoc.bin", os.O_RDONLY)
    completions: list[str] = []
    with (
        SpanFile(directory, len(spans), data_size(table.uncompressed_size), b"a" * 36) as files,
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
            options=options,
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
    until(lambda: not bench.reader.flying)
    assert bench.reader.read(999, 60_000, 150_000) == padded[60_000:210_000]


def test_nobody_waits_for_the_disk(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes its time: who waits for one verified span is answered before it is written; then it is."""
    real, gate = os.pwrite, threading.Event()

    def slow(fd: int, data: Buffer, offset: int) -> int:
        if fd == bench.files.fd:
            assert gate.wait(20)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    bench.source.gate.set()
    wanted = read_span(bench, 1, 3)
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == wanted
    assert not bench.files.live[3]
    assert read_span(bench, 2, 3) == wanted  # a second reader joins the flight that is writing
    gate.set()
    bench.kernel.wait(2)
    assert bench.kernel.answers[2] == wanted
    assert len(bench.source.asked) == 1
    until(lambda: bench.files.has(3, 3))


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
    until(lambda: bench.files.has(0, 0))

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


def test_a_whole_layer_is_read_at_once_until_the_disk_loses_a_mark(bench: Bench) -> None:
    """All spans here: every read has its bytes; a write-back that fails makes readers of what it lost wait for it."""
    bench.source.gate.set()
    bench.reader.fetch_ahead(range(len(bench.spans)))
    until(lambda: bench.reader._whole == 0)
    padded = TAR + bytes(1024)
    for offset in range(0, bench.reader.size, 300_001):
        assert (
            bench.reader.read(1, offset, 70_000)
            == padded[offset : offset + 70_000][: bench.reader.size - offset]
        )
    assert bench.reader.read(1, bench.reader.size, 1) == b""
    start = bench.spans.uncompressed_range(3)[0]
    bench.files.epoch += 1
    bench.files.live[3] = 0
    os.pwrite(bench.files.fd, bytes(1000), start)
    assert bench.reader.read(2, start, 1000) is None
    bench.kernel.wait(1)
    assert bench.kernel.answers[2] == TAR[start : start + 1000]
    until(lambda: bench.reader._whole == 1)


def test_files_close_behind_the_last_flight(bench: Bench) -> None:
    """A layer dropped while a flight is under way: nothing is closed before it ended, and no flight starts after. Its
    request is not cut off, because somebody waits.
    """
    closed = threading.Event()
    assert bench.reader.read(1, 0, 512) is None
    bench.reader.retire(closed.set)
    assert not closed.wait(0.2)
    assert bench.source.closed == 0
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


class Behind:
    """A background range on a thread of its own, standing before its first byte."""

    def __init__(self, bench: Bench, limit: int = 1 << 30) -> None:
        bench.source.pieces = threading.Semaphore(0)
        bench.source.gate.set()
        self.held = threading.Event()
        self.free = threading.Event()
        self.free.set()
        self.error: BaseException | None = None
        self.came = 0
        self._bench, self._limit = bench, limit
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        assert bench.source.reached.wait(20)

    def _run(self) -> None:
        try:
            self.came = self._bench.reader.fetch_background(self._limit, self._hold)
        except OSError as error:
            self.error = error
        except Remote as error:
            self.error = error

    def _hold(self, may: Callable[[], bool]) -> None:
        while not self.free.is_set() and may():
            self.held.set()
            time.sleep(0.005)
        self.held.clear()

    def end(self) -> None:
        """Let it go to its end."""
        self._bench.source.pieces.release(1_000_000)
        self.free.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


def read_span(bench: Bench, unique: int, span: int) -> bytes:
    """Ask for 1000 bytes of a span that is not here; what must come."""
    start = bench.spans.uncompressed_range(span)[0]
    assert bench.reader.read(unique, start, 1000) is None
    return TAR[start : start + 1000]


def test_a_reader_overtakes_a_background_range(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A span far back in a range comes by a request of its own, at once; the range passes it by and fills the rest."""
    monkeypatch.setattr("soci_snapshotter.layers.flight.JOIN_BYTES", 100_000)
    behind = Behind(bench)
    wanted = read_span(bench, 1, 12)
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == wanted
    assert bench.source.asked[1:] == [bench.spans.compressed_range(12)]
    behind.end()
    assert behind.error is None
    assert bench.files.has(0, len(bench.spans) - 1)
    assert os.pread(bench.files.fd, len(TAR), 0) == TAR
    counts = bench.reader.counts
    assert counts.flights[Priority.BACKGROUND] == counts.flights[Priority.DEMAND] == 1


def test_a_reader_joins_a_range_that_brings_its_span_soon(bench: Bench) -> None:
    """A span that comes next anyway costs no request; the range is not held up while somebody waits for it."""
    behind = Behind(bench)
    wanted = read_span(bench, 1, 1)
    behind.free.clear()
    bench.source.pieces.release(30)
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == wanted
    assert len(bench.source.asked) == 1
    behind.end()


def test_nobody_joins_a_range_that_is_held_up(bench: Bench) -> None:
    """A range that waits for readers is overtaken even by a reader of its next span."""
    behind = Behind(bench)
    behind.free.clear()
    bench.source.pieces.release(1)
    assert behind.held.wait(10)
    wanted = read_span(bench, 1, 0)
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == wanted
    assert bench.source.asked[1:] == [bench.spans.compressed_range(0)]
    behind.end()
    assert os.pread(bench.files.fd, len(TAR), 0) == TAR


def test_a_failed_range_is_no_readers_error(
    bench: Bench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who joined a background range that breaks gets the bytes by a request of its own; the caller hears of it."""

    def first_fails(number: int, data: bytes) -> bytes:
        if number == 1:
            raise Remote("r.example.com: no answer")
        return data

    bench.source.play = first_fails
    joined: list[bytes] = []
    start = bench.reader.source.read_range

    def joining(begin: int, end: int, sink: Callable[[memoryview], None], deadline: float) -> None:
        if not joined:  # the range is under way now
            joined.append(b"")
            joined[0] = read_span(bench, 1, 0)
        start(begin, end, sink, deadline)

    monkeypatch.setattr(bench.source, "read_range", joining)
    bench.source.gate.set()
    with pytest.raises(Remote):
        bench.reader.fetch_background(1 << 30, lambda may: None)
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == joined[0]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert bench.reader.counts.failures[Priority.BACKGROUND] == len(bench.spans)
    assert bench.reader.fetch_background(1 << 30, lambda may: None) > 0
    assert os.pread(bench.files.fd, len(TAR), 0) == TAR


def test_files_close_behind_a_background_range(bench: Bench) -> None:
    """A layer dropped under a range: its request is cut off, the range ends at its next piece at the latest, then the
    files close, and none starts after.
    """
    closed = threading.Event()
    behind = Behind(bench)
    bench.reader.retire(closed.set)
    assert bench.source.closed == 1
    assert not closed.wait(0.1)
    bench.source.pieces.release(1)
    assert closed.wait(10)
    behind.thread.join(10)
    assert isinstance(behind.error, OSError)
    assert bench.reader.fetch_background(1 << 30, lambda may: None) == 0
    assert bench.reader.missing() == 0
    assert len(bench.source.asked) == 1


def test_a_mark_that_is_taken_back_under_a_flight_strands_nobody(bench: Bench) -> None:
    """A range passes a span by that is here; the disk loses it, a reader joins: he is served by a flight of his own."""
    behind = Behind(bench)
    bench.files.live[1] = 1
    bench.source.pieces.release(6)
    until(lambda: bench.reader._flights._owners[2].at == 1)
    bench.files.live[1] = 0
    wanted = read_span(bench, 1, 1)
    assert len(bench.source.asked) == 1
    behind.end()
    bench.kernel.wait(1)
    assert bench.kernel.answers[1] == wanted
    assert bench.source.asked[1:] == [bench.spans.compressed_range(1)]


def test_background_ranges_leave_no_span_out_and_take_none_twice(bench: Bench) -> None:
    """Ranges of a bounded size over a layer of which some spans are here: each missing span is asked for once."""
    bench.source.gate.set()
    for number, span in enumerate((3, 7, 8)):
        read_span(bench, number, span)
    bench.kernel.wait(3)
    until(lambda: not bench.reader.flying)
    before, asked = bench.reader.missing(), len(bench.source.asked)
    came = []
    while size := bench.reader.fetch_background(150_000, lambda may: None):
        came.append(size)
    assert before - 100 < sum(came) <= before  # neighbors share a byte
    assert all(size <= 150_000 for size in came)
    spans = [
        span
        for start, end in bench.source.asked[asked:]
        for span in range(len(bench.spans))
        if start <= bench.spans.compressed_range(span)[0] and bench.spans.compressed_range(span)[1] <= end
    ]
    assert sorted(spans) == sorted(set(range(len(bench.spans))) - {3, 7, 8})
    assert bench.completions == [threading.current_thread().name]


def test_a_sequential_reader_is_run_ahead_of(ahead: Bench) -> None:
    """Reading from start to end: right bytes, no byte of the blob asked for twice, most of it before it was read."""
    ahead.source.gate.set()
    got = b""
    for unique, offset in enumerate(range(0, len(TAR), 50_000)):
        data = ahead.reader.read(unique, offset, 50_000)
        if data is None:
            end = time.monotonic() + 20
            while unique not in ahead.kernel.answers and time.monotonic() < end:
                time.sleep(0.001)
            answer = ahead.kernel.answers[unique]
            assert isinstance(answer, bytes)
            data = answer
        got += bytes(data)
    assert got == (TAR + bytes(1024))[: ahead.reader.size]
    ranges = sorted(ahead.source.asked)
    assert all(first[1] - 1 <= second[0] for first, second in pairwise(ranges))
    assert ahead.reader.counts.spans[Priority.AHEAD] > len(ahead.spans) // 2


def test_a_reader_does_not_wait_for_what_is_only_queued(bench: Bench) -> None:
    """Every thread is busy ahead: a read of a queued span gets a thread of its own kind first, and it comes once."""
    with FlightPool(1) as pool:
        bench.reader._flights._pool = pool
        bench.reader.fetch_ahead([0])
        until(lambda: len(bench.source.asked) == 1)
        bench.reader.fetch_ahead(range(2, 7))
        wanted = read_span(bench, 1, 5)
        bench.source.gate.set()
        bench.kernel.wait(1)
        assert bench.kernel.answers[1] == wanted
        until(lambda: not bench.reader.flying)
    ranges = [
        (bench.spans.compressed_range(first)[0], bench.spans.compressed_range(last)[1])
        for first, last in ((0, 0), (5, 5), (2, 4), (6, 6))
    ]
    assert bench.source.asked == ranges


def test_a_prefetch_artifact_is_followed_in_its_order(bench: Bench) -> None:
    """The lowest priority first, runs joined, what is here left out; spans that do not exist start nothing."""
    bench.source.gate.set()
    read_span(bench, 1, 3)
    bench.kernel.wait(1)
    with FlightPool(1) as pool:
        bench.reader._flights._pool = pool
        bench.reader.fetch_listed([SpanRange(8, 9, 2), SpanRange(2, 4, 1), SpanRange(12, 12, 0)])
        until(lambda: bench.files.has(8, 9))
    starts = [bench.spans.compressed_range(span)[0] for span in (12, 2, 4, 8)]
    assert [start for start, _ in bench.source.asked[1:]] == starts
    with pytest.raises(Integrity, match="span 18"):
        bench.reader.fetch_listed([SpanRange(0, 18)])
    assert not bench.files.live[0]


def test_a_guess_that_waited_too_long_is_dropped(ahead: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess that finds no free moment while it is fresh is not fetched."""
    monkeypatch.setattr("soci_snapshotter.layers.flights.GUESS_SECONDS", 0.0)
    ahead.source.gate.set()
    read_span(ahead, 1, 4)
    ahead.kernel.wait(1)
    until(lambda: not ahead.reader.flying)
    assert ahead.source.asked == [ahead.spans.compressed_range(4)]
    assert not ahead.files.live[5]


def test_connections_are_opened_ahead(bench: Bench) -> None:
    """`warm` reaches the source, on another thread."""
    bench.reader.warm()
    until(lambda: bench.source.warmed == 1)


def test_a_silent_registry_holds_its_own_threads_only() -> None:
    """With more jobs than threads on a registry that says nothing, a job for another one runs at once."""
    gate, ran = threading.Event(), threading.Event()
    with FlightPool(50, per_group=4) as pool:
        for _ in range(200):
            pool.submit(Priority.DEMAND, lambda: gate.wait(20), "dead.example.com")
        pool.submit(Priority.AHEAD, ran.set, "r.example.com")
        assert ran.wait(10)
        gate.set()


def test_groups_take_turns() -> None:
    """Jobs of two registries alternate, whoever queued more."""
    order: list[str] = []
    gate = threading.Event()
    with FlightPool(1) as pool:
        pool.submit(Priority.DEMAND, lambda: gate.wait(10))
        for name in "aaaabb":
            pool.submit(Priority.DEMAND, partial(order.append, name), name)
        gate.set()
        until(lambda: len(order) == 6)
    assert order == list("ababaa")


def test_listed_jobs_have_a_bound_of_their_own() -> None:
    """max_concurrency of prefetch: no more at once, all in the end."""
    lock, running, most, done = threading.Lock(), [0], [0], [0]

    def job() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.01)
        with lock:
            running[0] -= 1
            done[0] += 1

    with FlightPool(None, listed=2) as pool:
        for _ in range(12):
            pool.submit(Priority.LISTED, job)
        until(lambda: done[0] == 12)
    assert most[0] == 2


def test_guesses_wait_for_demand() -> None:
    """A guess begins when no demand is left, though threads are free."""
    order: list[str] = []
    gate = threading.Event()
    with FlightPool(4) as pool:
        pool.submit(Priority.DEMAND, lambda: (gate.wait(10), order.append("demand")))
        pool.submit(Priority.GUESS, lambda: order.append("guess"))
        pool.submit(Priority.AHEAD, lambda: order.append("ahead"))
        until(lambda: order == ["ahead"])
        gate.set()
        until(lambda: len(order) == 3)
    assert order == ["ahead", "demand", "guess"]


def test_what_a_closing_pool_never_runs_is_told() -> None:
    """Queued jobs, and jobs that come later, hear that they are dropped; running ones end."""
    gate, dropped = threading.Event(), []
    pool = FlightPool(1)
    pool.submit(Priority.DEMAND, lambda: gate.wait(10))
    pool.submit(Priority.DEMAND, lambda: None, dropped=lambda: dropped.append(1))
    pool.close(0.05)
    pool.submit(Priority.DEMAND, lambda: None, dropped=lambda: dropped.append(2))
    assert dropped == [1, 2]
    gate.set()
    until(lambda: pool.idle)


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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """Readers get the verified bytes, also over several spans of which some are kept; nothing is marked; one log line;
    when there is room again spans are kept again."""
    bench.source.gate.set()
    start = bench.spans.uncompressed_range(2)[0] + 100
    end = bench.spans.uncompressed_range(4)[1] - 100
    real = os.pwrite

    def full(fd: int, data: Buffer, offset: int) -> int:
        if fd == bench.files.fd and offset >= bench.spans.uncompressed_range(3)[0]:
            raise OSError(code, "no room")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    for unique in (1, 2):
        assert bench.reader.read(unique, start, end - start) is None
        bench.kernel.wait(unique)
        assert bench.kernel.answers[unique] == TAR[start:end]
    until(lambda: not bench.reader.flying)
    assert list(bench.files.live[2:5]) == [1, 0, 0]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "the disk takes no spans: they are served without being kept until it does"
    ]
    bench.reader.fetch_ahead([6])  # nobody waits: given up, and nothing is marked
    until(lambda: not bench.reader.flying)
    assert not bench.files.live[6]
    monkeypatch.setattr(os, "pwrite", real)
    assert bench.reader.read(3, start, end - start) is None
    bench.kernel.wait(3)
    assert bench.kernel.answers[3] == TAR[start:end]
    until(lambda: bench.files.has(2, 4))
