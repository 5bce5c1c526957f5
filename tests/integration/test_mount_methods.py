"""The ways of mounting that a node may have to use: the tests of lazy layers again, and what is theirs alone."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.coldcache import drop_caches
from harness.containerd import unmount_below
from harness.daemon import CONFIG, Daemon
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_erofs_mount import Pread, mounter, shown, tar_of, write_meta
from tests.integration.test_lazy import (  # noqa: F401  collected here too, with this module's rig
    big_layer,
    read_while_parked,
    sum_of,
    test_index_of_the_go_tool_drives_the_daemon,
    test_reader_survives_kill_9,
    test_removing_images_leaves_nothing,
    test_rootfs_equals_an_ordinary_pull,
    test_the_same_layer_twice,
)

from soci_snapshotter.linux import fusedev, mounts
from soci_snapshotter.serve.flatfiles import FuseServer
from soci_snapshotter.serve.layer_mounts import METHODS, LayerMounts, Stack
from soci_snapshotter.serve.probe import probe

pytestmark = pytest.mark.root


def config(method: str) -> str:
    """A daemon's configuration."""
    return f'mount_method = "{method}"\n{CONFIG}'


@pytest.fixture(scope="module", params=["loop", "classic"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """A node that mounts in this way; the way from files has the tests of its own module."""
    with lazy_rig(config(request.param)) as found:
        assert f'"method": "{request.param}"' in found.daemon.log
        yield found


def test_present_spans_are_served_while_reads_wait(rig: Rig) -> None:
    """As many parked reads as the way allows (a loop device has 128 requests) hold up no read of a span that is here."""
    read_while_parked(rig, 100 if "loop" in rig.daemon.config else 500)


def kinds(daemon: Daemon) -> set[bytes]:
    """Filesystems of the layers' mounts."""
    below = os.fsencode(daemon.root / "m") + b"/"
    return {entry.fstype for entry in mounts.mountinfo() if entry.target.startswith(below)}


def test_the_way_may_change_under_running_containers() -> None:
    """Layers stay as they were mounted when the daemon is killed and another way configured; new ones get that."""
    with lazy_rig(config(METHODS[-1])) as rig:
        images = [big_layer(seed, files=6) for seed in range(20, 24)]
        layouts = [rig.publish(f"way{number}", [layer]) for number, (layer, _) in enumerate(images)]
        roots: list[tuple[Path, dict[str, str]]] = []

        def step(number: int) -> None:
            """Pull one, go on below: every image is read whole, also those mounted by earlier daemons."""
            rig.pull(f"way{number}")
            with rig.rootfs(layouts[number], "soci") as root:
                roots.append((root, images[number][1]))
                drop_caches()
                for top, sums in roots:
                    assert {name: sum_of(top / name) for name in sums} == sums
                if number + 1 < len(images):
                    rig.daemon.kill()
                    rig.daemon.config = config(("file", "loop", "classic")[number % 3])
                    rig.daemon.start()
                    rig.reconnected()
                    step(number + 1)
                roots.pop()

        step(0)
        assert kinds(rig.daemon) == {b"erofs", b"fuse"}
        rig.daemon.stop()
        assert kinds(rig.daemon) == set()


@contextmanager
def large_sectors(base: Path) -> Iterator[Path]:
    """A directory on an ext4 whose disk has sectors of 4 KiB."""
    image, inside = base / "disk", base / "large"
    inside.mkdir()
    with open(image, "wb") as file:
        os.truncate(file.fileno(), 256 << 20)
    command = ["losetup", "--find", "--show", "--sector-size", "4096", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, str(inside)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)  # when the mount goes, if there is one
    try:
        yield inside
    finally:
        unmount_below(inside)


@pytest.mark.parametrize("method", [None, *METHODS])
def test_a_disk_with_large_sectors(method: str | None) -> None:
    """Direct I/O of 512 bytes fails there: the probe finds ways without, and each gives the right tree and bytes."""
    base = Path(
        subprocess.run(
            ["mktemp", "-d", "-p", "/var/tmp"], check=True, capture_output=True, text=True
        ).stdout.strip()
    )
    try:
        with large_sectors(base) as disk:
            stack = probe(disk, method)  # type: ignore[arg-type]
            assert stack == Stack(method or "file", directio=False)  # type: ignore[arg-type]
            tar = tar_of("gnu6-edge1")
            write_meta("gnu6-edge1", tar, disk / "meta")
            (disk / "data").write_bytes(tar)
            with mounter(stack.method, disk / "a") as (server, layers):
                layers._stack = stack
                server.add(16, Pread(disk / "data"))
                found = []
                for number, device in enumerate((server.path_of(16), os.fsencode(disk / "data"))):
                    target = disk / f"a/m/{number}"
                    target.mkdir(parents=True)
                    layers.mount(disk / "meta", device, target)
                    drop_caches()
                    found.append(shown(target))
                    layers.unmount(target)
            assert found[0] == found[1]
            with mounter("classic", base / "b") as (_, layers):  # elsewhere, where direct I/O works
                (base / "b/m/1").mkdir(parents=True)
                layers.mount(disk / "meta", os.fsencode(disk / "data"), base / "b/m/1")
                assert shown(base / "b/m/1") == found[0]
                layers.unmount(base / "b/m/1")
    finally:
        unmount_below(base)
        subprocess.run(["rm", "-r", str(base)], check=True)


def test_a_daemon_on_a_disk_with_large_sectors() -> None:
    """A pulled image's bytes are right, and the log says how they are mounted."""
    with lazy_rig() as rig:
        rig.daemon.stop()
        with large_sectors(rig.base) as disk:
            (rig.daemon.base / "root").rename(rig.base / "old")
            (disk / "root").mkdir(mode=0o700)
            (rig.daemon.base / "root").symlink_to(disk / "root")
            rig.daemon.start()
            rig.reconnected()
            layer, sums = big_layer(31, files=8)
            layout = rig.publish("large", [layer])
            rig.pull("large")
            with rig.rootfs(layout, "soci") as root:
                drop_caches()
                assert {name: sum_of(root / name) for name in sums} == sums
            assert '"how": "EROFS from files"' in rig.daemon.log
            rig.daemon.stop()


def test_a_tree_in_use_is_served_until_it_is_not(tmp_path: Path) -> None:
    """Unmounted under an open file the tree goes on; when that closes, the next look lets go, and the layer is told."""
    released: list[int] = []
    tar = tar_of("gnu6-edge1")
    write_meta("gnu6-edge1", tar, tmp_path / "meta")
    (tmp_path / "data").write_bytes(tar)
    with (
        fusedev.connect() as connection,
        FuseServer(connection, on_release=released.append) as server,
    ):
        server.add(16, Pread(tmp_path / "data"))
        layers = LayerMounts(Stack("classic", directio=False), tmp_path / "m", server, tmp_path / "run")
        layers.load(fresh=True)
        target = tmp_path / "m/1"
        target.mkdir(parents=True)
        layers.mount(tmp_path / "meta", server.path_of(16), target)
        directory = os.open(target / "edge", os.O_RDONLY)
        os.stat("hard-a", dir_fd=directory)
        layers.unmount(target)
        assert layers.mounted() == set()
        assert released == []
        want = sorted(name for name in os.listdir(directory))
        assert len(want) > 10
        with open(os.open("text-100k.txt", os.O_RDONLY, dir_fd=directory), "rb") as file:
            os.close(directory)
            layers.mounted()
            assert released == []
            assert len(file.read()) == 100_000
        layers.mounted()
        assert released == [16]
        assert os.listdir(tmp_path / "run") == []
        assert server.trees.lookup(b"m1") is None


def test_an_older_kernel_clones_what_is_attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a detached mount's directory cannot be cloned, the FUSE mount is attached, and goes at the end."""
    clone = mounts.clone
    table = tmp_path / "fuse"

    def before_6_15(mount_fd: int, path: bytes, clear: int) -> int:
        if not any(entry.target == os.fsencode(table) for entry in mounts.mountinfo()):
            raise OSError(22, "as older kernels say")
        return clone(mount_fd, path, clear)

    monkeypatch.setattr(mounts, "clone", before_6_15)
    tar = tar_of("go-one")
    write_meta("go-one", tar, tmp_path / "meta")
    (tmp_path / "data").write_bytes(tar)
    with mounter("classic", tmp_path) as (server, layers):
        server.add(16, Pread(tmp_path / "data"))
        targets = [tmp_path / f"m/{number}" for number in range(12)]
        errors: list[BaseException] = []

        def one(target: Path) -> None:
            try:
                target.mkdir(parents=True)
                layers.mount(tmp_path / "meta", server.path_of(16), target)
            except BaseException as problem:
                errors.append(problem)

        threads = [threading.Thread(target=one, args=(target,)) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert sum(entry.target == os.fsencode(table) for entry in mounts.mountinfo()) == 1
        assert table.stat().st_mode & 0o777 == 0o500
        trees = [shown(target) for target in targets]
        assert trees[1:] == trees[:-1]
        for target in targets:
            layers.unmount(target)
    assert not table.exists()
    assert not any(entry.target.startswith(os.fsencode(tmp_path)) for entry in mounts.mountinfo())
