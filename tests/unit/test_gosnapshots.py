"""Taking over a root that the Go daemon used: its rows, its locks and mounts, and lazy layers that come back."""

from __future__ import annotations

import errno
import fcntl
import gzip
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soci_snapshotter.errors import AlreadyExists, Config, Integrity, NotFound, Remote
from soci_snapshotter.formats.bbolt import Bucket, Database
from soci_snapshotter.linux import mounts
from soci_snapshotter.linux.mounts import MountInfo
from soci_snapshotter.policy import prepare as policy
from soci_snapshotter.policy.lazy import (
    Declined,
    Failed,
    LazyLayer,
    LazyLower,
    LazyRequest,
    LocalLower,
    Usage,
)
from soci_snapshotter.snapshotter import migrate, returning
from soci_snapshotter.snapshotter.migrate import go_root
from soci_snapshotter.snapshotter.snapshotter import Snapshotter
from soci_snapshotter.store import gosnapshots, pending
from soci_snapshotter.store.pending import PendingRows
from soci_snapshotter.store.snapshots import Kind, SnapshotStore

_VECTORS = Path(__file__).parents[1] / "vectors/bbolt"
_DB = gzip.decompress((_VECTORS / "snapshots.db.gz").read_bytes())
_LISTED = json.loads(gzip.decompress((_VECTORS / "snapshots.rows.json.gz").read_bytes()))
D = [f"sha256:{number:064x}" for number in range(12)]
LOCAL = f"default/7/{D[3]}"


def _root(tmp_path: Path, data: bytes = _DB) -> Path:
    """A root as the Go daemon left it, with the sample's rows and their directories."""
    root = tmp_path / "root"
    for row in _LISTED:
        (root / "snapshotter/snapshots" / row["id"] / "fs").mkdir(parents=True)
        (root / "snapshotter/snapshots" / row["id"] / "work").mkdir()
    (root / "snapshotter/metadata.db").write_bytes(data)
    return root


def _rows_path(root: Path) -> bytes:
    return os.fsencode(root / "snapshotter/metadata.sqlite")


# -- reading ---------------------------------------------------------------------------------------------------------


def test_rows_are_what_containerd_reads() -> None:
    """Every field of every row is what containerd's own store reads from the file; parents come first."""
    found = gosnapshots.decode(_DB)
    listed = {
        row["key"]: (
            *(int(row["id"]), row["parent"], row["kind"], row["labels"] or {}),
            *(row["size"], row["inodes"], row["created"], row["updated"]),
        )
        for row in _LISTED
    }
    assert listed == {
        row.key: (
            *(row.id, row.parent, row.kind.name.lower(), row.labels),
            *(row.usage.size, row.usage.inodes, row.created, row.updated),
        )
        for row in found.rows
    }
    assert found.last_id == 200
    assert [row.key for row in found.rows if row.lazy] == [D[1], D[2]]
    seen = {""}
    for row in found.rows:
        assert row.parent in seen
        seen.add(row.key)


def test_a_file_without_rows() -> None:
    """A database that the Go daemon never wrote a snapshot to has none."""
    empty = gzip.decompress((_VECTORS / "empty.db.gz").read_bytes())
    assert gosnapshots.decode(empty).rows == ()


def _row(number: int, **changed: bytes | Bucket | None) -> Bucket:
    fields: dict[str, bytes | Bucket | None] = {"id": bytes([number]), "kind": b"\x03", **changed}
    return Bucket(0, {key.encode(): value for key, value in fields.items() if value is not None})


