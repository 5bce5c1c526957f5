"""Containers in user namespaces: a real registry, containerd, runc and kernel."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containerd import unmount_below
from harness.images import Layer, Layout, layer_from_dir, layer_from_tar, shell_rootfs, write_layout
from harness.lazyrig import Rig, layout_chain, lazy_rig

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.containerd.types import Mount
from soci_snapshotter.errors import Invalid
from soci_snapshotter.linux.mounts import mountinfo
from soci_snapshotter.policy.prepare import GID_MAPPING, UID_MAPPING

pytestmark = pytest.mark.root

USERS, GROUPS, SIZE = 100000, 300000, 65536
LABELS = {
    UID_MAPPING: f"0:{USERS}:{SIZE}",
    GID_MAPPING: f"0:{GROUPS}:{SIZE}",
    "containerd.io/gc.root": "test",
}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One node for the module; each test has a repository of its own."""
    with lazy_rig() as found:
        found.base.chmod(0o711)  # the users of a namespace get through to their root file systems
        yield found


@pytest.fixture(scope="module")
def bottom(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    """A root file system with a shell."""
    return layer_from_dir(shell_rootfs(tmp_path_factory.mktemp("shell")))


def owned(name: str, *owners: tuple[int, int]) -> Layer:
    """A layer of files called <name>-<user>-<group>, whose owners those are."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for user, group in owners:
            member = tarfile.TarInfo(f"owned/{name}-{user}-{group}")
            member.uid, member.gid, member.mode = user, group, 0o644
            member.size = len(member.name)
            tar.addfile(member, io.BytesIO(member.name.encode()))
    return layer_from_tar(stream.getvalue())


def mapped(rig: Rig) -> list[bytes]:
    """The mapped mounts of the node."""
    prefix = os.fsencode(rig.daemon.root / "snapshotter/i") + b"/"
    return [each.target for each in mountinfo() if each.target.startswith(prefix)]


def nothing_mapped(rig: Rig) -> None:
    """After containerd has told us of the snapshots that are no more."""
    rig.containerd.garbage_collect()
    assert mapped(rig) == []


@contextlib.contextmanager
def rootfs(rig: Rig, chain: str, labels: dict[str, str] = LABELS) -> Iterator[Path]:
    """A container's root file system above `chain`, where a user of the namespace can get at it."""
    base = Path(tempfile.mkdtemp(prefix="idmapped-", dir="/var/tmp"))
    base.chmod(0o711)
    target = base / "rootfs"
    target.mkdir()
    key = f"container-{os.urandom(4).hex()}"
    snapshots = ("snapshots", "--snapshotter", "soci")
    try:
        with ContainerdClient(rig.containerd.address) as client:
            client.snapshots("soci").prepare(key, chain, {**labels, "containerd.io/gc.root": "test"})
        script = rig.containerd.ctr(*snapshots, "mounts", str(target), key).stdout
        subprocess.run(["sh", "-c", script], check=True)
        yield target
    finally:
        unmount_below(base)
        shutil.rmtree(base)
        rig.containerd.ctr(*snapshots, "rm", key, check=False)


def in_container(root: Path, script: str) -> str:
    """What a shell script says in a runc container with a user namespace; it must succeed."""
    bundle = root.parent
    subprocess.run(["runc", "spec", "--bundle", str(bundle)], check=True)
    spec = json.loads((bundle / "config.json").read_bytes())
    spec["process"].update(terminal=False, args=["/bin/sh", "-c", script])
    spec["root"] = {"path": "rootfs", "readonly": False}
    spec["linux"]["namespaces"].append({"type": "user"})
    for kind, first in (("uidMappings", USERS), ("gidMappings", GROUPS)):
        spec["linux"][kind] = [{"containerID": 0, "hostID": first, "size": SIZE}]
    (bundle / "config.json").write_text(json.dumps(spec))
    name = bundle.name
    command = ["runc", "--root", str(bundle / "state"), "run", "--bundle", str(bundle), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LIST = "for f in /owned/*; do stat -c '%n %u %g %a' $f; cat $f >/dev/null || echo unreadable; done"


def listing(*names: str) -> list[str]:
    """What LIST says of these files when owners and bytes are right."""
    found = []
    for name in sorted(names):
        _, user, group = name.split("-")
        found.append(f"/owned/{name} {user} {group} 644")
    return found


def pull_without_index(rig: Rig, repository: str, layers: list[Layer]) -> Layout:
    """An image whose layers containerd unpacks."""
    layout = rig.publish(repository, layers, index=False)
    rig.pull(repository)
    return layout


def test_all_layers_lazy(rig: Rig, bottom: Layer) -> None:
    """Inside a user namespace every file belongs to whom the image says, also one written by the container's root and
    a file copied up; outside, to the mapped users. No data is fetched for the mapping, nothing is left behind.
    """
    layers = [bottom, owned("a", (0, 0), (7, 8)), owned("b", (1000, 1000), (0, 42))]
    layout = rig.publish("lazy", layers)
    rig.pull("lazy")
    before = rig.proxy.received
    with rootfs(rig, layout_chain(layout)) as root:
        assert rig.proxy.received == before
        assert len(mapped(rig)) == 3
        said = in_container(
            root,
            f"{LIST}; echo >/new; stat -c 'new %u %g' /new; echo y >>/owned/a-7-8; stat -c 'copied %u %g' /owned/a-7-8",
        )
        assert said.splitlines() == [
            *listing("a-0-0", "a-7-8", "b-1000-1000", "b-0-42"),
            "new 0 0",
            "copied 7 8",
        ]
        for name, owner in (("new", (USERS, GROUPS)), ("owned/a-7-8", (USERS + 7, GROUPS + 8))):
            status = (root / name).stat()
            assert (status.st_uid, status.st_gid) == owner, name
        status = root.stat()
        assert (status.st_uid, status.st_gid) == (USERS, GROUPS)
    nothing_mapped(rig)
    assert os.listdir(rig.daemon.root / "snapshotter/i") == []


def test_mixed_and_local_layers(rig: Rig, bottom: Layer) -> None:
    """A lazy layer above one that containerd unpacked, one unpacked above a lazy one, and none lazy: owners are right."""
    unpacked = pull_without_index(rig, "local", [bottom, owned("l", (5, 6))])
    with rootfs(rig, layout_chain(unpacked)) as root:
        assert in_container(root, LIST).splitlines() == listing("l-5-6")
    layout = rig.publish("mixed", [bottom, owned("l", (5, 6)), owned("m", (9, 10))])
    rig.pull("mixed")
    with ContainerdClient(rig.containerd.address) as client, client.lease() as leased:
        snapshots = leased.snapshots("soci")
        top = layout_chain(layout)
        assert snapshots.stat(top).labels["containerd.io/snapshot/remote"]
        with rootfs(rig, top, {}) as plain:
            shutil.copytree(plain / "owned", rig.base / "copied")
        [mount] = snapshots.prepare("unpacking", top)
        upper = next(option for option in mount.options if option.startswith("upperdir="))
        above = Path(upper.removeprefix("upperdir=")) / "owned"
        above.mkdir(mode=0o755)
        (above / "u-3-4").write_text("x")
        os.chown(above / "u-3-4", 3, 4)
        (above / "u-3-4").chmod(0o644)
        snapshots.commit("test-mixed", "unpacking", {"containerd.io/gc.root": "test"})
    with rootfs(rig, "test-mixed") as root:
        kinds = {os.path.basename(path)[:1] == b"s" for path in mapped(rig)}
        assert kinds == {True, False}
        assert in_container(root, LIST).splitlines() == listing("l-5-6", "m-9-10", "u-3-4")
    nothing_mapped(rig)


def test_garbage_in_labels(rig: Rig, bottom: Layer) -> None:
    """Labels that are no mapping: INVALID_ARGUMENT naming the label, and neither mount nor directory."""
    layout = write_layout(rig.base / "garbage", [bottom])
    rig.publish("garbage", [bottom])
    rig.pull("garbage")
    directories = set(os.listdir(rig.daemon.root / "snapshotter/snapshots"))
    with ContainerdClient(rig.containerd.address) as client:
        for text in ("x", "0:1", "1:1:1", "-1:-1:-2", "0:0:0"):
            with pytest.raises(Invalid, match="uidmapping"):
                client.snapshots("soci").prepare("g", layout_chain(layout), {**LABELS, UID_MAPPING: text})
    assert mapped(rig) == []
    assert set(os.listdir(rig.daemon.root / "snapshotter/snapshots")) == directories


def test_containerd_without_remap_ids(rig: Rig, bottom: Layer) -> None:
    """A containerd that cannot be told of remap-ids changes owners itself, in a snapshot of its own: then nothing is
    mapped twice.
    """
    rig.publish("copied", [bottom, owned("c", (21, 22))])
    rig.pull("copied")
    maps = ("--uidmap", f"0:{USERS}:{SIZE}", "--gidmap", f"0:{USERS}:{SIZE}", "--remap-labels")
    run = ("run", "--rm", "--snapshotter", "soci", *maps, rig.name("copied"), "copied")
    assert rig.containerd.ctr(*run, "/bin/sh", "-c", LIST).stdout.splitlines() == listing("c-21-22")
    nothing_mapped(rig)


def test_restarts(rig: Rig, bottom: Layer) -> None:
    """A daemon that was killed adopts the mapped mounts; after a stop that unmounted everything new ones come when
    asked for.
    """
    layout = rig.publish("restarted", [bottom, owned("r", (11, 12))])
    rig.pull("restarted")
    with rootfs(rig, layout_chain(layout)) as root:
        before = {each.target: each.mount_id for each in mountinfo() if each.target in mapped(rig)}
        rig.daemon.kill()
        rig.daemon.start()
        assert set(lowerdirs(mount_of_container(rig))) == {os.fsdecode(path) for path in before}
        assert before == {each.target: each.mount_id for each in mountinfo() if each.target in mapped(rig)}
        assert in_container(root, LIST).splitlines() == listing("r-11-12")
        rig.daemon.stop()
        assert mapped(rig) == []
        rig.daemon.start()
        assert mapped(rig) == []
        again = lowerdirs(mount_of_container(rig))
        assert {os.fsencode(path) for path in again} == set(mapped(rig))
        status = Path(again[0], "owned/r-11-12").stat()
        assert (status.st_uid, status.st_gid) == (USERS + 11, GROUPS + 12)
        rig.reconnected()
    nothing_mapped(rig)


def mount_of_container(rig: Rig) -> Mount:
    """What the daemon itself, containerd left out, says to mount for the only container."""
    with ContainerdClient(str(rig.daemon.address)) as client:
        snapshots = client.snapshots("soci")
        [key] = [found.name for found in snapshots.find("kind==active") if "container-" in found.name]
        [mount] = snapshots.mounts(key)
        return mount


def lowerdirs(mount: Mount) -> list[str]:
    """Of an overlay."""
    [lowers] = [option for option in mount.options if option.startswith("lowerdir=")]
    return lowers.removeprefix("lowerdir=").split(":")
