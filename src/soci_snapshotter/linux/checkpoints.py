"""The pass that finds checkpoints: inflate with Z_BLOCK, through ctypes (FORMATS.md, 2 and 8).

Python's zlib cannot stop at block ends. The wheel of zlib-ng exports the library's own API from inside its
extension module, at 650 to 1,010 MB/s; libz.so.1 makes the same checkpoints at half the rate. Both release
the GIL.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from soci_snapshotter.errors import Integrity, Invalid, Unsupported
from soci_snapshotter.formats.zinfo import HEAD, POINT, WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

_OK, _STREAM_END, _BUF_ERROR = 0, 1, -5
_Z_BLOCK: Final = 5
_GZIP: Final = 31  # wbits: a gzip member, its header and trailer checked

OUTPUT: Final = 1 << 20
"""Bytes: the most inflated by one call, and the size of the pieces handed on. Larger ones fall out of the
cache."""

_FULL: Final = WINDOW + OUTPUT


class _Stream(ctypes.Structure):
    """z_stream up to data_type, which is where zng_stream differs, plus room for the larger of the two."""

    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_size_t),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_size_t),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@dataclass(frozen=True, slots=True)
class Library:
    """An inflate that knows Z_BLOCK. The functions take a _Stream by reference."""

    name: str
    init: Callable[[object], int]
    inflate: Callable[[object, int], int]
    reset: Callable[[object], int]
    end: Callable[[object], int]


def zlib_ng() -> Library | None:
    """The library inside zlib-ng's wheel; None if the wheel is missing or hides its symbols."""
    try:
        from zlib_ng import zlib_ng as module  # noqa: PLC0415 -- may be missing

        lib = ctypes.CDLL(module.__file__)
        start = lib.zng_inflateInit2
        return Library(
            "zlib-ng",
            lambda s: int(start(s, _GZIP)),
            lib.zng_inflate,
            lib.zng_inflateReset,
            lib.zng_inflateEnd,
        )
    except (ImportError, OSError, AttributeError):
        return None


def zlib() -> Library | None:
    """libz.so.1; None if it is not installed."""
    try:
        lib = ctypes.CDLL("libz.so.1")
        start, size = lib.inflateInit2_, ctypes.sizeof(_Stream)
        return Library(
            "zlib", lambda s: int(start(s, _GZIP, b"1", size)), lib.inflate, lib.inflateReset, lib.inflateEnd
        )
    except (OSError, AttributeError):
        return None


def load() -> Library:
    """The fastest there is. Unsupported if there is none."""
    library = zlib_ng() or zlib()
    if library is None:
        raise Unsupported("no inflate library for building an index: install the zlib-ng wheel or libz.so.1")
    return library


class Point(NamedTuple):
    """A checkpoint without its window: offsets in bytes; `bits` high bits of the byte at `at` - 1 belong to
    it.
    """

    at: int
    out: int
    bits: int


