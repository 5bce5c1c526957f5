"""One layer to its ztoc, in one pass: checkpoints, table of contents and all digests, in bounded memory.

What grows with the layer is the ztoc itself: 32 KiB a span and some 300 bytes an entry. The digests are
computed beside the pass, in threads (hashing and inflating release the GIL).
"""

from __future__ import annotations

import hashlib
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from soci_snapshotter.errors import Integrity, Invalid, Unsupported
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.gzipfmt import MAGIC
from soci_snapshotter.formats.tar import TarParser
from soci_snapshotter.formats.ztoc import MAX_ARCHIVE_SIZE, VERSION, Compression, Ztoc
from soci_snapshotter.formats.ztoc_writer import encode, encode_tarinfo
from soci_snapshotter.linux import checkpoints
from soci_snapshotter.linux.inflate import MAX_TAIL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from soci_snapshotter.formats.digest import Digest
    from soci_snapshotter.formats.ztoc import Entry

DEFAULT_SPAN_SIZE: Final = 4 << 20
"""Bytes: what the Go tool takes; 1.3 MB to fetch for a miss, and a window for each."""

QUEUE: Final = 4
"""Pieces of a MiB or so between the pass and a hashing thread: enough to smooth, too few to weigh."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class BuiltZtoc:
    """A ztoc and what was learnt on the way. Sizes in bytes; `uncompressed_size` counts the tar's tail
    too.
    """

    data: bytes
    digest: Digest
    layer_digest: Digest
    layer_size: int
    diff_id: Digest
    uncompressed_size: int
    entries: list[Entry]


def build_ztoc(
    chunks: Iterable[bytes],
    *,
    compression: Compression,
    span_size: int = DEFAULT_SPAN_SIZE,
    build_tool: str,
    expected: Digest | None = None,
) -> BuiltZtoc:
    """The ztoc of the layer whose bytes `chunks` brings, a MiB or so at a time.

    `expected`: the layer's digest. Integrity when it differs, or for a broken gzip stream or tar;
    Unsupported for a tar that no ztoc can describe, naming the entry.
    """
    if span_size < 1:
        raise Invalid(f"span size is {span_size}; it must be at least 1")
    build = _gzip if compression is Compression.GZIP else _uncompressed
    tar = TarParser()
    spans = _SpanDigests(expected.algorithm if expected else "sha256")
    blob, diff_id = build(chunks, span_size, tar, spans)
    layer_digest = digests.parse(f"{spans.layer.name}:{spans.layer.hexdigest()}")
    if expected is not None and layer_digest != expected:
        raise Integrity(f"layer {expected}: its bytes have the digest {layer_digest}")
    entries, size = tar.finish()
    if tar.fed > MAX_ARCHIVE_SIZE or tar.fed - size > MAX_TAIL:
        raise Unsupported(f"layer {layer_digest}: {tar.fed} bytes with {tar.fed - size} after the tar's end")
    data = encode(
        Ztoc(
            version=VERSION,
            build_tool=build_tool,
            compressed_size=spans.size,
            uncompressed_size=size,
            compression=compression,
            max_span_id=len(spans.digests) - 1,
            span_digests=spans.digests,
            checkpoints=blob,
            checkpoints_offset=0,
            entries=entries,
        )
    )
    return BuiltZtoc(
        data=data,
        digest=digests.sha256(data),
        layer_digest=layer_digest,
        layer_size=spans.size,
        diff_id=digests.from_hex(diff_id),
        uncompressed_size=tar.fed,
        entries=entries,
    )


def _gzip(chunks: Iterable[bytes], span_size: int, tar: TarParser, spans: _SpanDigests) -> tuple[bytes, str]:
    diff = hashlib.sha256()
    with (
        checkpoints.Scanner(span_size, checkpoints.load()) as scanner,
        _Beside(diff.update) as hashing,
        _Beside(spans.update) as digesting,
    ):
        for chunk in chunks:
            known = len(scanner.points)
            for piece in scanner.feed(chunk):
                tar.feed(piece)
                hashing.put(piece)
            digesting.put((chunk, [(point.at, point.bits) for point in scanner.points[known:]]))
        piece, blob = scanner.finish()
        tar.feed(piece)
        hashing.put(piece)
    spans.finish()
    return blob, diff.hexdigest()


def _uncompressed(
    chunks: Iterable[bytes], span_size: int, tar: TarParser, spans: _SpanDigests
) -> tuple[bytes, str]:
    diff = hashlib.sha256()
    with _Beside(diff.update) as hashing, _Beside(spans.update) as digesting:
        for chunk in chunks:
            if tar.fed == 0 and chunk.startswith(MAGIC):
                raise Integrity("the layer is gzip, but its media type says that it is not compressed")
            start, end = tar.fed, tar.fed + len(chunk)
            tar.feed(chunk)
            hashing.put(chunk)
            first = -(-start // span_size) * span_size
            digesting.put((chunk, [(at, 0) for at in range(first, end, span_size)]))
    spans.finish()
    return encode_tarinfo(span_size, spans.size), diff.hexdigest()


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
    """A thread that does `work` for each thing put, in order, while the caller goes on. Leaving waits for
    it.
    """

    def __init__(self, work: Callable[[_T], None]) -> None:
        self._work = work
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
        """Hand it over; waits while QUEUE things are waiting already."""
        self._queue.put(thing)

    def _run(self) -> None:
        while (thing := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._work(thing)
                except BaseException as e:  # raised where the caller waits; until then the queue must drain
                    self._error = e
