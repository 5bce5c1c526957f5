"""What the tests of ztocs, checkpoints and the tar parser share: the vectors, small ztocs, gzip by hand."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soci_snapshotter.formats import zinfo
from soci_snapshotter.formats.ztoc import Compression, Entry, Ztoc
from soci_snapshotter.linux.inflate import decode_span

if TYPE_CHECKING:
    from soci_snapshotter.formats.zinfo import SpanTable

VECTORS = Path(__file__).parent.parent / "vectors"
GO_TOOL = "AWS SOCI CLI v0.2"


@dataclass(frozen=True)
class Case:
    """One vector: `raw` is its line in cases.json."""

    raw: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.raw["case"])

    @property
    def layer(self) -> bytes:
        return bytes((VECTORS / self.name / self.raw["layer"]).read_bytes())

    @property
    def ztoc(self) -> bytes:
        return (VECTORS / self.name / "ztoc.bin").read_bytes()

    @property
    def compression(self) -> Compression:
        return Compression.UNCOMPRESSED if self.raw["layer"] == "layer.tar" else Compression.GZIP

    @property
    def tar(self) -> bytes:
        return self.layer if self.compression is Compression.UNCOMPRESSED else gzip.decompress(self.layer)

    @property
    def info(self) -> dict[str, Any]:
        return dict(json.loads((VECTORS / self.name / "ztoc-info.json").read_bytes()))

    @property
    def members(self) -> list[dict[str, Any]]:
        """The tar's members as an independent reader saw them; the two made by the Go program have no
        list.
        """
        for edge in ("edge1", "edge2", "edge3"):
            if edge in self.name:
                return list(json.loads((VECTORS / f"{edge}.tar.files.json").read_bytes()))
        return []


@cache
def cases() -> tuple[Case, ...]:
    """All vectors."""
    return tuple(Case(raw) for raw in json.loads((VECTORS / "cases.json").read_bytes()))


def entry(name: bytes = b"f", **changes: object) -> Entry:
    """A regular file of 5 bytes, the first in its tar, unless said otherwise."""
    plain = Entry(
        name, "reg", 512, 5, b"", 0o644, 1, 2, b"u", b"g", "2023-11-14T22:13:20Z", 0, 0, ((b"k", b"v"),)
    )
    return plain._replace(**changes)  # type: ignore[arg-type]


def small_ztoc(*entries: Entry, **changes: object) -> Ztoc:
    """One span, in the version 1 encoding, which needs no window: every byte of it matters."""
    fields: dict[str, Any] = {
        "version": "0.9",
        "build_tool": "tests",
        "compressed_size": 1000,
        "uncompressed_size": 10240,
        "compression": Compression.GZIP,
        "max_span_id": 0,
        "span_digests": ["sha256:" + "ab" * 32],
        "checkpoints": zinfo.HEAD.pack(1, 4 << 20),
        "checkpoints_offset": 0,
        "entries": list(entries),
    }
    return Ztoc(**(fields | changes))


def blob(points: list[tuple[int, int, int]], span_size: int = 4 << 20, count: int | None = None) -> bytes:
    """A checkpoints blob with zero windows, from (in, out, bits)."""
    head = zinfo.HEAD.pack(len(points) if count is None else count, span_size)
    return head + b"".join(zinfo.POINT.pack(*point) + bytes(zinfo.WINDOW) for point in points)


def member(data: bytes, level: int = 6, flush: int | None = None, step: int = 1000) -> bytes:
    """One gzip member; with `flush` (a zlib constant) flushed so after each `step` bytes."""
    deflate = zlib.compressobj(level, zlib.DEFLATED, 31)
    out = b""
    if flush is None:
        out += deflate.compress(data)
    else:
        for i in range(0, len(data), step):
            out += deflate.compress(data[i : i + step]) + deflate.flush(flush)
    return out + deflate.flush()


def read_span(table: SpanTable, index: int, layer: bytes, ztoc: bytes) -> bytes:
    """Span `index`, the way the daemon reads it: its compressed range, and its window out of the ztoc
    file.
    """
    start, end = table.compressed_range(index)
    at = table.window_position(index)
    window = None if at is None else ztoc[at : at + zinfo.WINDOW]
    return decode_span(table, index, layer[start:end], window)


def read_range(table: SpanTable, offset: int, size: int, layer: bytes, ztoc: bytes) -> bytes:
    """Bytes of the tar through spans."""
    spans = table.spans_for(offset, size)
    if not spans:
        return b""
    data = b"".join(read_span(table, index, layer, ztoc) for index in spans)
    start = offset - table.uncompressed_range(spans[0])[0]
    return data[start : start + size]
