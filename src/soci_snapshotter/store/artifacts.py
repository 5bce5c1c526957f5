"""<root>/content/artifacts.sqlite: which SOCI indexes were made here, and for which images. push asks it."""

from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import Config
from ..formats import digest as digests
from ..formats.digest import Digest

# Another `soci create` may be writing; its transactions take milliseconds, a slow disk's fsync seconds.
_BUSY_S = 30.0

_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS indexes (
    digest TEXT NOT NULL,         -- of the SOCI index manifest
    store TEXT NOT NULL,          -- where its blobs are: containerd or soci
    namespace TEXT NOT NULL,      -- containerd's namespace; its content is per namespace
    image_digest TEXT NOT NULL,   -- of the image manifest it describes
    image_name TEXT NOT NULL,
    platform TEXT NOT NULL,
    media_type TEXT NOT NULL,     -- of its config: the kind of index
    size INTEGER NOT NULL,        -- bytes of the manifest
    created_ns INTEGER NOT NULL,  -- UTC, nanoseconds since 1970
    PRIMARY KEY (digest, store, namespace)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS indexes_by_image ON indexes (image_digest, store, namespace);
PRAGMA user_version = {_VERSION};
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """A SOCI index made here. `size` in bytes; `created_ns` is UTC in nanoseconds since 1970."""

    digest: Digest
    store: str
    namespace: str
    image_digest: Digest
    image_name: str
    platform: str
    media_type: str
    size: int
    created_ns: int


class Artifacts:
    """The table of indexes; a context manager, safe for threads and for several processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> Artifacts:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._db.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            self.__exit__()
            raise Config(f"{self._path}: {error}; check --root and that this user may write there") from None
        if version > _VERSION:
            self.__exit__()
            raise Config(f"{self._path}: written by a newer soci (version {version}); use that one")
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def add(self, record: IndexRecord, *, only: bool) -> None:
        """Record an index; with `only`, forget the others of the same image, store and namespace.

        An equal record keeps its place but gets the new time, so that it is the newest again.
        """
        row = (
            record.digest,
            record.store,
            record.namespace,
            record.image_digest,
            record.image_name,
            record.platform,
            record.media_type,
            record.size,
            record.created_ns,
        )
        with self._lock:
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            try:
                if only:
                    db.execute(
                        "DELETE FROM indexes WHERE image_digest = ? AND store = ? AND namespace = ?",
                        (record.image_digest, record.store, record.namespace),
                    )
                db.execute("INSERT OR REPLACE INTO indexes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                db.execute("COMMIT")
            except BaseException:
                db.execute("ROLLBACK")
                raise

    def of_image(self, image_digest: Digest, store: str, namespace: str) -> list[IndexRecord]:
        """Indexes of this image manifest in this store, newest first."""
        with self._lock:
            rows = (
                self._open()
                .execute(
                    "SELECT digest, store, namespace, image_digest, image_name, platform, media_type, size,"
                    " created_ns FROM indexes WHERE image_digest = ? AND store = ? AND namespace = ?"
                    " ORDER BY created_ns DESC, digest",
                    (image_digest, store, namespace),
                )
                .fetchall()
            )
        return [IndexRecord(digests.parse(r[0]), r[1], r[2], digests.parse(r[3]), *r[4:]) for r in rows]

    def remove(self, digest: Digest, store: str, namespace: str) -> None:
        """Forget an index; a no-op when it is unknown."""
        with self._lock:
            self._open().execute(
                "DELETE FROM indexes WHERE digest = ? AND store = ? AND namespace = ?",
                (digest, store, namespace),
            )

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise Config(f"{self._path}: not open")
        return self._db


def now_ns() -> int:
    """The time for `created_ns`."""
    return time.time_ns()
