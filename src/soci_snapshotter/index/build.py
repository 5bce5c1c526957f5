"""One layer to its ztoc, in one pass: checkpoints, table of contents and all digests, in bounded memory.

What grows with the layer, 32 KiB a span and some 300 bytes an entry, goes to temporary files. The digests are
computed beside the pass, in threads (hashing and inflating release the GIL), from the very buffers that inflate
filled.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import msgspec

from soci_snapshotter.errors import Integrity, Invalid, Unsupported
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.gzipfmt import MAGIC
from soci_snapshotter.formats.tar import TarParser
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.ztoc import MAX_ARCHIVE_SIZE, VERSION, Compression, Ztoc
from soci_snapshotter.formats.ztoc_writer import MAX_SIZE, encode_pieces, encode_tarinfo
from soci_snapshotter.index.spool import Spool, naming
from soci_snapshotter.linux import checkpoints
from soci_snapshotter.linux.inflate import MAX_TAIL

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from types import TracebackType

    from soci_snapshotter.formats.digest import Digest

DEFAULT_SPAN_SIZE: Final = 4 << 20
"""Bytes: what the Go tool takes; 1.3 MB to fetch for a miss, and a window for each."""

QUEUE: Final = 4
"""Pieces of a MiB or so between the pass and a hashing thread: enough to smooth, too few to weigh."""

BUFFERS: Final = 3
"""Of a MiB: one to fill, one to hash, one between."""

_DIGEST: Final = 80
"""Bytes: a span digest in a ztoc, 71 characters with what goes with them."""

_BATCH: Final = msgspec.msgpack.Decoder(list[Entry])

_T = TypeVar("_T")

Sink = Callable[[bytes | memoryview], object]
"""Takes uncompressed bytes."""


@dataclass(frozen=True, slots=True)
class WrittenZtoc:
    """A ztoc's digest and size, and what was learnt on the way. Sizes in bytes; `uncompressed_size` counts the
    tar's tail too.
    """

    digest: Digest
    size: int
    layer_digest: Digest
    layer_size: int
    diff_id: Digest
    uncompressed_size: int
    spans: int


@dataclass(frozen=True, slots=True)
class BuiltZtoc:
    """The same with the ztoc itself, and its entries."""

    data: bytes
    digest: Digest
    layer_digest: Digest
    layer_size: int
    diff_id: Digest
    uncompressed_size: int
    entries: list[Entry]


def write_ztoc(
    chunks: Iterable[bytes],
    output: Path,
    *,
    compression: Compression,
    span_size: int = DEFAULT_SPAN_SIZE,
    build_tool: str,
    expected: Digest | None = None,
    sink: Sink | None = None,
) -> WrittenZtoc:
    """Write the ztoc of the layer whose bytes `chunks` brings, a MiB or so at a time, to the file `output`.

    `expected`: the layer's digest. `sink` is given the uncompressed bytes in order, in a thread of its own, each
    piece valid during the call only; what it raises ends the pass. Integrity when the digest differs, or for a
    broken gzip stream or tar; Unsupported for a tar that no ztoc can describe, naming the entry; OSError for a full
    disk. Then `output` is as it was.
    """
    with _Aside(output.parent) as aside:
        layer = _scan(chunks, aside, compression, span_size, expected, sink)
        size, pieces = _encode(layer, aside, build_tool)
        digest = _write(pieces, output)
    return WrittenZtoc(
        digest=digest,
        size=size,
        layer_digest=layer.digest,
        layer_size=layer.size,
        diff_id=layer.diff_id,
        uncompressed_size=layer.uncompressed_size,
        spans=len(layer.span_digests),
    )


def build_ztoc(
    chunks: Iterable[bytes],
    *,
    compression: Compression,
    span_size: int = DEFAULT_SPAN_SIZE,
    build_tool: str,
    expected: Digest | None = None,
) -> BuiltZtoc:
    """The same in memory, for a layer that is known to be small."""
    with _Aside(None) as aside:
        layer = _scan(chunks, aside, compression, span_size, expected)
        data = b"".join(_encode(layer, aside, build_tool)[1])
        entries = list(itertools.chain(*map(_BATCH.decode, aside.entries), layer.last_entries))
    return BuiltZtoc(
        data=data,
        digest=digests.sha256(data),
        layer_digest=layer.digest,
        layer_size=layer.size,
        diff_id=layer.diff_id,
        uncompressed_size=layer.uncompressed_size,
        entries=entries,
    )


class _Aside:
    """What grows with a layer: checkpoints, batches of entries, and these as they are in the ztoc."""

    def __init__(self, directory: Path | None) -> None:
        self.checkpoints, self.entries, self.encoded = (Spool(directory) for _ in range(3))

    def __enter__(self) -> _Aside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for spool in (self.checkpoints, self.entries, self.encoded):
            spool.close()


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that was read to its end; sizes in bytes. `checkpoints_head` comes before those put aside."""

    digest: Digest
    size: int
    diff_id: Digest
    uncompressed_size: int
    tar_size: int
    compression: Compression
    span_digests: list[str]
    checkpoints_head: bytes
    last_entries: list[Entry]


