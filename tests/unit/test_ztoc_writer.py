"""Writing ztocs: byte for byte what the Go tool writes, and what the FlatBuffers library would."""

from __future__ import annotations

from dataclasses import replace

import flatbuffers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.ztoc_support import Case, cases, entry, small_ztoc

from soci_snapshotter.errors import Unsupported
from soci_snapshotter.formats import ztoc, ztoc_writer
from soci_snapshotter.formats.ztoc import Compression, Entry, Ztoc


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_vectors_are_written_again_byte_for_byte(case: Case) -> None:
    """Decoding and encoding a ztoc of the Go tool gives the same file."""
    assert ztoc_writer.encode(ztoc.decode(case.ztoc)) == case.ztoc


def test_tarinfo_equals_the_vectors() -> None:
    """The checkpoints of an uncompressed layer are those of the Go tool."""
    (case,) = (case for case in cases() if case.compression is Compression.UNCOMPRESSED)
    expected = bytes(ztoc.decode(case.ztoc).checkpoints)
    assert ztoc_writer.encode_tarinfo(case.raw["span_size"], case.raw["layer_size"]) == expected


def _by_library(z: Ztoc) -> bytes:
    """The same ztoc through the FlatBuffers library, in the order of creation that FORMATS.md gives."""
    b = flatbuffers.Builder(1024)
    version, tool = b.CreateString(z.version), b.CreateString(z.build_tool)
    tables = [_library_entry(b, e) for e in reversed(z.entries)]
    metadata = _library_vector(b, tables[::-1])
    b.StartObject(1)
    b.PrependUOffsetTRelativeSlot(0, metadata, 0)
    toc = b.EndObject()
    checkpoints = b.CreateByteVector(bytes(z.checkpoints))
    digests = _library_vector(b, [b.CreateString(d) for d in z.span_digests])
    b.StartObject(4)
    b.PrependInt32Slot(1, z.max_span_id, 0)
    b.PrependUOffsetTRelativeSlot(2, digests, 0)
    b.PrependUOffsetTRelativeSlot(3, checkpoints, 0)
    b.PrependInt8Slot(0, int(z.compression), 1)
    info = b.EndObject()
    b.StartObject(6)
    b.PrependUOffsetTRelativeSlot(0, version, 0)
    b.PrependUOffsetTRelativeSlot(1, tool, 0)
    b.PrependUOffsetTRelativeSlot(4, toc, 0)
    b.PrependInt64Slot(2, z.compressed_size, 0)
    b.PrependInt64Slot(3, z.uncompressed_size, 0)
    b.PrependUOffsetTRelativeSlot(5, info, 0)
    b.Finish(b.EndObject())
    return bytes(b.Output())


def _library_vector(b: flatbuffers.Builder, targets: list[int]) -> int:
    b.StartVector(4, len(targets), 4)
    for target in reversed(targets):
        b.PrependUOffsetTRelative(target)
    return int(b.EndVector())


def _library_entry(b: flatbuffers.Builder, e: Entry) -> int:
    strings = [b.CreateString(s) for s in (e.name, e.type, e.linkname, e.uname, e.gname, e.mod_time)]
    name, kind, link, uname, gname, time = strings
    records = []
    for key, value in e.records:
        k, v = b.CreateString(key), b.CreateString(value)
        b.StartObject(2)
        b.PrependUOffsetTRelativeSlot(0, k, 0)
        b.PrependUOffsetTRelativeSlot(1, v, 0)
        records.append(b.EndObject())
    xattrs = _library_vector(b, records)
    b.StartObject(14)
    b.PrependUOffsetTRelativeSlot(0, name, 0)
    b.PrependUOffsetTRelativeSlot(1, kind, 0)
    b.PrependInt64Slot(2, e.offset, 0)
    b.PrependInt64Slot(3, e.size, 0)
    b.PrependUOffsetTRelativeSlot(4, link, 0)
    b.PrependInt64Slot(5, e.mode, 0)
    b.PrependUint32Slot(6, e.uid, 0)
    b.PrependUint32Slot(7, e.gid, 0)
    b.PrependUOffsetTRelativeSlot(8, uname, 0)
    b.PrependUOffsetTRelativeSlot(9, gname, 0)
    b.PrependUOffsetTRelativeSlot(10, time, 0)
    b.PrependInt64Slot(11, e.devmajor, 0)
    b.PrependInt64Slot(12, e.devminor, 0)
    b.PrependUOffsetTRelativeSlot(13, xattrs, 0)
    return int(b.EndObject())


