"""Layers that turned out to be a lie, remembered when their files are gone: <root>/condemned.json.

Only so many: an attacker who has thousands of lies believed once can have the oldest believed once more.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import msgspec

from soci_snapshotter.store.layerfiles import write_atomically

_log = logging.getLogger(__name__)

_LIMIT = 1000  # 300 bytes each
_FILE_LIMIT = 4 << 20


class Entry(msgspec.Struct, frozen=True):
    """One (layer, ztoc)."""

    layer: str
    ztoc: str
    diff_id: str
    """What its bytes are; "" when its table of contents is the lie, whatever the bytes are."""
    reason: str


class Condemned:
    """The list. Thread safe."""

    def __init__(self, root: Path) -> None:
        """Read it; a damaged file is an empty list: it saves work and protects nobody by itself."""
        self._path = root / "condemned.json"
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], Entry] = {}
        try:
            if self._path.stat().st_size <= _FILE_LIMIT:
                entries = msgspec.json.decode(self._path.read_bytes(), type=list[Entry])
                self._entries = {(entry.layer, entry.ztoc): entry for entry in entries[-_LIMIT:]}
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError) as error:
            _log.warning(
                "list of condemned layers unreadable", extra={"path": str(self._path), "error": str(error)}
            )

    def find(self, layer: str, ztoc: str) -> Entry | None:
        """What is known of (layer, ztoc)."""
        with self._lock:
            return self._entries.get((layer, ztoc))

    def add(self, entry: Entry) -> None:
        """Remember, durably; the newest are kept. Raises OSError."""
        key = entry.layer, entry.ztoc
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = entry
            while len(self._entries) > _LIMIT:
                del self._entries[next(iter(self._entries))]
            raw = msgspec.json.encode(list(self._entries.values()))
        write_atomically(self._path, raw)
