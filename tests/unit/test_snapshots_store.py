"""The rows: containerd's storage rules, and what they survive."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci_snapshotter.errors import AlreadyExists, Config, Invalid, NotFound, Precondition
from soci_snapshotter.policy.lazy import LazyLayer, Usage
from soci_snapshotter.policy.prepare import TARGET
from soci_snapshotter.store.snapshots import Kind, Link, SnapshotStore

REF = "sha256:" + "a" * 64


def path(tmp_path: Path) -> bytes:
    return os.fsencode(tmp_path / "metadata.sqlite")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SnapshotStore]:
    with SnapshotStore(path(tmp_path)) as opened:
        yield opened


def active(store: SnapshotStore, key: str, parent: str = "", kind: Kind = Kind.ACTIVE) -> int:
    return store.create(store.reserve(), key, parent=parent, kind=kind, labels={}).id


def committed(store: SnapshotStore, name: str, parent: str = "", **labels: str) -> int:
    snapshot_id = active(store, name + "-a", parent)
    store.commit(name + "-a", name, labels, Usage(4096, 1))
    return snapshot_id


def lazily(store: SnapshotStore, name: str, parent: str = "", ref: str = REF, mount: int = 7) -> None:
    layer = LazyLayer("layer", mount, 10, 2)
    store.commit_lazy(store.reserve(), name, parent=parent, labels={TARGET: ref}, layer=layer)


def test_create(store: SnapshotStore) -> None:
    """A new row reads back as written, created and updated at one moment."""
    store.create(store.reserve(), "k", parent="", kind=Kind.VIEW, labels={"a": "1", "empty": ""})
    row = store.get("k")
    assert (row.key, row.parent, row.kind, row.labels) == ("k", "", Kind.VIEW, {"a": "1"})
    assert row.created == row.updated
    assert row.usage == Usage(0, 0)


def test_create_errors(store: SnapshotStore) -> None:
    """A taken key, a missing parent and a parent that is not committed give containerd's error classes."""
    active(store, "a")
    with pytest.raises(AlreadyExists, match="'a'"):
        active(store, "a")
    with pytest.raises(NotFound, match="parent snapshot 'x'"):
        active(store, "b", "x")
    with pytest.raises(Invalid, match="not committed"):
        active(store, "b", "a")
    with pytest.raises(NotFound):
        store.get("b")


def test_commit(store: SnapshotStore) -> None:
    """Commit renames, keeps the id, replaces all labels and stores the usage."""
    snapshot_id = store.create(store.reserve(), "k", parent="", kind=Kind.ACTIVE, labels={"old": "1"}).id
    row, _ = store.commit("k", "n", {"new": "2"}, Usage(8192, 3))
    assert (row.id, row.kind, row.labels, row.usage) == (
        snapshot_id,
        Kind.COMMITTED,
        {"new": "2"},
        Usage(8192, 3),
    )
    with pytest.raises(NotFound):
        store.get("k")


def test_commit_errors(store: SnapshotStore) -> None:
    """A taken name, a missing key and a view cannot be committed, and nothing changes."""
    committed(store, "c")
    active(store, "a", "c")
    active(store, "v", "c", Kind.VIEW)
    with pytest.raises(AlreadyExists, match="'c'"):
        store.commit("a", "c", {}, Usage())
    with pytest.raises(NotFound):
        store.commit("x", "n", {}, Usage())
    with pytest.raises(Precondition, match="not active"):
        store.commit("v", "n", {}, Usage())
    assert store.get("a").kind == Kind.ACTIVE


def test_commit_rebases(store: SnapshotStore) -> None:
    """A snapshot without parent can be committed onto one; another parent than its own is refused."""
    committed(store, "c")
    committed(store, "other")
    active(store, "a")
    active(store, "b", "c")
    with pytest.raises(Precondition):
        store.commit("a", "n", {}, Usage(), parent="b")
    with pytest.raises(NotFound):
        store.commit("a", "n", {}, Usage(), parent="nothing")
    assert store.commit("a", "n", {}, Usage(), parent="c")[0].parent == "c"
    with pytest.raises(Invalid):
        store.commit("b", "m", {}, Usage(), parent="other")
    assert store.commit("b", "m", {}, Usage(), parent="c")[0].parent == "c"


