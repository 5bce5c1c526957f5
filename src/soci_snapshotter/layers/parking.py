"""FUSE requests that wait for spans: who waits for which, and their answers."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.policy.counters import Reads

_log = logging.getLogger(__name__)


class Replies(Protocol):
    """Who answers the kernel (serve.flatfiles.FuseServer)."""

    def reply(self, unique: int, data: Buffer) -> None: ...
    def reply_error(self, unique: int, code: int) -> None: ...


class Parked:
    """One FUSE request and how many of its spans are still missing."""

    __slots__ = ("kept", "missing", "offset", "size", "started", "unique")

    def __init__(self, unique: int, offset: int, size: int) -> None:
        self.started = time.monotonic_ns()
        self.unique = unique
        self.offset = offset
        self.size = size
        self.missing = 0
        """Negative: answered already, with an error."""
        self.kept: list[tuple[int, bytes]] = []  # what the disk did not take: position in the request, bytes

    def keep(self, begin: int, data: memoryview) -> None:
        """Take what the request wants of verified bytes at offset `begin` of the tar."""
        start, stop = max(begin, self.offset), min(begin + len(data), self.offset + self.size)
        if start < stop:
            self.kept.append((start - self.offset, bytes(data[start - begin : stop - begin])))

    def gather(self, fd: int) -> Buffer:
        """The request's bytes: from data.tar, but for those that were kept."""
        if not self.kept:
            return os.pread(fd, self.size, self.offset)
        if len(self.kept) == 1 and len(self.kept[0][1]) == self.size:
            return self.kept[0][1]
        data = bytearray(os.pread(fd, self.size, self.offset))
        data.extend(bytes(self.size - len(data)))
        for position, piece in self.kept:
            data[position : position + len(piece)] = piece
        return data


class Parking:
    """The requests of one layer. What changes the table (first part) is called under the lock of its flights."""

    def __init__(self, name: str, fd: int, replies: Replies, reads: Reads) -> None:
        """`name`: the layer, for the log; `fd`: data.tar."""
        self._name = name
        self._fd = fd
        self._replies = replies
        self._reads = reads
        self._waiting: dict[int, list[Parked]] = {}

    def __bool__(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def __contains__(self, span: int) -> bool:
        """Whether anybody waits for `span`."""
        return span in self._waiting

    def park(self, parked: Parked, spans: Sequence[int]) -> None:
        """`parked` waits for these."""
        parked.missing = len(spans)
        for span in spans:
            self._waiting.setdefault(span, []).append(parked)

    def land(self, span: int, unkept: tuple[int, memoryview] | None = None) -> list[Parked]:
        """`span` is here, or (`unkept`: offset and bytes) only passes by: those who wait for nothing else."""
        ready = []
        for parked in self._waiting.pop(span, ()):
            if unkept is not None:
                parked.keep(*unkept)
            parked.missing -= 1
            if parked.missing == 0:
                ready.append(parked)
        return ready

    def land_early(self, span: int, verified: tuple[int, memoryview]) -> list[Parked]:
        """The bytes of `span` are verified, and will be here: those who wait for nothing else need not wait for that."""
        ready: list[Parked] = []
        rest: list[Parked] = []
        for parked in self._waiting.get(span, ()):
            (ready if parked.missing == 1 else rest).append(parked)
        for parked in ready:
            parked.keep(*verified)
            parked.missing = 0
        if rest:
            self._waiting[span] = rest
        elif ready:
            del self._waiting[span]
        return ready

    def withdraw(self, spans: Iterable[int] | None = None) -> list[Parked]:
        """Those who wait for one of `spans`, or for any (None): theirs is an error, once, whatever else comes."""
        lost = []
        for span in list(self._waiting) if spans is None else spans:
            for parked in self._waiting.pop(span, ()):
                if parked.missing > 0:
                    parked.missing = -1
                    lost.append(parked)
        return lost

    # -- without the lock

    def answer(self, ready: Iterable[Parked]) -> None:
        """Give these their bytes."""
        for parked in ready:
            try:
                data = parked.gather(self._fd)
            except OSError as error:
                _log.error("data.tar cannot be read", extra={"layer": self._name, "error": str(error)})
                self.refuse((parked,))
            else:
                self._reads.answered(time.monotonic_ns() - parked.started, parked.size)
                self._replies.reply(parked.unique, data)

    def refuse(self, lost: Iterable[Parked]) -> None:
        """Give these an error."""
        for parked in lost:
            self._reads.refused()
            self._replies.reply_error(parked.unique, errno.EIO)
