"""The rows of the snapshotter: one sqlite file, one connection, every call one transaction.

    snapshots   one row a snapshot. `key` is whatever containerd sent. `ref` repeats the label snapshot.ref.
                `mount` is set on lazy rows only, and those are unique in (parent, ref). `condemned` says why a
                lazy row is not to be used any more; its ref is gone, so that nobody finds it.
    given       the lazy lowerdir paths that active and view snapshots were handed
    spare       room that is never given back (see _LOG_BYTES)
    counter     ids below `next` may be in use as directory names; ids are never used twice

WAL with synchronous=FULL: a call that returned survives a power cut. containerd keeps references to our rows
in a database of its own that is just as durable; losing one of ours would leave a reference to nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import msgspec

from ..errors import AlreadyExists, Config, Invalid, NotFound, Precondition, Remote
from ..policy.lazy import LazyLayer, Usage
from ..policy.prepare import TARGET

_log = logging.getLogger(__name__)

_VERSION = 2
_SCHEMA = """
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    kind INTEGER NOT NULL,
    ref TEXT,
    labels BLOB NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    size INTEGER NOT NULL DEFAULT 0,
    inodes INTEGER NOT NULL DEFAULT 0,
    mount INTEGER,
    layer TEXT,
    condemned TEXT
) STRICT;
CREATE INDEX snapshots_parent ON snapshots (parent);
CREATE INDEX snapshots_ref ON snapshots (ref);
CREATE UNIQUE INDEX snapshots_lazy ON snapshots (ifnull(parent, 0), ref) WHERE mount IS NOT NULL;
CREATE TABLE given (
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    path BLOB NOT NULL,
    PRIMARY KEY (snapshot, path)
) STRICT, WITHOUT ROWID;
CREATE INDEX given_path ON given (path);
CREATE TABLE counter (next INTEGER NOT NULL) STRICT;
INSERT INTO counter VALUES (1);
PRAGMA user_version = 2;
"""
_FROM_1 = "ALTER TABLE snapshots ADD COLUMN condemned TEXT; PRAGMA user_version = 2;"
_SELECT = """
SELECT s.id, s.key, p.key, s.kind, s.labels, s.created, s.updated, s.size, s.inodes, s.mount, s.layer
FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent
"""
# Ids are taken from the file this many at a time: a new snapshot costs one synchronous write, not two.
_ID_BLOCK = 64
# Removing snapshots must work on a full disk: it is what makes room. So the log has this many bytes from the start, and
# is begun anew well before it needs more; a transaction of ours is 10 pages or less.
_LOG_BYTES = 512 << 10
_LOG_PAGES = 100
_RESTORE = (
    "restore it from a backup, or, to begin anew, remove all images of this snapshotter from containerd, and then this "
    "daemon's whole root"
)
# Rows read under the lock at a time while listing.
_PAGE = 256

_labels_decoder = msgspec.json.Decoder(dict[str, str])


class Kind(IntEnum):
    """The kinds of snapshots; the numbers are those of containerd's API."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True)
class Snapshot:
    """One row. `parent` is the parent's key or ""; times are nanoseconds since 1970."""

    id: int
    key: str
    parent: str
    kind: Kind
    labels: dict[str, str]
    created: int
    updated: int
    usage: Usage
    mount_id: int | None
    layer_key: str | None


@dataclass(frozen=True)
class Link:
    """One snapshot of a chain: its directory's id, when lazy its mount, and why it is not to be used, if so."""

    id: int
    mount_id: int | None
    condemned: str | None = None


@dataclass(frozen=True)
class Removed:
    """What a removal leaves to do: the row that is gone, and the lowerdirs nobody holds any longer."""

    snapshot: Snapshot
    returned: frozenset[bytes]


