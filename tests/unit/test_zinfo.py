"""Span tables: what a checkpoints blob says, and the rules it must keep."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.ztoc_support import Case, blob, cases, small_ztoc

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import zinfo, ztoc
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.formats.ztoc_writer import encode_tarinfo

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_spans_of_vectors_tile_the_layer(case: Case) -> None:
    """Spans follow each other, sharing one byte where bits say so, and have the digests in the ztoc."""
    decoded = ztoc.decode(case.ztoc)
    table, layer = span_table(decoded), case.layer
    end = table.compressed_range(0)[0]
    out = 0
    for i in range(len(table)):
        start = table.compressed_range(i)[0]
        assert end - start == (1 if table.bits(i) else 0)
        end = table.compressed_range(i)[1]
        assert table.digest_range(i) == (start, end)
        assert "sha256:" + hashlib.sha256(layer[start:end]).hexdigest() == table.digest(i)
        assert table.uncompressed_range(i)[0] == out
        out = table.uncompressed_range(i)[1]
        assert table.is_last(i) == (i == len(table) - 1)
    known = len(layer) if case.compression is Compression.UNCOMPRESSED else decoded.uncompressed_size
    assert (end, out, table.uncompressed_size) == (len(layer), known, known)


def _version_1(case: Case) -> ztoc.Ztoc:
    """The vector's ztoc with a version 1 blob: checkpoint 0 left out."""
    decoded = ztoc.decode(case.ztoc)
    old = bytes(decoded.checkpoints)
    new = old[: zinfo.HEAD.size] + old[zinfo.HEAD.size + zinfo.STRIDE :]
    changes = {name: getattr(decoded, name) for name in ztoc.Ztoc.__slots__} | {"checkpoints": new}
    return ztoc.Ztoc(**changes)


@pytest.mark.parametrize(
    "case", [c for c in cases() if c.compression is Compression.GZIP], ids=lambda c: c.name
)
def test_version_1_says_the_same_as_version_2(case: Case) -> None:
    """A blob without checkpoint 0 gives the same spans; the first is fetched with the gzip header before
    it.
    """
    new, old = span_table(ztoc.decode(case.ztoc)), span_table(_version_1(case))
    assert (len(old), old.implied_header, new.implied_header) == (len(new), True, False)
    assert old.compressed_range(0) == (0, new.compressed_range(0)[1])
    for i in range(len(new)):
        assert old.digest_range(i) == new.digest_range(i)
        assert old.uncompressed_range(i) == new.uncompressed_range(i)
        assert old.bits(i) == new.bits(i)
        if new.window_position(i) is None:
            assert old.window_position(i) is None
        else:
            assert old.window_position(i) == new.window_position(i) - zinfo.STRIDE  # type: ignore[operator]


def test_windows_are_where_the_table_says() -> None:
    """window_position points at the 32 KiB of tar before the span, in the ztoc file."""
    (case,) = (c for c in cases() if c.name == "gnu6-edge1-span64k")
    table, tar, data = span_table(ztoc.decode_spans(case.ztoc)), case.tar, case.ztoc
    for i in range(1, len(table)):
        at, out = table.window_position(i), table.uncompressed_range(i)[0]
        assert at is not None
        assert data[at : at + zinfo.WINDOW] == tar[out - zinfo.WINDOW : out]
    assert table.window_position(0) is None


POINTS = [(10, 0, 0), (500, 5000, 3), (700, 5000, 7), (900, 9000, 0)]

BROKEN = [
    ("no head", b"\1\0\0", "checkpoints has 3 bytes"),
    ("none", zinfo.HEAD.pack(0, 4096), "holds 0"),
    ("fewer than none", zinfo.HEAD.pack(-1, 4096), "holds -1"),
    ("absurdly many", zinfo.HEAD.pack(2**31 - 1, 4096), "holds 2147483647"),
    ("one too many", blob([*POINTS, (950, 9500, 0)]), "holds 5"),
    ("truncated", blob(POINTS)[:-1], "bytes, which do not hold 4"),
    ("two missing", blob(POINTS[:2], count=4), "bytes, which do not hold 4"),
    ("one in excess", blob([*POINTS, (950, 9500, 0)], count=4), "bytes, which do not hold 4"),
    ("span size 0", blob(POINTS, 0), "span size"),
    ("span size negative", blob(POINTS, -4), "span size"),
    ("out not from 0", blob([(10, 1, 0), *POINTS[1:]]), "checkpoint 0: out"),
    ("in the header", blob([(9, 0, 0), *POINTS[1:]]), "checkpoint 0: in"),
    ("in negative", blob([(-10, 0, 0), *POINTS[1:]]), "checkpoint 0: in"),
    ("in falls", blob([*POINTS[:2], (499, 5000, 0), POINTS[3]]), "checkpoint 2: in"),
    ("in stays", blob([*POINTS[:2], (500, 5000, 0), POINTS[3]]), "checkpoint 2: in"),
    ("in beyond the layer", blob([*POINTS[:3], (1001, 9000, 0)]), "checkpoint 3: in"),
    ("out falls", blob([*POINTS[:2], (700, 4999, 0), POINTS[3]]), "checkpoint 2: out"),
    ("out in the terabytes", blob([*POINTS[:3], (900, 1 << 42, 0)]), "checkpoint 3: out"),
    ("more than deflate can", blob([*POINTS[:3], (900, 5000 + 202 * 1032, 0)]), "checkpoint 3: out"),
    ("bits", blob([*POINTS[:3], (900, 9000, 8)]), "checkpoint 3: bits"),
]


