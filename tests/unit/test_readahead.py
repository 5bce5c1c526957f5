"""The read-ahead policy as playbooks: reads go in, spans to fetch come out."""

from __future__ import annotations

import random

from soci_snapshotter.policy.readahead import STREAMS, WINDOW_FIRST, WINDOW_MOST, Ahead, ReadAhead

MIB = 1 << 20


def tracker(spans: int = 400, size: int = MIB, *, most: int = WINDOW_MOST) -> ReadAhead:
    """A layer of equal spans."""
    return ReadAhead(spans, lambda span: (span + 1) * size, most=most)


def test_a_stream_is_seen_at_its_second_span_and_run_ahead_of_more_and_more() -> None:
    """Reading span by span: first a guess, then windows that follow each other without gap and grow to the bound."""
    ahead = tracker()
    assert ahead.read(0, 0, missed=True) == Ahead(range(1, 2), sure=False)
    asked = [ahead.read(1, 1, missed=False)]
    assert asked[0] == Ahead(range(2, 2 + WINDOW_FIRST // MIB), sure=True)
    for span in range(2, 300):
        if span in ahead.watched:
            asked.append(ahead.read(span, span, missed=False))
            assert asked[-1].sure
            assert asked[-1].spans.start == asked[-2].spans.stop
            assert asked[-1].spans.stop - 1 - span <= WINDOW_MOST // MIB
    assert asked[-1].spans.stop - 1 > 300
    sizes = [len(each.spans) for each in asked]
    assert max(sizes) >= WINDOW_MOST // MIB // 2


def test_a_layer_read_to_its_end_asks_for_nothing_behind_it() -> None:
    """Windows end with the layer, and the last span starts no stream."""
    ahead = tracker(5)
    assert ahead.read(2, 2, missed=True).spans == range(3, 4)
    assert ahead.read(3, 3, missed=False).spans == range(4, 5)
    assert not ahead.read(4, 4, missed=False).spans
    assert not ahead.read(4, 4, missed=True).spans


def test_many_requests_for_one_span_are_one_reader() -> None:
    """The kernel asks for a span in several pieces: they neither make streams nor widen windows."""
    ahead = tracker()
    ahead.read(0, 0, missed=True)
    for _ in range(10):
        assert not ahead.read(0, 0, missed=True).spans
    first = ahead.read(1, 1, missed=True)
    for _ in range(10):
        assert not ahead.read(1, 1, missed=True).spans
    assert first.spans == range(2, 4)


def test_a_span_larger_than_the_window_is_asked_for_all_the_same() -> None:
    """One span at least, however large."""
    ahead = tracker(10, 64 * MIB)
    ahead.read(0, 0, missed=True)
    assert ahead.read(1, 1, missed=True) == Ahead(range(2, 3), sure=True)


def test_streams_do_not_disturb_each_other() -> None:
    """Three readers in turn, one of them at random in between: each gets the spans behind its own."""
    ahead, chance = tracker(3000), random.Random(7)
    ends = {}
    for step in range(20):
        for start in (0, 1000, 2000):
            found = ahead.read(start + step, start + step, missed=step < 2)
            if found.sure:
                assert found.spans.start == ends.get(start, start + step + 1)
                ends[start] = found.spans.stop
        elsewhere = chance.randrange(500, 900)
        ahead.read(elsewhere, elsewhere, missed=True)
    assert set(ends) == {0, 1000, 2000}


def test_random_reads_soon_get_no_guesses() -> None:
    """Somebody who never reads what was guessed: a guess or two, then none, and no stream."""
    ahead = tracker(4000)
    found = [ahead.read(span, span, missed=True) for span in range(0, 4000, 7)]
    assert not any(each.sure for each in found)
    assert 1 <= sum(bool(each.spans) for each in found) <= 2
    assert len(ahead.watched) <= STREAMS


def test_guesses_come_back_when_neighbors_are_read() -> None:
    """After random reads, a program that reads pairs of neighbors is guessed for again."""
    ahead = tracker(4000)
    for span in range(0, 700, 7):
        ahead.read(span, span, missed=True)
    assert not ahead.read(800, 800, missed=True).spans
    for span in range(1000, 1100, 10):
        ahead.read(span, span, missed=True)
        ahead.read(span + 1, span + 1, missed=True)
    assert ahead.read(2000, 2000, missed=True).spans == range(2001, 2002)


def test_off_is_off() -> None:
    """With a bound of 0 nothing is ever asked for."""
    ahead = tracker(most=0)
    assert not any(ahead.read(span, span, missed=True).spans for span in range(50))
    assert not ahead.watched