def _scan(
    chunks: Iterable[bytes],
    aside: _Aside,
    compression: Compression,
    span_size: int,
    expected: Digest | None,
    sink: Sink | None = None,
) -> _Layer:
    if span_size < 1:
        raise Invalid(f"span size is {span_size}; it must be at least 1")
    scan = _gzip if compression is Compression.GZIP else _uncompressed
    tar = TarParser(lambda entries: aside.entries.append(msgspec.msgpack.encode(entries)))
    spans = _SpanDigests(expected.algorithm if expected else "sha256")
    diff = _DiffId(sink)
    head = scan(chunks, span_size, tar, spans, aside.checkpoints, diff)
    digest = digests.parse(f"{spans.layer.name}:{spans.layer.hexdigest()}")
    if expected is not None and digest != expected:
        raise Integrity(f"layer {expected}: its bytes have the digest {digest}")
    entries, size = tar.finish()
    return _Layer(
        digest=digest,
        size=spans.size,
        diff_id=digests.from_hex(diff.hash.hexdigest()),
        uncompressed_size=tar.fed,
        tar_size=size,
        compression=compression,
        span_digests=spans.digests,
        checkpoints_head=head,
        last_entries=entries,
    )


def _encode(layer: _Layer, aside: _Aside, build_tool: str) -> tuple[int, Iterator[bytes | memoryview]]:
    """The ztoc's size in bytes, and its pieces."""
    ztoc = Ztoc(
        version=VERSION,
        build_tool=build_tool,
        compressed_size=layer.size,
        uncompressed_size=layer.tar_size,
        compression=layer.compression,
        max_span_id=len(layer.span_digests) - 1,
        span_digests=layer.span_digests,
        checkpoints=b"",
        checkpoints_offset=0,
        entries=[],
    )
    head = layer.checkpoints_head
    return encode_pieces(
        ztoc,
        itertools.chain([layer.last_entries], map(_BATCH.decode, reversed(aside.entries))),
        len(head) + aside.checkpoints.size,
        itertools.chain([head], aside.checkpoints),
        aside.encoded,
    )


def _write(pieces: Iterable[bytes | memoryview], output: Path) -> Digest:
    """Write the file, all of it or nothing; its digest."""
    partial = output.with_name(f"{output.name}.part")
    hashed = hashlib.sha256()
    try:
        with naming(partial), open(partial, "wb") as file:
            for piece in pieces:
                hashed.update(piece)
                file.write(piece)
        os.replace(partial, output)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return digests.from_hex(hashed.hexdigest())


def _gzip(
    chunks: Iterable[bytes], span_size: int, tar: TarParser, spans: _SpanDigests, kept: Spool, diff: _DiffId
) -> bytes:
    """What goes before the checkpoints put into `kept`."""
    ring = _Ring()
    with (
        checkpoints.Scanner(span_size, checkpoints.load(), keep=kept.append, take=ring.take) as scanner,
        _Beside(diff.update, ring.give_back) as hashing,
        _Beside(spans.update) as digesting,
    ):
        for chunk in chunks:
            known = len(scanner.points)
            for piece in scanner.feed(chunk):
                tar.feed(piece)
                hashing.put(piece)
            digesting.put((chunk, [(point.at, point.bits) for point in scanner.points[known:]]))
            _check_sizes(tar, kept.size)
        piece, head = scanner.finish()
        tar.feed(piece)
        hashing.put(piece)
    _check_sizes(tar, kept.size)
    spans.finish()
    return head


