"""The snapshots of a root that the Go daemon used: read from its metadata.db, once, into our own rows.

containerd's snapshot store (core/snapshots/storage) lays the file out so, and the Go daemon's layer directories are ours:

    v1 / snapshots / <key>      bucket: id, kind, parent (a key), createdat, updatedat, inodes, size, labels (bucket)
    <root>/snapshots/<id>/{fs,work}

A row keeps id and key, and so its directory and containerd's reference. A lazy one has no bytes of its own: it is
entered as pending (store.pending) until its layer is mounted again. The file itself is never written.
"""

from __future__ import annotations

import os
import sqlite3
import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass

import msgspec

from ..errors import AlreadyExists, Integrity
from ..formats import bbolt
from ..formats.bbolt import Bucket, Database
from ..policy.lazy import Usage
from ..policy.prepare import REMOTE, TARGET
from . import pending
from .snapshots import Kind, SnapshotStore

ID_GAP = 1_000_000
"""Our ids begin this far above the Go daemon's: started again, it goes on where it was, and must not find a directory
of ours in its way."""

_MAX_ID = 1 << 62  # sqlite's integers, with room above
_TIMES = struct.Struct(">BqiH")  # Go's time.MarshalBinary: version, seconds since year 1, nanoseconds, zone
_TIME_SIZES = {1: _TIMES.size, 2: _TIMES.size + 1}  # by version
_YEAR_1 = 62_135_596_800  # seconds from year 1 to 1970
_MAX_SECONDS = (1 << 63) // 1_000_000_000  # nanoseconds since 1970 fit sqlite's integers


@dataclass(frozen=True)
class GoSnapshot:
    """One row of the Go daemon. `parent` is a key or ""; times are nanoseconds since 1970."""

    id: int
    key: str
    parent: str
    kind: Kind
    labels: dict[str, str]
    created: int
    updated: int
    usage: Usage

    @property
    def lazy(self) -> bool:
        """Whether its layer was mounted lazily (the Go daemon goes by the label, too)."""
        return self.kind == Kind.COMMITTED and REMOTE in self.labels


@dataclass(frozen=True)
class GoSnapshots:
    """All rows, parents first; `last_id` is the highest id ever given, `transaction` what tells a later state."""

    rows: tuple[GoSnapshot, ...]
    last_id: int
    transaction: int


def decode(data: bytes) -> GoSnapshots:
    """The rows in the bytes of a metadata.db. Raises Integrity, naming the page or the row."""
    return rows_of(bbolt.read(data))


def rows_of(database: Database) -> GoSnapshots:
    """The rows in a database. Raises Integrity, naming the row."""
    version = database.root.bucket(b"v1")
    snapshots = version.bucket(b"snapshots") if version is not None else None
    if snapshots is None:
        return GoSnapshots((), 0, database.transaction)
    rows = {}
    for key, entry in snapshots.entries.items():
        if isinstance(entry, Bucket):
            row = _row(key, entry)
            rows[row.key] = row
    ids = {row.id for row in rows.values()}
    if len(ids) != len(rows):
        raise Integrity("two snapshots have the same id")
    last = max(ids | {snapshots.sequence})
    if last >= _MAX_ID:
        raise Integrity(f"the highest id is {last}, which cannot be")
    return GoSnapshots(tuple(_parents_first(rows)), last, database.transaction)


def imported(path: bytes) -> int | None:
    """Which state (GoSnapshots.transaction) was imported into the rows at `path`, None when none was. Makes no file."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return None
    with SnapshotStore(path), closing(sqlite3.connect(path)) as db:
        return _imported(db)


def transaction(head: bytes) -> int:
    """The state that a metadata.db is in, from its first HEAD_BYTES. Raises Integrity."""
    return bbolt.transaction(head)


HEAD_BYTES = bbolt.HEAD_BYTES


def import_into(path: bytes, found: GoSnapshots) -> bool:
    """Enter the rows in the file of our own (metadata.sqlite), all or none; False when that was done before.

    Raises AlreadyExists when there are rows already.
    """
    with SnapshotStore(path), closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        with db:  # commits, or rolls back
            if _imported(db) is not None:
                return False
            if found.rows and db.execute("SELECT 1 FROM snapshots LIMIT 1").fetchone():
                raise AlreadyExists("there are snapshots already")
            ids = {row.key: row.id for row in found.rows}
            try:
                db.executemany(_INSERT, [_values(row, ids) for row in found.rows])
            except sqlite3.IntegrityError as error:
                raise Integrity(f"its rows do not fit each other ({error})") from None
            db.execute("UPDATE counter SET next = max(next, ?)", (found.last_id + ID_GAP,))
            db.execute("CREATE TABLE imported (state INTEGER NOT NULL) STRICT")
            db.execute("INSERT INTO imported VALUES (?)", (found.transaction,))
    return True


_INSERT = """
INSERT INTO snapshots (id, key, parent, kind, ref, labels, created, updated, size, inodes, mount, layer)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""