class SnapshotStore:
    """The rows, for many threads; a context manager. Raises what containerd's own store raises."""

    def __init__(self, path: bytes, *, missed: str = "") -> None:
        """Open the file, or make it. `missed`: what there is that an earlier file must have had rows for, if any.

        Config, in one line, for a file that cannot be used, or that is not there and missed: its rows cannot be made
        again, and without them all else would be swept away.
        """
        self._name = path.decode(errors="replace")
        self._lock = threading.Lock()
        with self._named_errors():
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._open(missed)
            except BaseException:
                self._db.close()
                raise
        self._next_id = self._id_limit = 0

    def _open(self, missed: str) -> None:
        self._db.execute("PRAGMA journal_mode = WAL").fetchall()
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and missed:
            raise Config(f"{self._name} is missing or empty, but there is {missed}: {_RESTORE}")
        damage = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if damage != "ok":
            raise Config(f"{self._name} is damaged ({damage.splitlines()[-1]}): {_RESTORE}")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
        elif version == 1:
            self._db.executescript(f"BEGIN IMMEDIATE; {_FROM_1} COMMIT;")
        elif version != _VERSION:
            raise Config(
                f"{self._name} has format {version}, this program knows {_VERSION}: "
                "use the version that wrote it, or another root"
            )
        try:
            self._db.execute("CREATE TABLE IF NOT EXISTS spare (filler BLOB NOT NULL) STRICT")
            self._db.execute(
                "INSERT OR REPLACE INTO spare (rowid, filler) VALUES (1, zeroblob(?))", (_LOG_BYTES,)
            )
            self._db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.OperationalError as error:
            _log.warning("no room for the log of the snapshots", extra={"error": str(error)})
        self._db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}").fetchall()

    def __enter__(self) -> SnapshotStore:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise  # a row's, not the file's
        except sqlite3.ProgrammingError:
            raise Remote(f"{self._name} is closed: the daemon is stopping") from None
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name) from None
            raise Config(
                f"{self._name}: {error}; check that the disk is well and may be written to"
            ) from None
        except sqlite3.DatabaseError as error:
            raise Config(f"{self._name} is damaged ({error}): {_RESTORE}") from None

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._named_errors():
            yield self._db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._named_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk has ended it already
                    self._db.execute("ROLLBACK")
                raise

    def reserve(self) -> int:
        """A new id, never given before, not even to a snapshot that was removed."""
        with self._reading() as db:
            if self._next_id == self._id_limit:
                query = "UPDATE counter SET next = next + ? RETURNING next"
                # fetchall: the statement commits when it has been read to its end
                [(self._id_limit,)] = db.execute(query, (_ID_BLOCK,)).fetchall()
                self._next_id = self._id_limit - _ID_BLOCK
            self._next_id += 1
            return self._next_id - 1

    def get(self, key: str) -> Snapshot:
        """The row of `key`, or NotFound."""
        with self._reading() as db:
            return _get(db, key)

    def find_target(self, parent: str, target: str) -> Snapshot | None:
        """The first committed row with label snapshot.ref == `target` on the parent with the key `parent`."""
        query = _SELECT + "WHERE s.ref = ? AND ifnull(p.key, '') = ? AND s.kind = ? ORDER BY s.id LIMIT 1"
        with self._reading() as db:
            row = db.execute(query, (target, parent, Kind.COMMITTED)).fetchone()
        return _snapshot(row) if row else None

    def chain(self, key: str) -> tuple[Snapshot | None, tuple[Link, ...]]:
        """The committed snapshot `key` and its chain, topmost first, itself included; "" is the empty chain.

        Raises NotFound, and Invalid when `key` is not committed: it cannot be a parent.
        """
        if not key:
            return None, ()
        query = """
        WITH RECURSIVE chain (id, parent, mount, condemned, depth) AS (
            SELECT id, parent, mount, condemned, 0 FROM snapshots WHERE key = ?
            UNION ALL
            SELECT s.id, s.parent, s.mount, s.condemned, depth + 1
            FROM chain JOIN snapshots s ON s.id = chain.parent)
        SELECT id, mount, condemned FROM chain ORDER BY depth"""
        with self._reading() as db:
            top = _parent(db, key)
            links = tuple(Link(*row) for row in db.execute(query, (key,)))
        return top, links

    def create(
        self,
        snapshot_id: int,
        key: str,
        *,
        parent: str,
        kind: Kind,
        labels: Mapping[str, str],
        given: Sequence[bytes] = (),
    ) -> Snapshot:
        """Add an active or view snapshot whose directory exists already; `given` are its lazy lowerdirs."""
        with self._transaction() as db:
            try:
                _insert(db, parent, _NewRow(snapshot_id, key, kind, labels))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"snapshot {key!r} already exists") from None
            _give(db, snapshot_id, given)
            return _get(db, key)

    def give(self, snapshot_id: int, paths: Sequence[bytes]) -> bool:
        """Note lowerdirs handed to a snapshot; True when one of them was not noted before."""
        with self._reading() as db:
            query = "SELECT path FROM given WHERE snapshot = ?"
            known = {row[0] for row in db.execute(query, (snapshot_id,))}
        if known.issuperset(paths):
            return False
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM snapshots WHERE id = ?", (snapshot_id,)).fetchone() is None:
                raise NotFound(f"snapshot {snapshot_id} was removed meanwhile")
            _give(db, snapshot_id, paths)
        return True

    def handed_out(self) -> frozenset[bytes]:
        """Every lazy lowerdir that some active or view snapshot was given."""
        with self._reading() as db:
            return frozenset(row[0] for row in db.execute("SELECT DISTINCT path FROM given"))

    def commit(
        self, key: str, name: str, labels: Mapping[str, str], usage: Usage, parent: str = ""
    ) -> tuple[Snapshot, frozenset[bytes]]:
        """Turn the active `key` into the committed `name`, with these labels only (nothing is inherited).

        `parent` rebases a snapshot that has none. Also returns the lowerdirs nobody holds any longer.
        """
        now = time.time_ns()
        with self._transaction() as db:
            row = _get(db, key)
            if db.execute("SELECT 1 FROM snapshots WHERE key = ?", (name,)).fetchone():
                raise AlreadyExists(f"committed snapshot {name!r} already exists")
            if row.kind != Kind.ACTIVE:
                raise Precondition(f"cannot commit snapshot {key!r}: it is not active")
            if parent and row.parent not in {"", parent}:
                raise Invalid(f"cannot commit snapshot {key!r} on {parent!r}: its parent is {row.parent!r}")
            if parent and not row.parent:
                rebased = _get(db, parent)
                if rebased.kind != Kind.COMMITTED:
                    raise Precondition(f"cannot commit snapshot {key!r} on {parent!r}: that is not committed")
                db.execute("UPDATE snapshots SET parent = ? WHERE id = ?", (rebased.id, row.id))
            returned = _take_back(db, row.id)
            db.execute(
                "UPDATE snapshots SET key = ?, kind = ?, created = ?, updated = ?, size = ?, inodes = ?"
                " WHERE id = ?",
                (name, Kind.COMMITTED, now, now, usage.size, usage.inodes, row.id),
            )
            _set_labels(db, row.id, labels)
            return _get(db, name), returned

    def commit_lazy(
        self, snapshot_id: int, name: str, *, parent: str, labels: Mapping[str, str], layer: LazyLayer
    ) -> Snapshot:
        """Add a committed lazy snapshot. AlreadyExists when its (parent, snapshot.ref) has a lazy row."""
        with self._transaction() as db:
            try:
                _insert(db, parent, _NewRow(snapshot_id, name, Kind.COMMITTED, labels, layer))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"target snapshot {labels[TARGET]!r} already exists") from None
            return _get(db, name)

    def remove(self, key: str) -> Removed:
        """Remove a row that is nobody's parent, else Precondition."""
        with self._transaction() as db:
            row = _get(db, key)
            child = db.execute("SELECT key FROM snapshots WHERE parent = ? LIMIT 1", (row.id,)).fetchone()
            if child:
                raise Precondition(f"cannot remove snapshot {key!r}: {child[0]!r} is its child")
            returned = _take_back(db, row.id)
            db.execute("DELETE FROM snapshots WHERE id = ?", (row.id,))
        return Removed(row, returned)

    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str]) -> Snapshot:
        """Replace the labels, or with `paths` only those named: "labels", "labels.<name>".

        A named label that `labels` lacks, or gives the empty text, is removed. Any other path is Invalid.
        """
        with self._transaction() as db:
            row = _get(db, key)
            merged = dict(row.labels) if paths else dict(labels)
            for path in paths:
                if path == "labels":
                    merged = dict(labels)
                elif path.startswith("labels."):
                    name = path.removeprefix("labels.")
                    merged[name] = labels.get(name, "")
                else:
                    raise Invalid(f"cannot update field {path!r} of snapshot {key!r}: only labels can change")
            try:
                db.execute("UPDATE snapshots SET updated = ? WHERE id = ?", (time.time_ns(), row.id))
                _set_labels(db, row.id, merged)
            except sqlite3.IntegrityError:
                raise AlreadyExists(
                    f"target snapshot {merged[TARGET]!r} already exists on that parent"
                ) from None
            return _get(db, key)

    def walk(self, *, target: str | None = None) -> Iterator[Snapshot]:
        """All rows by id, or those with this snapshot.ref; the caller looks at each without the lock."""
        condition, values = ("", ()) if target is None else ("AND s.ref = ?", (target,))
        query = f"{_SELECT} WHERE s.id > ? {condition} ORDER BY s.id LIMIT {_PAGE}"
        last = -1
        while True:
            with self._reading() as db:
                rows = db.execute(query, (last, *values)).fetchall()
            for row in rows:
                yield _snapshot(row)
            if len(rows) < _PAGE:
                return
            last = rows[-1][0]

    def ids(self) -> frozenset[int]:
        """The ids of all rows."""
        with self._reading() as db:
            return frozenset(row[0] for row in db.execute("SELECT id FROM snapshots"))

    def on_mounts(self, mount_ids: Sequence[int]) -> list[tuple[Snapshot, Snapshot | None]]:
        """The lazy rows with one of these mounts, condemned ones left out, each with its parent."""
        marks = ",".join("?" * len(mount_ids))
        query = f"{_SELECT} WHERE s.mount IN ({marks}) AND s.condemned IS NULL"
        with self._reading() as db:
            rows = [_snapshot(row) for row in db.execute(query, tuple(mount_ids))]
            return [(row, _get(db, row.parent) if row.parent else None) for row in rows]

    def condemn(self, reasons: Mapping[int, str]) -> None:
        """Mark lazy rows (id -> why) as not to be used: their label snapshot.ref goes, so that nobody finds them."""
        with self._transaction() as db:
            for snapshot_id, reason in reasons.items():
                found = db.execute("SELECT labels FROM snapshots WHERE id = ?", (snapshot_id,)).fetchone()
                if found is None:  # removed meanwhile
                    continue
                labels = _labels_decoder.decode(found[0])
                labels.pop(TARGET, None)
                db.execute("UPDATE snapshots SET condemned = ? WHERE id = ?", (reason, snapshot_id))
                _set_labels(db, snapshot_id, labels)

    def lazy_rows(self) -> list[tuple[int, str]]:
        """(mount id, layer key) of every lazy row; a mount that two rows share is there twice."""
        with self._reading() as db:
            return db.execute("SELECT mount, layer FROM snapshots WHERE mount IS NOT NULL").fetchall()


