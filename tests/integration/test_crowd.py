"""Many at once: clients that want the same chain, and containers that start while their images come and go."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from harness.directnode import Client, Published, data_layer, direct_node
from harness.images import Layer
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_complete import until

from soci_snapshotter.containerd.stubs import snapshots_pb2 as pb
from soci_snapshotter.linux import mounts

pytestmark = pytest.mark.root
CLIENTS = 32
LAYERS = 4
SETTLE_SECONDS = 60.0


def together(number: int, work: Callable[[int], None]) -> None:
    """Run `work` in so many threads that begin at once; the first error is raised."""
    barrier = threading.Barrier(number)
    errors: list[BaseException] = []

    def run(n: int) -> None:
        try:
            barrier.wait()
            work(n)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_32_clients_want_one_chain() -> None:
    """Each gets every layer lazily, all the same snapshots; the registry is asked once for each document and ztoc."""
    with direct_node() as node:
        image = node.publish("chain", [data_layer(n, files=1, size=1 << 16)[0] for n in range(LAYERS)])
        asked_before = len(node.registry.requests())
        names: list[list[str]] = [[] for _ in range(CLIENTS)]

        def pull(n: int) -> None:
            with node.client() as client:
                names[n] = client.pull(image)

        together(CLIENTS, pull)
        assert all(found == names[0] for found in names)
        asked = Counter(
            target for method, target in node.registry.requests()[asked_before:] if method == "GET"
        )
        assert asked and not [target for target, times in asked.items() if times > 1], asked
        assert len([target for target in asked if "/blobs/" in target]) >= LAYERS
        with node.client() as client:
            rows = [info for part in client.stub.List(pb.ListSnapshotsRequest()) for info in part.info]
            assert len(rows) == LAYERS
            client.remove(names[0])
        gone(node.daemon.root)


@pytest.mark.slow
def test_clients_of_two_namespaces_and_removals() -> None:
    """Pulled and removed over and over by two namespaces at once: every answer is right, and nothing is left."""
    with direct_node() as node:
        images = [
            node.publish(f"churn{n}", [data_layer(40 + n + k, files=1, size=1 << 16)[0] for k in range(2)])
            for n in range(2)
        ]

        def churn(n: int) -> None:
            with node.client(f"space{n % 2}") as client:
                for turn in range(3):
                    once(client, images[(n + turn) % 2])

        together(8, churn)
        with node.client() as client:
            sweep(client)
        gone(node.daemon.root)


def once(client: Client, image: Published) -> None:
    """Pull, take a container's mounts, remove. Another client may remove what this one counts on: it begins again."""
    parent = ""
    level = 0
    while level < len(image.layers):
        try:
            parent = client.prepare(image, level, parent)
            level += 1
        except (grpc.RpcError, AssertionError) as error:
            if isinstance(error, grpc.Call):
                assert error.code() == grpc.StatusCode.NOT_FOUND, error
            parent, level = "", 0
    key = client.key("container")
    try:
        assert client.stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=parent)).mounts
        client.stub.Remove(pb.RemoveSnapshotRequest(key=key))
        client.stub.Remove(pb.RemoveSnapshotRequest(key=parent))
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION), error


def sweep(client: Client) -> None:
    """Remove every snapshot."""
    while rows := [info for part in client.stub.List(pb.ListSnapshotsRequest()) for info in part.info]:
        parents = {row.parent for row in rows}
        for row in rows:
            if row.name not in parents:
                client.stub.Remove(pb.RemoveSnapshotRequest(key=row.name))
    client.stub.Cleanup(pb.CleanupRequest())


def gone(root: Path) -> None:
    """Wait until no layer, mount, directory or ztoc is left."""
    places = [root / "layers", root / "m", root / "snapshotter/snapshots", root / "content/blobs/sha256"]

    def left() -> list[str]:
        return [str(path) for place in places for path in place.iterdir()]

    end = time.monotonic() + SETTLE_SECONDS
    while left() and time.monotonic() < end:
        time.sleep(0.1)
    assert left() == []
    top = os.fsencode(root) + b"/"
    assert [entry.target for entry in mounts.mountinfo() if entry.target.startswith(top)] == []