def test_remove(store: SnapshotStore) -> None:
    """A parent cannot be removed, a childless row can, and its key is free again."""
    committed(store, "c")
    active(store, "a", "c")
    with pytest.raises(Precondition, match="cannot remove"):
        store.remove("c")
    store.remove("a")
    store.remove("c")
    with pytest.raises(NotFound):
        store.remove("c")
    active(store, "a")


def test_update(store: SnapshotStore) -> None:
    """Labels change as a whole or one by one; other fields cannot; only `updated` moves."""
    active(store, "a")
    before = store.get("a")
    after = store.update("a", {"x": "1", "y": "2"}, ())
    assert after.labels == {"x": "1", "y": "2"}
    assert after.created == before.created < after.updated
    assert store.update("a", {"x": "3", "z": "4"}, ("labels.x", "labels.y")).labels == {"x": "3"}
    assert store.update("a", {"w": "5"}, ("labels",)).labels == {"w": "5"}
    with pytest.raises(Invalid, match="'parent'"):
        store.update("a", {}, ("labels", "parent"))
    assert store.get("a").labels == {"w": "5"}
    with pytest.raises(NotFound):
        store.update("b", {}, ())


def test_chain(store: SnapshotStore) -> None:
    """A chain lists the snapshot itself first and its bottom last, lazy ones with their mounts."""
    assert store.chain("") == (None, ())
    bottom = committed(store, "1")
    lazily(store, "2", "1", mount=5)
    top = committed(store, "3", "2")
    row, links = store.chain("3")
    assert row == store.get("3")
    assert links == (Link(top, None), Link(store.get("2").id, 5), Link(bottom, None))
    active(store, "a")
    with pytest.raises(Invalid):
        store.chain("a")
    with pytest.raises(NotFound):
        store.chain("x")


def test_lazy_rows_are_unique_by_parent_and_target(store: SnapshotStore) -> None:
    """One lazy row for a target on a parent; another parent gets another; the absent parent counts as one."""
    lazily(store, "1")
    with pytest.raises(AlreadyExists, match="target"):
        lazily(store, "2", mount=8)
    lazily(store, "3", "1")
    lazily(store, "4", "3")
    with pytest.raises(AlreadyExists):
        lazily(store, "5", "3")
    found = store.find_target("3", REF)
    assert found is not None
    assert found.key == "4"
    assert store.lazy_rows() == [(7, "layer")] * 3


def test_ordinary_rows_share_a_target(store: SnapshotStore) -> None:
    """Two namespaces may unpack one chain at once; the first is the one found, and only once committed."""
    store.create(store.reserve(), "a", parent="", kind=Kind.ACTIVE, labels={TARGET: REF})
    assert store.find_target("", REF) is None
    committed(store, "1", **{TARGET: REF})
    store.commit("a", "2", {TARGET: REF}, Usage())
    found = store.find_target("", REF)
    assert found is not None
    assert found.key == "2"
    assert store.find_target("1", REF) is None


def test_update_moves_the_target(store: SnapshotStore) -> None:
    """The column behind find_target and walk follows the label, and cannot break uniqueness."""
    committed(store, "1")
    store.update("1", {TARGET: REF}, ())
    assert store.find_target("", REF) is not None
    assert [row.key for row in store.walk(target=REF)] == ["1"]
    store.update("1", {}, (f"labels.{TARGET}",))
    assert store.find_target("", REF) is None
    lazily(store, "2")
    lazily(store, "3", ref="sha256:" + "b" * 64)
    with pytest.raises(AlreadyExists):
        store.update("3", {TARGET: REF}, ())


def test_walk_pages(store: SnapshotStore) -> None:
    """A walk over many pages sees each row once, though rows are removed while it goes on."""
    keys = [f"k{n}" for n in range(600)]
    for key in keys:
        active(store, key)
    seen = []
    for row in store.walk():
        seen.append(row.key)
        store.remove(row.key)
    assert seen == keys