def _get(db: sqlite3.Connection, key: str) -> Snapshot:
    row = db.execute(_SELECT + "WHERE s.key = ?", (key,)).fetchone()
    if row is None:
        raise NotFound(f"snapshot {key!r} does not exist")
    return _snapshot(row)


def _parent(db: sqlite3.Connection, key: str) -> Snapshot:
    try:
        row = _get(db, key)
    except NotFound:
        raise NotFound(f"parent snapshot {key!r} does not exist") from None
    if row.kind != Kind.COMMITTED:
        raise Invalid(f"parent snapshot {key!r} is not committed")
    return row


@dataclass(frozen=True)
class _NewRow:
    id: int
    key: str
    kind: Kind
    labels: Mapping[str, str]
    layer: LazyLayer | None = None


def _insert(db: sqlite3.Connection, parent: str, row: _NewRow) -> None:
    parent_id = _parent(db, parent).id if parent else None
    now = time.time_ns()
    db.execute(
        "INSERT INTO snapshots (id, key, parent, kind, labels, created, updated)"
        " VALUES (?, ?, ?, ?, x'', ?, ?)",
        (row.id, row.key, parent_id, row.kind, now, now),
    )
    _set_labels(db, row.id, row.labels)
    if row.layer is not None:
        db.execute(
            "UPDATE snapshots SET size = ?, inodes = ?, mount = ?, layer = ? WHERE id = ?",
            (row.layer.size, row.layer.inodes, row.layer.mount_id, row.layer.layer_key, row.id),
        )