def _rows_of(rows: dict[bytes, bytes | Bucket], sequence: int = 0) -> gosnapshots.GoSnapshots:
    version = Bucket(0, {b"snapshots": Bucket(sequence, rows)})
    return gosnapshots.rows_of(Database(1, Bucket(0, {b"v1": version})))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({b"a": _row(1, kind=None)}, "'a': unknown kind ''"),
        ({b"a": _row(1, kind=b"\x09")}, "'a': unknown kind '09'"),
        ({b"a": _row(1, kind=b"\x03\x03")}, "'a': unknown kind"),
        ({b"a": _row(0)}, "'a': cannot have the id 0"),
        ({b"a": _row(1, id=b"\xff" * 9 + b"\x7f")}, "'a': a number is malformed"),
        ({b"a": _row(1, id=b"\xff" * 9 + b"\x01")}, "'a': cannot have the id"),
        ({b"a": _row(1, id=b"\x80")}, "'a': a number is malformed"),
        ({b"a": _row(1, id=None)}, "'a': a number is malformed"),
        ({b"a": _row(1, parent=b"b")}, "'a': 'b' cannot be its parent"),
        ({b"a": _row(1, parent=b"a")}, "'a': 'a' cannot be its parent"),
        ({b"a": _row(1, parent=b"b"), b"b": _row(2, parent=b"a")}, "cannot be its parent"),
        ({b"a": _row(1, parent=b"b"), b"b": _row(2, kind=b"\x02")}, "'b' cannot be its parent"),
        ({b"a": _row(1), b"b": _row(1)}, "the same id"),
        ({b"\xff": _row(1)}, "is not UTF-8"),
        ({b"a": _row(1, labels=Bucket(0, {b"l": b"\xff"}))}, "a label of snapshot 'a' is not UTF-8"),
        ({b"a": _row(1, createdat=b"\x01")}, "'a': a time is malformed"),
        ({b"a": _row(1, updatedat=bytes(15))}, "'a': a time is malformed"),
    ],
)
def test_rows_that_cannot_be(rows: dict[bytes, bytes | Bucket], message: str) -> None:
    """A row whose fields cannot be is an error that names the row."""
    with pytest.raises(Integrity, match=message):
        _rows_of(rows)


def test_odd_rows_that_can_be() -> None:
    """No times and no sizes are 0, empty labels are none, and what is no bucket is no row."""
    odd = _row(1, labels=Bucket(0, {b"l": b"", b"m": Bucket(0)}), size=b"\x01")
    (row,) = _rows_of({b"a": odd, b"b": b"x"}, sequence=7).rows
    assert (row.created, row.updated, row.usage, row.labels) == (0, 0, Usage(0, 0), {})
    with pytest.raises(Integrity, match="the highest id"):
        _rows_of({b"a": odd}, sequence=1 << 63)


_FIELDS = st.sampled_from(
    [b"id", b"kind", b"parent", b"createdat", b"updatedat", b"size", b"inodes", b"labels"]
)
_VALUES = st.binary(max_size=17) | st.builds(
    Bucket, st.just(0), st.dictionaries(st.binary(max_size=4), st.binary(max_size=4), max_size=2)
)


