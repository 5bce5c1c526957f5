"""The daemon ends in every way there is and comes back: what is mounted stays, what was fetched is not fetched again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from harness.coldcache import drop_caches
from harness.containerd import unmount_below
from harness.daemon import start_daemon
from harness.directnode import CONFIG, Client, DirectNode, Published, data_layer, direct_node
from harness.lazyrig import lazy_rig
from harness.manylayers import fill_root
from tests.integration.test_complete import until
from tests.integration.test_lazy import big_layer, sum_of

from soci_snapshotter.containerd.stubs import snapshots_pb2 as pb
from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import SnapshotsStub
from soci_snapshotter.linux import mounts
from soci_snapshotter.serve import keeper_client

pytestmark = pytest.mark.root
ZTOC = Path(__file__).parents[1] / "vectors/pigz-edge3/ztoc.bin"
KNOWN = 200
READY_SECONDS = 2.0
"""On the processor, the best of three: that is the time of day on a machine on which nothing else runs."""


@pytest.fixture(scope="module")
def node() -> Iterator[DirectNode]:
    """One node for the module; each test has images of its own."""
    with direct_node() as found:
        yield found


def mounted(base: Path) -> set[str]:
    """What is mounted below a directory."""
    top = os.fsencode(base) + b"/"
    return {os.fsdecode(e.target[len(top) :]) for e in mounts.mountinfo() if e.target.startswith(top)}


def sums(root: Path, names: list[str]) -> list[str]:
    """sha256 of each file, read from the disk or whoever has it."""
    drop_caches()
    return [sum_of(root / name) for name in names]


def test_ready_in_two_seconds_with_200_layers() -> None:
    """200 lazy layers known, mounted or not: all are mounted when the socket answers, and it answers within 2 s."""
    base = Path(tempfile.mkdtemp(prefix="soci-", dir="/var/tmp"))
    try:
        (base / "d" / "root").mkdir(parents=True)
        fill_root(base / "d" / "root", KNOWN, ZTOC.read_bytes())
        with start_daemon(base / "d", address=base / "run" / "s.sock", config=CONFIG) as daemon:
            assert len(mounted(daemon.root / "m")) == KNOWN
            took = []
            for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
                before = mounted(daemon.root / "m")
                daemon.stop(number)
                assert mounted(daemon.root / "m") == before
                started = time.monotonic()
                daemon.start()
                with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
                    stub = SnapshotsStub(channel)
                    parts = stub.List(pb.ListSnapshotsRequest(), wait_for_ready=True, timeout=20)
                    assert sum(len(part.info) for part in parts) == KNOWN
                took.append((processor_seconds(daemon.pid), time.monotonic() - started))
                assert mounted(daemon.root / "m") == before
            print(f"ready after (processor, clock): {took}")
            assert min(took)[0] < READY_SECONDS, took
    finally:
        unmount_below(base)
        shutil.rmtree(base)


def processor_seconds(pid: int) -> float:
    """What the process has used of processors, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_container_does_not_notice(node: DirectNode, number: signal.Signals, tmp_path: Path) -> None:
    """With the registry away at the start: the same mounts, the same container, no byte fetched again."""
    layer, known = data_layer(number)
    image = node.publish(f"notice{number}", [layer])
    names = list(known)
    with node.client() as client:
        pulled = client.pull(image)
        with client.container(pulled[-1], tmp_path / "root") as root:
            some = names[:4]
            assert sums(root, some) == [known[name] for name in some]
            before, fetched = mounted(node.daemon.root / "m"), settled(node)
            node.daemon.stop(number)
            node.proxy.stall()
            try:
                assert mounted(node.daemon.root / "m") == before
                node.daemon.start()
                assert mounted(node.daemon.root / "m") == before
                assert sums(root, some) == [known[name] for name in some]
                assert node.proxy.received == fetched
            finally:
                node.proxy.resume()
            assert sums(root, names) == list(known.values())
        until(lambda: ready(client), "the daemon does not answer")
        client.remove(pulled)