def _uncompressed(
    chunks: Iterable[bytes], span_size: int, tar: TarParser, spans: _SpanDigests, _: Spool, diff: _DiffId
) -> bytes:
    with _Beside(diff.update) as hashing, _Beside(spans.update) as digesting:
        for chunk in chunks:
            if tar.fed == 0 and chunk.startswith(MAGIC):
                raise Unsupported("it is gzip, but its media type says that it is not compressed")
            start, end = tar.fed, tar.fed + len(chunk)
            tar.feed(chunk)
            hashing.put(chunk)
            first = -(-start // span_size) * span_size
            digesting.put((chunk, [(at, 0) for at in range(first, end, span_size)]))
            _check_sizes(tar, end // span_size * _DIGEST)
    spans.finish()
    return encode_tarinfo(span_size, spans.size)


def _check_sizes(tar: TarParser, spans: int) -> None:
    """Stop as soon as no ztoc can be made, not when the disk is full. `spans`: bytes they take in it."""
    if tar.fed > MAX_ARCHIVE_SIZE or tar.tail > MAX_TAIL:
        raise Unsupported(f"the layer has {tar.fed} bytes uncompressed, {tar.tail} after the tar's end")
    if spans > MAX_SIZE:
        raise Unsupported(
            f"the ztoc would exceed {MAX_SIZE} bytes, its format's end; take a larger span size"
        )


class _Ring:
    """Buffers for output, in turn: in one there is written, the others wait to be hashed."""

    def __init__(self) -> None:
        self._buffers = itertools.cycle([checkpoints.Buffer() for _ in range(BUFFERS)])
        self._free = threading.Semaphore(BUFFERS)

    def take(self) -> checkpoints.Buffer:
        """The next; waits until it is free."""
        self._free.acquire()
        return next(self._buffers)

    def give_back(self) -> None:
        """The one that was taken first is free."""
        self._free.release()


class _DiffId:
    """The digest of the uncompressed bytes, which go to `sink` on the way."""

    def __init__(self, sink: Sink | None) -> None:
        self.hash = hashlib.sha256()
        self._sink = sink

    def update(self, piece: bytes | memoryview) -> None:
        self.hash.update(piece)
        if self._sink is not None:
            self._sink(piece)


class _SpanDigests:
    """The digests of the layer and of its spans, from chunks and the checkpoints found in each."""

    def __init__(self, algorithm: str) -> None:
        self.layer = hashlib.new(algorithm)
        self.size = 0
        self.digests: list[str] = []
        self._span: hashlib._Hash | None = None
        self._last = b""

    def update(self, job: tuple[bytes, list[tuple[int, int]]]) -> None:
        """A chunk, and for each span that begins in it: offset in the layer, bits it has of the byte
        before.
        """
        chunk, begins = job
        self.layer.update(chunk)
        view = memoryview(chunk)
        at = 0
        for begin, bits in begins:
            cut = begin - self.size
            self._end_span(view[at:cut])
            self._span = hashlib.sha256()
            if bits:
                self._span.update(view[cut - 1 : cut] if cut else self._last)
            at = cut
        if self._span:
            self._span.update(view[at:])
        self.size += len(chunk)
        self._last = chunk[-1:] or self._last

    def finish(self) -> None:
        """The last span ends with the layer."""
        self._end_span(b"")

    def _end_span(self, rest: bytes | memoryview) -> None:
        if self._span:
            self._span.update(rest)
            self.digests.append("sha256:" + self._span.hexdigest())


class _Beside(Generic[_T]):
    """A thread that does `work` for each thing put, in order, while the caller goes on; then `done`, whether
    it could be done or not. Leaving waits for it.
    """

    def __init__(self, work: Callable[[_T], None], done: Callable[[], None] = lambda: None) -> None:
        self._work = work
        self._done = done
        self._queue: queue.Queue[_T | None] = queue.Queue(QUEUE)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="index-digest")

    def __enter__(self) -> _Beside[_T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def put(self, thing: _T) -> None:
        """Hand it over; waits while QUEUE things are waiting already. Raises what went wrong with an earlier one."""
        if self._error is not None:
            raise self._error
        self._queue.put(thing)

    def _run(self) -> None:
        while (thing := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._work(thing)
                except BaseException as e:  # raised where the caller waits; until then the queue must drain
                    self._error = e
            self._done()
