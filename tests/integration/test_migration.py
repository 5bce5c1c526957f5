"""From the Go daemon to ours and back, on one root, with containerd's references kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.containerd import start_containerd
from harness.containerds import Unavailable, binaries
from harness.daemon import CONFIG, Daemon
from harness.godaemon import GoDaemon, as_go_root, build_go_daemon, fuse_mount, lazy_directories
from harness.images import Layer, layer_from_dir, shell_rootfs
from harness.lazyrig import Rig, lazy_rig

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.serve import keeper_client

pytestmark = pytest.mark.root
_SNAPSHOTS = ("snapshots", "--snapshotter", "soci")


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A node of the test's own: its root changes hands."""
    with lazy_rig() as found:
        yield found


def _layer(tmp_path: Path, name: str, size: int = 300_000) -> tuple[Layer, str]:
    """A layer with a shell and one file /<name>; and that file's sha256."""
    directory = tmp_path / name
    shell_rootfs(directory, ("dash", "cat", "ls", "sha256sum", "sleep"))
    data = hashlib.shake_128(name.encode()).digest(size)
    (directory / name).write_bytes(data)
    return layer_from_dir(directory), hashlib.sha256(data).hexdigest()


def _listed(rig: Rig) -> dict[str, str]:
    """Every snapshot that containerd has, with what `ctr snapshots info` says of it."""
    lines = rig.containerd.ctr(*_SNAPSHOTS, "ls").stdout.splitlines()[1:]
    return {
        key: rig.containerd.ctr(*_SNAPSHOTS, "info", key).stdout
        for key in (line.split()[0] for line in lines)
    }


def _start(rig: Rig, container: str) -> str:
    """Start a container that was created before; what it wrote."""
    try:
        return rig.containerd.ctr("tasks", "start", container).stdout
    finally:
        rig.containerd.ctr("tasks", "rm", "--force", container, check=False)


def _create(rig: Rig, repository: str, container: str, *command: str) -> None:
    rig.containerd.ctr(
        "containers", "create", "--snapshotter", "soci", rig.name(repository), container, *command
    )


def _eventually_empty(rig: Rig) -> None:
    """Nothing is left of any snapshot, in containerd, on disk, or among the mounts."""
    root = rig.daemon.root
    places = (root / "snapshotter/snapshots", root / "layers", root / "m")
    end = time.monotonic() + 20
    while left := [path for place in places for path in place.iterdir()]:
        assert time.monotonic() < end, left
        rig.containerd.garbage_collect()
        time.sleep(0.2)
    assert _listed(rig) == {}


def test_a_root_of_the_go_daemon(rig: Rig, tmp_path: Path) -> None:
    """Started on such a root without a registry, every reference of containerd stays good and a running container runs
    on; with the registry containers on lazy layers start again, new pulls share them, and all can be removed.
    """
    lazy, digest = _layer(tmp_path, "lazy")
    local, _ = _layer(tmp_path, "local")
    rig.publish("lazy", [lazy, local])
    rig.publish("local", [local], index=False)
    rig.pull("lazy")
    rig.pull("local")
    _create(rig, "lazy", "c-lazy", "/bin/sha256sum", "/lazy")
    _create(rig, "local", "c-local", "/bin/ls", "/local")
    rig.containerd.ctr(
        "run", "--detach", "--snapshotter", "soci", rig.name("local"), "running", "/bin/sleep", "600"
    )
    before = _listed(rig)
    assert len(before) == 6
    rig.daemon.stop()
    as_go_root(rig.daemon.root)
    database = rig.daemon.root / "snapshotter/metadata.db"
    written = database.read_bytes()
    dead = lazy_directories(rig.daemon.root)
    assert len(dead) == 2
    for directory in dead:
        os.close(fuse_mount(directory))
    rig.proxy.stall()
    rig.daemon.start()
    rig.reconnected()
    assert _listed(rig) == before
    run = ("tasks", "exec", "--exec-id", "e", "running", "/bin/ls", "/local")
    assert rig.containerd.ctr(*run).stdout == "/local\n"
    assert _start(rig, "c-local") == "/local\n"
    rig.proxy.resume()
    rig.proxy.cut()
    assert _start(rig, "c-lazy") == f"{digest}  /lazy\n"
    rig.publish("more", [lazy])
    rig.pull("more")
    assert rig.containerd.run(rig.name("more"), "/bin/sha256sum", "/lazy", snapshotter="soci").startswith(
        digest
    )
    rig.daemon.kill()
    rig.daemon.start()
    rig.reconnected()
    assert _start(rig, "c-lazy") == f"{digest}  /lazy\n"
    rig.containerd.ctr("tasks", "rm", "--force", "running")
    for container in ("c-lazy", "c-local", "running"):
        rig.containerd.ctr("containers", "rm", container)
    for repository in ("lazy", "local", "more"):
        rig.containerd.ctr("images", "rm", "--sync", rig.name(repository))
    _eventually_empty(rig)
    assert database.read_bytes() == written