@pytest.mark.parametrize("how", ["interrupt", "reboot", "power"])
def test_what_was_fetched_is_here_after_unmounting(node: DirectNode, how: str, tmp_path: Path) -> None:
    """SIGINT leaves no mount, and a start makes them again; after a reboot, too, and what was fetched is not fetched
    again. When the power went, what was not on the disk is not believed."""
    layer, known = data_layer(300 + len(how))
    image = node.publish(f"fetched-{how}", [layer])
    names = list(known)[:4]
    with node.client() as client:
        pulled = client.pull(image)
        with client.container(pulled[-1], tmp_path / "root") as root:
            assert sums(root, names) == [known[name] for name in names]
            settled(node)
        [directory] = (node.daemon.root / "layers" / image.layers[0].partition(":")[2]).iterdir()
        ends = {"interrupt": signal.SIGINT, "reboot": signal.SIGTERM, "power": signal.SIGKILL}
        node.daemon.stop(ends[how])
        if how != "interrupt":
            keeper_client.stop(node.daemon.address.parent)
            unmount_below(node.daemon.base)
            other_boot(directory / "spans.live")
        if how == "power":
            (directory / "spans.durable").unlink(missing_ok=True)  # written every 30 s: not yet
        assert mounted(node.daemon.base) == set()
        fetched = node.proxy.received
        node.daemon.start()
        assert len(mounted(node.daemon.root / "m")) == 1
        with client.container(pulled[-1], tmp_path / "root") as root:
            assert sums(root, names) == [known[name] for name in names]
        assert (node.proxy.received > fetched) is (how == "power")
        client.remove(pulled)


def other_boot(live: Path) -> None:
    """As if spans.live had been written in another boot (store.layerfiles: the id stands behind 8 bytes of magic)."""
    with live.open("r+b") as file:
        file.seek(8)
        file.write(b"00000000-0000-0000-0000-000000000000")


def settled(node: DirectNode) -> int:
    """Bytes that came from the registry, when no more come: what is read ahead comes behind the reader."""
    found = -1
    while found != node.proxy.received:
        found = node.proxy.received
        time.sleep(0.5)
    return found


def ready(client: Client) -> bool:
    """Whether the daemon answers this client."""
    try:
        list(client.stub.List(pb.ListSnapshotsRequest(), wait_for_ready=True, timeout=20))
    except grpc.RpcError:
        return False
    return True


@pytest.mark.parametrize(
    "lost",
    ["ztoc", pytest.param("record", marks=pytest.mark.slow), pytest.param("meta", marks=pytest.mark.slow)],
)
def test_one_bad_layer_harms_nobody(node: DirectNode, lost: str, tmp_path: Path) -> None:
    """A layer is spoiled: the start goes on and names its image, its containers get UNAVAILABLE with what to do, another
    image is as before; removed and pulled again it is well."""
    (bad, sums_bad), (good, sums_good) = data_layer(500 + len(lost)), data_layer(600 + len(lost))
    images = [node.publish(f"{name}-{lost}", [layer]) for name, layer in (("bad", bad), ("good", good))]
    with node.client() as client:
        pulled = [client.pull(image) for image in images]
        node.daemon.stop(signal.SIGINT)
        [directory] = (node.daemon.root / "layers" / images[0].layers[0].partition(":")[2]).iterdir()
        spoilt = {
            "record": directory / "layer.json",
            "ztoc": node.daemon.root / "content/blobs/sha256" / directory.name,
            "meta": next(directory.glob("meta-*")),
        }[lost]
        spoilt.unlink()
        logged = len(node.daemon.log)
        node.daemon.start()
        said = [
            json.loads(line) for line in node.daemon.log[logged:].splitlines() if '"level": "error"' in line
        ]
        assert [line for line in said if images[0].layers[0] in line["msg"]], said
        with pytest.raises(grpc.RpcError) as caught, client.container(pulled[0][-1], tmp_path / "bad"):
            pass
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "remove its image and pull it again" in str(caught.value.details())
        with client.container(pulled[1][-1], tmp_path / "good") as root:
            assert sums(root, list(sums_good)[:2]) == list(sums_good.values())[:2]
        client.remove(pulled[0])
        again = client.pull(images[0])
        with client.container(again[-1], tmp_path / "bad") as root:
            assert sums(root, list(sums_bad)[:2]) == list(sums_bad.values())[:2]
        for names in (again, pulled[1]):
            client.remove(names)


