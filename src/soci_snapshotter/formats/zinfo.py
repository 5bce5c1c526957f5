"""Checkpoints: where a layer can be entered without what lies before it (FORMATS.md, 2 and 3).

A span is what lies between two checkpoints. `span_table` turns the blob in a ztoc into numbers and checks
every rule; the 32 KiB windows stay in the file, and `SpanTable.window_position` says where.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import Final

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats.flatbuf import Table
from soci_snapshotter.formats.ztoc import MAX_ARCHIVE_SIZE, Compression, Ztoc

WINDOW: Final = 32768
"""Bytes: how far back a deflate block may refer (RFC 1951)."""

HEAD: Final = struct.Struct("<iq")
"""number of checkpoints, span size"""

POINT: Final = struct.Struct("<qqB")
"""in, out, bits; the window follows"""

STRIDE: Final = POINT.size + WINDOW

GZIP_HEADER: Final = 10
"""Bytes: a gzip header without optional fields (RFC 1952); version 1 blobs take it for granted."""

_MAX_TARZINFO: Final = 4096
"""Bytes: known tools write 48."""

MAX_EXPANSION: Final = 1032
"""Deflate's best: a match of 258 bytes in two bits. A span that claims more is lying about its length."""


class SpanTable:
    """A layer's spans, numbered from 0. Positions are byte offsets in the layer blob, in the tar or in the
    ztoc file.

    The last span's uncompressed end is the tar's end as the ztoc counts it; the stream may go on behind it
    (zero padding, mostly), which belongs to the DiffID.
    """

    __slots__ = (
        "_bits",
        "_digests",
        "_ins",
        "_outs",
        "_windows",
        "compression",
        "implied_header",
        "span_size",
    )

    def __init__(
        self,
        *,
        compression: Compression,
        span_size: int,
        ins: list[int],
        outs: list[int],
        bits: bytes,
        windows: int | None,
        implied_header: bool,
        digests: list[str],
    ) -> None:
        """Use `span_table`. `ins` and `outs` have one element more than there are spans: the ends.

        `windows` is where checkpoint 0's window is, or would be, in the ztoc file (None: no windows).
        """
        self.compression = compression
        self.span_size = span_size
        self.implied_header = implied_header
        self._ins, self._outs, self._bits, self._windows, self._digests = ins, outs, bits, windows, digests

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def uncompressed_size(self) -> int:
        """Where the last span ends, as far as the ztoc tells."""
        return self._outs[-1]

    def compressed_range(self, index: int) -> tuple[int, int]:
        """What to fetch, end exclusive: whole bytes, the first shared with the span before if `bits` is not
        0.

        Span 0 with an implied header (version 1) starts at 0: the header must be read to know where it ends.
        """
        if index == 0 and self.implied_header:
            return 0, self._ins[1]
        return self._ins[index] - (1 if self._bits[index] else 0), self._ins[index + 1]

    def digest_range(self, index: int) -> tuple[int, int]:
        """What `digest` covers. Differs from `compressed_range` only for span 0 with an implied header."""
        return self._ins[index] - (1 if self._bits[index] else 0), self._ins[index + 1]

    def uncompressed_range(self, index: int) -> tuple[int, int]:
        """The span's bytes in the tar, end exclusive. May be empty."""
        return self._outs[index], self._outs[index + 1]

    def bits(self, index: int) -> int:
        """How many high bits of the first byte of `compressed_range` belong to the span; 0: all of them."""
        return self._bits[index]

    def window_position(self, index: int) -> int | None:
        """Where the span's 32768-byte window is in the ztoc file; None: it needs none (all zeros)."""
        if self._windows is None or self._outs[index] == 0:
            return None
        return self._windows + STRIDE * index

    def digest(self, index: int) -> str:
        """sha256:<hex> of the layer's bytes in `digest_range`."""
        return self._digests[index]

    def is_last(self, index: int) -> bool:
        """Whether the span runs to the end of the layer, possibly beyond its uncompressed range."""
        return index == len(self._digests) - 1

    def span_at(self, offset: int) -> int:
        """The span that holds the tar's byte at `offset`: the last one that begins at or before it."""
        return min(bisect_right(self._outs, offset), len(self._digests)) - 1

    def spans_for(self, offset: int, size: int) -> range:
        """The spans that hold `size` bytes from `offset` on; empty for size 0 or less, or without spans."""
        if size <= 0 or not self._digests:
            return range(0)
        return range(self.span_at(offset), self.span_at(offset + size - 1) + 1)


def span_table(ztoc: Ztoc, layer_size: int | None = None) -> SpanTable:
    """The spans of a decoded ztoc. Integrity, naming the field, when a rule of FORMATS.md 2 or 3 is broken.

    `layer_size`: the blob's size in bytes as its descriptor says; the ztoc must agree.
    """
    if layer_size is not None and ztoc.compressed_size != layer_size:
        raise Integrity(
            f"ztoc: compressed_archive_size is {ztoc.compressed_size}, but the layer has {layer_size} bytes"
        )
    if len(ztoc.span_digests) != ztoc.max_span_id + 1:
        raise Integrity(f"ztoc: {len(ztoc.span_digests)} span_digests, but max_span_id is {ztoc.max_span_id}")
    if ztoc.compression is Compression.UNCOMPRESSED:
        return _uncompressed(ztoc)
    return _gzip(ztoc)