INT64 = st.one_of(st.just(0), st.integers(-(2**63), 2**63 - 1), st.integers(0, 0o7777))
UINT32 = st.one_of(st.just(0), st.integers(0, 2**32 - 1))
TEXT = st.binary(max_size=12)
ENTRIES = st.lists(
    st.builds(
        Entry,
        TEXT,
        st.sampled_from(["reg", "dir", "symlink", "hardlink", "char", "block", "fifo"]),
        st.just(0),
        st.one_of(st.just(0), st.integers(0, 5000)),
        TEXT,
        INT64,
        UINT32,
        UINT32,
        TEXT,
        TEXT,
        st.sampled_from(["", "2023-11-14T22:13:20Z", "2023-11-14T22:13:20.5Z", "0000-01-01T00:00:00+01:00"]),
        INT64,
        INT64,
        st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple),
    ),
    max_size=8,
)


def _laid_out(entries: list[Entry]) -> tuple[list[Entry], int]:
    """The entries one after another in a tar, and the tar's size."""
    at, placed = 0, []
    for e in entries:
        placed.append(e._replace(offset=at + 512))
        at += 512 + ((e.size + 511) // 512 * 512 if e.type == "reg" else 0)
    return placed, at


@settings(deadline=None, max_examples=400)
@given(ENTRIES, st.text(max_size=9), st.binary(max_size=30), st.integers(0, 3), st.sampled_from(Compression))
def test_equals_the_library_and_survives_decoding(
    entries: list[Entry], tool: str, blob: bytes, digests: int, compression: Compression
) -> None:
    """Any ztoc encodes to the FlatBuffers library's bytes, and decodes to itself."""
    placed, size = _laid_out(entries)
    z = small_ztoc(
        *placed,
        build_tool=tool,
        uncompressed_size=size,
        checkpoints=blob,
        span_digests=["sha256:" + f"{i:064x}" for i in range(digests)],
        max_span_id=digests - 1,
        compression=compression,
    )
    data = ztoc_writer.encode(z)
    assert data == _by_library(z)
    decoded = ztoc.decode(data)
    assert decoded.entries == placed
    assert (decoded.build_tool, bytes(decoded.checkpoints)) == (tool, blob)
    assert (decoded.span_digests, decoded.max_span_id) == (z.span_digests, digests - 1)
    assert (decoded.uncompressed_size, decoded.compression) == (size, compression)


def test_a_ztoc_beyond_two_gigabytes_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    """What FlatBuffers cannot address is refused, not written wrong."""
    monkeypatch.setattr(ztoc_writer, "MAX_SIZE", 200)
    with pytest.raises(Unsupported, match="200"):
        ztoc_writer.encode(small_ztoc(entry()))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(1, 9))
def test_pieces_are_the_whole(batch: int, count: int) -> None:
    """Entries in batches, last batch first, and checkpoints in pieces give the bytes of the ztoc in one."""
    entries = [
        entry(b"f%d" % n, offset=512 + 1024 * n, records=((b"k", b"v" * n),) * (n % 3)) for n in range(count)
    ]
    whole = small_ztoc(*entries)
    batches = [entries[at : at + batch] for at in range(0, count, batch)]
    blob = bytes(whole.checkpoints)
    bare = replace(whole, entries=[], checkpoints=b"")
    size, pieces = ztoc_writer.encode_pieces(bare, reversed(batches), len(blob), (blob[:5], blob[5:]), [])
    assert b"".join(pieces) == ztoc_writer.encode(whole)
    assert size == len(ztoc_writer.encode(whole))


def test_checkpoints_of_another_size_are_a_mistake_of_the_caller() -> None:
    """Every offset behind them would be wrong."""
    _, pieces = ztoc_writer.encode_pieces(small_ztoc(), [], 10, (b"123",), [])
    with pytest.raises(ValueError, match="by 7 bytes"):
        b"".join(pieces)