def _values(row: GoSnapshot, ids: Mapping[str, int]) -> tuple[int | str | bytes | None, ...]:
    return (
        *(row.id, row.key, ids.get(row.parent), row.kind, row.labels.get(TARGET)),
        *(msgspec.json.encode(row.labels), row.created, row.updated, row.usage.size, row.usage.inodes),
        *((pending.mount_of(row.id), "") if row.lazy else (None, None)),
    )


def _imported(db: sqlite3.Connection) -> int | None:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'imported'").fetchone() is None:
        return None
    (state,) = db.execute("SELECT state FROM imported").fetchone()
    return int(state)


def _row(key: bytes, bucket: Bucket) -> GoSnapshot:
    name = _text(key, "a key")
    kind = bucket.value(b"kind") or b""
    if len(kind) != 1 or kind[0] not in set(Kind):
        raise Integrity(f"snapshot {name!r}: unknown kind {kind.hex()!r}")
    number = _uvarint(bucket.value(b"id") or b"", name)
    if not 0 < number < _MAX_ID:
        raise Integrity(f"snapshot {name!r}: cannot have the id {number}")
    labels = bucket.bucket(b"labels")
    return GoSnapshot(
        id=number,
        key=name,
        parent=_text(bucket.value(b"parent") or b"", f"the parent of snapshot {name!r}"),
        kind=Kind(kind[0]),
        labels=_labels(labels, name) if labels is not None else {},
        created=_time(bucket.value(b"createdat"), name),
        updated=_time(bucket.value(b"updatedat"), name),
        usage=Usage(_size(bucket, b"size", name), _size(bucket, b"inodes", name)),
    )


def _labels(bucket: Bucket, name: str) -> dict[str, str]:
    what = f"a label of snapshot {name!r}"
    pairs = ((key, value) for key, value in bucket.entries.items() if isinstance(value, bytes))
    return {_text(key, what): _text(value, what) for key, value in pairs if value}


def _parents_first(rows: Mapping[str, GoSnapshot]) -> list[GoSnapshot]:
    """Raises Integrity for a parent that is not there, is not committed, or is its own ancestor."""
    ordered: dict[str, GoSnapshot] = {}
    for row in rows.values():
        chain: dict[str, GoSnapshot] = {}
        while row.key not in ordered:
            chain[row.key] = row
            if not row.parent:
                break
            parent = rows.get(row.parent)
            if parent is None or parent.kind != Kind.COMMITTED or parent.key in chain:
                raise Integrity(f"snapshot {row.key!r}: {row.parent!r} cannot be its parent")
            row = parent
        ordered.update(reversed(chain.items()))
    return list(ordered.values())


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Integrity(f"{what} is not UTF-8: {data[:80]!r}") from None


def _size(bucket: Bucket, key: bytes, name: str) -> int:
    """A signed varint; 0 when it is not there, and for what is no size."""
    data = bucket.value(key)
    if data is None:
        return 0
    number = _uvarint(data, name)
    return 0 if number & 1 else number >> 1  # odd numbers stand for negative ones


def _uvarint(data: bytes, name: str) -> int:
    """Go's binary.Uvarint."""
    number = 0
    for position, byte in enumerate(data[:10]):
        number |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            if number >> 64:
                break
            return number
    raise Integrity(f"snapshot {name!r}: a number is malformed: {data[:16].hex()!r}")


def _time(data: bytes | None, name: str) -> int:
    """Nanoseconds since 1970; 0 when it is not there, and for a time that is out of range."""
    if data is None:
        return 0
    if not data or _TIME_SIZES.get(data[0]) != len(data):
        raise Integrity(f"snapshot {name!r}: a time is malformed: {data[:16].hex()!r}")
    _, seconds, nanoseconds, _ = _TIMES.unpack_from(data)
    since_1970 = seconds - _YEAR_1
    return since_1970 * 1_000_000_000 + nanoseconds if abs(since_1970) < _MAX_SECONDS else 0