def test_an_index_that_is_gone(rig: Rig, tmp_path: Path) -> None:
    """A lazy layer whose index the registry has no more is pulled whole: containerd's reference stays good."""
    lazy, digest = _layer(tmp_path, "lazy")
    rig.publish("gone", [lazy])
    rig.pull("gone")
    _create(rig, "gone", "c", "/bin/sha256sum", "/lazy")
    rig.daemon.stop()
    as_go_root(rig.daemon.root)
    rig.daemon.config = ""  # v1 is off: nothing leads to the index any more
    rig.daemon.start()
    rig.reconnected()
    assert _start(rig, "c") == f"{digest}  /lazy\n"


@pytest.mark.slow
def test_a_mount_that_is_alive(rig: Rig, tmp_path: Path) -> None:
    """While a FUSE mount of the Go daemon's still has its process the start is refused in one line, and it stays."""
    lazy, _ = _layer(tmp_path, "lazy")
    rig.publish("alive", [lazy])
    rig.pull("alive")
    rig.daemon.stop()
    as_go_root(rig.daemon.root)
    (target,) = lazy_directories(rig.daemon.root)
    device = fuse_mount(target)
    try:
        with pytest.raises(
            RuntimeError, match=rf"1 mounts below .* are in use, the first at {target}: stop the"
        ) as error:
            rig.daemon.start()
        rig.daemon.process.wait()
        assert "Traceback" not in str(error.value)
        assert os.fsencode(target) in Path("/proc/self/mountinfo").read_bytes()
    finally:
        os.close(device)
    rig.daemon.start()
    rig.reconnected()
    assert len(_listed(rig)) == 1


@contextmanager
def _go_node() -> Iterator[tuple[Rig, GoDaemon]]:
    """A node with the real Go daemon, which needs a containerd that says the namespace (1.7 and later)."""
    try:
        programs = binaries("2.1")
    except Unavailable as error:
        pytest.skip(str(error))
    with (
        lazy_rig() as rig,
        start_containerd(
            rig.base / "c2", proxy_plugins={"soci": rig.base / "run2/soci.sock"}, bin_dir=programs
        ) as containerd,
    ):
        place = rig.base / "d2"
        (rig.base / "run2").mkdir(mode=0o700)
        place.mkdir()
        (place / "go.toml").write_text(CONFIG)
        socket = rig.base / "run2/soci.sock"
        go = GoDaemon(build_go_daemon(), place / "root", socket, place / "go.toml", place / "go.log")
        ours = Daemon(place, socket, CONFIG)
        go.start()
        node = Rig(rig.base, rig.proxy, rig.registry, containerd, ours)
        node.reconnected()
        try:
            yield node, go
        finally:
            go.stop(signal.SIGKILL)
            if getattr(ours, "process", None) is not None and ours.process.poll() is None:
                ours.stop()
            keeper_client.stop(socket.parent)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name)
def test_there_and_back(tmp_path: Path, how: signal.Signals) -> None:
    """The real Go daemon, ended in every way; ours on its root; back, with what was pulled before; and ours again."""
    lazy, digest = _layer(tmp_path, "lazy")
    local, _ = _layer(tmp_path, "local")
    with _go_node() as (rig, go):
        rig.publish("lazy", [lazy, local])
        rig.publish("local", [local], index=False)
        rig.pull("lazy")
        rig.pull("local")
        _create(rig, "lazy", "c-lazy", "/bin/sha256sum", "/lazy")
        _create(rig, "local", "c-local", "/bin/ls", "/local")
        with ContainerdClient(rig.containerd.address) as client:
            parent = next(key for key, info in _listed(rig).items() if '"Kind": "Committed"' in info)
            client.snapshots("soci").prepare("kept", parent, {"containerd.io/gc.root": "test"})
        before = _listed(rig)
        database = rig.daemon.root / "snapshotter/metadata.db"
        with pytest.raises(RuntimeError, match=r"a process serves there|metadata\.db is in use"):
            rig.daemon.start()
        rig.daemon.process.wait()
        go.stop(how)
        written = database.read_bytes()
        rig.daemon.start()
        rig.reconnected()
        assert _listed(rig) == before
        assert _start(rig, "c-local") == "/local\n"
        assert _start(rig, "c-lazy") == f"{digest}  /lazy\n"
        rig.publish("more", [lazy, local])
        rig.pull("more")
        rig.containerd.ctr(*_SNAPSHOTS, "mounts", "/mnt", "kept")
        rig.daemon.stop()
        assert database.read_bytes() == written
        go.start()
        rig.reconnected()
        assert _listed(rig) == before
        assert _start(rig, "c-local") == "/local\n"
        assert _start(rig, "c-lazy") == f"{digest}  /lazy\n"
        go.stop(signal.SIGINT)
        with pytest.raises(RuntimeError, match="was changed by the Go daemon after it was imported"):
            rig.daemon.start()
        rig.daemon.process.wait()
        for path in (rig.daemon.root / "snapshotter").glob("metadata.sqlite*"):
            path.unlink()
        with pytest.raises(RuntimeError, match="is missing, but there are"):
            rig.daemon.start()
        rig.daemon.process.wait()
        shutil.rmtree(rig.daemon.root / "layers")
        for path in (rig.daemon.root / "snapshotter/snapshots").iterdir():
            if path.name.isdecimal() and int(path.name) >= 1_000_000:
                shutil.rmtree(path)
        rig.daemon.start()
        rig.reconnected()
        assert _listed(rig) == before
        assert _start(rig, "c-lazy") == f"{digest}  /lazy\n"
