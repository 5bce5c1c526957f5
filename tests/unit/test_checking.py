"""Headers checked as spans arrive: in any order, across spans, by several threads, and what is marked meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.indexed_layer import IndexedLayer
from tests.unit.tar_strategies import Member, encode, plain, tars
from tests.unit.ztoc_support import Case, cases, member, read_span

from soci_snapshotter.errors import Condemned
from soci_snapshotter.formats import ztoc, ztoc_writer
from soci_snapshotter.formats.zinfo import SpanTable, span_table
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.layers.checking import HeaderCheck
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.store.layerfiles import SpanFile


class Node:
    """One layer on a node: its check, its files, and its spans' bytes."""

    def __init__(
        self, check: HeaderCheck, files: SpanFile, spans: SpanTable, layer: bytes, data: bytes
    ) -> None:
        self.check = check
        self.files = files
        self.spans = spans
        self._layer = layer
        self._ztoc = data

    def span(self, number: int) -> bytes:
        """What a flight has when it comes to the check."""
        return read_span(self.spans, number, self._layer, self._ztoc)

    def land(self, number: int) -> None:
        """What a flight does."""
        data = self.span(number)
        with self.check.arriving(number, data):
            self.files.write(number, self.spans.uncompressed_range(number)[0], memoryview(data))

    def land_all(self, order: Sequence[int]) -> list[str]:
        """Land every span; what the refusals said."""
        said = []
        for number in order:
            try:
                self.land(number)
            except Condemned as error:
                said.append(str(error))
                assert not self.files.live[number]
        return said


@contextmanager
def node(data: bytes, layer: bytes) -> Iterator[Node]:
    """A node with the ztoc `data` of `layer`."""
    table = ztoc.decode_spans(data)
    spans = span_table(table)
    with TemporaryDirectory() as name, ExitStack() as stack:
        path = Path(name) / "ztoc"
        path.write_bytes(data)
        fd = os.open(path, os.O_RDONLY)
        stack.callback(os.close, fd)
        files = stack.enter_context(
            SpanFile(Path(name), len(spans), data_size(table.uncompressed_size), b"a" * 36)
        )
        yield Node(
            HeaderCheck("layer l", fd, ztoc.locate_contents(data), spans, files), files, spans, layer, data
        )


def lying(data: bytes, **changes: object) -> bytes:
    """The ztoc with other fields."""
    return ztoc_writer.encode(replace(ztoc.decode(data), **changes))  # type: ignore[arg-type]


def with_entry(data: bytes, number: int, **changes: object) -> bytes:
    """The ztoc with other fields of one entry."""
    entries = list(ztoc.decode(data).entries)
    entries[number] = entries[number]._replace(**changes)  # type: ignore[arg-type]
    return lying(data, entries=entries)


def sample(name: str) -> Case:
    """One of the vectors."""
    return next(case for case in cases() if case.name == name)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_samples_pass_in_any_order(case: Case) -> None:
    """Ztocs of the Go tool: forwards, backwards and shuffled, every header is compared once."""
    with node(case.ztoc, case.layer) as first:
        count = len(first.spans)
    shuffled = list(range(count))
    Random(1).shuffle(shuffled)
    for order in (range(count), range(count - 1, -1, -1), shuffled):
        with node(case.ztoc, case.layer) as one:
            assert one.land_all(order) == []
            assert one.files.has(0, count - 1)
            assert one.check.checked == len(ztoc.decode(case.ztoc).entries)


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
def test_what_the_builder_indexes_passes(data: st.DataObject) -> None:
    """Any tar, spans from 1 KiB, gzip of one or several members or none, in any order."""
    tar = data.draw(tars())
    compression, layer = Compression.UNCOMPRESSED, tar
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(tar)))
        compression, layer = Compression.GZIP, member(tar[:cut]) + member(tar[cut:], step=2000, flush=2)
    built = IndexedLayer(
        layer, span_size=data.draw(st.sampled_from([1024, 1500, 5000, 1 << 16])), compression=compression
    )
    with node(built.built.data, layer) as one:
        order = data.draw(st.permutations(range(len(one.spans))))
        assert one.land_all(order) == []
        assert one.check.checked == len(built.ztoc.entries)