@given(
    st.dictionaries(st.sampled_from([b"a", b"b", b"c"]), st.dictionaries(_FIELDS, _VALUES)),
    st.integers(0, 2**64 - 1),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_arbitrary_rows(rows: dict[bytes, dict[bytes, bytes | Bucket]], sequence: int) -> None:
    """Rows of any content are read or refused, and every chain of what is read ends."""
    try:
        found = _rows_of({key: Bucket(0, fields) for key, fields in rows.items()}, sequence)
    except Integrity:
        return
    places = {row.key: place for place, row in enumerate(found.rows)}
    assert all(not row.parent or places[row.parent] < places[row.key] for row in found.rows)


# -- importing -------------------------------------------------------------------------------------------------------


def test_rows_are_imported_once(tmp_path: Path) -> None:
    """Keys, ids, parents, labels, times and usage are kept; new ids begin far above; another import changes nothing."""
    path = os.fsencode(tmp_path / "metadata.sqlite")
    found = gosnapshots.decode(_DB)
    assert gosnapshots.imported(path) is None
    assert gosnapshots.import_into(path, found)
    assert gosnapshots.imported(path) == found.transaction
    with SnapshotStore(path) as store:
        assert store.reserve() == 200 + gosnapshots.ID_GAP
        rows = {row.key: row for row in store.walk()}
        assert rows.keys() == {row.key for row in found.rows}
        for before in found.rows:
            row = rows[before.key]
            assert (row.id, row.parent, row.kind, row.labels) == (
                before.id,
                before.parent,
                before.kind,
                before.labels,
            )
            assert (row.created, row.updated, row.usage) == (before.created, before.updated, before.usage)
            assert row.mount_id == (-before.id if before.lazy else None)
        target = store.find_target(D[1], D[2])
        assert target is not None
        store.remove("default/9/container")
    assert not gosnapshots.import_into(path, found)
    with SnapshotStore(path) as store, pytest.raises(NotFound):
        store.get("default/9/container")


def test_no_import_above_rows_of_our_own(tmp_path: Path) -> None:
    """Where our daemon has snapshots already nothing is imported: neither set of rows may replace the other."""
    path = os.fsencode(tmp_path / "metadata.sqlite")
    with SnapshotStore(path) as store:
        store.create(store.reserve(), "ours", parent="", kind=Kind.ACTIVE, labels={})
    with pytest.raises(AlreadyExists):
        gosnapshots.import_into(path, gosnapshots.decode(_DB))
    with SnapshotStore(path) as store:
        assert [row.key for row in store.walk()] == ["ours"]


def test_an_import_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Rows that do not fit each other (two lazy ones of one target) are refused as a whole."""
    labels = Bucket(0, {policy.TARGET.encode(): D[1].encode(), policy.REMOTE.encode(): b"x"})
    found = _rows_of({b"a": _row(1, labels=labels), b"b": _row(2, labels=labels), b"c": _row(3)})
    path = os.fsencode(tmp_path / "metadata.sqlite")
    with pytest.raises(Integrity, match="do not fit"):
        gosnapshots.import_into(path, found)
    assert gosnapshots.imported(path) is None
    with SnapshotStore(path) as store:
        assert list(store.walk()) == []


# -- the root --------------------------------------------------------------------------------------------------------


def test_a_root_of_nobody(tmp_path: Path) -> None:
    """Without a database of the Go daemon's nothing happens, and nothing is made."""
    with go_root(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_the_go_daemon_still_runs(tmp_path: Path) -> None:
    """Its lock on its database is respected; the error says what to stop, and nothing was imported."""
    root = _root(tmp_path)
    with open(root / "snapshotter/metadata.db", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(Config, match=r"is in use: .* stop it \(`systemctl stop soci-snapshotter`"),
            go_root(root),
        ):
            pass
    assert not (root / "snapshotter/metadata.sqlite").exists()


def test_the_go_daemon_cannot_start_while_we_run(tmp_path: Path) -> None:
    """Its database is locked against it, never written, and free again at the end."""
    root = _root(tmp_path)
    with open(root / "snapshotter/metadata.db", "rb") as theirs:
        with go_root(root), pytest.raises(BlockingIOError):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (root / "snapshotter/metadata.db").read_bytes() == _DB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not a database at all", "not a bbolt database"),
        (_DB[:8192], "no such page"),
        (b"", "not a bbolt database"),
    ],
)
def test_a_database_that_cannot_be_read(tmp_path: Path, data: bytes, message: str) -> None:
    """Damage is one line that names the file and how to drain the node; nothing is imported or removed."""
    root = _root(tmp_path, data)
    before = sorted(root.rglob("*"))
    with pytest.raises(Config, match=message) as caught, go_root(root):
        pass
    assert "\n" not in str(caught.value)
    for part in (
        str(root / "snapshotter/metadata.db"),
        "crictl rmi --prune",
        "ctr images rm",
        f"remove {root}",
    ):
        assert part in str(caught.value)
    assert [path for path in sorted(root.rglob("*")) if "sqlite" not in path.name] == before


