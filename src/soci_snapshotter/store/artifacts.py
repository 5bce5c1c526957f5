"""<root>/content/artifacts.sqlite: which SOCI indexes were made here, and for which images.

Only indexes are recorded: the ztocs and prefetch artifacts are what their manifests name. A row says that an
index was made, not that it is still there; whoever lists looks into the store.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from ..errors import Config
from ..formats import digest as digests
from ..formats.digest import Digest

# Another `soci create` may be writing; its transactions take milliseconds, a slow disk's fsync seconds.
_BUSY_S = 30.0

# Step n brings a database of version n to version n + 1; the first makes a new one.
_STEPS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE indexes (
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
        ) WITHOUT ROWID
        """,
        "CREATE INDEX indexes_by_image ON indexes (image_digest, store, namespace)",
    ),
)
_VERSION = len(_STEPS)

_COLUMNS = "digest, store, namespace, image_digest, image_name, platform, media_type, size, created_ns"
_VALUES = f"({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
# Newest first; the digest makes the order of equals the same every time.
_ORDER = "ORDER BY created_ns DESC, digest, store, namespace"


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
    """The table of indexes; a context manager, safe for threads and for several processes.

    Every method raises Config, naming the file and what to do, when the database cannot be read or written, and
    OSError when the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> Artifacts:
        try:
            # mkdir gives `mode` to the last directory only, and the root, above, is nobody else's business either.
            for directory in (self._path.parent.parent, self._path.parent):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Config(f"{self._path}: {error}; check --root and that this user may write there") from None
        try:
            with self._named_errors():
                self._db = sqlite3.connect(
                    self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
                )
                self._migrate(self._db)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def add(self, record: IndexRecord, *, only: bool) -> None:
        """Record an index; with `only`, forget the others of the same image, store and namespace.

        An equal record keeps its place but gets the new time, so that it is the newest again.
        """
        with self._transaction() as db:
            if only:
                db.execute(
                    "DELETE FROM indexes WHERE image_digest = ? AND store = ? AND namespace = ?",
                    (record.image_digest, record.store, record.namespace),
                )
            db.execute(f"INSERT OR REPLACE INTO indexes {_VALUES}", astuple(record))

    def update(self, found: Iterable[IndexRecord], gone: Iterable[IndexRecord]) -> None:
        """Add records that are not there yet and forget others, all at once. For rebuilding the table."""
        with self._transaction() as db:
            db.executemany(f"INSERT OR IGNORE INTO indexes {_VALUES}", map(astuple, found))
            db.executemany(
                "DELETE FROM indexes WHERE digest = ? AND store = ? AND namespace = ?",
                [(record.digest, record.store, record.namespace) for record in gone],
            )

    def all(self) -> list[IndexRecord]:
        """Every record of every store and namespace, newest first."""
        return self._select("1", ())

    def of_image(self, image_digest: Digest, store: str, namespace: str) -> list[IndexRecord]:
        """Indexes of this image manifest in this store, newest first."""
        return self._select(
            "image_digest = ? AND store = ? AND namespace = ?", (image_digest, store, namespace)
        )

    def remove(self, digest: Digest, store: str, namespace: str) -> None:
        """Forget an index; a no-op when it is unknown."""
        with self._transaction() as db:
            db.execute(
                "DELETE FROM indexes WHERE digest = ? AND store = ? AND namespace = ?",
                (digest, store, namespace),
            )

    def _select(self, where: str, values: tuple[str, ...]) -> list[IndexRecord]:
        query = f"SELECT {_COLUMNS} FROM indexes WHERE {where} {_ORDER}"  # noqa: S608 - constants
        with self._lock, self._named_errors():
            rows = self._open().execute(query, values).fetchall()
        return [IndexRecord(digests.parse(r[0]), r[1], r[2], digests.parse(r[3]), *r[4:]) for r in rows]

    def _migrate(self, db: sqlite3.Connection) -> None:
        version = _version(db)
        if version < _VERSION:
            db.execute("BEGIN IMMEDIATE")
            # Asked again: another process may have done it while this one waited.
            for step in _STEPS[_version(db) :]:
                for statement in step:
                    db.execute(statement)
            db.execute(f"PRAGMA user_version = {max(_VERSION, _version(db))}")
            db.execute("COMMIT")
        elif version > _VERSION:
            raise Config(f"{self._path}: written by a newer soci (version {version}); use that one")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._named_errors():
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # a full disk has ended the transaction already
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, read-only
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path)) from None
            raise Config(f"{self._path}: {error}; check --root and that this user may write there") from None
        except sqlite3.DatabaseError as error:
            raise Config(
                f"{self._path}: {error}; remove the file, then make it again with: soci rebuild-db"
            ) from None

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise Config(f"{self._path}: not open")
        return self._db


def now_ns() -> int:
    """The time for `created_ns`."""
    return time.time_ns()


def _version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version