LIES = {
    "name": {"name": b"other"},
    "mode": {"mode": 0o4755},
    "uid": {"uid": 4711},
    "uncompressed_size": {"size": 1},
    "linkname": {"type": "symlink", "linkname": b"x"},
}


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_lie_keeps_a_span_of_its_header_from_being_served(data: st.DataObject) -> None:
    """Whatever the order: refused, by its name or the next one's; its header's spans are not all here in the end."""
    layer = b"".join(
        encode(
            Member(b"%d/" % n + b"d" * 120, "reg", content=Random(n).randbytes(n * 97 % 1500), style="pax")
        )
        for n in range(30)
    ) + bytes(1024)
    size = data.draw(st.sampled_from([512, 1000, 1024, 3000]))
    built = IndexedLayer(layer, span_size=size, compression=Compression.UNCOMPRESSED)
    number = data.draw(st.integers(0, 29))
    field = data.draw(st.sampled_from(sorted(LIES)))
    if field == "uncompressed_size" and built.ztoc.entries[number].size < 2:
        number = 1
    bad = with_entry(built.built.data, number, **LIES[field])
    with node(bad, layer) as one:
        said = one.land_all(data.draw(st.permutations(range(len(one.spans)))))
        # Its own header, and what stands where the table lets the next one begin: an entry or the tar's end.
        assert 1 <= len(said) <= 2
        near = [ascii(entry.name)[:50] for entry in built.ztoc.entries[number : number + 2]]
        near += [ascii(ztoc.decode(bad).entries[number].name)[:50], *["b''"][: number // 29]]
        assert all(any(f"entry {name}" in line for name in near) for line in said)
        entry = built.ztoc.entries[number]
        before = built.ztoc.entries[number - 1] if number else None
        start = before.offset + -(-before.size // 512) * 512 if before else 0
        assert not all(one.files.live[span] for span in one.spans.spans_for(start, entry.offset - start))


def crossing() -> tuple[IndexedLayer, bytes]:
    """A layer of two spans, whose second header lies half in each."""
    layer = plain([Member(b"a", "reg", content=b"x"), Member(b"b", "reg", content=b"y" * 600)])
    assert len(layer) == 512 * 7
    return IndexedLayer(layer, span_size=1300, compression=Compression.UNCOMPRESSED), layer


def test_two_at_once_share_what_they_bring() -> None:
    """Neither is written when the other comes: the later one checks the header they share, from memory."""
    built, layer = crossing()
    with node(with_entry(built.built.data, 1, mode=0o777), layer) as one:
        with one.check.arriving(0, one.span(0)), pytest.raises(Condemned, match="entry b'b': mode is 0777"):
            one.land(1)
        assert not one.files.live[1]
    with node(built.built.data, layer) as one, one.check.arriving(0, one.span(0)):
        one.land(1)
        assert one.check.checked == 2


def test_a_span_that_came_to_nothing_is_not_waited_for() -> None:
    """A flight that fails after its check: its half of a header counts only when it has come again."""
    built, layer = crossing()
    with node(with_entry(built.built.data, 1, mode=0o777), layer) as one:
        with pytest.raises(OSError, match="full"), one.check.arriving(0, one.span(0)):
            raise OSError("the disk is full")
        one.land(1)  # half a header says nothing
        with pytest.raises(Condemned):
            one.land(0)


def test_what_the_disk_lost_condemns_nobody() -> None:
    """A neighbour whose bytes went while they were read back: an I/O error, to be tried again."""
    built, layer = crossing()
    with node(built.built.data, layer) as one:
        one.land(0)
        real = one.check._compare

        def losing(*arguments: object) -> None:
            os.pwrite(one.files.fd, bytes(1300), 0)
            one.files.epoch += 1
            real(*arguments)  # type: ignore[arg-type]

        one.check._compare = losing  # type: ignore[method-assign]
        with pytest.raises(OSError, match="went while"):
            one.land(1)


@pytest.mark.parametrize("size", [512, 1000, 1300, 1 << 20])
def test_entries_hidden_behind_the_end_are_found(size: int) -> None:
    """A table that leaves out the last entries, with a tar's size that ends before them, after or in their headers."""
    members = [Member(b"%d" % n, "reg", content=b"x" * (n * 300)) for n in range(5)]
    layer = plain(members)
    built = IndexedLayer(layer, span_size=size, compression=Compression.UNCOMPRESSED)
    for kept in range(1, 5):
        entries = built.ztoc.entries[:kept]
        end = entries[-1].offset + -(-entries[-1].size // 512) * 512
        for more in (0, 100, 512, 1024, len(layer) - end):
            bad = lying(built.built.data, entries=entries, uncompressed_size=end + more)
            for order in (1, -1):
                with node(bad, layer) as one:
                    assert one.land_all(range(len(one.spans))[::order]) != [], (kept, more, order)


def test_a_long_region_needs_no_memory_of_its_own() -> None:
    """A file behind 300 PAX headers, which cross a hundred spans, in any order: passes; a lie in it is found last."""
    names = b"".join(
        encode(Member(b"n", "fifo", others=((b"comment", b"c" * 900),)))[:-512] for _ in range(300)
    )
    layer = names + encode(Member(b"it", "reg", content=b"data")) + bytes(1024)
    built = IndexedLayer(layer, span_size=5000, compression=Compression.UNCOMPRESSED)
    with node(built.built.data, layer) as one:
        order = list(range(len(one.spans)))
        Random(3).shuffle(order)
        assert len(order) > 80
        assert one.land_all(order) == []
    with node(with_entry(built.built.data, 0, gid=9), layer) as one:
        assert len(one.land_all(order)) == 1
