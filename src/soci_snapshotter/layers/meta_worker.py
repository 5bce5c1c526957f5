"""The process that builds meta.erofs: pure Python work that would hold up page faults inside the daemon.

Reads MetaRequest frames from standard input and writes one answer frame each to standard output (a little-endian u32
length, then msgpack). Ends at end of file, so it cannot outlive the daemon.
"""

from __future__ import annotations

import gc
import resource
import struct
import sys
from typing import IO

import msgspec

from soci_snapshotter import errors
from soci_snapshotter.layers.meta import MetaRequest, MetaResult, build

LENGTH = struct.Struct("<I")
FRAME_LIMIT = 4 << 20  # 500 lower directories of 4 KiB paths and as much again; an answer is tiny
_MEMORY_LIMIT = 4 << 30  # address space: 1 GiB of ztoc decoded; a hostile one must not take the node's memory


class Answer(msgspec.Struct):
    """One of the two is set."""

    result: MetaResult | None = None
    error: tuple[str, str] | None = None
    """Class name in `errors`, message."""


def write_frame(stream: IO[bytes], value: object) -> None:
    """Send one message."""
    body = msgspec.msgpack.encode(value)
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next message's bytes; None at end of file. Raises Integrity for a frame over FRAME_LIMIT."""
    header = stream.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(header)
    if length > FRAME_LIMIT:
        raise errors.Integrity(f"worker frame of {length} bytes")
    body = stream.read(length)
    return body if len(body) == length else None


def answer(frame: bytes) -> Answer:
    """Carry out one request; every failure becomes an answer."""
    try:
        return Answer(result=build(msgspec.msgpack.decode(frame, type=MetaRequest)))
    except errors.SociError as error:
        return Answer(error=(type(error).__name__, str(error)))
    except MemoryError:
        return Answer(error=("Unsupported", "its table of contents needs more memory than a worker may take"))
    except OSError as error:
        return Answer(error=("SociError", f"meta.erofs: {error}"))


def main() -> None:
    """Serve until end of file."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    gc.disable()  # a tree of entries has no cycles; looking for them takes a fifth of the time
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        write_frame(sys.stdout.buffer, answer(frame))


if __name__ == "__main__":
    main()
