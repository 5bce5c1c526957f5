"""Tasks at once: all run, the first failure ends the rest, and nothing waits for a task that is stuck."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from soci_snapshotter.errors import Remote
from soci_snapshotter.index import parallel
from soci_snapshotter.index.parallel import run_all


def test_all_tasks_run_and_no_more_at_once_than_asked() -> None:
    """Twenty tasks on three threads: each once, three together at some time, never four."""
    lock, together = threading.Lock(), threading.Barrier(3)
    done: list[int] = []
    now, most = 0, 0

    def task(number: int) -> Callable[[Callable[[], bool]], None]:
        def run(_stopped: Callable[[], bool]) -> None:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            if number < 3:
                together.wait(10)
            with lock:
                now -= 1
                done.append(number)

        return run

    run_all([task(number) for number in range(20)], 3)
    assert sorted(done) == list(range(20))
    assert most == 3
    run_all([], 3)


def test_a_failure_ends_the_rest_without_waiting_for_a_stuck_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is raised while another task is blocked for good; that one is told to stop, none is begun."""
    monkeypatch.setattr(parallel, "_JOIN_S", 0.1)
    forever, begun, told = threading.Event(), [0], threading.Event()

    def stuck(stopped: Callable[[], bool]) -> None:
        forever.wait(60)
        if stopped():
            told.set()

    def fails(_stopped: Callable[[], bool]) -> None:
        raise Remote("no")

    def later(_stopped: Callable[[], bool]) -> None:
        begun[0] += 1

    with pytest.raises(Remote, match="no"):
        run_all([stuck, fails, later], 2)
    forever.set()
    assert told.wait(10)
    assert begun == [0]
