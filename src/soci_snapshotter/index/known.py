"""Ztocs that were made here before: the same layer with the same options need not be read again."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import Integrity, NotFound
from ..formats import digest as digests
from ..formats import oci, sociindex, ztoc
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from .create import Known
from .sinks import Store

# A ztoc of a million entries has some 300 MB; a bigger one is rather made again than held in memory.
_LIMIT = 512 << 20


def known_ztocs(store: Store, indexes: Iterable[Digest]) -> Known:
    """A Known that looks into these indexes (newest first), which were made here, as far as the store has them."""
    found: dict[tuple[str, str], Descriptor] = {}
    asked = iter(indexes)

    def look(layer: Descriptor, span_size: int, tool: str) -> tuple[Digest, bytes] | None:
        key = (str(layer.digest), str(span_size))
        while key not in found and (index := next(asked, None)) is not None:
            for entry in _ztocs(store, index):
                marks = entry.annotations
                found.setdefault((marks[sociindex.LAYER_DIGEST], marks[sociindex.SPAN_SIZE]), entry)
        return _load(store, found[key], layer, tool) if key in found else None

    return look


def _ztocs(store: Store, index: Digest) -> list[Descriptor]:
    try:
        decoded = sociindex.decode(store.get(index, oci.MANIFEST_LIMIT))
    except (NotFound, Integrity):
        return []  # collected, or damaged: it is made again
    return [entry for entry in decoded.ztocs.values() if sociindex.SPAN_SIZE in entry.annotations]


def _load(store: Store, entry: Descriptor, layer: Descriptor, tool: str) -> tuple[Digest, bytes] | None:
    try:
        data = store.get(entry.digest, _LIMIT)
        decoded = ztoc.decode_spans(data)
    except (NotFound, Integrity):
        return None
    if decoded.compressed_size != layer.size or decoded.build_tool != tool:
        return None
    return digests.sha256(data), data
