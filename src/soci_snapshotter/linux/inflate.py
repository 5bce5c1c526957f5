"""Inflating a span: isal where there is a wheel for it (1,090 MB/s; zlib 420), zlib elsewhere. Both release
the GIL."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final, Protocol, cast

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats.gzipfmt import MAGIC, resume_prefix
from soci_snapshotter.formats.zinfo import SpanTable
from soci_snapshotter.formats.ztoc import Compression

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Buffer

    class _Decompressor(Protocol):
        @property
        def eof(self) -> bool: ...
        @property
        def unused_data(self) -> bytes: ...
        @property
        def unconsumed_tail(self) -> bytes: ...
        def decompress(self, data: Buffer, max_length: int = ..., /) -> bytes: ...

    Engine = Callable[..., _Decompressor]

try:
    from isal import isal_zlib

    ENGINE: Engine = isal_zlib.decompressobj
    _ERRORS: tuple[type[Exception], ...] = (zlib.error, cast("type[Exception]", isal_zlib.IsalError))
except ImportError:  # no wheel for this machine
    ENGINE = zlib.decompressobj
    _ERRORS = (zlib.error,)

RAW, GZIP = -15, 31
"""zlib's wbits for a bare deflate stream, and for a gzip member with its header and checked trailer."""

TRAILER: Final = 8
"""Bytes: a gzip member's CRC-32 and length."""

MAX_TAIL: Final = 16 << 20
"""Bytes: what may follow a tar's end blocks. GNU tar pads to 10 KiB, tape users to some MiB; more is an
attack."""

CHUNK: Final = 4 << 20
"""Bytes: the most that one step of `inflate_chunks` yields, so that a giant span needs little memory."""


def decode_span(table: SpanTable, index: int, fetched: Buffer, window: Buffer | None) -> bytes:
    """The uncompressed bytes of span `index`, given what `table.compressed_range(index)` names.

    `window`: the 32768 bytes at `table.window_position(index)`, None if that is None. The last span's result
    may be longer than its `uncompressed_range`, by what follows the tar's end (at most MAX_TAIL). The digest
    of `fetched` is the caller's to check. Integrity if the bytes do not decode to just that.
    """
    decoder = SpanDecoder(table, index, window)
    decoder.feed(fetched)
    return decoder.finish()


class SpanDecoder:
    """decode_span, for bytes that come in pieces. It holds the uncompressed bytes, never more than the table says."""

    def __init__(self, table: SpanTable, index: int, window: Buffer | None) -> None:
        start, end = table.uncompressed_range(index)
        self._index, self._expected = index, end - start
        self._parts: list[bytes] = []
        self._plain = 0  # bytes of a span that is not compressed
        self._inflater: SpanInflater | None = None
        if table.compression is not Compression.UNCOMPRESSED:
            self._inflater = SpanInflater(
                window=window,
                bits=table.bits(index),
                expected=self._expected,
                last=table.is_last(index),
                whole_member=index == 0 and table.implied_header,
                step=max(self._expected + 1, CHUNK),
            )

    def feed(self, piece: Buffer) -> None:
        """Take the next bytes of the span. Integrity as soon as they are wrong."""
        try:
            if self._inflater is not None:
                self._parts.extend(self._inflater.feed(piece))
                return
            self._parts.append(bytes(piece))
        except Integrity as e:
            raise Integrity(f"span {self._index}: {e}") from None
        self._plain += len(self._parts[-1])
        if self._plain > self._expected:
            raise Integrity(f"span {self._index} has {self._plain} bytes, not {self._expected}")

    def finish(self) -> bytes:
        """All of it. Integrity when something is missing."""
        if self._inflater is not None:
            try:
                self._inflater.finish()
            except Integrity as e:
                raise Integrity(f"span {self._index}: {e}") from None
        elif self._plain != self._expected:
            raise Integrity(f"span {self._index} has {self._plain} bytes, not {self._expected}")
        return b"".join(self._parts)


def inflate_span(
    compressed: Buffer,
    *,
    window: Buffer | None,
    bits: int,
    expected: int,
    last: bool = False,
    whole_member: bool = False,
    engine: Engine = ENGINE,
) -> bytes:
    """`compressed` inflated to exactly `expected` bytes; see `inflate_chunks`."""
    return b"".join(
        inflate_chunks(
            (compressed,),
            window=window,
            bits=bits,
            expected=expected,
            last=last,
            whole_member=whole_member,
            engine=engine,
            step=expected + 1,
        )
    )


