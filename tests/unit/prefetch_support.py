"""What the tests of prefetching share: entries, layers and span tables without a tar behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.zinfo import SpanTable
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.policy.prefetchset import LayerContents

if TYPE_CHECKING:
    from collections.abc import Sequence

SPAN = 2048  # a header and a small file fit twice, so files share spans


def entry(name: str | bytes, kind: str = "reg", *, link: str = "", size: int = 0, mode: int = 0o755) -> Entry:
    """An entry at offset 512; `stack` gives it its place."""
    raw = name if isinstance(name, bytes) else name.encode()
    return Entry(raw, kind, 512, size, link.encode(), mode, 0, 0, b"", b"", "", 0, 0, ())


def laid_out(entries: Sequence[Entry]) -> list[Entry]:
    """The entries at the offsets that a tar gives them: a header of 512 bytes each, data padded."""
    at, result = 0, []
    for item in entries:
        at += 512
        result.append(item._replace(offset=at))
        if item.type == "reg":
            at += -(-item.size // 512) * 512
    return result


def layer(number: int, *entries: Entry, ztoc: bool = True, known: bool = True) -> LayerContents:
    """Layer `number` (its digest) with spans of SPAN bytes, as an uncompressed tar has them."""
    placed = laid_out(entries)
    last = placed[-1] if placed else entry("")
    total = last.offset + last.size + 1024
    count = -(-total // SPAN)
    edges = [min(i * SPAN, total) for i in range(count + 1)]
    digest = digests.parse(f"sha256:{number:064x}")
    spans = SpanTable(
        compression=Compression.UNCOMPRESSED,
        span_size=SPAN,
        ins=edges,
        outs=edges,
        bits=bytes(count),
        windows=None,
        implied_header=False,
        digests=[str(digest)] * count,
    )
    return LayerContents(digest, placed if known else None, spans if ztoc else None)
