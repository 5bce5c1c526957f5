"""Reading ztocs: what other tools wrote, and what nobody should have written."""

from __future__ import annotations

import mmap
import struct
import tempfile
import tracemalloc
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import flatbuffers
import pytest
from flatbuffers import number_types
from flatbuffers.table import Table as LibraryTable
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.ztoc_support import Case, cases, entry, small_ztoc

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import toc, ztoc
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.formats.ztoc_writer import encode

if TYPE_CHECKING:
    from collections.abc import Callable

TAR_TYPES = {"0": "reg", "1": "hardlink", "2": "symlink", "3": "char", "4": "block", "5": "dir", "6": "fifo"}

every_case = pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)


@every_case
def test_vectors_agree_with_what_their_builder_printed(case: Case) -> None:
    """Every ztoc made by the Go tool decodes to the names, places, types and spans that tool lists."""
    decoded = ztoc.decode(case.ztoc)
    table = span_table(decoded, case.raw["layer_size"])
    info = case.info
    expected = [(f["filename"].encode(), f["offset"], f["size"], f["type"]) for f in info["files"] or ()]
    spans = [(f["start_span"], f["end_span"]) for f in info["files"] or ()]
    assert [(e.name, e.offset, e.size, e.type) for e in decoded.entries] == expected
    assert [(table.span_at(e.offset), table.span_at(e.offset + e.size)) for e in decoded.entries] == spans
    assert (decoded.version, decoded.build_tool) == (info["version"], info["build_tool"])
    assert (len(table), table.span_size) == (info["num_spans"], info["span_size"])


@every_case
def test_vectors_agree_with_an_independent_tar_reader(case: Case) -> None:
    """Every field of every entry in the Go tool's ztocs is what an independent reader of the tar saw."""
    entries = ztoc.decode(case.ztoc).entries
    members = case.members
    assert members or case.name.startswith("go-")
    for got, member in zip(entries, members, strict=bool(members)):
        name = member["name"].encode("utf-8", "surrogateescape")
        assert got.name.rstrip(b"/") == name
        assert (got.type, got.offset) == (TAR_TYPES[member["type"]], member["off_data"])
        assert (got.mode & 0o7777, got.uid, got.gid) == (int(member["mode"], 8), member["uid"], member["gid"])
        assert got.linkname == member["link"].encode("utf-8", "surrogateescape")
        assert [got.devmajor, got.devminor] == member["dev"]
        assert {k.decode(): v.decode("utf-8", "surrogateescape") for k, v in got.records} == member["pax"]
        if got.type == "reg":
            assert got.size == member["size"]


def _library_entries(data: bytes) -> list[tuple[Any, ...]]:
    """All entries through the FlatBuffers library's own accessors."""

    def string(table: LibraryTable, index: int) -> bytes:
        at = table.Offset(4 + 2 * index)
        return bytes(table.String(at + table.Pos)) if at else b""

    def number(table: LibraryTable, index: int, flags: object) -> int:
        at = table.Offset(4 + 2 * index)
        return int(table.Get(flags, at + table.Pos)) if at else 0

    def tables(table: LibraryTable, index: int) -> list[LibraryTable]:
        at = table.Offset(4 + 2 * index)
        start = table.Vector(at)
        return [LibraryTable(table.Bytes, table.Indirect(start + 4 * i)) for i in range(table.VectorLen(at))]

    root = LibraryTable(data, struct.unpack_from("<I", data)[0])
    contents = LibraryTable(data, root.Indirect(root.Pos + root.Offset(4 + 2 * 4)))
    i64, u32 = number_types.Int64Flags, number_types.Uint32Flags
    return [
        (
            *(string(t, 0), string(t, 1).decode(), number(t, 2, i64), number(t, 3, i64), string(t, 4)),
            *(number(t, 5, i64), number(t, 6, u32), number(t, 7, u32), string(t, 8), string(t, 9)),
            *(string(t, 10).decode(), number(t, 11, i64), number(t, 12, i64)),
            tuple((string(x, 0), string(x, 1)) for x in tables(t, 13)),
        )
        for t in tables(contents, 0)
    ]


@every_case
def test_entries_equal_the_flatbuffers_librarys(case: Case) -> None:
    """The specialised reader and the FlatBuffers library see the same entries, field for field."""
    assert ztoc.decode(case.ztoc).entries == _library_entries(case.ztoc)