def test_a_database_too_large(tmp_path: Path) -> None:
    """A file beyond the limit is refused before it is read."""
    root = _root(tmp_path)
    os.truncate(root / "snapshotter/metadata.db", (256 << 20) + 1)
    with pytest.raises(Config, match="bytes, more than"), go_root(root):
        pass


def test_changed_by_the_go_daemon_since(tmp_path: Path) -> None:
    """The way back and here again: what the Go daemon changed after the import is not passed over in silence."""
    root = _root(tmp_path)
    with go_root(root):
        pass
    with go_root(root):  # nothing has changed
        pass
    other = gzip.decompress((_VECTORS / "inline.db.gz").read_bytes())
    (root / "snapshotter/metadata.db").write_bytes(other)
    with (
        pytest.raises(Config, match=r"was changed by the Go daemon.*remove .*metadata\.sqlite\*"),
        go_root(root),
    ):
        pass


def test_imported_before_and_damaged_since(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What became of the Go daemon's file after its import costs nobody the start: our rows are what counts."""
    root = _root(tmp_path)
    with go_root(root):
        pass
    before = (root / "snapshotter/metadata.sqlite").stat().st_size
    for data in (b"", b"damaged" * 5000):
        (root / "snapshotter/metadata.db").write_bytes(data)
        caplog.clear()
        with go_root(root):
            assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (root / "snapshotter/metadata.sqlite").stat().st_size >= before


@pytest.mark.parametrize("left", ["layers/ab/cd/layer.json", "snapshotter/snapshots/9000000/fs/x"])
def test_rows_of_ours_that_are_lost(tmp_path: Path, left: str) -> None:
    """Without our rows the Go daemon's are not imported again over what only ours knew: refused, and all stays."""
    root = _root(tmp_path)
    (root / left).parent.mkdir(parents=True, exist_ok=True)
    (root / left).write_text("x")
    for empty in (False, True):
        if empty:
            (root / "snapshotter/metadata.sqlite").touch()
        with pytest.raises(Config, match=r"metadata\.sqlite is missing, but there are"), go_root(root):
            pass
        assert (root / left).exists()
        assert gosnapshots.imported(_rows_path(root)) is None


def _mounted(target: Path, fstype: bytes) -> MountInfo:
    return MountInfo(1, 2, "0:1", b"/", bytes(target), b"", fstype, b"x", b"")


def test_dead_mounts_are_taken_off_and_live_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE mounts that answer ENOTCONN go before the import; one that answers, hangs or is no FUSE stays and is named."""
    root = _root(tmp_path)
    snapshots = root / "snapshotter/snapshots"
    table = [_mounted(snapshots / "3/fs", b"fuse.rawBridge"), _mounted(tmp_path / "elsewhere", b"fuse.other")]
    answers: dict[str, Callable[[], None]] = {}
    taken: list[bytes] = []
    stat = os.stat

    def imitated(path: bytes | str | Path, *arguments: object, **more: object) -> os.stat_result:
        name = os.fsdecode(path)
        if name in answers:
            answers[name]()
        return stat(path, *arguments, **more)  # type: ignore[arg-type]

    def dead() -> None:
        raise OSError(errno.ENOTCONN, "dead")

    monkeypatch.setattr(mounts, "mountinfo", lambda: table)
    monkeypatch.setattr(mounts, "unmount", lambda target, flags: taken.append(target))
    monkeypatch.setattr(os, "stat", imitated)
    monkeypatch.setattr(migrate, "_ANSWER_SECONDS", 0.2)
    hanging = threading.Event()
    for name, answer in (("alive", lambda: None), ("hanging", lambda: (hanging.wait(20), None)[1])):
        answers[str(snapshots / "3/fs")] = answer
        with pytest.raises(Config, match=rf"1 mounts below .* the first at {snapshots}/3/fs"), go_root(root):
            raise AssertionError(name)
    hanging.set()
    answers[str(snapshots / "3/fs")] = dead
    table.append(_mounted(snapshots / "4_9/fs", b"ext4"))
    with pytest.raises(Config, match=r"4_9/fs"), go_root(root):
        pass
    assert not taken
    assert gosnapshots.imported(_rows_path(root)) is None
    table[-1] = _mounted(snapshots / "4/fs", b"fuse.rawBridge")
    answers[str(snapshots / "4/fs")] = dead
    with go_root(root):
        assert taken == [bytes(snapshots / "4/fs"), bytes(snapshots / "3/fs")]
    assert gosnapshots.imported(_rows_path(root)) is not None


# -- layers that return ----------------------------------------------------------------------------------------------


@dataclass
class Layers:
    """Who makes lazy layers, imitated: notes what it is asked, fails or waits as the test says."""

    requests: list[LazyRequest] = field(default_factory=list)
    failing: Exception | None = None
    answer: Declined | Failed | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    references: dict[int, int] = field(default_factory=dict)
    commits: list[int] = field(default_factory=list)

    def prepare(self, request: LazyRequest, *, must: bool = False) -> LazyLayer | Declined | Failed:
        assert must == (request.target in D[1:3])
        self.gate.wait(20)
        if self.failing is not None:
            raise self.failing
        if self.answer is not None:
            return self.answer
        self.requests.append(request)
        number = len(self.requests)
        self.references[number] = self.references.get(number, 0) + 1
        return LazyLayer(f"layer-{number}", number, 10, 1, {"containerd.io/snapshot/diff-id": D[7]})

    def serves(self, request: LazyRequest, mount_id: int, layer_key: str) -> str | None:
        assert mount_id > 0
        return None if layer_key == f"layer-{mount_id}" else "another layer"

    def committed(self, mount_id: int) -> None:
        self.commits.append(mount_id)

    def lowerdir(self, mount_id: int) -> bytes:
        assert mount_id in self.references
        return b"/m/%d" % mount_id

    def usage(self, mount_id: int) -> Usage:
        assert mount_id > 0
        return Usage(mount_id, 1)

    def release(self, mount_ids: tuple[int, ...]) -> None:
        for number in mount_ids:
            self.references[number] -= 1

    def returned(self, paths: frozenset[bytes]) -> None:
        pass


@contextmanager
def _migrated(tmp_path: Path, layers: Layers) -> Iterator[Snapshotter]:
    root = _root(tmp_path)
    with go_root(root), Snapshotter(os.fsencode(root / "snapshotter"), lazy=layers) as snapshotter:
        yield snapshotter


def _eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_layers_return_in_the_background(tmp_path: Path) -> None:
    """Bottom first, with the labels that the Go daemon kept; rows then stand for the new mounts, also after a restart."""
    layers = Layers()
    layers.gate.set()
    with _migrated(tmp_path, layers) as snapshotter:
        assert sorted(snapshotter.lazy_rows()) == [(-4, ""), (-3, "")]
        with snapshotter.returning():
            _eventually(lambda: len(snapshotter.lazy_rows()) == 2 and min(snapshotter.lazy_rows())[0] > 0)
        bottom, top = layers.requests
        assert (bottom.target, bottom.layer_digest, bottom.parent_chain_id) == (D[1], D[0][:-2] + "65", "")
        assert (top.target, top.parent_chain_id, top.parent_chain) == (D[2], D[1], (LazyLower(1),))
        assert (top.namespace, top.image_ref, top.index_digest) == ("default", "registry.example/x:1", D[9])
        assert layers.commits == [1, 2]
        assert snapshotter.stat(D[1]).labels["containerd.io/snapshot/diff-id"] == D[7]
        assert snapshotter.stat(D[1]).labels[policy.TARGET] == D[1]
    with Snapshotter(os.fsencode(tmp_path / "root/snapshotter"), lazy=layers) as snapshotter:
        assert sorted(snapshotter.lazy_rows()) == [(1, "layer-1"), (2, "layer-2")]


def test_a_disk_that_does_not_take_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While rows cannot be settled their layers are given back, the background goes on, and then all return."""
    layers = Layers()
    layers.gate.set()
    settle, refused = PendingRows.settle, threading.Event()

    def full(rows: PendingRows, snapshot_id: int, layer: LazyLayer) -> bool:
        refused.set()
        raise OSError(errno.EIO, "no room")

    monkeypatch.setattr(returning, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(PendingRows, "settle", full)
    with _migrated(tmp_path, layers) as snapshotter, snapshotter.returning():
        assert refused.wait(20)
        _eventually(lambda: len(layers.requests) > 2)
        monkeypatch.setattr(PendingRows, "settle", settle)
        _eventually(lambda: len(snapshotter.lazy_rows()) == 2 and min(snapshotter.lazy_rows())[0] > 0)
        held = {number for number, count in layers.references.items() if count}
        assert held == {number for number, _ in snapshotter.lazy_rows()}
        assert set(layers.references.values()) <= {0, 1}


def test_mounts_bring_layers_back_at_once(tmp_path: Path) -> None:
    """A container of a migrated root gets its own directories above the layers that came back, without the background."""
    layers = Layers()
    layers.gate.set()
    with _migrated(tmp_path, layers) as snapshotter:
        (mount,) = snapshotter.mounts("default/9/container")
        snapshots = tmp_path / "root/snapshotter/snapshots"
        local = snapshotter.stat(LOCAL)
        assert mount.options[2] == f"lowerdir={snapshots}/{local.id}/fs:/m/2:/m/1"
        assert snapshotter.usage(D[2]) == Usage(2, 1)
        assert snapshotter.usage(LOCAL) == Usage(1 << 33, 4711)


def test_the_registry_is_away(tmp_path: Path) -> None:
    """What needs no lazy layer works; the rest is UNAVAILABLE, in one line that names layer and image, until then."""
    layers = Layers(failing=Remote("registry.example: connection refused"))
    layers.gate.set()
    with _migrated(tmp_path, layers) as snapshotter, snapshotter.returning():
        assert {row.key for row in snapshotter.walk()} == {row["key"] for row in _LISTED}
        assert snapshotter.usage(D[2]) == Usage()
        for _ in range(2):
            with pytest.raises(Remote) as caught:
                snapshotter.mounts("default/9/container")
            assert str(caught.value) == (
                f"layer {D[0][:-2]}65 of registry.example/x:1, lazy under the Go daemon, cannot return now: "
                "registry.example: connection refused"
            )
        layers.failing = None
        assert len(snapshotter.mounts("default/9/container")) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            Declined("no layer"),
            r"cannot return now \(no layer\); if that stays, remove the image and pull it again",
        ),
        (Failed(Remote("refused")), "cannot return now: refused"),
    ],
)
def test_a_layer_that_is_not_made(tmp_path: Path, answer: Declined | Failed, message: str) -> None:
    """A layer that can be had neither lazily nor whole is UNAVAILABLE: an empty directory never stands for it."""
    layers = Layers(answer=answer)
    layers.gate.set()
    with _migrated(tmp_path, layers) as snapshotter, pytest.raises(Remote, match=message):
        snapshotter.mounts("default/9/container")


