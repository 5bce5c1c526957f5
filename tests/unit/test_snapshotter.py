"""The ten verbs, with lazy layers imitated: what is asked of them, and what containerd gets."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from soci_snapshotter.errors import AlreadyExists, Config, Integrity, Invalid, NotFound, Precondition, Remote
from soci_snapshotter.policy import prepare as policy
from soci_snapshotter.policy.proof import DIFF_ID
from soci_snapshotter.snapshotter.flight import Flights
from soci_snapshotter.snapshotter.mounts import Mount, Stack, mounts
from soci_snapshotter.snapshotter.ports import (
    Declined,
    Failed,
    LazyLayer,
    LazyLower,
    LazyRequest,
    LocalLower,
    Usage,
    Way,
)
from soci_snapshotter.snapshotter.snapshotter import Snapshotter
from soci_snapshotter.store.snapshots import Kind

D = ["sha256:" + char * 64 for char in "0123456789abcdef"]


@dataclass
class Layers:
    """Lazy layers that are plain directories; notes what it is asked, and answers as the test says."""

    top: Path
    log: list[object] = field(default_factory=list)
    requests: list[LazyRequest] = field(default_factory=list)
    answer: Callable[[LazyRequest], LazyLayer | Declined | Failed] | None = None
    shift: int = 0
    refusal: str | None = None
    commits: list[int] = field(default_factory=list)
    references: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, request: LazyRequest) -> LazyLayer | Declined | Failed:
        with self.lock:
            self.requests.append(request)
            mount_id = len(self.requests)
        if self.answer is not None:
            return self.answer(request)
        return self.mounted(mount_id)

    def mounted(self, mount_id: int) -> LazyLayer:
        self.path(mount_id).mkdir(exist_ok=True, parents=True)
        with self.lock:
            self.references[mount_id] = self.references.get(mount_id, 0) + 1
        return LazyLayer(f"layer-{mount_id}", mount_id, 4096 * mount_id, mount_id, {"own": str(mount_id)})

    def path(self, mount_id: int) -> Path:
        return self.top / f"m{mount_id + self.shift}"

    def serves(self, request: LazyRequest, mount_id: int, layer_key: str) -> str | None:
        return self.refusal

    def committed(self, mount_id: int) -> None:
        self.commits.append(mount_id)

    def lowerdir(self, mount_id: int) -> bytes:
        if self.path(mount_id).exists():
            return bytes(self.path(mount_id))
        raise Remote(f"layer of mount {mount_id}: registry.test does not answer")

    def usage(self, mount_id: int) -> Usage:
        return Usage(mount_id, 1)

    def release(self, mount_ids: Sequence[int]) -> None:
        self.log.append(("release", *mount_ids))
        with self.lock:
            for mount_id in mount_ids:
                self.references[mount_id] -= 1

    def returned(self, paths: frozenset[bytes]) -> None:
        self.log.append(("returned", *sorted(os.path.basename(path).decode() for path in paths)))


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path / "m")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def snapshots(root: Path, layers: Layers) -> Iterator[Snapshotter]:
    with Snapshotter(bytes(root), lazy=layers, overlay_options=("index=off",)) as opened:
        yield opened


def pull(n: int, **more: str) -> dict[str, str]:
    """The labels of a pull of the layer whose chain ID is D[n]."""
    return {
        policy.TARGET: D[n],
        policy.IMAGE_REF: "registry.test/image:1",
        policy.MANIFEST_DIGEST: D[15],
        policy.LAYER_DIGEST: D[14],
        policy.IMAGE_LAYERS: D[14],
        **more,
    }


def lazily(snapshots: Snapshotter, n: int, parent: str = "") -> str:
    """Prepare a lazy layer as containerd does; the name of the row it then finds."""
    with pytest.raises(AlreadyExists, match="target snapshot"):
        snapshots.prepare(f"default/1/extract-{n}", parent, pull(n))
    query = f'labels."{policy.TARGET}"=={D[n]},parent=="{parent}"'
    [row] = [found for found in snapshots.walk([query]) if found.kind == Kind.COMMITTED]
    return row.key


def locally(snapshots: Snapshotter, name: str, parent: str = "") -> str:
    snapshots.prepare(f"{name}-a", parent, {})
    snapshots.commit(f"{name}-a", name, {})
    return name


def directories(root: Path) -> set[str]:
    return set(os.listdir(root / "snapshots"))


def only(made: tuple[Mount, ...]) -> Mount:
    [mount] = made
    return mount


# Ordinary snapshots


def test_mounts_without_parent(snapshots: Snapshotter, root: Path) -> None:
    """A first active snapshot is a writable bind mount of its top, a view of nothing a read-only one."""
    assert snapshots.prepare("a", "", {}) == (Mount("bind", f"{root}/snapshots/1/fs", ("rw", "rbind")),)
    assert snapshots.view("v", "", {}) == (Mount("bind", f"{root}/snapshots/2/fs", ("ro", "rbind")),)
    assert snapshots.mounts("a") == (Mount("bind", f"{root}/snapshots/1/fs", ("rw", "rbind")),)


def test_mounts_with_parents(snapshots: Snapshotter, root: Path) -> None:
    """Parents are lowerdirs, topmost first; a view of one parent is a bind mount, of two an overlay."""
    locally(snapshots, "1")
    locally(snapshots, "2", "1")
    at = f"{root}/snapshots"
    assert snapshots.view("v1", "1", {}) == (Mount("bind", f"{at}/1/fs", ("ro", "rbind")),)
    lower = f"lowerdir={at}/2/fs:{at}/1/fs"
    assert snapshots.view("v2", "2", {}) == (Mount("overlay", "overlay", (lower, "index=off")),)
    options = (f"workdir={at}/5/work", f"upperdir={at}/5/fs", lower, "index=off")
    assert snapshots.prepare("a", "2", {}) == (Mount("overlay", "overlay", options),)
    assert snapshots.mounts("a") == (Mount("overlay", "overlay", options),)


def test_directories(snapshots: Snapshotter, root: Path) -> None:
    """Tops are 0755 whatever the umask, work is 0711 and for active ones only, snapshots/ is root's own."""
    mask = os.umask(0o077)
    try:
        snapshots.prepare("a", "", {})
        snapshots.view("v", "", {})
    finally:
        os.umask(mask)
    modes = {path.relative_to(root): path.stat().st_mode & 0o7777 for path in root.glob("snapshots/*/*")}
    assert modes == {
        Path("snapshots/1/fs"): 0o755,
        Path("snapshots/1/work"): 0o711,
        Path("snapshots/2/fs"): 0o755,
    }
    assert (root / "snapshots").stat().st_mode & 0o7777 == 0o700


