"""Several blocking tasks at once on threads that never outlive the user's patience."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence

# How long an ending waits for tasks that are blocked in the network; they are daemon threads and die with the
# process.
_JOIN_S = 2.0


def run_all(tasks: Sequence[Callable[[Callable[[], bool]], None]], workers: int) -> None:
    """Run the tasks, at most `workers` at once, and raise the first failure, or what interrupts this thread.

    Each task gets a function that says whether it should give up. After a failure no further one is begun, and none
    is waited for longer than a moment.
    """
    waiting: queue.SimpleQueue[Callable[[Callable[[], bool]], None]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                task(stop.is_set)
            except BaseException as error:
                results.put(error)
                return
            results.put(None)

    count = min(max(1, workers), len(tasks))
    threads = [threading.Thread(target=work, name=f"task-{n}", daemon=True) for n in range(count)]
    try:
        for thread in threads:
            thread.start()
        for _ in tasks:
            error = results.get()
            if error is not None:
                raise error
    finally:
        stop.set()
        deadline = time.monotonic() + _JOIN_S
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