def test_labels_that_say_too_little(tmp_path: Path) -> None:
    """A lazy row without the labels of a pull says to remove the image; with them again it returns."""
    layers = Layers()
    layers.gate.set()
    with _migrated(tmp_path, layers) as snapshotter:
        labels = snapshotter.stat(D[1]).labels
        snapshotter.update(D[1], {**labels, policy.IMAGE_REF: ""})
        with pytest.raises(Remote, match=r"cri.image-ref is missing.*remove the image and pull it again"):
            snapshotter.mounts("default/9/container")
        snapshotter.update(D[1], labels)
        assert snapshotter.mounts("default/9/container")


def test_a_call_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that takes too long makes the call UNAVAILABLE and goes on returning; the next call finds it."""
    monkeypatch.setattr(returning, "WAIT_SECONDS", 0.05)
    layers = Layers()
    with _migrated(tmp_path, layers) as snapshotter:
        with pytest.raises(Remote, match=f"snapshot '{D[2]}', lazy under the Go daemon, is still returning"):
            snapshotter.mounts("default/9/container")
        layers.gate.set()
        monkeypatch.setattr(returning, "WAIT_SECONDS", 20.0)
        assert snapshotter.mounts("default/9/container")
        assert len(layers.requests) == 2


def test_a_call_that_waits_ends_with_the_daemon(tmp_path: Path) -> None:
    """A daemon that stops does not wait for a layer: the call is UNAVAILABLE."""
    layers = Layers()
    with _migrated(tmp_path, layers) as snapshotter, ThreadPoolExecutor(1) as calls:
        with snapshotter.returning():
            call = calls.submit(snapshotter.mounts, "default/9/container")
            _eventually(call.running)
            threading.Timer(1.0, layers.gate.set).start()  # flights under way are given a moment
        with pytest.raises(Remote):
            raise call.exception(20) or AssertionError


def test_removed_while_it_returns(tmp_path: Path) -> None:
    """A snapshot that goes while its layer is being made leaves no reference on the layer."""
    layers = Layers()
    with _migrated(tmp_path, layers) as snapshotter, snapshotter.returning():
        for key in ("default/9/container", LOCAL, D[2], "k8s.io/11/view", D[1]):
            snapshotter.remove(key)
        layers.gate.set()
        _eventually(lambda: layers.references == {1: 0})
        assert list(snapshotter.walk()) == []
        assert layers.commits == []


def test_a_new_pull_above_pending_layers(tmp_path: Path) -> None:
    """A lazy layer made on a pending one has it back first; the same target again is answered by what came back."""
    layers = Layers()
    layers.gate.set()
    with _migrated(tmp_path, layers) as snapshotter:
        labels = {
            policy.IMAGE_REF: "registry.example/y:1",
            policy.MANIFEST_DIGEST: D[8],
            policy.LAYER_DIGEST: D[6],
        }
        with pytest.raises(AlreadyExists):
            snapshotter.prepare("default/20/a", D[1], {**labels, policy.TARGET: D[4]})
        assert layers.requests[-1].parent_chain == (LazyLower(1),)
        with pytest.raises(AlreadyExists):
            snapshotter.prepare("other/21/a", D[1], {**labels, policy.TARGET: D[2]})
        assert [request.target for request in layers.requests] == [D[1], D[4], D[2]]
        row = snapshotter.stat(D[2])
        assert (row.mount_id, row.layer_key) == (3, "layer-3")
        assert layers.requests[-1].parent_chain == (LazyLower(1),)


def test_a_local_parent_stays_local(tmp_path: Path) -> None:
    """A pending layer above one that was unpacked by the Go daemon is made above that directory."""
    layers = Layers()
    layers.gate.set()
    root = _root(tmp_path)
    path = _rows_path(root)
    found = gosnapshots.decode(_DB)
    assert gosnapshots.import_into(path, found)
    with SnapshotStore(path) as store:  # the bottom layer becomes an ordinary one
        store._db.execute("UPDATE snapshots SET mount = NULL, layer = NULL WHERE key = ?", (D[1],))
    with Snapshotter(os.fsencode(root / "snapshotter"), lazy=layers) as snapshotter:
        snapshotter.mounts("default/9/container")
        local = LocalLower(os.fsencode(root / f"snapshotter/snapshots/{snapshotter.stat(D[1]).id}/fs"))
        assert layers.requests[0].parent_chain == (local,)


def test_pending_numbers() -> None:
    """A pending row's number is nobody else's, and names the row."""
    assert pending.snapshot_of(pending.mount_of(17)) == 17
    assert pending.snapshot_of(17) is None
