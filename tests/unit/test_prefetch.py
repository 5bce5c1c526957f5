"""Prefetch artifacts and lists of paths: the Go tool's bytes, and nothing hostile accepted."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Integrity, Invalid
from soci_snapshotter.formats import prefetch
from soci_snapshotter.formats.prefetch import SpanRange

RANGES = st.lists(
    st.builds(
        lambda start, length, priority: SpanRange(start, start + length, priority),
        st.integers(0, 40),
        st.integers(0, 8),
        st.integers(-2, 2),
    ),
    max_size=12,
)


def as_map(ranges: tuple[SpanRange, ...] | list[SpanRange]) -> dict[int, int]:
    """Span to its most urgent priority."""
    found: dict[int, int] = {}
    for start, end, priority in ranges:
        for span in range(start, end + 1):
            found[span] = min(priority, found.get(span, priority))
    return found


def test_the_go_tools_bytes() -> None:
    """Compact, keys in Go's order, start 0 written, priority 0 not; overlapping and adjacent ranges merged."""
    ranges = [SpanRange(50, 55, 1), SpanRange(2, 4), SpanRange(0, 2), SpanRange(5, 5), SpanRange(9, 9)]
    assert prefetch.encode(ranges) == (
        b'{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":5},{"start_span":9,"end_span":9},'
        b'{"start_span":50,"end_span":55,"priority":1}]}'
    )


def test_a_span_asked_for_twice_keeps_the_more_urgent_priority() -> None:
    """A range that a more urgent one covers in part is cut, not listed again."""
    ranges = [SpanRange(0, 9, 5), SpanRange(3, 4, 1)]
    assert prefetch.normalize(ranges) == (SpanRange(0, 2, 5), SpanRange(3, 4, 1), SpanRange(5, 9, 5))


@given(RANGES)
def test_normalize_keeps_every_span_and_its_priority(ranges: list[SpanRange]) -> None:
    """The result lists the same spans at the same priorities, disjoint, rising, nothing left to join."""
    result = prefetch.normalize(ranges)
    assert as_map(result) == as_map(ranges)
    for one, two in itertools.pairwise(result):
        assert one.end < two.start
        assert one.end + 1 < two.start or one.priority != two.priority


@given(RANGES.filter(bool))
def test_what_is_encoded_is_decoded(ranges: list[SpanRange]) -> None:
    """The artifact holds the normalised ranges, and is what json.dumps would write compactly."""
    data = prefetch.encode(ranges)
    assert prefetch.decode(data) == prefetch.normalize(ranges)
    assert json.dumps(json.loads(data), separators=(",", ":")).encode() == data


@given(RANGES.filter(bool), st.data())
def test_a_damaged_artifact_is_refused_or_read(ranges: list[SpanRange], data: st.DataObject) -> None:
    """Cut or changed anywhere, it raises Integrity or gives ranges that keep the rules."""
    artifact = bytearray(prefetch.encode(ranges))
    at = data.draw(st.integers(0, len(artifact) - 1))
    if data.draw(st.booleans()):
        del artifact[at:]
    else:
        artifact[at] = data.draw(st.integers(0, 255))
    try:
        found = prefetch.decode(bytes(artifact))
    except Integrity:
        return
    assert all(0 <= item.start <= item.end < 2**31 for item in found)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (b'{"version":"1.0","prefetch_spans":[{"start_span":3,"end_span":2}]}', "before its start 3"),
        (b'{"version":"1.0","prefetch_spans":[{"start_span":-1,"end_span":2}]}', "start_span"),
        (b'{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":2147483648}]}', "end_span"),
        (b'{"version":"1.0","prefetch_spans":[{"start_span":0}]}', "end_span"),
        (b'{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":1.5}]}', "end_span"),
        (b'{"version":"2.0","prefetch_spans":[]}', "'2.0'; known is 1.0"),
        (b'{"prefetch_spans":[]}', "version"),
        (b"[]", "prefetch artifact"),
        (b"", "prefetch artifact"),
        (b" " * (prefetch.MAX_SIZE + 1), "more than"),
        (
            b'{"version":"1.0","prefetch_spans":['
            + b",".join([b'{"start_span":0,"end_span":0}'] * (prefetch.MAX_RANGES + 1))
            + b"]}",
            str(prefetch.MAX_RANGES),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_artifact_is_refused_by_name(document: bytes, says: str) -> None:
    """Each broken rule is an Integrity error that names the field."""
    with pytest.raises(Integrity, match=says):
        prefetch.decode(document)


def test_an_artifact_may_be_empty_but_none_is_written() -> None:
    """Go's nil slice is read as no spans; to write an artifact without spans is Invalid."""
    assert prefetch.decode(b'{"version":"1.0","prefetch_spans":null}') == ()
    assert prefetch.decode(b'{"version":"1.0","prefetch_spans":[],"later":{"a":[1]}}') == ()
    with pytest.raises(Invalid, match="no spans"):
        prefetch.encode([])


def test_ranges_that_no_artifact_can_hold_are_not_written() -> None:
    """Too many islands, and spans beyond an int32, are Invalid before any bytes exist."""
    with pytest.raises(Invalid, match="more than 65536"):
        prefetch.encode([SpanRange(2 * i, 2 * i) for i in range(prefetch.MAX_RANGES + 1)])
    with pytest.raises(Invalid, match="cannot be written"):
        prefetch.encode([SpanRange(0, 2**31)])
    with pytest.raises(Invalid, match="ends before"):
        prefetch.encode([SpanRange(2, 1)])


def test_lists_are_read_as_go_reads_them() -> None:
    """Strings trimmed of Unicode's white space (not of U+001F), empty ones and nulls left out."""
    assert prefetch.decode_list(
        '[" /bin/sh\\n", "", null, "\u00a0./b \u3000", "\\u001fc", "ä"]'.encode()
    ) == (b"/bin/sh", b"./b", b"\x1fc", "ä".encode())
    assert prefetch.decode_list(b"null") == ()


@pytest.mark.parametrize("document", [b'{"a":1}', b"[1]", b'["a"', b'[["a"]]', b'"a"', b'["\xff"]', b""])
def test_what_is_no_list_is_refused_and_the_shape_shown(document: bytes) -> None:
    """A file of another shape is the user's mistake: Invalid, with an example."""
    with pytest.raises(Invalid, match="want a JSON array of strings"):
        prefetch.decode_list(document)


def test_lists_are_bounded() -> None:
    """Neither a huge file nor a huge number of paths is taken."""
    with pytest.raises(Invalid, match="more than the"):
        prefetch.decode_list(b" " * (prefetch.MAX_LIST + 1))
    with pytest.raises(Invalid, match="name directories or globs"):
        prefetch.paths(["a"] * (prefetch.MAX_PATHS + 1))


def test_paths_of_a_command_line_keep_their_bytes() -> None:
    """A name that is not UTF-8 reaches the table of contents as it was typed."""
    assert prefetch.paths([b"caf\xe9".decode("utf-8", "surrogateescape")]) == (b"caf\xe9",)