@every_case
def test_spans_alone_equal_the_whole_without_entries(case: Case) -> None:
    """decode_spans gives what decode gives, but no entries, and its window positions lie in the file."""
    whole, spans = ztoc.decode(case.ztoc), ztoc.decode_spans(case.ztoc)
    assert spans.entries == []
    assert bytes(spans.checkpoints) == case.ztoc[spans.checkpoints_offset :][: len(spans.checkpoints)]
    for field in (
        "compressed_size",
        "uncompressed_size",
        "span_digests",
        "max_span_id",
        "checkpoints_offset",
    ):
        assert getattr(spans, field) == getattr(whole, field)


def test_a_refused_mapping_can_be_closed() -> None:
    """An Integrity error keeps no view of a mapped file, so that closing it raises nothing else."""
    with tempfile.TemporaryFile() as file:
        file.write(encode(small_ztoc(span_digests=[])))
        file.flush()
        with pytest.raises(Integrity) as caught, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            ztoc.decode_spans(mapped)
    assert "span_digests" in str(caught.value)


def _foreign(shared: bytes, entries: int, *, step: int = 1024) -> bytes:
    """A ztoc by another builder: strings shared, tables without empty fields, added in another order."""
    b = flatbuffers.Builder()
    text = b.CreateString(shared)
    kind = b.CreateString("reg")
    tables = []
    for i in range(entries):
        b.StartObject(14)
        b.PrependUOffsetTRelativeSlot(1, kind, 0)
        b.PrependInt64Slot(2, 512 + step * i, 0)
        b.PrependUOffsetTRelativeSlot(0, text, 0)
        tables.append(b.EndObject())
    b.StartVector(4, entries, 4)
    for t in reversed(tables):
        b.PrependUOffsetTRelative(t)
    metadata = b.EndVector()
    b.StartObject(1)
    b.PrependUOffsetTRelativeSlot(0, metadata, 0)
    contents = b.EndObject()
    blob = b.CreateByteVector(struct.pack("<iq", 1, 1 << 22))
    digest = b.CreateString("sha256:" + "0" * 64)
    b.StartVector(4, 1, 4)
    b.PrependUOffsetTRelative(digest)
    digests = b.EndVector()
    b.StartObject(4)
    b.PrependUOffsetTRelativeSlot(3, blob, 0)
    b.PrependUOffsetTRelativeSlot(2, digests, 0)
    info = b.EndObject()
    version = b.CreateString("0.9")
    b.StartObject(6)
    b.PrependUOffsetTRelativeSlot(5, info, 0)
    b.PrependUOffsetTRelativeSlot(4, contents, 0)
    b.PrependInt64Slot(3, 1 << 30, 0)
    b.PrependInt64Slot(2, 1 << 22, 0)
    b.PrependUOffsetTRelativeSlot(0, version, 0)
    b.Finish(b.EndObject())
    return bytes(b.Output())


def test_another_builders_layout_is_read() -> None:
    """Shared strings, absent fields and another field order, all legal FlatBuffers, decode to defaults."""
    decoded = ztoc.decode(_foreign(b"x", 100))
    assert len(decoded.entries) == 100
    assert decoded.entries[99] == toc.Entry(
        b"x", "reg", 512 + 1024 * 99, 0, b"", 0, 0, 0, b"", b"", "", 0, 0, ()
    )
    assert decoded.build_tool == ""


def test_sharing_one_long_string_does_not_fill_the_memory() -> None:
    """A file of 1.1 MB whose 1,000 entries share a name of 1 MB is refused before it takes a gigabyte."""
    data = _foreign(b"x" * 1_000_000, 1000)
    tracemalloc.start()
    with pytest.raises(Integrity, match="times the file"):
        ztoc.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


def test_entries_that_are_one_table_are_refused() -> None:
    """A metadata vector that names one table many times is an overlap, not many entries."""
    with pytest.raises(Integrity, match=r"metadata\[1\].*overlaps"):
        ztoc.decode(_foreign(b"x", 2, step=0))