@pytest.mark.parametrize(("data", "message"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_checkpoints_are_refused_by_name(data: bytes, message: str) -> None:
    """Each rule of FORMATS.md 2, broken alone, is an Integrity error naming the checkpoint and the field."""
    good = small_ztoc(max_span_id=3, span_digests=[DIGEST] * 4, checkpoints=blob(POINTS))
    assert len(span_table(good)) == 4
    bad = small_ztoc(max_span_id=3, span_digests=[DIGEST] * 4, checkpoints=data)
    with pytest.raises(Integrity, match=message):
        span_table(bad)


BROKEN_TAR = [
    ("empty", b"", "too few"),
    ("size differs", encode_tarinfo(100, 999), "TarZinfo.size"),
    ("span size 0", encode_tarinfo(0, 1000), "TarZinfo.span_size"),
    ("span size negative", encode_tarinfo(-1, 1000), "TarZinfo.span_size"),
    ("spans too small", encode_tarinfo(1, 1000), "makes 1000 spans"),
    ("cut", encode_tarinfo(100, 1000)[:-8], "TarZinfo"),
]


@pytest.mark.parametrize(("data", "message"), [b[1:] for b in BROKEN_TAR], ids=[b[0] for b in BROKEN_TAR])
def test_broken_tarinfo_is_refused_by_name(data: bytes, message: str) -> None:
    """The same for the checkpoints of an uncompressed layer."""

    def made(checkpoints: bytes, uncompressed: int = 1000) -> ztoc.Ztoc:
        return small_ztoc(
            compression=Compression.UNCOMPRESSED,
            uncompressed_size=uncompressed,
            max_span_id=9,
            span_digests=[DIGEST] * 10,
            checkpoints=checkpoints,
        )

    assert span_table(made(encode_tarinfo(100, 1000))).compressed_range(9) == (900, 1000)
    with pytest.raises(Integrity, match=message):
        span_table(made(data))
    with pytest.raises(Integrity, match="uncompressed_archive_size"):
        span_table(made(encode_tarinfo(100, 1000), 1001))


def test_an_empty_uncompressed_layer_has_no_spans() -> None:
    """max_span_id -1 is legal there and only there."""
    changes = {"max_span_id": -1, "span_digests": [], "compressed_size": 0, "uncompressed_size": 0}
    tarinfo = encode_tarinfo(4096, 0)
    table = span_table(small_ztoc(compression=Compression.UNCOMPRESSED, checkpoints=tarinfo, **changes))
    assert len(table) == 0
    assert list(table.spans_for(0, 0)) == list(table.spans_for(0, 1)) == []


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 300), st.integers(-1, 300))
def test_spans_for_finds_what_a_linear_search_finds(steps: list[int], offset: int, size: int) -> None:
    """The spans for a range are those that a search of all spans finds, empty spans skipped at its start."""
    outs = [0]
    for step in steps[1:]:
        outs.append(outs[-1] + step)
    total = outs[-1] + steps[0]
    z = small_ztoc(
        max_span_id=len(outs) - 1,
        span_digests=[DIGEST] * len(outs),
        uncompressed_size=total,
        checkpoints=blob([(10 + i, out, 0) for i, out in enumerate(outs)]),
    )
    table = span_table(z)
    offset = min(offset, max(total - 1, 0))
    size = min(size, total - offset)
    touched = [
        i
        for i in range(len(table))
        if max(table.uncompressed_range(i)[0], offset) < min(table.uncompressed_range(i)[1], offset + size)
    ]
    found = table.spans_for(offset, size)
    assert [i for i in found if range(*table.uncompressed_range(i))] == touched
    if touched:
        assert (found[0], found[-1]) == (touched[0], touched[-1])