def inflate_chunks(
    chunks: Iterable[Buffer],
    *,
    window: Buffer | None,
    bits: int,
    expected: int,
    last: bool = False,
    whole_member: bool = False,
    engine: Engine = ENGINE,
    step: int = CHUNK,
) -> Iterator[bytes]:
    """Inflate a span as its compressed bytes come in; yields at most `step` bytes at a time.

    Of the first byte only the high `bits` belong to the span (0: all). `window`: the 32 KiB of output before
    it (None: nothing, or zeros). With `whole_member` the span starts with a gzip header instead. A span may
    go on in the next gzip members. `last`: the span ends where the layer ends, must end cleanly, and may be
    up to MAX_TAIL longer than `expected`; zeros after the last member are ignored. Integrity when it is not
    so; what was yielded by then is to be thrown away.
    """
    inflater = SpanInflater(
        window=window,
        bits=bits,
        expected=expected,
        last=last,
        whole_member=whole_member,
        engine=engine,
        step=step,
    )
    for chunk in chunks:
        yield from inflater.feed(chunk)
    inflater.finish()


class SpanInflater:
    """The state of `inflate_chunks`, fed by its caller."""

    def __init__(
        self,
        *,
        window: Buffer | None,
        bits: int,
        expected: int,
        last: bool,
        whole_member: bool,
        engine: Engine = ENGINE,
        step: int = CHUNK,
    ) -> None:
        self._state = _Members(window, engine, raw=not whole_member)
        self._bits = bits
        self._expected = expected
        self._last = last
        self._limit = expected + (MAX_TAIL if last else 0)
        self._step = step
        self._total = 0

    def feed(self, chunk: Buffer) -> Iterator[bytes]:
        """What the next bytes inflate to; to be exhausted. Integrity for a bad stream, and for more than promised."""
        data = memoryview(chunk).cast("B")
        pieces: tuple[Buffer, ...] = (data,)
        if self._bits and len(data):
            pieces = (resume_prefix(self._bits, data[0]), data[1:])
            self._bits = 0
        for piece in pieces:
            for out in self._state.feed(piece, self._step):
                self._total += len(out)
                if self._total > self._limit:
                    raise Integrity(f"inflates to more than the {self._expected} bytes promised")
                yield out

    def finish(self) -> None:
        """Integrity when something is missing."""
        if self._total < self._expected:
            raise Integrity(f"inflates to {self._total} bytes, not the {self._expected} promised")
        if self._last and not self._state.finished:
            raise Integrity("the gzip stream is truncated")


class _Members:
    """A deflate stream, what is left of its gzip member, and the members after it."""

    def __init__(self, window: Buffer | None, engine: Engine, *, raw: bool) -> None:
        self._engine = engine
        self._skip = TRAILER if raw else 0  # later members' trailers are eaten, and checked, by the engine
        self._zeros = False
        self._inflater: _Decompressor | None = None
        if not raw:
            self._inflater = engine(GZIP)
        elif window is None:
            self._inflater = engine(RAW)
        else:
            self._inflater = engine(RAW, zdict=window)

    @property
    def finished(self) -> bool:
        """Whether the stream may end here: after a member, its trailer included."""
        return self._inflater is None and self._skip == 0

    def feed(self, data: Buffer, step: int) -> Iterator[bytes]:
        """Take all of `data`, yield what it inflates to."""
        more = False  # the engine stopped at `step` bytes and may hold more, even without input
        while len(view := memoryview(data)) or more:
            if self._inflater is None:
                skipped = min(self._skip, len(view))
                self._skip -= skipped
                view = view[skipped:]
                if not len(view):
                    return
                if self._zeros or view[0] != MAGIC[0]:
                    self._zeros = True
                    if any(view):
                        raise Integrity("something other than zeros follows after the last gzip member")
                    return
                self._inflater = self._engine(GZIP)
            inflater = self._inflater
            try:
                out = inflater.decompress(view, step)
            except _ERRORS as e:
                raise Integrity(f"not a valid deflate stream ({e})") from None
            if out:
                yield out
            if inflater.eof:
                data, more = inflater.unused_data, False
                self._inflater = None
            else:
                data, more = inflater.unconsumed_tail, len(out) >= step