class Buffer:
    """Room for the 32 KiB of output before a piece (zeros at first), and for the piece behind them."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(WINDOW + OUTPUT))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))


class Scanner:
    """Inflates one gzip layer and collects its checkpoints. Feed it in chunks, then `finish`."""

    def __init__(
        self,
        span_size: int,
        library: Library,
        *,
        keep: Callable[[bytes], object],
        take: Callable[[], Buffer] = Buffer,
    ) -> None:
        """`span_size`: bytes of output after which the next block end becomes a checkpoint.

        `keep` is given each checkpoint as the version 2 blob has it, its window included. `take`: a buffer for
        the next piece; it may be one that was taken before, once nobody reads that piece any more.
        """
        if span_size < 1:
            raise Invalid(f"span size is {span_size}; it must be at least 1")
        self.points: list[Point] = []
        """The checkpoints so far."""
        self._span_size = span_size
        self._lib = library
        self._stream = _Stream()
        self._ref = ctypes.byref(self._stream)
        self._keep = keep
        self._take = take
        self._buffer = take()
        self._filled = WINDOW
        self._consumed = 0  # bytes of the chunks before this one
        self._produced = 0  # bytes of output before the buffer's new part
        self._between = True  # before or after a member
        self._zeros = False

    def __enter__(self) -> Scanner:
        if self._lib.init(self._ref) != _OK:
            raise Unsupported(f"{self._lib.name} cannot start inflating")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lib.end(self._ref)

    def feed(self, chunk: bytes) -> Iterator[memoryview]:
        """The layer's next bytes; to be iterated to its end. Yields output in pieces of OUTPUT bytes, each in a
        buffer of its own.

        Integrity for what is not gzip, or not only gzip (zeros may follow the last member).
        """
        stream, inflate, size = self._stream, self._lib.inflate, len(chunk)
        if size > 0xFFFFFFFF:
            raise Invalid(f"a chunk of {size} bytes; at most 4 GiB - 1")
        stream.next_in = ctypes.cast(ctypes.c_char_p(chunk), ctypes.c_void_p).value
        stream.avail_in = size
        while stream.avail_in or not (self._between or stream.avail_out):
            if self._between and not self._begin_member(chunk, size - stream.avail_in):
                break
            if self._filled == _FULL:
                yield self._piece()
                self._change_buffer()
            room = _FULL - self._filled
            stream.next_out = self._buffer.address + self._filled
            stream.avail_out = room
            code = inflate(self._ref, _Z_BLOCK)
            self._filled += room - stream.avail_out
            if code == _STREAM_END:
                self._between = True
            elif code == _OK:
                kind = stream.data_type
                if kind & 128 and not kind & 64:  # after a header, or a block that is not its member's last
                    self._stop(self._consumed + size - stream.avail_in, kind & 63)
            elif code == _BUF_ERROR:  # it wants more input
                break
            else:
                self._refuse(size)
        self._consumed += size

    def _begin_member(self, chunk: bytes, at: int) -> bool:
        """Whether a gzip member begins there; otherwise all the rest is zeros."""
        if not self._zeros and chunk[at] == 0x1F:
            self._between = False
            self._lib.reset(self._ref)
            return True
        if self._consumed + at == 0:
            raise Integrity("the layer is not gzip")
        self._zeros = True
        if chunk.count(0, at) != len(chunk) - at:
            raise Integrity(
                f"after the last gzip member, at byte {self._consumed + at}, there is something else"
            )
        return False

    def _stop(self, at: int, bits: int) -> None:
        if bits > 7:
            raise Unsupported(f"{self._lib.name} reads ahead over block ends; it cannot make an index")
        out = self._produced + self._filled - WINDOW
        if out == 0 or out - self.points[-1].out > self._span_size:
            self.points.append(Point(at, out, bits))
            window = self._buffer.view[self._filled - WINDOW : self._filled]
            self._keep(POINT.pack(at, out, bits) + window)

    def _piece(self) -> memoryview:
        return self._buffer.view[WINDOW : self._filled]

    def _change_buffer(self) -> None:
        """Go on in the next one, with the last 32 KiB of this as the window."""
        used, end = self._buffer, self._filled
        self._buffer = self._take()
        self._buffer.view[:WINDOW] = used.view[end - WINDOW : end]
        self._produced += end - WINDOW
        self._filled = WINDOW

    def _refuse(self, size: int) -> None:
        at = self._consumed + size - self._stream.avail_in
        message = self._stream.msg.decode(errors="replace") if self._stream.msg else "no reason given"
        raise Integrity(f"the layer is not valid gzip at byte {at}: {message}")

    def finish(self) -> tuple[memoryview, bytes]:
        """The last output, and what the version 2 blob has before its checkpoints. Integrity if the stream is
        cut off.
        """
        if not self._between or not self.points:
            raise Integrity(f"the gzip stream is cut off after {self._consumed} bytes")
        return self._piece(), HEAD.pack(len(self.points), self._span_size)