HOSTILE: list[tuple[str, dict[str, Any], str]] = [
    ("terabytes compressed", {"compressed_size": 1 << 43}, "compressed_archive_size"),
    ("terabytes uncompressed", {"uncompressed_size": 1 << 60}, "uncompressed_archive_size"),
    ("one terabyte out of a kilobyte", {"uncompressed_size": 1 << 40}, "uncompressed_archive_size"),
    ("negative size", {"compressed_size": -1}, "compressed_archive_size"),
    ("too few digests", {"span_digests": []}, "span_digests"),
    ("too many digests", {"span_digests": ["sha256:" + "0" * 64] * 2}, "span_digests"),
    ("a digest of nothing", {"span_digests": ["sha256:xyz"]}, "span_digests"),
    ("a long digest", {"span_digests": ["sha256:" + "0" * 65]}, "span_digests"),
    ("upper case digest", {"span_digests": ["sha256:" + "A" * 64]}, "span_digests"),
    ("no checkpoints", {"checkpoints": b""}, "checkpoints"),
    ("unknown compression", {"compression": 3}, "compression_algorithm"),
    ("negative span id", {"max_span_id": -5}, "max_span_id"),
    ("negative entry size", {"entries": [entry(size=-1)]}, "uncompressed_size"),
    ("negative offset", {"entries": [entry(offset=-512)]}, "uncompressed_offset"),
    ("no room for a header", {"entries": [entry(offset=0)]}, "uncompressed_offset"),
    ("unaligned", {"entries": [entry(offset=513)]}, "uncompressed_offset"),
    ("past the end", {"entries": [entry(size=10240)]}, "uncompressed_size"),
    ("directory past the end", {"entries": [entry(type="dir", offset=10752)]}, "uncompressed_offset"),
    ("terabytes of file", {"entries": [entry(size=1 << 42)]}, "uncompressed_size"),
    ("falling offsets", {"entries": [entry(offset=2048), entry(offset=512)]}, "overlaps"),
    ("overlap", {"entries": [entry(size=513), entry(offset=1536)]}, "overlaps"),
    ("no header between", {"entries": [entry(), entry(offset=1024)]}, "overlaps"),
    ("unknown type", {"entries": [entry(type="door")]}, "type"),
    ("no time", {"entries": [entry(mod_time="yesterday")]}, "mod_time"),
    ("time with a NUL", {"entries": [entry(mod_time="2023-11-14T22:13:20Z\0")]}, "mod_time"),
    ("endless name", {"entries": [entry(b"n" * ((1 << 20) + 1))]}, r"metadata\[0\].name"),
    ("endless value", {"entries": [entry(records=((b"k", b"v" * ((1 << 20) + 1)),))]}, "value"),
]


@pytest.mark.parametrize(("changes", "field"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_values_are_refused_by_name(changes: dict[str, Any], field: str) -> None:
    """Each lie in a well-formed FlatBuffer is an Integrity error that names the field."""
    data = encode(small_ztoc(**changes))
    with pytest.raises(Integrity, match=field):
        span_table(ztoc.decode(data))


def test_the_layers_descriptor_is_held_against_the_ztoc() -> None:
    """A compressed_archive_size other than the size in the layer's descriptor is refused."""
    decoded = ztoc.decode(encode(small_ztoc()))
    assert len(span_table(decoded, 1000)) == 1
    with pytest.raises(Integrity, match="compressed_archive_size"):
        span_table(decoded, 1001)


def test_sparse_times_and_zones_are_kept() -> None:
    """Fractions, zones and the empty time, all of which the Go tool writes, pass as they are."""
    times = ["", "2023-11-14T22:13:20.123456789Z", "1601-01-01T00:00:00-08:00", "9999-12-31T23:59:59+14:00"]
    entries = [entry(offset=512 * 2 * i + 512, mod_time=t) for i, t in enumerate(times)]
    assert [e.mod_time for e in ztoc.decode(encode(small_ztoc(*entries))).entries] == times


def _try(data: bytes) -> bool:
    """Whether it decodes; anything but Integrity propagates, and so does a result out of proportion."""
    try:
        decoded = ztoc.decode(data)
        span_table(decoded)
    except Integrity as error:
        assert str(error).startswith("ztoc: ")
        return False
    assert sum(len(e.name) + len(e.linkname) for e in decoded.entries) <= toc.MAX_SHARING * len(data)
    return True


SMALL = encode(
    small_ztoc(
        entry(b"a/", type="dir", size=0, records=()),
        entry(b"a/file", offset=1536, records=((b"SCHILY.xattr.user.x", b""), (b"mtime", b"1.5"))),
        entry(b"a/link", type="symlink", offset=2560, size=0, linkname=b"file", mod_time=""),
        entry(b"dev", type="char", offset=3072, size=0, devmajor=5, devminor=-1, mode=-1, uid=3_000_000_000),
    )
)


def test_truncated_anywhere_is_refused() -> None:
    """Every prefix of a ztoc that lacks a byte with a meaning is an Integrity error."""
    assert _try(SMALL)
    accepted = [n for n in range(len(SMALL)) if _try(SMALL[:n])]
    assert accepted == [len(SMALL) - 1]  # the last string's terminating zero, which its length makes needless


INTERESTING = st.one_of(
    st.integers(0, 2**32 - 1),
    st.integers(0, 64),
    st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4, len(SMALL), len(SMALL) - 4]),
)
MUTATIONS = st.lists(
    st.tuples(st.integers(0, len(SMALL) - 4), st.sampled_from(["<B", "<H", "<I"]), INTERESTING),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=3000)
