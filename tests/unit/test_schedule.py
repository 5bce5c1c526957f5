"""The background fetch's policy as playbooks: layers and the time go in, turns come out."""

from __future__ import annotations

import itertools

from soci_snapshotter.policy.schedule import RANGE_BYTES, Layer, Rules, Schedule, Turn

QUIET = 60.0
RULES = Rules(silence=3, patience=30)


def layers(*found: tuple[str, str, int, float]) -> list[Layer]:
    """(key, image, missing, touched) each."""
    return [Layer(*each) for each in found]


def test_an_image_starts_when_its_reads_calm_down() -> None:
    """Silence counts from the last mount or missed read of any of its layers."""
    schedule = Schedule(RULES)
    schedule.update(layers(("a", "x", 10, 0.0), ("b", "x", 20, 1.0)), 1.0)
    assert schedule.next(3.9, QUIET) is None
    schedule.update(layers(("a", "x", 10, 3.5), ("b", "x", 20, 1.0)), 4.0)
    assert schedule.next(6.4, QUIET) is None
    assert schedule.next(6.5, QUIET) == Turn("a", RANGE_BYTES)


def test_an_image_that_never_calms_down_starts_all_the_same() -> None:
    """After `patience` it starts whatever is read."""
    schedule = Schedule(RULES)
    for now in range(31):
        schedule.update(layers(("a", "x", 10, float(now))), float(now))
        turn = schedule.next(float(now), 0.3)
        assert (turn is None) == (now < 30)


def test_images_take_turns_and_the_smaller_rest_goes_first() -> None:
    """Two images alternate however many layers they have; within one the layer with the least left is fetched."""
    schedule = Schedule(RULES)
    left = {"a": 50, "b": 30, "c": 40, "z": 1000}
    order = []
    for step in range(8):
        found = [Layer(key, "y" if key == "z" else "x", left[key], 0.0) for key in left if left[key]]
        schedule.update(found, 10.0 + step)
        turn = schedule.next(10.0 + step, QUIET)
        assert turn is not None
        order.append(turn.key)
        left[str(turn.key)] -= 10
    assert [key for key in order if key != "z"] == ["b", "b", "b", "c"]
    assert order.count("z") == 4
    assert all(first != second for first, second in zip(order[::2], order[1::2], strict=True))


def test_small_ranges_while_somebody_reads_now_and_then() -> None:
    """What is asked for at once grows with the time since a reader needed the link."""
    schedule = Schedule(RULES)
    schedule.update(layers(("a", "x", 10, 0.0)), 0.0)
    limits = [turn.limit for quiet in (0.3, 5.0, 60.0) if (turn := schedule.next(100.0, quiet))]
    assert limits == sorted(set(limits))
    assert limits[-1] == RANGE_BYTES


def test_a_dead_registry_is_asked_less_and_less_and_holds_up_its_own_image_only() -> None:
    """Waits double up to five minutes; the other image goes on; one success and all is as before."""
    schedule = Schedule(RULES)
    found = layers(("a", "x", 10, 0.0), ("b", "x", 20, 0.0), ("z", "y", 1000, 0.0))
    now, tries = 10.0, []
    while now < 3000:
        schedule.update(found, now)
        turn = schedule.next(now, QUIET)
        if turn is not None and turn.key != "z":
            tries.append(now)
            schedule.failed(turn.key, now, 0.999, all_of_image=True)
        else:
            assert turn == Turn("z", RANGE_BYTES)
            schedule.succeeded("z")
        now += 0.5
    waits = [second - first for first, second in itertools.pairwise(tries)]
    assert [round(wait) for wait in waits[:6]] == [1, 2, 4, 8, 16, 32]
    assert 299 <= max(waits) <= 301
    assert len(tries) < 25
    schedule.succeeded("a")
    assert {schedule.next(now, QUIET), schedule.next(now, QUIET)} == {
        Turn("a", RANGE_BYTES),
        Turn("z", RANGE_BYTES),
    }


def test_bad_bytes_hold_up_their_layer_only() -> None:
    """A layer whose spans are not what its ztoc says waits; its image's other layer does not."""
    schedule = Schedule(RULES)
    schedule.update(layers(("a", "x", 10, 0.0), ("b", "x", 20, 0.0)), 0.0)
    schedule.failed("a", 10.0, 0.5, all_of_image=False)
    assert schedule.next(10.0, QUIET) == Turn("b", RANGE_BYTES)
    assert schedule.next(11.0, QUIET) == Turn("a", RANGE_BYTES)


def test_a_period_and_one_span_at_a_time() -> None:
    """A configured period is kept between requests, and each asks for one span, as the Go daemon's do."""
    schedule = Schedule(Rules(silence=0, period=2.0))
    schedule.update(layers(("a", "x", 10, 0.0)), 0.0)
    assert [now for now in range(7) if schedule.next(float(now), QUIET) == Turn("a", 0)] == [0, 2, 4, 6]


def test_a_full_queue_drops_the_newest_or_the_oldest() -> None:
    """Three layers come and two may wait: which is given up is the policy's choice, counted, and it stays so."""
    found = layers(("a", "x", 1, 0.0), ("b", "x", 2, 0.0), ("c", "x", 3, 0.0))
    for newest, kept in ((True, {"a", "b"}), (False, {"b", "c"})):
        schedule = Schedule(Rules(silence=0, queue=2, drop_newest=newest))
        schedule.update(found, 0.0)
        schedule.update(found, 1.0)
        assert schedule.evicted == 1
        assert schedule.queued == 2
        chosen = set()
        for _ in range(2):
            turn = schedule.next(2.0, QUIET)
            assert turn is not None
            chosen.add(turn.key)
            schedule.failed(turn.key, 2.0, 0.5, all_of_image=False)
        assert chosen == kept
        assert schedule.next(2.0, QUIET) is None


def test_what_is_complete_is_forgotten() -> None:
    """Layers that lack nothing any more, and their images, leave no trace; a layer that was dropped may come back."""
    schedule = Schedule(Rules(silence=0, queue=1))
    schedule.update(layers(("a", "x", 1, 0.0), ("b", "y", 2, 0.0)), 0.0)
    schedule.update([], 1.0)
    assert schedule.queued == 0
    assert schedule.next(2.0, QUIET) is None
    schedule.update(layers(("b", "y", 2, 0.0)), 3.0)
    assert schedule.next(3.0, QUIET) == Turn("b", RANGE_BYTES)
