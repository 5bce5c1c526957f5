"""A layer read as the data plane reads it: span by span, each from its own compressed range, digests checked."""

from __future__ import annotations

import hashlib

from tests.unit.ztoc_support import read_span

from soci_snapshotter.formats import ztoc
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index.build import BuiltZtoc, build_ztoc


class IndexedLayer:
    """`layer` and the index made of it; nothing but the index's bytes is used to read."""

    def __init__(
        self,
        layer: bytes,
        *,
        span_size: int,
        compression: Compression = Compression.GZIP,
        step: int = 1 << 20,
    ) -> None:
        chunks = (layer[at : at + step] for at in range(0, len(layer), step))
        self.built: BuiltZtoc = build_ztoc(
            chunks, compression=compression, span_size=span_size, build_tool="tests"
        )
        self.layer = layer
        self.ztoc = ztoc.decode(self.built.data)
        self.spans = span_table(self.ztoc, len(layer))
        self._decoded: dict[int, bytes] = {}

    def span(self, index: int) -> bytes:
        """A span's bytes, decoded on their own."""
        if index not in self._decoded:
            start, end = self.spans.digest_range(index)
            found = "sha256:" + hashlib.sha256(self.layer[start:end]).hexdigest()
            assert found == self.spans.digest(index), f"span {index}"
            self._decoded[index] = read_span(self.spans, index, self.layer, self.built.data)
        return self._decoded[index]

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar, from just the spans that hold them."""
        spans = self.spans.spans_for(offset, size)
        if not spans:
            return b""
        start = offset - self.spans.uncompressed_range(spans[0])[0]
        return b"".join(map(self.span, spans))[start : start + size]

    def tar(self) -> bytes:
        """All spans, the tail after the tar's end among them."""
        return b"".join(map(self.span, range(len(self.spans))))

    def check(self, tar: bytes) -> None:
        """Every span, the sizes and the digests are those of `tar`, and each entry's data is where it says."""
        assert self.tar() == tar
        assert self.built.diff_id == f"sha256:{hashlib.sha256(tar).hexdigest()}"
        assert self.built.layer_digest == f"sha256:{hashlib.sha256(self.layer).hexdigest()}"
        assert (self.built.layer_size, self.built.uncompressed_size) == (len(self.layer), len(tar))
        assert self.ztoc.entries == self.built.entries
