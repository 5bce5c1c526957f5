"""Bytes of an image's files out of layers that are not unpacked, for `closure`: a few spans, kept for a while.

getfile reads one file from end to end; a loader's questions are small, many and close together.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from ..errors import Integrity, NotFound
from ..formats.digest import Buffer
from ..formats.zinfo import WINDOW, SpanTable
from ..linux.inflate import decode_span
from ..policy.mergedtree import Found
from .getfile import ReadLayer

MAX_KEPT: Final = 32 << 20
"""Bytes of inflated spans: eight of the default size, which hold the libraries of one program."""


class LayerReader:
    """The tar of one layer, read through its ztoc (`data`, of which `spans` is the table). Not for threads."""

    def __init__(self, spans: SpanTable, data: Buffer, read: ReadLayer) -> None:
        self._spans = spans
        self._data = data
        self._layer = read
        self._kept: OrderedDict[int, bytes] = OrderedDict()

    def read(self, offset: int, size: int) -> bytes:
        """The tar's bytes from `offset` on, fewer only at its end. Integrity for bytes that are not the ztoc's."""
        pieces = []
        for span in self._spans.spans_for(offset, size):
            begin = self._spans.uncompressed_range(span)[0]
            pieces.append(self._span(span)[max(offset - begin, 0) : max(offset + size - begin, 0)])
        return b"".join(pieces)

    def _span(self, span: int) -> bytes:
        if span not in self._kept:
            self._kept[span] = self._inflated(span)
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(span)
        return self._kept[span]

    def _inflated(self, span: int) -> bytes:
        start, end = self._spans.compressed_range(span)
        first, last = self._spans.digest_range(span)
        fetched = b"".join(self._layer(start, end - start)) if end > start else b""
        found = "sha256:" + hashlib.sha256(fetched[first - start : last - start]).hexdigest()
        if len(fetched) != end - start or found != self._spans.digest(span):
            raise Integrity(f"span {span}: its {len(fetched)} bytes have the digest {found}, not the ztoc's")
        at = self._spans.window_position(span)
        window = None if at is None else self._data[at : at + WINDOW]
        return decode_span(self._spans, span, fetched, window)


class ImageReader:
    """What `closure` reads through. `layers`: lowest first as in its tree, None for one that cannot be read."""

    def __init__(self, layers: Sequence[LayerReader | None]) -> None:
        self._layers = layers

    def __call__(self, found: Found, offset: int, size: int) -> bytes:
        """Bytes of a regular file of the merged tree; NotFound when its layer cannot be read."""
        layer = self._layers[found.layer] if found.entry is not None else None
        if layer is None or found.entry is None:
            raise NotFound("its layer has no ztoc, so its contents are not known")
        left = min(size, found.entry.size - offset)
        return layer.read(found.entry.offset + offset, left) if left > 0 and offset >= 0 else b""