def _gzip(ztoc: Ztoc) -> SpanTable:
    blob = ztoc.checkpoints
    if len(blob) < HEAD.size:
        raise Integrity(f"ztoc: checkpoints has {len(blob)} bytes, too few for its head")
    n, span_size = HEAD.unpack_from(blob)
    if n < 1:
        raise Integrity(f"ztoc: checkpoints holds {n} of them; at least 1 is needed")
    if n != len(ztoc.span_digests):
        raise Integrity(f"ztoc: checkpoints holds {n} of them, but span_digests has {len(ztoc.span_digests)}")
    if span_size < 1:
        raise Integrity(f"ztoc: the span size in checkpoints is {span_size}")
    stored, rest = divmod(len(blob) - HEAD.size, STRIDE)
    if rest or stored not in (n, n - 1):
        raise Integrity(f"ztoc: checkpoints has {len(blob)} bytes, which do not hold {n} of them")
    implied = stored == n - 1
    points = [POINT.unpack_from(blob, HEAD.size + STRIDE * i) for i in range(stored)]
    if implied:
        points.insert(0, (GZIP_HEADER, 0, 0))
    ins = [p[0] for p in points]
    outs = [p[1] for p in points]
    _check_points(ztoc, ins, outs, [p[2] for p in points])
    return SpanTable(
        compression=Compression.GZIP,
        span_size=span_size,
        ins=[*ins, ztoc.compressed_size],
        outs=[*outs, max(outs[-1], ztoc.uncompressed_size)],
        bits=bytes(p[2] for p in points),
        windows=ztoc.checkpoints_offset + HEAD.size + POINT.size - (STRIDE if implied else 0),
        implied_header=implied,
        digests=ztoc.span_digests,
    )


def _check_points(ztoc: Ztoc, ins: list[int], outs: list[int], bits: list[int]) -> None:
    if outs[0] != 0:
        raise Integrity(f"ztoc: checkpoint 0: out is {outs[0]}, not 0")
    if ins[0] < GZIP_HEADER:
        raise Integrity(f"ztoc: checkpoint 0: in is {ins[0]}, inside the gzip header")
    last_in, last_out = 0, 0
    for i, (at, out, used) in enumerate(zip(ins, outs, bits, strict=True)):
        if used > 7:
            raise Integrity(f"ztoc: checkpoint {i}: bits is {used}, more than 7")
        if at <= last_in:
            raise Integrity(f"ztoc: checkpoint {i}: in is {at}, not above {last_in}")
        if at > ztoc.compressed_size:
            raise Integrity(
                f"ztoc: checkpoint {i}: in is {at}, beyond compressed_archive_size {ztoc.compressed_size}"
            )
        if out < last_out:
            raise Integrity(f"ztoc: checkpoint {i}: out is {out}, below {last_out}")
        if out > MAX_ARCHIVE_SIZE:
            raise Integrity(f"ztoc: checkpoint {i}: out is {out}, more than {MAX_ARCHIVE_SIZE}")
        _check_expansion(f"checkpoint {i}: out", at - last_in + 1, out - last_out)
        last_in, last_out = at, out
    _check_expansion(
        "uncompressed_archive_size", ztoc.compressed_size - last_in + 1, ztoc.uncompressed_size - last_out
    )


def _check_expansion(field: str, compressed: int, uncompressed: int) -> None:
    if uncompressed > compressed * MAX_EXPANSION:
        raise Integrity(f"ztoc: {field} makes {uncompressed} bytes out of {compressed}, which deflate cannot")


def _uncompressed(ztoc: Ztoc) -> SpanTable:
    data = memoryview(bytes(ztoc.checkpoints[:_MAX_TARZINFO]))
    if len(data) < 8:
        raise Integrity(f"ztoc: checkpoints has {len(data)} bytes, too few for a TarZinfo")
    info = Table(data, int.from_bytes(data[:4], "little"), "TarZinfo")
    version = info.scalar(0, "i", "TarZinfo.version")
    span_size = info.scalar(1, "q", "TarZinfo.span_size")
    size = info.scalar(2, "q", "TarZinfo.size")
    if version not in (1, 2):
        raise Integrity(f"ztoc: TarZinfo.version is {version}; known are 1 and 2")
    if span_size < 1:
        raise Integrity(f"ztoc: TarZinfo.span_size is {span_size}")
    if size != ztoc.compressed_size:
        raise Integrity(
            f"ztoc: TarZinfo.size is {size}, but compressed_archive_size is {ztoc.compressed_size}"
        )
    if ztoc.uncompressed_size > size:
        raise Integrity(
            f"ztoc: uncompressed_archive_size is {ztoc.uncompressed_size}, beyond the file's {size}"
        )
    n = -(-size // span_size)
    if n != len(ztoc.span_digests):
        raise Integrity(f"ztoc: TarZinfo makes {n} spans, but span_digests has {len(ztoc.span_digests)}")
    edges = [min(i * span_size, size) for i in range(n + 1)]
    return SpanTable(
        compression=Compression.UNCOMPRESSED,
        span_size=span_size,
        ins=edges,
        outs=edges,
        bits=bytes(n),
        windows=None,
        implied_header=False,
        digests=ztoc.span_digests,
    )
