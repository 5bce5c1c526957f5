"""HTTP fields, retries, discovery and runs of spans."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Integrity, Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import httpfields as fields
from soci_snapshotter.policy.discovery import Source, candidates, sources
from soci_snapshotter.policy.retry import Retry, is_transient
from soci_snapshotter.policy.runs import join


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 40))
def test_ranges_round_trip(start: int, size: int) -> None:
    """A range and the answer to it parse to what they were made of."""
    asked = fields.Range(start, start + size)
    assert fields.parse_range(str(asked)) == asked
    given_ = fields.ContentRange(start, start + size, start + size + 7)
    assert fields.parse_content_range(str(given_)) == given_


def test_empty_ranges_cannot_be_said() -> None:
    """HTTP has no empty range: Invalid before anything is sent."""
    with pytest.raises(Invalid):
        fields.Range(5, 5)


@pytest.mark.parametrize("text", ["", "bytes 5-4/9", "bytes 0-9/5", "items 0-1/2", "bytes */5", "bytes 0-1"])
def test_contradicting_answers_are_refused(text: str) -> None:
    """A Content-Range that is malformed or contradicts itself: Integrity."""
    with pytest.raises(Integrity):
        fields.parse_content_range(text)


def test_challenges() -> None:
    """Bearer and Basic in one field, quoted commas and quotes, names in any case, the first of a repeated one."""
    text = 'Bearer realm="https://a/t?x=1,2",SCOPE="r:\\"x\\":pull",realm="https://evil/", Basic realm=plain'
    bearer, basic = fields.parse_challenges(text)
    assert (bearer.scheme, dict(bearer.params)) == (
        "bearer",
        {"realm": "https://a/t?x=1,2", "scope": 'r:"x":pull'},
    )
    assert (basic.scheme, dict(basic.params)) == ("basic", {"realm": "plain"})


@given(st.text(max_size=200))
def test_challenges_raise_only_integrity(text: str) -> None:
    """Whatever a server sends either parses or raises Integrity."""
    try:
        found = fields.parse_challenges(text)
    except Integrity:
        return
    assert all(each.scheme == each.scheme.lower() for each in found)


def test_retry_after_and_next_link() -> None:
    """Seconds and dates; the next link among others."""
    assert fields.parse_retry_after("7", 0) == 7
    assert fields.parse_retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 40) == 60
    assert fields.parse_retry_after("soon", 0) is None
    assert fields.parse_next_link('</a>; rel="prev", </v2/x?n=2>; rel="next"') == "/v2/x?n=2"


@given(st.floats(0, 0.999), st.integers(0, 20))
def test_retries_double_and_end(jitter: float, attempts: int) -> None:
    """Exactly `attempts` retries, each wait between half of and the whole doubling, never above the maximum."""
    retry, waits = Retry(attempts=attempts, min_wait=0.03, max_wait=2.0), []
    while (after := retry.after_failure(jitter)) is not None:
        waits.append(after[0])
        retry = after[1]
    assert len(waits) == attempts
    for number, wait in enumerate(waits):
        most = min(0.03 * 2**number, 2.0)
        assert most / 2 <= wait <= most


def test_retry_after_is_obeyed_within_patience() -> None:
    """A longer wait that the server asks for replaces ours; one beyond patience ends the tries."""
    waited = Retry().after_failure(0.0, 5.0)
    assert waited is not None
    assert waited[0] == 5.0
    assert Retry(patience=60).after_failure(0.0, 61.0) is None
    assert [status for status in (200, 401, 404, 429, 500, 501, 503) if is_transient(status)] == [
        429,
        500,
        503,
    ]


def test_discovery_order() -> None:
    """An explicit digest excludes the rest even with every mode off; v2 before v1; the tag, a part of v1, last."""
    assert sources("sha256:x", v1=False, v2=False) == (Source.EXPLICIT,)
    assert sources(None, v1=True, v2=True) == (Source.V2, Source.V1)
    assert sources(None, v1=False, v2=False) == ()
    assert sources(None, v1=True, v2=True, tag=True) == (Source.V2, Source.V1, Source.TAG)
    assert sources(None, v1=False, v2=True, tag=True) == (Source.V2,)


@given(st.lists(st.integers(0, 30)), st.randoms())
def test_the_order_of_candidates_is_no_registrys(numbers: list[int], random: Random) -> None:
    """However indexes are listed, and how often, they are tried in one order, each once."""
    listed = [digests.sha256(bytes([number])) for number in numbers]
    order = candidates(listed)
    random.shuffle(listed)
    assert candidates(listed) == order == tuple(sorted(set(listed)))


@given(st.sets(st.integers(0, 60)), st.integers(1, 40), st.data())
def test_runs_cover_the_missing_spans_once(missing: set[int], limit: int, data: st.DataObject) -> None:
    """Runs hold each missing span once, only neighbors, and no more bytes than the limit unless one span alone is."""
    spans = sorted(missing)
    sizes = [data.draw(st.integers(1, 30)) for _ in spans]
    runs = join(spans, sizes, limit)
    assert [span for run in runs for span in range(run.first, run.last + 1)] == spans
    by_span = dict(zip(spans, sizes, strict=True))
    for run in runs:
        held = sum(by_span[span] for span in range(run.first, run.last + 1))
        assert held <= limit or run.first == run.last