def test_given_paths(store: SnapshotStore) -> None:
    """A lowerdir is returned by the last snapshot that was given it, on removal or commit."""
    first = store.create(
        store.reserve(), "1", parent="", kind=Kind.ACTIVE, labels={}, given=[b"m/1", b"m/2"]
    ).id
    active(store, "2")
    assert store.give(store.get("2").id, [b"m/2", b"m/3"]) is True
    assert store.give(store.get("2").id, [b"m/3"]) is False
    assert store.give(first, []) is False
    assert store.handed_out() == {b"m/1", b"m/2", b"m/3"}
    assert store.commit("1", "c", {}, Usage())[1] == {b"m/1"}
    assert store.remove("2").returned == {b"m/2", b"m/3"}
    assert store.handed_out() == frozenset()
    with pytest.raises(NotFound):
        store.give(999, [b"m/1"])


def test_ids_are_never_used_twice(tmp_path: Path) -> None:
    """Ids grow over removals and restarts."""
    used = []
    for _ in range(3):
        with SnapshotStore(path(tmp_path)) as store:
            used += [active(store, "k") for _ in range(1)]
            store.remove("k")
            used += [store.reserve() for _ in range(100)]
    assert used == sorted(set(used))


def test_other_format_is_refused(tmp_path: Path) -> None:
    """A file of a later version is not touched, and the error says what to do."""
    with sqlite3.connect(path(tmp_path)) as db:
        db.execute("PRAGMA user_version = 3")
    db.close()
    with pytest.raises(Config, match="format 3"):
        SnapshotStore(path(tmp_path))


def test_failed_transaction_leaves_the_store_usable(store: SnapshotStore) -> None:
    """After the disk was full the failed call has changed nothing, and the next one works."""
    active(store, "before")
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match="No space left"):
        store.create(store.reserve(), "big", parent="", kind=Kind.ACTIVE, labels={"l": "x" * 100_000})
    store._db.execute("PRAGMA max_page_count = 1000000")
    active(store, "after")
    assert [row.key for row in store.walk()] == ["before", "after"]


def test_threads(store: SnapshotStore) -> None:
    """Of many threads that create, commit and remove the same keys, exactly one wins each step."""
    outcomes: list[type] = []

    def work(number: int) -> None:
        for n in range(20):
            try:
                active(store, f"k{n}")
                outcomes.append(int)
            except AlreadyExists:
                outcomes.append(AlreadyExists)
            active(store, f"own{number}-{n}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(int) == 20
    assert len(list(store.walk())) == 20 + 8 * 20


CRASH = """
import os, sys
from soci_snapshotter.policy.lazy import Usage
from soci_snapshotter.store.snapshots import Kind, SnapshotStore
store = SnapshotStore(os.fsencode(sys.argv[1]))
parent = ""
for n in range(100000):
    store.create(store.reserve(), f"a{n}", parent=parent, kind=Kind.ACTIVE, labels={"n": str(n)})
    store.commit(f"a{n}", f"c{n}", {"n": str(n)}, Usage(n, n))
    parent = f"c{n}"
    print(n, flush=True)
"""


def test_kill(tmp_path: Path) -> None:
    """A process killed at any moment loses nothing it reported, and leaves whole rows only."""
    for _ in range(3):
        file = tmp_path / "killed.sqlite"
        command = [sys.executable, "-c", CRASH, str(file)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(20):
                last = int(process.stdout.readline())
            process.kill()
        with SnapshotStore(os.fsencode(file)) as store:
            rows = {row.key: row for row in store.walk()}
            for n in range(last + 1):
                row = rows[f"c{n}"]
                assert (row.parent, row.usage) == (f"c{n - 1}" if n else "", Usage(n, n))
            _, chain = store.chain(f"c{last}")
            assert len(chain) == last + 1
        for leftover in tmp_path.glob("killed.sqlite*"):
            leftover.unlink()
