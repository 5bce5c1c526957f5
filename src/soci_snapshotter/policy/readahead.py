"""Which spans of a layer are likely to be read next: one tracker per layer, numbers in, numbers out.

    stream    somebody who reads on where he read before. The first time a span is read whose neighbor was missed
              before, the next WINDOW_FIRST bytes are asked for; each time half of what was asked for has been read,
              more, up to a bound. Several streams at once, the oldest forgotten.
    guess     a miss that continues no stream: the next neighbor, as long as guesses turn out right often enough.
              Files of one package lie together in a tar, so a program that starts is often right; somebody who reads
              at random is not, and soon gets none.

Bytes are compressed bytes: what the link carries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

WINDOW_FIRST = 2 << 20
"""One or two usual spans. On the recorded reads of a program's start over 10 ms and 500 Mbit/s: 3.6 s for 153 MB, against
4.3 s for 117 MB without; 4 MiB that double give 3.7 s for 197 MB."""

WINDOW_MOST = 32 << 20
"""Half a second of 500 Mbit/s: enough for four requests of 8 MiB at once, little enough to be wrong about."""

STREAMS = 16
"""Readers of one layer followed at once; a start reads some files in parallel, rarely more."""

_SCORE_START = 0.4
_SCORE_WRONG = 1 / 8
_SCORE_RIGHT = 1 / 4
_SCORE_ENOUGH = 1 / 3
"""A guess counts as wrong until it proves right. With these a quarter of right guesses keeps them coming, and one wrong
guess at the start of a layer ends them until two neighbors are read."""


class Ahead(NamedTuple):
    """Spans to fetch before they are asked for. `sure`: a stream goes there; else it is a guess."""

    spans: range
    sure: bool


NOTHING = Ahead(range(0), sure=False)


class _Stream:
    """Read up to span `at`; asked for up to `end` (exclusive); `watch` is the span whose reading asks for more."""

    __slots__ = ("at", "end", "watch", "window")

    def __init__(self, at: int) -> None:
        self.at = at
        self.end = self.watch = at + 1
        self.window = 0


class ReadAhead:
    """The tracker. Not thread safe."""

    def __init__(self, spans: int, end_of: Callable[[int], int], *, most: int = WINDOW_MOST) -> None:
        """`end_of(span)`: the blob's offset behind that span; `most`: bytes to be ahead of a stream, 0 for never."""
        self._spans = spans
        self._end_of = end_of
        self._most = most
        self._streams: list[_Stream] = []  # the one used last at the end
        self._score = _SCORE_START
        self.watched: dict[int, _Stream] = {}
        """Spans whose reading is news even when they are present: call `read` for those, and for every miss."""

    def read(self, first: int, last: int, *, missed: bool) -> Ahead:
        """Spans first..last (inclusive) are read; `missed`: one of them at least was not there."""
        stream = self._of(first, last, missed=missed)
        if stream is not None:
            if last >= stream.watch:
                return self._go_on(stream, last)
            stream.at = max(stream.at, last)
            return NOTHING
        if not missed or self._most <= 0:
            return NOTHING
        self._begin(last)
        self._score -= self._score * _SCORE_WRONG
        if self._score < _SCORE_ENOUGH:
            return NOTHING
        return Ahead(range(last + 1, min(last + 2, self._spans)), sure=False)

    def _of(self, first: int, last: int, *, missed: bool) -> _Stream | None:
        for span in range(first, last + 1):
            stream = self.watched.get(span)
            if stream is not None:
                return stream
        if missed:  # in what was asked for and has not come, or right behind it
            for stream in reversed(self._streams):
                if stream.at <= first <= stream.end:
                    return stream
        return None

    def _begin(self, at: int) -> None:
        if at + 1 >= self._spans:
            return
        if len(self._streams) >= STREAMS:
            self._unwatch(self._streams.pop(0))
        stream = _Stream(at)
        self._streams.append(stream)
        self.watched[stream.watch] = stream

    def _go_on(self, stream: _Stream, last: int) -> Ahead:
        self._streams.remove(stream)
        self._streams.append(stream)
        self._unwatch(stream)
        if stream.window:
            stream.window = min(stream.window + max(WINDOW_FIRST, stream.window // 2), self._most)
        else:
            stream.window = min(WINDOW_FIRST, self._most)
            self._score += (1 - self._score) * _SCORE_RIGHT
        stream.at = max(stream.at, last)
        begin = max(stream.end, stream.at + 1)
        end, limit = begin, self._end_of(stream.at) + stream.window
        while end < self._spans and (end == begin or self._end_of(end) <= limit):
            end += 1
        stream.end = end
        if stream.at + 1 >= self._spans:
            self._streams.remove(stream)
        else:
            stream.watch = min(stream.at + 1 + (end - stream.at - 1) // 2, self._spans - 1)
            self.watched[stream.watch] = stream
        return Ahead(range(begin, end), sure=True)

    def _unwatch(self, stream: _Stream) -> None:
        if self.watched.get(stream.watch) is stream:
            del self.watched[stream.watch]