@given(MUTATIONS)
def test_mutations_of_a_small_ztoc_raise_only_integrity(mutations: list[tuple[int, str, int]]) -> None:
    """Whatever four of its 900 bytes become, a ztoc decodes, or is refused by Integrity, and never blows
    up.
    """
    data = bytearray(SMALL)
    for at, code, value in mutations:
        struct.pack_into(code, data, at, value % 256 ** struct.calcsize(code))
    _try(bytes(data))


def test_every_word_replaced_raises_only_integrity() -> None:
    """Each byte position in turn gets each awkward 32-bit value: self references, cycles, ends of the
    file.
    """
    for at in range(len(SMALL) - 3):
        for value in (
            0,
            1,
            4,
            at,
            2**31 - 1,
            2**31,
            2**32 - 1,
            2**32 - at,
            len(SMALL) - at,
            len(SMALL) - at - 4,
        ):
            data = bytearray(SMALL)
            struct.pack_into("<I", data, at, value % 2**32)
            _try(bytes(data))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_mutations_of_vectors_raise_only_integrity(data: st.DataObject) -> None:
    """The same for real ztocs, which have checkpoints, windows and thousands of entries."""
    case = data.draw(st.sampled_from([c for c in cases() if c.raw["ztoc_size"] < 200_000]))
    raw = bytearray(case.ztoc)
    size = len(raw)
    places = st.one_of(st.integers(0, 300), st.integers(size - 4000, size - 4), st.integers(0, size - 4))
    for _ in range(data.draw(st.integers(1, 5))):
        struct.pack_into("<I", raw, data.draw(places), data.draw(INTERESTING))
    _try(bytes(raw))


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400))
def test_random_bytes_raise_only_integrity(data: bytes) -> None:
    """Bytes that never were a ztoc are refused the same way."""
    _try(data)
    _try(struct.pack("<I", 4) + data)


def _patch(data: bytes, find: bytes, write: Callable[[bytearray, int], None]) -> bytes:
    raw = bytearray(data)
    assert raw.count(find) == 1
    write(raw, raw.index(find))
    return bytes(raw)


def test_an_absurd_vector_count_is_refused_at_once() -> None:
    """A vector that claims four billion elements in a small file is refused before anything is allocated."""
    head = small_ztoc().checkpoints

    def grow(raw: bytearray, at: int) -> None:
        struct.pack_into("<I", raw, at - 4, 0xFFFFFFFF)

    with pytest.raises(Integrity, match="checkpoints claims 4294967295"):
        ztoc.decode(_patch(encode(small_ztoc()), bytes(head), grow))


def test_too_many_entries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """More entries than the limit are refused before the first is read."""
    monkeypatch.setattr(ztoc, "MAX_ENTRIES", 3)
    with pytest.raises(Integrity, match="metadata has 4 entries"):
        ztoc.decode(SMALL)


def test_a_text_that_is_not_utf8_is_refused() -> None:
    """version and build_tool_identifier are shown to people: they must be UTF-8."""

    def spoil(raw: bytearray, at: int) -> None:
        raw[at] = 0xFF

    with pytest.raises(Integrity, match="build_tool_identifier"):
        ztoc.decode(_patch(SMALL, b"tests", spoil))


def test_entries_come_in_the_tars_order() -> None:
    """Offsets only rise, so a reader may bisect them."""
    offsets = [e.offset for case in cases() for e in ztoc.decode(case.ztoc).entries[:1]]
    assert offsets == [512] * len(offsets)
    for case in cases():
        assert all(a.offset < b.offset for a, b in pairwise(ztoc.decode(case.ztoc).entries))
