"""One blob into a file, in one piece or in ranges that come at the same time; whoever follows reads behind them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from soci_snapshotter.errors import Remote, SociError
from soci_snapshotter.policy.eager import chunks
from soci_snapshotter.registry.ranges import NoRanges, Sink

_log = logging.getLogger(__name__)

_STEP = 1 << 20  # followers hear of progress in steps of this
LEAST_RATE = 64 << 10
"""Bytes a second that a whole transfer must reach at least: less is a registry that drips to hold the node up."""


class Source(Protocol):
    """Where a blob's bytes are (registry.ranges.BlobReader)."""

    def read_range(self, start: int, end: int, sink: Sink, deadline: float) -> None: ...
    def doubt(self) -> None: ...
    def close(self) -> None: ...


class Download:
    """A blob of `size` bytes on its way into the file `path`. Thread safe; a file that is not wanted any more is the
    caller's to remove.
    """

    def __init__(self, source: Source, size: int, path: Path, *, chunk: int | None, seconds: float) -> None:
        """`chunk`: bytes of one request. `seconds`: what one request may take beside its transfer."""
        self._source = source
        self._seconds = seconds
        self.size = size
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, size)
        self._changed = threading.Condition()
        self._ranges = chunks(size, chunk)
        self._whole = [(0, size)]  # what replaces the ranges where the server knows none
        self._ends = [start for start, _ in self._ranges]
        self._first = 0  # the first range that is not here whole
        self._error: SociError | OSError | None = None
        self._using = 1  # who may still use the descriptor

    def __len__(self) -> int:
        """How many requests it takes."""
        return len(self._ranges)

    @property
    def failed(self) -> bool:
        """Whether it is given up."""
        return self._error is not None

    def fetch(self, number: int) -> None:
        """Fetch range `number`. What goes wrong is told to those who follow."""
        with self._changed:
            if self._error is not None:
                return
            self._using += 1
        try:
            self._fetch(number)
        except (SociError, OSError) as error:
            self.fail(error)
        except Exception as error:
            _log.exception("a download failed")
            self.fail(SociError(f"{type(error).__name__}: {error}"))
        finally:
            self._put_down()

    def fail(self, error: SociError | OSError) -> None:
        """Give up: followers get `error`."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def doubt(self) -> None:
        """What came is not the blob: whoever fetches it next had better ask the registry than its mirrors."""
        self._source.doubt()

    def close(self) -> None:
        """Nobody follows any more: what is under way ends soon."""
        self.fail(Remote("given up"))
        self._source.close()
        self._put_down()

    def progress(self, position: int = 0) -> Iterator[int]:
        """How many bytes are here from the start on, again and again, until it is all. Raises what made it fail."""
        while position < self.size:
            with self._changed:
                while self._error is None and self._here() <= position:
                    self._changed.wait()
                if self._error is not None:
                    raise self._error
                position = self._here()
            yield position

    def read(self, position: int) -> Iterator[bytes]:
        """The bytes from `position` on, as they come."""
        for available in self.progress(position):
            while position < available:
                piece = os.pread(self._fd, min(_STEP, available - position), position)
                yield piece
                position += len(piece)

    def _here(self) -> int:
        """Under the condition: bytes from the start on, in steps but for the last."""
        count = self.size if self._first == len(self._ranges) else self._ends[self._first]
        return count if count == self.size else count - count % _STEP

    def _fetch(self, number: int) -> None:
        with self._changed:
            ranges = self._ranges
        if ranges is self._whole:
            return  # another request fetches all
        try:
            self._read(ranges, number)
        except NoRanges:
            with self._changed:
                if self._ranges is self._whole:
                    return
                self._ranges, self._ends, self._first = self._whole, [0], 0
            _log.info("the registry knows no ranges: one request for the whole layer")
            self._read(self._whole, 0)

    def _read(self, ranges: list[tuple[int, int]], number: int) -> None:
        start, end = ranges[number]
        position = start

        def sink(piece: memoryview) -> None:
            nonlocal position
            while piece:
                count = os.pwrite(self._fd, piece, position)
                piece, position = piece[count:], position + count
            self._advance(ranges, number, position)

        self._source.read_range(
            start, end, sink, time.monotonic() + self._seconds + (end - start) / LEAST_RATE
        )

    def _advance(self, ranges: list[tuple[int, int]], number: int, position: int) -> None:
        with self._changed:
            if self._error is not None:
                raise self._error
            if ranges is not self._ranges:
                return
            before = self._here()
            self._ends[number] = position
            while self._first < len(ranges) and self._ends[self._first] == ranges[self._first][1]:
                self._first += 1
            if self._here() > before:
                self._changed.notify_all()

    def _put_down(self) -> None:
        with self._changed:
            self._using -= 1
            if not self._using:
                os.close(self._fd)
