"""Inflating spans: every span of every vector, every bit position, both engines, and what must be refused."""

from __future__ import annotations

import hashlib
import random
import zlib
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.ztoc_support import Case, cases, member, read_span, small_ztoc

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import zinfo, ztoc
from soci_snapshotter.formats.zinfo import WINDOW, span_table
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.linux import checkpoints, inflate
from soci_snapshotter.linux.inflate import ENGINE, SpanDecoder, decode_span, inflate_chunks, inflate_span

if TYPE_CHECKING:
    from soci_snapshotter.formats.zinfo import SpanTable

engines = pytest.mark.parametrize("engine", [ENGINE, zlib.decompressobj], ids=["isal", "zlib"])
GZIP_CASES = [c for c in cases() if c.compression is Compression.GZIP]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_all_spans_of_vectors_make_the_tar(case: Case) -> None:
    """The spans of each vector, decoded one by one, are the tar, its tail after the end blocks included."""
    table, layer, data = span_table(ztoc.decode(case.ztoc)), case.layer, case.ztoc
    tar = b"".join(read_span(table, i, layer, data) for i in range(len(table)))
    assert hashlib.sha256(tar).hexdigest() == case.raw["tar_sha256"]


@pytest.mark.parametrize("case", GZIP_CASES, ids=lambda case: case.name)
def test_spans_of_version_1_make_the_tar(case: Case) -> None:
    """The same with the version 1 blob, whose first span starts at the gzip header."""
    decoded = ztoc.decode(case.ztoc)
    start, end = zinfo.HEAD.size, zinfo.HEAD.size + zinfo.STRIDE
    at = decoded.checkpoints_offset
    data = case.ztoc[: at + start] + case.ztoc[at + end :]
    changes = {name: getattr(decoded, name) for name in ztoc.Ztoc.__slots__}
    changes["checkpoints"] = data[at : at + len(decoded.checkpoints) - zinfo.STRIDE]
    table = span_table(ztoc.Ztoc(**changes))
    assert table.implied_header
    tar = b"".join(read_span(table, i, case.layer, data) for i in range(len(table)))
    assert hashlib.sha256(tar).hexdigest() == case.raw["tar_sha256"]


def test_version_1_with_a_long_gzip_header() -> None:
    """A header with a file name, unknown to version 1, is stepped over; the digest still starts at 10."""
    data = bytes(range(256)) * 40
    plain = member(data)
    layer = plain[:3] + b"\x08" + plain[4:10] + b"layer.tar\0" + plain[10:]
    table = span_table(small_ztoc(compressed_size=len(layer), uncompressed_size=len(data)))
    assert (table.compressed_range(0), table.digest_range(0)) == ((0, len(layer)), (10, len(layer)))
    assert decode_span(table, 0, layer, None) == data


@cache
def _stream() -> tuple[bytes, bytes, tuple[checkpoints.Point, ...], tuple[bytes, ...]]:
    """Data, one gzip member of it with many blocks, all its checkpoints, and their windows."""
    rng = random.Random(7)
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(300)]
    data = b"".join(rng.choice(words) for _ in range(100_000)) + rng.randbytes(100_000)
    layer = member(data, 6, zlib.Z_PARTIAL_FLUSH, 3001)
    with checkpoints.Scanner(1, checkpoints.load(), keep=lambda _: None) as scanner:
        out = b"".join(scanner.feed(layer))
        rest, _ = scanner.finish()
    assert out + rest == data
    padded = bytes(WINDOW) + data
    windows = tuple(padded[p.out : p.out + WINDOW] for p in scanner.points)
    return data, layer, tuple(scanner.points), windows


@engines
def test_a_span_may_start_at_any_bit(engine: inflate.Engine) -> None:
    """Blocks that begin at each of the eight bit positions are entered with their window and nothing else."""
    data, layer, points, windows = _stream()
    seen = set()
    for i, (at, out, bits) in enumerate(points[:-1]):
        end, stop, _ = points[i + 1]
        seen.add(bits)
        piece = layer[at - (1 if bits else 0) : end]
        assert (
            inflate_span(piece, window=windows[i], bits=bits, expected=stop - out, engine=engine)
            == data[out:stop]
        )
    assert seen == set(range(8))


@engines
@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_stretch_of_blocks_is_a_span(engine: inflate.Engine, draw: st.DataObject) -> None:
    """From any checkpoint to any later one, in chunks of any size, whole or to the end of the layer."""
    data, layer, points, windows = _stream()
    first = draw.draw(st.integers(0, len(points) - 1))
    last = draw.draw(st.integers(first + 1, len(points)))
    at, out, bits = points[first]
    end, stop = points[last][:2] if last < len(points) else (len(layer), len(data))
    piece = layer[at - (1 if bits else 0) : end]
    size = draw.draw(st.integers(1, 70_000))
    chunks = [piece[i : i + size] for i in range(0, len(piece), size)]
    step = draw.draw(st.integers(1000, 1 << 20))
    found = list(
        inflate_chunks(
            chunks,
            window=windows[first],
            bits=bits,
            expected=stop - out,
            last=last == len(points),
            engine=engine,
            step=step,
        )
    )
    assert b"".join(found) == data[out:stop]
    assert max(map(len, found), default=0) <= step


