"""Ztocs that eager filling made on the way: which layer has which, kept when the layer's bytes are gone.

    <root>/made/<layer hex>      {"ztoc": digest or "", "size": bytes}; "" for a layer that no ztoc can make lazy

The ztocs themselves are in the content store. They take 1 % of their layers' sizes; the least recently used go when
all take more than LIMIT.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import msgspec

from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.store.content import ContentStore

_log = logging.getLogger(__name__)

LIMIT = 256 << 20
"""Bytes: the ztocs of some 25 GB of layers."""
MOST_ENTRIES = 10_000
"""Of a few hundred bytes each."""
_ENTRY_LIMIT = 4096  # bytes of a file that holds one digest and one number


class FreeZtoc(msgspec.Struct, frozen=True):
    """The ztoc of one layer; "" when it has none. `size` in bytes."""

    ztoc: str
    size: int


class FreeZtocs:
    """The table. Thread safe. Files that are damaged are as good as absent: the ztoc is made again."""

    def __init__(self, root: Path, content: ContentStore, *, limit: int = LIMIT) -> None:
        """`limit`: bytes that the ztocs may take together."""
        self._top = root / "made"
        self._top.mkdir(mode=0o700, exist_ok=True)
        self._content = content
        self._limit = limit
        self._lock = threading.Lock()
        self._entries: dict[Digest, FreeZtoc] = {}  # least recently used first
        found = []
        with os.scandir(self._top) as names:
            for name in names:
                entry = _read(Path(name.path))
                if entry is not None:
                    found.append((name.stat().st_mtime_ns, name.name, entry))
        for _, name_text, entry in sorted(found, key=lambda item: item[0]):
            self._entries[digests.from_hex(name_text)] = entry

    def find(self, layer: Digest) -> FreeZtoc | None:
        """What is known of the layer; a ztoc that is named is in the content store."""
        with self._lock:
            entry = self._entries.get(layer)
        if entry is None or (entry.ztoc and not self._content.exists(digests.parse(entry.ztoc))):
            return None
        with self._lock:
            if self._entries.pop(layer, None) is not None:
                self._entries[layer] = entry
        try:
            os.utime(self._top / layer.hex)
        except OSError as error:
            _log.debug("cannot note a use", extra={"error": str(error)})
        return entry

    def keeps(self, ztoc: Digest) -> bool:
        """Whether this table is a reason to keep a ztoc."""
        text = str(ztoc)
        with self._lock:
            return any(entry.ztoc == text for entry in self._entries.values())

    def add(self, layer: Digest, entry: FreeZtoc) -> list[Digest]:
        """Remember; the ztocs that gave way for it are returned, theirs to delete who knows that nobody uses them."""
        path = self._top / layer.hex
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(msgspec.json.encode(entry))
        os.rename(temporary, path)
        with self._lock:
            self._entries.pop(layer, None)
            self._entries[layer] = entry
            total = sum(other.size for other in self._entries.values())
            dropped: list[tuple[Digest, FreeZtoc]] = []
            while len(self._entries) > 1 and (total > self._limit or len(self._entries) > MOST_ENTRIES):
                oldest = next(iter(self._entries))
                gone = self._entries.pop(oldest)
                total -= gone.size
                dropped.append((oldest, gone))
        for old, _ in dropped:
            (self._top / old.hex).unlink(missing_ok=True)
        return [digests.parse(gone.ztoc) for _, gone in dropped if gone.ztoc]


def _read(path: Path) -> FreeZtoc | None:
    try:
        digests.from_hex(path.name)
        if path.stat().st_size > _ENTRY_LIMIT:
            return None
        entry = msgspec.json.decode(path.read_bytes(), type=FreeZtoc)
        if entry.ztoc:
            digests.parse(entry.ztoc)
    except (OSError, msgspec.MsgspecError, Invalid) as error:
        _log.debug("not an entry", extra={"path": str(path), "error": str(error)})
        return None
    return entry
