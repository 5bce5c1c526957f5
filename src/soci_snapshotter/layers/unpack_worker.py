"""The process that unpacks layers: inflating, hashing and reading tars beside the daemon's page faults.

Reads an UnpackRequest frame from standard input, then little-endian u64 numbers: how many bytes of the blob are here,
each more than the one before. Writes one answer frame, and waits for the next request. Ends at end of file, so that it
cannot outlive the daemon, and after a failure: numbers that nobody reads may follow.
"""

from __future__ import annotations

import resource
import struct
import sys

import msgspec

from soci_snapshotter import errors
from soci_snapshotter.layers.meta_worker import read_frame, write_frame
from soci_snapshotter.layers.unpacking import Unpacked, UnpackRequest, unpack

AVAILABLE = struct.Struct("<Q")
_MEMORY_LIMIT = 4 << 30  # address space: as meta_worker; a zstd window takes 128 MiB of it


class Answer(msgspec.Struct):
    """One of the two is set."""

    result: Unpacked | None = None
    error: tuple[str, str] | None = None
    """Class name in `errors`, or OSError; message."""


class _Gone(Exception):
    """Whoever fetched the blob gave up."""


def _wait(position: int) -> int:
    while True:
        raw = sys.stdin.buffer.read(AVAILABLE.size)
        if len(raw) < AVAILABLE.size:
            raise _Gone
        available: int = AVAILABLE.unpack(raw)[0]
        if available > position:
            return available


def answer(request: UnpackRequest) -> Answer:
    """Carry out one request; every failure becomes an answer."""
    try:
        return Answer(result=unpack(request, _wait))
    except errors.SociError as error:
        return Answer(error=(type(error).__name__, str(error)))
    except MemoryError:
        return Answer(error=("Unsupported", "it needs more memory than a worker may take"))
    except OSError as error:
        return Answer(error=("OSError", f"{error.errno} {error}"))


def main() -> None:
    """Serve until end of file, or a failure."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        try:
            told = answer(msgspec.msgpack.decode(frame, type=UnpackRequest))
        except _Gone:
            return
        write_frame(sys.stdout.buffer, told)
        if told.result is None:
            return


if __name__ == "__main__":
    main()