@engines
def test_a_span_crosses_members(engine: inflate.Engine) -> None:
    """A span that begins in one gzip member and ends in the third is decoded through both headers."""
    parts = [b"first " * 5000, b"", b"second " * 9000, b"third " * 7000]
    layer = b"".join(map(member, parts)) + bytes(1000)
    data = b"".join(parts)
    for size in (1, 7, 5000, len(layer)):
        chunks = [layer[10:][i : i + size] for i in range(0, len(layer) - 10, size)]
        out = inflate_chunks(chunks, window=None, bits=0, expected=len(data), last=True, engine=engine)
        assert b"".join(out) == data


def _refused(
    piece: bytes, expected: int, message: str, *, engine: inflate.Engine, last: bool = False
) -> None:
    with pytest.raises(Integrity, match=message):
        inflate_span(piece, window=None, bits=0, expected=expected, last=last, engine=engine)


@engines
def test_what_does_not_decode_to_just_the_span_is_refused(engine: inflate.Engine) -> None:
    """Too long, too short, cut off, garbage, garbage after the end: Integrity, never other bytes."""
    data = random.Random(1).randbytes(5000) * 3
    raw = member(data)[10:]
    _refused(raw, len(data) - 1, "more than the 14999", engine=engine)
    _refused(raw, len(data) + 1, "to 15000 bytes", engine=engine, last=True)
    _refused(raw[:-300], len(data), "bytes, not the", engine=engine)
    _refused(raw[:-1], len(data), "truncated", engine=engine, last=True)
    _refused(raw[:-8], len(data), "truncated", engine=engine, last=True)
    _refused(b"\xff" * 1000, 10, "not a valid deflate", engine=engine)
    _refused(raw + b"x", len(data), "after the last gzip member", engine=engine, last=True)
    _refused(raw + bytes(9) + b"x", len(data), "after the last gzip member", engine=engine, last=True)
    _refused(raw + member(data)[:-5] + b"\0" * 5, 2 * len(data), "not a valid", engine=engine, last=True)
    assert inflate_span(raw, window=None, bits=0, expected=len(data), last=True, engine=engine) == data


@engines
def test_a_bomb_is_stopped_at_the_promised_size(engine: inflate.Engine) -> None:
    """A last span that inflates to 100 MB stops at what was promised plus the bounded tail."""
    raw = member(bytes(100_000_000), 9)[10:]
    _refused(raw, 1000, "more than", engine=engine, last=True)
    _refused(raw, 1000, "more than", engine=engine)


def test_a_wrong_window_changes_bytes_not_length() -> None:
    """The window matters: that is why the ztoc's own digest must be checked before it is believed."""
    data, layer, points, windows = _stream()
    i = next(i for i, p in enumerate(points) if p[1] > WINDOW and p[2])
    (at, out, bits), (end, stop, _) = points[i], points[i + 1]
    wrong = inflate_span(layer[at - 1 : end], window=bytes(WINDOW), bits=bits, expected=stop - out)
    right = inflate_span(layer[at - 1 : end], window=windows[i], bits=bits, expected=stop - out)
    assert right == data[out:stop] != wrong


def test_decode_span_names_the_span() -> None:
    """An error carries the number of the span, compressed or not."""
    (case,) = (c for c in cases() if c.name == "gnu6-edge1-span64k")
    table = span_table(ztoc.decode(case.ztoc))
    start, end = table.compressed_range(3)
    with pytest.raises(Integrity, match="span 3: "):
        decode_span(table, 3, case.layer[start : end - 2000], bytes(WINDOW))
    (case,) = (c for c in cases() if c.compression is Compression.UNCOMPRESSED)
    plain: SpanTable = span_table(ztoc.decode(case.ztoc))
    with pytest.raises(Integrity, match="span 1 has 5 bytes"):
        decode_span(plain, 1, b"short", None)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_spans_decode_as_their_bytes_come(case: Case) -> None:
    """Fed in pieces of any size, empty ones too, a span is what it is in one piece; one piece less is an error."""
    table, rng = span_table(ztoc.decode(case.ztoc)), random.Random(3)
    for index in range(min(len(table), 6)):
        start, end = table.compressed_range(index)
        fetched, position = memoryview(case.layer)[start:end], table.window_position(index)
        window = None if position is None else case.ztoc[position : position + WINDOW]
        cuts = sorted({0, end - start, 1, *(rng.randrange(end - start) for _ in range(9))})
        decoder, short = SpanDecoder(table, index, window), SpanDecoder(table, index, window)
        for first, second in pairwise(cuts):
            decoder.feed(fetched[first:second])
            decoder.feed(b"")
            if second < cuts[-1]:
                short.feed(fetched[first:second])
        assert decoder.finish() == decode_span(table, index, fetched, window)
        if end - start - cuts[-2] > 16:  # enough that uncompressed bytes are missing
            with pytest.raises(Integrity, match=f"span {index}"):
                short.finish()
