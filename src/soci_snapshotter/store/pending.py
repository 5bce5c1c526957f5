"""Pending rows: lazy snapshots whose layer is still to be mounted. Their `mount` is below 0, which no layer's number is.

A migration enters them (store.gosnapshots); they are settled one by one. A connection of its own: this is no part of any
call of containerd's.
"""

from __future__ import annotations

import errno
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from ..policy.lazy import LazyLayer

_BUSY_SECONDS = (
    30.0  # a write of the snapshots' own connection is a few milliseconds; a sick disk takes longer
)


def mount_of(snapshot_id: int) -> int:
    """The `mount` of a pending row."""
    return -snapshot_id


def snapshot_of(mount_id: int) -> int | None:
    """Which pending row has this `mount`; None for a layer's number."""
    return -mount_id if mount_id < 0 else None


@dataclass(frozen=True, slots=True)
class Pending:
    """One such row."""

    id: int
    key: str
    parent_id: int | None


@contextmanager
def _as_oserror() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(errno.EIO, f"the snapshots' rows: {error}") from None


class PendingRows:
    """The pending rows of metadata.sqlite at `path`. Thread safe; to be closed. Raises OSError where the disk does."""

    def __init__(self, path: bytes) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, _BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        """Close the connection; calls after it raise OSError."""
        with self._lock:
            self._db.close()

    def all(self) -> list[Pending]:
        """The rows, by id; a parent is older than its children."""
        with self._lock, _as_oserror():
            rows = self._db.execute(
                "SELECT id, key, parent FROM snapshots WHERE mount < 0 ORDER BY id"
            ).fetchall()
        return [Pending(*row) for row in rows]

    def settle(self, snapshot_id: int, layer: LazyLayer) -> bool:
        """The row's layer is mounted; False when the row is not there any more, or not pending."""
        with self._lock, _as_oserror(), self._db:  # commits, or rolls back
            self._db.execute("BEGIN IMMEDIATE")
            query = "SELECT labels FROM snapshots WHERE id = ? AND mount < 0"
            found = self._db.execute(query, (snapshot_id,)).fetchone()
            if found is None:
                return False
            labels = {**msgspec.json.decode(found[0], type=dict[str, str]), **layer.labels}
            self._db.execute(
                "UPDATE snapshots SET labels = ?, size = ?, inodes = ?, mount = ?, layer = ? WHERE id = ?",
                (
                    msgspec.json.encode(labels),
                    layer.size,
                    layer.inodes,
                    layer.mount_id,
                    layer.layer_key,
                    snapshot_id,
                ),
            )
        return True
