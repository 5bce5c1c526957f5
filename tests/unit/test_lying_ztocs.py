"""What a reader of a layer gets when its table of contents turns out to be a lie."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.test_checking import with_entry
from tests.unit.test_reader import CASE, TAR, Kernel, Source

from soci_snapshotter.errors import Condemned
from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.zinfo import SpanTable, span_table
from soci_snapshotter.layers.checking import HeaderCheck
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.layers.pool import FlightPool
from soci_snapshotter.layers.reader import LayerReader, ReadOptions
from soci_snapshotter.store.layerfiles import SpanFile

HONEST = (CASE / "ztoc.bin").read_bytes()
ENTRIES = ztoc.decode(HONEST).entries
LIAR = next(number for number, entry in enumerate(ENTRIES) if entry.offset > 1_100_000)


@dataclass
class Bench:
    """A layer whose ztoc lies about one file's owner."""

    reader: LayerReader
    kernel: Kernel
    source: Source
    spans: SpanTable
    files: SpanFile
    lies: list[str]
    told: threading.Event

    @property
    def bad(self) -> int:
        """The span of the lie."""
        return self.spans.span_at(ENTRIES[LIAR].offset - 512)

    def start(self, span: int) -> int:
        """Where a span begins in the tar."""
        return self.spans.uncompressed_range(span)[0]


@contextmanager
def opened(directory: Path, *, verify: bool = True) -> Iterator[Bench]:
    """The vector's layer, empty, with that ztoc."""
    data = with_entry(HONEST, LIAR, uid=4711)
    (directory / "ztoc").write_bytes(data)
    fd = os.open(directory / "ztoc", os.O_RDONLY)
    table = ztoc.decode_spans(data)
    spans, kernel, source = span_table(table), Kernel(), Source()
    lies: list[str] = []
    told = threading.Event()

    def lied(reason: str) -> None:
        lies.append(reason)
        told.set()

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
            options=ReadOptions(flight_seconds=10, ahead=False),
            headers=HeaderCheck("it", fd, ztoc.locate_contents(data), spans, files) if verify else None,
            on_lie=lied,
        )
        yield Bench(reader, kernel, source, spans, files, lies, told)
        source.gate.set()
    os.close(fd)


def test_reads_fail_once_a_lie_is_known(tmp_path: Path) -> None:
    """Spans before it are served; its own is fetched once and is EIO; then everything is, what is here included."""
    with opened(tmp_path) as bench:
        bench.source.gate.set()
        good = bench.start(bench.bad - 2)
        assert bench.reader.read(1, good, 4096) is None
        bench.kernel.wait(1)
        assert bench.kernel.answers[1] == TAR[good : good + 4096]
        asked = len(bench.source.asked)
        assert bench.reader.read(2, bench.start(bench.bad), 512) is None
        bench.kernel.wait(2)
        assert bench.kernel.answers[2] == errno.EIO
        assert bench.told.wait(10)
        assert len(bench.source.asked) == asked + 1
        assert not bench.files.live[bench.bad]
        for offset in (good, bench.start(bench.bad), bench.start(bench.bad - 5)):
            with pytest.raises(OSError, match="uid is 4711") as caught:
                bench.reader.read(3, offset, 512)
            assert caught.value.errno == errno.EIO
        bench.reader.fetch_ahead(range(len(bench.spans)))
        assert bench.reader.fetch_background(1 << 20, lambda busy: None) == 0
        assert len(bench.source.asked) == asked + 1
        assert len(bench.lies) == 1


def test_who_waits_elsewhere_gets_an_error_once(tmp_path: Path) -> None:
    """Readers parked on other spans, and one on both, when the lie is found: one EIO each, and no bytes."""
    with opened(tmp_path) as bench:
        size = bench.start(bench.bad + 1) - bench.start(bench.bad - 1)
        assert bench.reader.read(1, bench.start(bench.bad - 1), size) is None
        assert bench.reader.read(2, bench.start(bench.bad - 5), 512) is None
        assert bench.reader.read(3, bench.start(bench.bad), 512) is None
        bench.source.play = lambda number, data: data if number == 1 else (bench.told.wait(10), data)[1]
        bench.source.gate.set()
        bench.kernel.wait(3)
        assert bench.told.wait(10)
        assert bench.kernel.answers == dict.fromkeys((1, 2, 3), errno.EIO)
        assert len(bench.lies) == 1


def test_the_background_finds_lies_too(tmp_path: Path) -> None:
    """A background flight over the lie: it raises, says so once, and there is nothing left for it to do."""
    with opened(tmp_path) as bench:
        bench.source.gate.set()
        with pytest.raises(Condemned, match="uid is 4711"):
            while bench.reader.fetch_background(1 << 20, lambda busy: None):
                pass
        assert bench.told.is_set()
        assert bench.reader.fetch_background(1 << 20, lambda busy: None) == 0
        assert bench.reader.missing() == 0


def test_a_layer_dropped_meanwhile_closes_its_files(tmp_path: Path) -> None:
    """A lie found by the last flight of a layer that is being closed: the files are closed behind that flight."""
    with opened(tmp_path) as bench:
        closed = threading.Event()
        assert bench.reader.read(1, bench.start(bench.bad), 512) is None
        bench.reader.retire(closed.set)
        assert not closed.is_set()
        bench.source.gate.set()
        assert closed.wait(10)
        assert bench.kernel.answers[1] == errno.EIO


def test_without_verification_headers_are_not_looked_at(tmp_path: Path) -> None:
    """disable_verification: the same layer is served whole."""
    with opened(tmp_path, verify=False) as bench:
        bench.source.gate.set()
        while bench.reader.fetch_background(1 << 20, lambda busy: None):
            pass
        start = bench.start(bench.bad)
        assert bench.reader.read(1, start, 4096) == TAR[start : start + 4096]
        assert bench.lies == []