@pytest.mark.root
def test_owner_of_the_top(snapshots: Snapshotter, root: Path, layers: Layers) -> None:
    """A new top belongs to the owner of its parent's top, local or lazy; its mode stays 0755."""
    locally(snapshots, "1")
    os.chown(root / "snapshots/1/fs", 12, 34)
    os.chmod(root / "snapshots/1/fs", 0o700)
    snapshots.prepare("a", "1", {})
    stat = (root / "snapshots/2/fs").stat()
    assert (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (12, 34, 0o755)
    lazy = lazily(snapshots, 0)
    os.chown(layers.path(1), 56, 78)
    snapshots.prepare("b", lazy, {})
    stat = (root / f"snapshots/{snapshots.stat('b').id}/fs").stat()
    assert (stat.st_uid, stat.st_gid) == (56, 78)


def test_committed_has_no_mounts(snapshots: Snapshotter) -> None:
    """Mounts of a committed snapshot fail as a precondition, of an unknown one as not found."""
    locally(snapshots, "1")
    with pytest.raises(Precondition):
        snapshots.mounts("1")
    with pytest.raises(NotFound):
        snapshots.mounts("x")


def test_failed_prepare_leaves_nothing(snapshots: Snapshotter, root: Path) -> None:
    """A taken key, an unknown or uncommitted parent: the error, and no directory left behind."""
    snapshots.prepare("a", "", {})
    for key, parent, error in (("a", "", AlreadyExists), ("b", "x", NotFound), ("b", "a", Invalid)):
        with pytest.raises(error):
            snapshots.prepare(key, parent, {})
    assert directories(root) == {"1"}
    with pytest.raises(Precondition):
        snapshots.commit("a-view", "n", {}) if snapshots.view("a-view", "", {}) else None


def test_usage(snapshots: Snapshotter, root: Path) -> None:
    """Usage counts allocated blocks and inodes once each; of a committed snapshot as it was at commit."""
    snapshots.prepare("a", "", {})
    top = root / "snapshots/1/fs"
    (top / "d").mkdir()
    (top / "d/f").write_bytes(b"x" * 10000)
    os.link(top / "d/f", top / "hard")
    os.symlink("nowhere", top / "link")
    with (top / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 30)
    everything = [top, top / "d", top / "d/f", top / "link", top / "sparse"]
    expected = Usage(sum(os.lstat(path).st_blocks * 512 for path in everything), len(everything))
    assert snapshots.usage("a") == expected
    assert expected.size < 1 << 20
    snapshots.commit("a", "c", {})
    (top / "late").write_bytes(b"x" * 100000)
    assert snapshots.usage("c") == expected
    snapshots.view("v", "c", {})
    assert snapshots.usage("v") == Usage(0, 0)


def test_remove_is_asynchronous(snapshots: Snapshotter, root: Path) -> None:
    """Remove forgets the row at once, Cleanup takes the directory, and only such directories."""
    locally(snapshots, "1")
    snapshots.prepare("a", "1", {})
    with pytest.raises(Precondition, match="cannot remove"):
        snapshots.remove("1")
    snapshots.remove("a")
    (root / "snapshots/99").mkdir()
    assert directories(root) == {"1", "2", "99"}
    snapshots.cleanup()
    assert directories(root) == {"1"}
    snapshots.prepare("a", "1", {})
    assert directories(root) == {"1", "3"}


def test_cleanup_spares_what_is_being_made(snapshots: Snapshotter, root: Path) -> None:
    """Threads that clean up all the time never take the directory of a snapshot that is being made."""
    done = threading.Event()

    def clean() -> None:
        while not done.is_set():
            snapshots.cleanup()

    cleaners = [threading.Thread(target=clean) for _ in range(2)]
    for cleaner in cleaners:
        cleaner.start()
    try:
        for n in range(200):
            snapshots.prepare(f"k{n}", "", {})
    finally:
        done.set()
        for cleaner in cleaners:
            cleaner.join()
    assert directories(root) == {str(row.id) for row in snapshots.walk()}
    assert all((root / f"snapshots/{row.id}/work").is_dir() for row in snapshots.walk())


def test_restart(root: Path, layers: Layers) -> None:
    """Another Snapshotter on the same root has every row, and its cleanup spares their directories."""
    with Snapshotter(bytes(root), lazy=layers) as first:
        locally(first, "1")
        lazy = lazily(first, 0, "1")
        made = first.prepare("a", lazy, {})
    with Snapshotter(bytes(root), lazy=layers) as second:
        second.cleanup()
        assert second.mounts("a") == made
        assert second.lazy_rows() == [(1, "layer-1")]
        assert second.handed_out() == {bytes(layers.path(1))}
        assert directories(root) == {"1", "3"}


@pytest.mark.parametrize("name", ["a:b", "a,b", "a\\b"])
def test_root_that_overlayfs_cannot_name(tmp_path: Path, name: str) -> None:
    """A root whose name would break lowerdir= is refused when it is opened, not at the first container."""
    with pytest.raises(Config, match="choose another root"):
        Snapshotter(bytes(tmp_path / name))


def test_walk_filters(snapshots: Snapshotter) -> None:
    """Filters see kind, name, parent and labels; a bad one is Invalid before anything is sent."""
    locally(snapshots, "1")
    snapshots.prepare("a", "1", {"x": "1"})
    snapshots.view("v", "1", {policy.TARGET: D[0]})
    assert [row.key for row in snapshots.walk(["kind==view"])] == ["v"]
    assert [row.key for row in snapshots.walk(["name==a", "kind==committed"])] == ["1", "a"]
    assert [row.key for row in snapshots.walk(["parent==1,labels.x"])] == ["a"]
    assert [row.key for row in snapshots.walk([f'labels."{policy.TARGET}"=={D[0]}'])] == ["v"]
    assert [row.key for row in snapshots.walk(["created"])] == []
    with pytest.raises(Invalid):
        snapshots.walk(["=="])


CRASH = """
import os, sys
from soci_snapshotter.snapshotter.snapshotter import Snapshotter
with Snapshotter(os.fsencode(sys.argv[1])) as snapshots:
    for n in range(100000):
        snapshots.prepare(f"k{n}", "", {})
        print(n, flush=True)
        if n % 3 == 0:
            snapshots.remove(f"k{n}")
"""


def test_kill(root: Path) -> None:
    """Killed at any moment, no row is without its directories, and cleanup removes what has no row."""
    for _ in range(3):
        command = [sys.executable, "-c", CRASH, str(root)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(30):
                process.stdout.readline()
            process.kill()
        with Snapshotter(bytes(root)) as snapshots:
            snapshots.cleanup()
            ids = {row.id for row in snapshots.walk()}
            assert {int(name) for name in directories(root)} == ids
            assert len(ids) >= 19
            assert all((root / f"snapshots/{n}/{name}").is_dir() for n in ids for name in ("fs", "work"))
            for row in list(snapshots.walk()):
                snapshots.remove(row.key)


# Lazy snapshots


def test_lazy_layer(snapshots: Snapshotter, layers: Layers, root: Path) -> None:
    """A lazy layer becomes a committed row with the labels containerd looks for, and no directory."""
    name = lazily(snapshots, 0)
    row = snapshots.stat(name)
    assert row.labels == {
        **pull(0),
        "containerd.io/snapshot/remote": "remote snapshot",
        "containerd.io/snapshot/remote/namespace": "default",
        "containerd.io/snapshot/remote/has.soci.index.digest": "true",
        "own": "1",
    }
    assert (row.parent, row.usage, row.mount_id) == ("", Usage(4096, 1), 1)
    assert snapshots.usage(name) == Usage(1, 1)
    assert directories(root) == set()
    assert not list(snapshots.walk(["kind==active"]))
    [request] = layers.requests
    assert request == LazyRequest(
        namespace="default",
        image_ref="registry.test/image:1",
        manifest_digest=D[15],
        layer_digest=D[14],
        image_layers=(D[14],),
        index_digest=None,
        target=D[0],
        parent_chain_id="",
        parent_chain=(),
        labels=pull(0),
    )


def test_request_describes_the_parents(snapshots: Snapshotter, layers: Layers, root: Path) -> None:
    """A layer above others is told its parents, topmost first, and the chain ID right below."""
    locally(snapshots, "default/1/" + D[1])
    middle = lazily(snapshots, 2, "default/1/" + D[1])
    lazily(snapshots, 3, middle)
    first, second = layers.requests
    local = LocalLower(f"{root}/snapshots/1/fs".encode())
    assert (first.parent_chain_id, first.parent_chain) == (D[1], (local,))
    assert (second.parent_chain_id, second.parent_chain) == (D[2], (LazyLower(1), local))


def test_same_target_again(snapshots: Snapshotter, layers: Layers) -> None:
    """A target that is there on that parent is not asked for again; on another parent it is."""
    name = lazily(snapshots, 0)
    assert lazily(snapshots, 0) == name
    assert len(layers.requests) == 1
    other = lazily(snapshots, 0, name)
    assert other != name
    assert len(layers.requests) == 2


def test_unpacked_target_is_reused(snapshots: Snapshotter, layers: Layers) -> None:
    """A chain that containerd unpacked for one namespace serves another without asking for a lazy layer."""
    snapshots.prepare("default/1/a", "", {})
    snapshots.commit("default/1/a", "default/2/" + D[0], {policy.TARGET: D[0]})
    assert lazily(snapshots, 0) == "default/2/" + D[0]
    assert layers.requests == []


def test_mixed_stack(snapshots: Snapshotter, layers: Layers, root: Path) -> None:
    """Lazy mounts and unpacked directories stack in order; a view of one lazy layer is a bind mount."""
    bottom = lazily(snapshots, 0)
    middle = locally(snapshots, "2", bottom)
    top = lazily(snapshots, 3, middle)
    mount = only(snapshots.prepare("a", top, {}))
    assert mount.options[2] == f"lowerdir={layers.path(2)}:{root}/snapshots/2/fs:{layers.path(1)}"
    assert only(snapshots.view("v", bottom, {})) == Mount("bind", str(layers.path(1)), ("ro", "rbind"))


def test_declined(snapshots: Snapshotter, layers: Layers, caplog: pytest.LogCaptureFixture) -> None:
    """Without index or ztoc the caller gets mounts, and the log says so under the Go daemon's key."""
    layers.answer = lambda _: Declined("no valid SOCI index found")
    with caplog.at_level(logging.INFO):
        assert only(snapshots.prepare("default/1/a", "", pull(0))).type == "bind"
    [record] = caplog.records
    assert vars(record)["defer-snapshot-runtime"] == "true"
    assert vars(record)["reason"] == "no valid SOCI index found"
    snapshots.commit("default/1/a", "default/2/c", {policy.TARGET: D[0]})


@pytest.mark.parametrize(
    ("way", "labels", "word"),
    [
        (None, {policy.REMOTE: "remote snapshot", policy.HAS_INDEX: "true"}, "remote-snapshot-prepared"),
        (Way.LOCAL, {policy.HAS_INDEX: "true"}, "local-snapshot-prepared"),
        (Way.PARALLEL, {}, "local-snapshot-prepared"),
    ],
)
def test_how_a_layer_was_made(
    snapshots: Snapshotter,
    layers: Layers,
    caplog: pytest.LogCaptureFixture,
    way: Way | None,
    labels: dict[str, str],
    word: str,
) -> None:
    """The Go daemon's labels and log key for lazy layers, for local ones and for those of a parallel pull."""
    layers.answer = lambda _: replace(layers.mounted(1), way=way)
    with caplog.at_level(logging.INFO), pytest.raises(AlreadyExists):
        snapshots.prepare("default/1/a", "", pull(0))
    [row] = snapshots.walk([f'labels."{policy.TARGET}"=={D[0]}'])
    names = {policy.REMOTE, policy.HAS_INDEX}
    assert {key: value for key, value in row.labels.items() if key in names} == labels
    assert row.labels[policy.REMOTE_NAMESPACE] == "default"
    assert [vars(record)[word] for record in caplog.records] == ["true"]


def test_a_pull_that_failed(snapshots: Snapshotter, layers: Layers) -> None:
    """Where containerd is not to try, it gets the error, and the key is free; the next try may succeed."""
    layers.answer = lambda _: Failed(Remote("image registry.test/image:1: layer x: connection refused"))
    with pytest.raises(Remote, match="connection refused"):
        snapshots.prepare("default/1/a", "", pull(0))
    assert list(snapshots.walk()) == []
    layers.answer = None
    with pytest.raises(AlreadyExists):
        snapshots.prepare("default/1/a", "", pull(0))


@pytest.mark.parametrize(
    "error",
    [
        Integrity("ztoc of sha256:ab: checkpoints fall"),
        OSError(errno.ENOSPC, "no space"),
        KeyError("a bug"),
    ],
)
def test_failed_try_falls_back(
    snapshots: Snapshotter, layers: Layers, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """Whatever a lazy try fails with, there is a warning with its text and the pull goes on with mounts."""

    def fail(_: LazyRequest) -> LazyLayer:
        raise error

    layers.answer = fail
    assert only(snapshots.prepare("default/1/a", "", pull(0))).type == "bind"
    [warning] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert vars(warning)["remote-snapshot-prepared"] == "false"
    assert vars(warning)["error"] == str(error)
    layers.answer = None
    lazily(snapshots, 0)


def test_success_is_logged(snapshots: Snapshotter, layers: Layers, caplog: pytest.LogCaptureFixture) -> None:
    """Each lazy success has one record with the key that users of the Go daemon count."""
    del layers
    with caplog.at_level(logging.INFO):
        lazily(snapshots, 0)
    assert [vars(record)["remote-snapshot-prepared"] for record in caplog.records] == ["true"]


def test_unreachable_layer(snapshots: Snapshotter, layers: Layers, root: Path) -> None:
    """A stack with an unreachable lazy layer is Remote (UNAVAILABLE); nothing is left of the try."""
    name = lazily(snapshots, 0)
    snapshots.prepare("a", name, {})
    layers.path(1).rmdir()
    before = directories(root)
    with pytest.raises(Remote, match=r"registry\.test"):
        snapshots.mounts("a")
    with pytest.raises(Remote):
        snapshots.prepare("b", name, {})
    assert directories(root) == before
    with pytest.raises(NotFound):
        snapshots.stat("b")


def test_remove_releases(snapshots: Snapshotter, layers: Layers) -> None:
    """Removing a lazy row releases its mount once, after the row is gone; what was given comes back."""
    name = lazily(snapshots, 0)
    snapshots.prepare("a", name, {})
    snapshots.view("v", name, {})
    with pytest.raises(Precondition):
        snapshots.remove(name)
    snapshots.remove("a")
    assert layers.log == []
    snapshots.remove("v")
    assert layers.log == [("returned", "m1")]
    snapshots.remove(name)
    assert layers.log == [("returned", "m1"), ("release", 1)]
    assert layers.references == {1: 0}


def test_release_that_fails(snapshots: Snapshotter, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row is gone even when its mount cannot be dropped: containerd must not try for ever."""
    name = lazily(snapshots, 0)

    def busy(_: Sequence[int]) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(layers, "release", busy)
    snapshots.remove(name)
    with pytest.raises(NotFound):
        snapshots.stat(name)


def test_new_mounts_after_completion(snapshots: Snapshotter, layers: Layers) -> None:
    """When a layer moves to a new mount, its snapshots hold the old path and the new one until they go."""
    name = lazily(snapshots, 0)
    snapshots.prepare("a", name, {})
    old = layers.path(1)
    layers.shift = 100
    layers.path(1).mkdir()
    assert only(snapshots.mounts("a")).options[2] == f"lowerdir={layers.path(1)}"
    assert snapshots.handed_out() == {bytes(old), bytes(layers.path(1))}
    snapshots.commit("a", "c", {})
    assert layers.log == [("returned", "m1", "m101")]


def test_path_that_moves_while_it_is_given(
    snapshots: Snapshotter, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount superseded between being looked up and being noted is not handed out."""
    name = lazily(snapshots, 0)
    snapshots.prepare("a", name, {})
    paths = iter([b"/m/5", b"/m/9", b"/m/9"])
    monkeypatch.setattr(layers, "lowerdir", lambda _: next(paths))
    assert only(snapshots.mounts("a")).options[2] == "lowerdir=/m/9"
    assert snapshots.handed_out() == {bytes(layers.path(1)), b"/m/5", b"/m/9"}


def test_parent_removed_meanwhile(snapshots: Snapshotter, layers: Layers) -> None:
    """When the parent goes while the layer is mounted, the mount is released and the error is NotFound."""
    locally(snapshots, "1")

    def remove_parent(_: LazyRequest) -> LazyLayer:
        snapshots.remove("1")
        return layers.mounted(9)

    layers.answer = remove_parent
    with pytest.raises(NotFound, match="parent"):
        snapshots.prepare("default/1/a", "1", pull(0))
    assert layers.references == {9: 0}


def test_no_namespace(snapshots: Snapshotter) -> None:
    """A lazy try without namespace is refused; the header makes up for a key without one."""
    with pytest.raises(Precondition, match="namespace"):
        snapshots.prepare("bare", "", pull(0))
    with pytest.raises(AlreadyExists):
        snapshots.prepare("bare", "", pull(0), namespace="moby")


def test_without_lazy_layers(root: Path) -> None:
    """A Snapshotter without lazy layers leaves every layer to containerd."""
    with Snapshotter(bytes(root)) as plain:
        assert only(plain.prepare("default/1/a", "", pull(0))).type == "bind"


# Many at once


def together(number: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads that start at one moment; a failure in one fails the test."""
    barrier = threading.Barrier(number)
    failures: list[BaseException] = []

    def run(n: int) -> None:
        barrier.wait()
        try:
            work(n)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_one_layer_for_many_clients(snapshots: Snapshotter, layers: Layers) -> None:
    """Of 32 clients that prepare one chain at once one does the work; all get ALREADY_EXISTS."""
    release = threading.Event()

    def slow(request: LazyRequest) -> LazyLayer:
        assert release.wait(10)
        return layers.mounted(int(request.target[7], 16))

    layers.answer = slow
    answers: list[str] = []

    def client(n: int) -> None:
        parent = ""
        for depth in range(3):
            try:
                snapshots.prepare(f"default/{n}/extract-{depth}", parent, pull(depth))
            except AlreadyExists as error:
                answers.append(str(error))
            [row] = snapshots.walk([f'labels."{policy.TARGET}"=={D[depth]},parent=="{parent}"'])
            parent = row.key
        snapshots.prepare(f"default/{n}/container", parent, {})

    timer = threading.Timer(0.3, release.set)
    timer.start()
    together(32, client)
    timer.join()
    assert len(answers) == 96
    assert [request.target for request in layers.requests] == D[:3]
    assert layers.references == {0: 1, 1: 1, 2: 1}


def test_declined_for_many_clients(snapshots: Snapshotter, layers: Layers) -> None:
    """When the one try is declined, every client that waited for it gets mounts of its own."""
    release = threading.Event()

    def decline(_: LazyRequest) -> Declined:
        assert release.wait(10)
        return Declined("no index")

    layers.answer = decline
    sources: list[str] = []
    timer = threading.Timer(0.3, release.set)
    timer.start()
    together(16, lambda n: sources.append(only(snapshots.prepare(f"default/{n}/x", "", pull(0))).source))
    timer.join()
    assert len(set(sources)) == 16
    assert len(layers.requests) == 1


def test_targets_do_not_wait_for_each_other(snapshots: Snapshotter, layers: Layers) -> None:
    """A registry that hangs for one layer keeps neither another layer nor any other verb waiting."""
    release, waiting = threading.Event(), threading.Event()

    def hang(_: LazyRequest) -> Declined:
        waiting.set()
        assert release.wait(10)
        return Declined("late")

    layers.answer = hang
    slow = threading.Thread(target=lambda: snapshots.prepare("default/1/slow", "", pull(0)))
    slow.start()
    assert waiting.wait(10)
    layers.answer = None
    lazily(snapshots, 1)
    snapshots.prepare("a", "", {})
    snapshots.cleanup()
    assert len(list(snapshots.walk())) == 2
    release.set()
    slow.join()
    assert snapshots.stat("default/1/slow").kind == Kind.ACTIVE


def test_everything_at_once(snapshots: Snapshotter, layers: Layers, root: Path) -> None:
    """Clients that pull, run and remove in all orders leave no row, no reference and no directory."""

    def client(n: int) -> None:
        for turn in range(10):
            key = f"default/{n}/c{turn}"
            try:
                snapshots.prepare(f"default/{n}/x{turn}", "", pull(turn % 2))
            except AlreadyExists:
                pass
            rows = list(snapshots.walk([f'labels."{policy.TARGET}"=={D[turn % 2]}']))
            try:
                snapshots.prepare(key, rows[0].key, {})
                snapshots.mounts(key)
                snapshots.remove(key)
                snapshots.remove(rows[0].key)
            except (NotFound, Precondition, IndexError):
                pass  # somebody else removed it, or uses it
            snapshots.cleanup()

    together(8, client)
    for row in list(snapshots.walk()):
        snapshots.remove(row.key)
    snapshots.cleanup()
    assert directories(root) == set()
    assert snapshots.handed_out() == frozenset()
    assert set(layers.references.values()) <= {0}


def test_flight_shares_errors() -> None:
    """An error in the one call reaches everyone who waited, and the next call runs anew."""
    flights: Flights[int] = Flights()
    release, calls, errors = threading.Event(), [], []

    def fail() -> int:
        calls.append(1)
        assert release.wait(10)
        raise Remote("away")

    def client(_: int) -> None:
        try:
            flights.run("k", fail)
        except Remote as error:
            errors.append(str(error))

    timer = threading.Timer(0.3, release.set)
    timer.start()
    together(8, client)
    timer.join()
    assert (len(calls), errors) == (1, ["away"] * 8)
    assert flights.run("k", lambda: 5) == 5


# Mounts


def test_repeated_lowerdirs() -> None:
    """Of equal lowerdirs the topmost stays; when one is left a view is a bind mount."""
    overlay = only(mounts(Stack(Kind.ACTIVE, "/u", "/w", ("/a", "/b", "/a", "/c", "/b"))))
    assert overlay.options == ("workdir=/w", "upperdir=/u", "lowerdir=/a:/b:/c")
    assert only(mounts(Stack(Kind.VIEW, "/u", "/w", ("/a", "/a")))) == Mount("bind", "/a", ("ro", "rbind"))


@pytest.mark.root
def test_kernel_takes_a_repeated_layer(snapshots: Snapshotter, layers: Layers, tmp_path: Path) -> None:
    """The kernel mounts a stack that holds one lazy layer twice, and the upper copy wins."""
    layers.answer = lambda request: layers.mounted(2 if request.target == D[1] else 1)
    bottom = lazily(snapshots, 0)
    middle = lazily(snapshots, 1, bottom)
    top = lazily(snapshots, 2, middle)
    (layers.path(1) / "f").write_text("one")
    (layers.path(2) / "f").write_text("two")
    (layers.path(2) / "g").write_text("two")
    mount = only(snapshots.prepare("a", top, {}))
    target = tmp_path / "target"
    target.mkdir()
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", ",".join(mount.options), target], check=True)
    try:
        assert (target / "f").read_text() == "one"
        assert (target / "g").read_text() == "two"
    finally:
        subprocess.run(["umount", target], check=True)


# Proof


def test_a_condemned_snapshot_is_no_parent(snapshots: Snapshotter, layers: Layers) -> None:
    """Nobody finds it or builds on it, what stands on it cannot be mounted, and the layer is asked for anew."""
    name = lazily(snapshots, 0)
    top = lazily(snapshots, 1, name)
    snapshots.prepare("a", top, {})
    [claim] = snapshots.claims([1])
    snapshots.condemn({claim.snapshot: "layer X has the DiffID Y"})
    assert snapshots.claims([1]) == []
    with pytest.raises(Integrity, match="DiffID Y; remove the image"):
        snapshots.mounts("a")
    with pytest.raises(Integrity, match="DiffID Y"):
        snapshots.prepare("b", top, {})
    assert list(snapshots.walk([f'labels."{policy.TARGET}"=={D[0]}'])) == []
    again = lazily(snapshots, 0)
    assert again != name
    snapshots.prepare("c", again, {})
    snapshots.remove("a")
    snapshots.remove(top)
    snapshots.remove(name)
    assert ("release", 1) in layers.log


def test_claims_of_rows(snapshots: Snapshotter) -> None:
    """Target, parent's chain ID (also above a condemned parent), DiffID label and image are the row's own."""
    name = lazily(snapshots, 0)
    lazily(snapshots, 1, name)
    [bottom] = snapshots.claims([1])
    assert (bottom.target, bottom.parent_chain_id, bottom.image) == (D[0], "", "registry.test/image:1")
    assert [claim.parent_chain_id for claim in snapshots.claims([2])] == [D[0]]
    snapshots.condemn({bottom.snapshot: "why"})
    assert [claim.parent_chain_id for claim in snapshots.claims([1, 2])] == [D[0]]
    with pytest.raises(AlreadyExists):
        snapshots.prepare("default/1/x", "", pull(2, **{DIFF_ID: D[5]}))
    assert [claim.diff_id for claim in snapshots.claims([3])] == [D[5]]


def test_every_lazy_commit_is_told(snapshots: Snapshotter, layers: Layers) -> None:
    """Whoever completes layers hears of each new row, and only when it is there."""
    lazily(snapshots, 0)
    assert layers.commits == [1]


def test_a_chain_id_alone_does_not_share(snapshots: Snapshotter, layers: Layers) -> None:
    """Another image that claims the chain ID of a lazy snapshot gets it only when the layers say so."""
    lazily(snapshots, 0)
    layers.refusal = "not proven"
    assert only(snapshots.prepare("other/1/x", "", pull(0))).type == "bind"
    layers.refusal = None
    with pytest.raises(AlreadyExists):
        snapshots.prepare("other/2/x", "", pull(0))
    assert len(layers.requests) == 1