def test_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    """One line that names the root and the reason, exit code 2, nothing mounted; with the disk back it starts."""
    base = Path(tempfile.mkdtemp(prefix="soci-", dir="/var/tmp"))
    try:
        root = base / "d" / "root"
        root.mkdir(parents=True)
        with start_daemon(base / "d", address=base / "run" / "s.sock", config=CONFIG) as daemon:
            daemon.stop(signal.SIGTERM)
            subprocess.run(["mount", "--bind", root, root], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", root], check=True)
            logged = len(daemon.log)
            with pytest.raises(RuntimeError, match="did not start"):
                daemon.start()
            assert daemon.process.wait(10) == 2
            [line] = [
                text for text in daemon.log[logged:].splitlines() if text.startswith("soci-snapshotter-grpc:")
            ]
            assert "ead-only file system" in line and str(root) in line
            subprocess.run(["umount", root], check=True)
            daemon.start()
    finally:
        unmount_below(base)
        shutil.rmtree(base)


@pytest.mark.slow
def test_containerd_restarts_meanwhile() -> None:
    """containerd goes and comes while the daemon is down, and while it is up: both find each other, nothing is lost."""
    with lazy_rig() as rig:
        layer, known = big_layer(71, files=4)
        layout = rig.publish("meanwhile", [layer])
        rig.pull("meanwhile")
        names = list(known)
        for number in (signal.SIGTERM, signal.SIGKILL):
            rig.daemon.stop(number)
            rig.containerd.restart()
            rig.daemon.start()
            rig.reconnected()
            with rig.rootfs(layout, "soci") as root:
                rig.containerd.restart()
                assert sums(root, names) == list(known.values())
        rig.containerd.ctr("images", "rm", "--sync", rig.name("meanwhile"))
        until(lambda: not any((rig.daemon.root / "layers").iterdir()), "the layer stayed")


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_in_the_middle(kills: int, tmp_path: Path) -> None:
    """Prepare and Remove, interrupted by kill -9 at moments of chance: after each start every mount, directory and row
    has its like, temporary files are gone, and at the end, with all removed, nothing is left."""
    moments = random.Random(kills)
    with direct_node() as node:
        images = [
            node.publish(
                f"killed{n}", [data_layer(800 + n * 10 + k, files=1, size=1 << 16)[0] for k in range(5)]
            )
            for n in range(2)
        ]
        for _ in range(kills):
            worker = threading.Thread(target=churn, args=(node, images))
            worker.start()
            time.sleep(moments.uniform(0.05, 1.0))
            node.daemon.kill()
            worker.join(60)
            assert not worker.is_alive()
            node.daemon.start()
            consistent(node)
        with node.client() as client:
            until(lambda: ready(client), "the daemon does not answer")
            while rows := [i for part in client.stub.List(pb.ListSnapshotsRequest()) for i in part.info]:
                parents = {row.parent for row in rows}
                for row in rows:
                    if row.name not in parents:
                        client.stub.Remove(pb.RemoveSnapshotRequest(key=row.name))
            client.stub.Cleanup(pb.CleanupRequest())
        root = node.daemon.root
        until(lambda: not any((root / "layers").iterdir()), "layers stayed")
        assert mounted(root / "m") == set() and not any((root / "m").iterdir())
        assert not any((root / "snapshotter/snapshots").iterdir())
        assert not any((root / "content/ingest").iterdir())


def churn(node: DirectNode, images: list[Published]) -> None:
    """Pull and remove until the daemon dies."""
    with node.client() as client:
        try:
            while True:
                for image in images:
                    names = client.pull(image)
                    key = client.key("container")
                    client.stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=names[-1]))
                    client.remove([*names, key])
        except (grpc.RpcError, AssertionError):
            return


def consistent(node: DirectNode) -> None:
    """Every lazy row has a layer, every layer a row, every mount a record, every directory a row."""
    root = node.daemon.root
    with node.client() as client:
        until(lambda: ready(client), "the daemon does not answer")
        client.stub.Cleanup(pb.CleanupRequest())
        rows = [info for part in client.stub.List(pb.ListSnapshotsRequest()) for info in part.info]
    records = [json.loads(path.read_bytes()) for path in root.glob("layers/*/*/layer.json")]
    assert len(records) == len(list(root.glob("layers/*/*")))
    lazy = [row for row in rows if row.name.startswith("lazy:")]
    assert sum(len(record["mounts"]) for record in records) == len(lazy)
    shown = {str(record["shown"].get(h, n)) for record in records for h, n in record["mounts"].items()}
    assert mounted(root / "m") == shown == {path.name for path in (root / "m").iterdir()}
    assert len(list((root / "snapshotter/snapshots").iterdir())) == len(rows) - len(lazy)
    assert not list(root.rglob("*.tmp")) and not any((root / "content/ingest").iterdir())