def _set_labels(db: sqlite3.Connection, snapshot_id: int, labels: Mapping[str, str]) -> None:
    """A label without a value is no label (containerd's own store drops it as well)."""
    kept = {name: value for name, value in labels.items() if value}
    values = (msgspec.json.encode(kept), kept.get(TARGET), snapshot_id)
    db.execute("UPDATE snapshots SET labels = ?, ref = ? WHERE id = ?", values)


def _give(db: sqlite3.Connection, snapshot_id: int, paths: Sequence[bytes]) -> None:
    db.executemany("INSERT OR IGNORE INTO given VALUES (?, ?)", [(snapshot_id, path) for path in paths])


def _take_back(db: sqlite3.Connection, snapshot_id: int) -> frozenset[bytes]:
    """Forget what a snapshot was given; the paths that no other snapshot was given."""
    rows = db.execute("DELETE FROM given WHERE snapshot = ? RETURNING path", (snapshot_id,)).fetchall()
    query = "SELECT 1 FROM given WHERE path = ? LIMIT 1"
    return frozenset(path for (path,) in rows if db.execute(query, (path,)).fetchone() is None)


def _snapshot(
    row: tuple[int, str, str | None, int, bytes, int, int, int, int, int | None, str | None],
) -> Snapshot:
    snapshot_id, key, parent, kind, labels, created, updated, size, inodes, mount, layer = row
    return Snapshot(
        id=snapshot_id,
        key=key,
        parent=parent or "",
        kind=Kind(kind),
        labels=_labels_decoder.decode(labels),
        created=created,
        updated=updated,
        usage=Usage(size, inodes),
        mount_id=mount,
        layer_key=layer,
    )