@pytest.mark.parametrize(
    ("containers", "images"),
    [
        pytest.param(12, 3, marks=pytest.mark.slow),
        pytest.param(100, 10, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_containers_start_while_images_come_and_go(containers: int, images: int, shell: Layer) -> None:
    """Containers of several images start at once while images are removed and pulled again: each reads the right bytes,
    and afterwards mounts, directories, descriptors and disk are where they were."""
    with lazy_rig(
        "[pull_modes.soci_v1]\nenable = true\n[background_fetch]\nsilence_period_msec = 500\n"
    ) as rig:
        made = {}
        for number in range(images):
            layer, sums = data_layer(900 + number, files=3, size=1 << 18)
            rig.publish(f"crowd{number}", [shell, layer])
            made[f"crowd{number}"] = sums
        rig.pull("crowd0")
        rig.containerd.run(rig.name("crowd0"), "/bin/ls", "/", snapshotter="soci")
        empty(rig, {"crowd0": made["crowd0"]})
        before = held(rig)
        for name in made:
            rig.pull(name)
        stop = threading.Event()

        def start(n: int) -> None:
            name = f"crowd{n % images}"
            chosen = sorted(made[name])
            found = ""
            for _ in range(5):  # its image may have gone a moment ago: then it is pulled again
                if rig.containerd.ctr("images", "ls", "-q", f"name=={rig.name(name)}").stdout.strip():
                    run = (
                        "run",
                        "--rm",
                        "--snapshotter",
                        "soci",
                        rig.name(name),
                        f"c{n}-{os.urandom(3).hex()}",
                    )
                    done = rig.containerd.ctr(
                        *run, "/bin/sha256sum", *(f"/{c}" for c in chosen), check=False, timeout=600
                    )
                    found = done.stdout
                    if done.returncode == 0:
                        break
                    assert "not found" in done.stderr, done.stderr
                pull(rig, name)
            assert [line.split()[0] for line in found.splitlines()] == [made[name][c] for c in chosen]

        def come_and_go() -> None:
            turn = 0
            while not stop.wait(0.2):
                name = f"crowd{turn % images}"
                rig.containerd.ctr("images", "rm", rig.name(name), check=False)
                pull(rig, name)
                turn += 1

        goes = threading.Thread(target=come_and_go)
        goes.start()
        try:
            together(containers, start)
        finally:
            stop.set()
            goes.join()
        empty(rig, made)
        after = held(rig)
        assert after == before


def pull(rig: Rig, name: str) -> None:
    """Pull in a process of its own kind: containerd's client, through `soci`, whose flags are not this process's."""
    command = ("pull", "--quiet", "--plain-http", "--snapshotter", "soci")
    assert rig.soci(*command, rig.name(name)) == 0


def empty(rig: Rig, names: dict[str, dict[str, str]]) -> None:
    """Remove the images, and wait until the daemon has nothing of them."""
    for name in names:
        rig.containerd.ctr("images", "rm", rig.name(name), check=False)
    rig.containerd.garbage_collect()
    until(lambda: not any((rig.daemon.root / "layers").iterdir()), "layers stayed", SETTLE_SECONDS)
    until(lambda: not any((rig.daemon.root / "snapshotter/snapshots").iterdir()), "directories stayed")
    time.sleep(2)  # workers that were started for a layer end by themselves


def held(rig: Rig) -> dict[str, int]:
    """What the node holds: mounts and descriptors by number, disk in steps that a few pages of rows do not cross."""
    top = os.fsencode(rig.base) + b"/"
    fds = Path(f"/proc/{rig.daemon.pid}/fd")
    links = []
    for fd in fds.iterdir():
        try:
            links.append(os.readlink(fd))
        except FileNotFoundError:
            continue
    files = [path for path in rig.daemon.root.rglob("*") if path.is_file()]
    return {
        "mounts": sum(1 for entry in mounts.mountinfo() if entry.target.startswith(top)),
        "files": len(files),
        "files open": sum(1 for link in links if link.startswith(str(rig.daemon.root))),
        "MB": sum(path.stat().st_blocks * 512 for path in files) >> 22,
    }
