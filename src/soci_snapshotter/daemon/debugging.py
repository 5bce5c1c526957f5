"""What the debug address serves: where every thread is, and where they spend their time. No values of variables."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from types import FrameType

MAX_SECONDS = 60.0
"""Of one profile."""
_INTERVAL = 0.02
"""Between two looks: walking 50 threads takes about 1 ms, so that the daemon is slowed down by a twentieth."""
_DEPTH = 64


def stacks() -> str:
    """The stack of every thread, innermost call last, as a traceback shows it."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    blocks = []
    for ident, frame in sys._current_frames().items():
        lines = "".join(traceback.format_stack(frame))
        blocks.append(f"thread {names.get(ident, '?')} ({ident}):\n{lines}")
    return "\n".join(sorted(blocks))


def profile(seconds: float) -> str:
    """Where the threads are, looked at 50 times a second for so long (at most MAX_SECONDS): wall time, waits included.

    A line for each stack, outermost call first, parts separated by semicolons, then how often it was seen: what
    flame graph tools read.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    own = threading.get_ident()
    end = time.monotonic() + min(max(seconds, 0.0), MAX_SECONDS)
    while time.monotonic() < end:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident != own:
                seen[(names.get(ident, "?"), *reversed(list(_calls(frame))))] += 1
        time.sleep(_INTERVAL)
    return "".join(f"{';'.join(stack)} {count}\n" for stack, count in seen.most_common())


def _calls(frame: FrameType | None) -> Iterator[str]:
    for _ in range(_DEPTH):
        if frame is None:
            return
        code = frame.f_code
        yield f"{frame.f_globals.get('__name__', '?')}.{code.co_qualname}".replace(";", ",").replace(" ", "_")
        frame = frame.f_back
