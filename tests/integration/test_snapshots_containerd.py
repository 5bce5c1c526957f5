"""The installed containerd with our snapshots service as its proxy plugin."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from harness.containerd import Containerd, start_containerd, unmount_below
from harness.images import layer_from_dir, load, shell_rootfs, write_layout

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import add_SnapshotsServicer_to_server
from soci_snapshotter.daemon.snapshots_service import SnapshotsService
from soci_snapshotter.errors import AlreadyExists
from soci_snapshotter.policy import prepare as policy
from soci_snapshotter.snapshotter.directories import overlay_options
from soci_snapshotter.snapshotter.ports import Declined, LazyLayer, LazyRequest, Usage
from soci_snapshotter.snapshotter.snapshotter import Snapshotter

pytestmark = pytest.mark.root

D = ["sha256:" + char * 64 for char in "0123456789abcdef"]


@dataclass
class Prepared:
    """Lazy layers that are directories made beforehand, by layer digest: here containerd is under test."""

    directories: dict[str, Path] = field(default_factory=dict)
    requests: list[LazyRequest] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def prepare(self, request: LazyRequest) -> LazyLayer | Declined:
        self.requests.append(request)
        if request.layer_digest not in self.directories:
            return Declined("no ztoc for this layer")
        return LazyLayer(request.layer_digest, list(self.directories).index(request.layer_digest), 1, 1)

    def serves(self, request: LazyRequest, mount_id: int, layer_key: str) -> None:
        del request, mount_id, layer_key

    def committed(self, mount_id: int) -> None:
        del mount_id

    def lowerdir(self, mount_id: int) -> bytes:
        return bytes(list(self.directories.values())[mount_id])

    def usage(self, mount_id: int) -> Usage:
        return Usage(mount_id, 1)

    def release(self, mount_ids: Sequence[int]) -> None:
        self.released += mount_ids

    def returned(self, paths: frozenset[bytes]) -> None:
        del paths


@dataclass
class Node:
    """containerd, our service beside it, and what it keeps."""

    base: Path
    containerd: Containerd
    snapshotter: Snapshotter
    layers: Prepared

    def keys(self) -> list[str]:
        return [row.key for row in self.snapshotter.walk()]

    def directories(self) -> list[str]:
        return os.listdir(self.base / "soci/snapshots")


@pytest.fixture
def node() -> Iterator[Node]:
    layers = Prepared()
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="snap-", dir="/tmp")))
        stack.callback(unmount_below, base)
        options = overlay_options()
        snapshotter = Snapshotter(bytes(base / "soci"), lazy=layers, overlay_options=options)
        stack.enter_context(snapshotter)
        server = grpc.server(stack.enter_context(ThreadPoolExecutor(8)))
        add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), server)
        server.add_insecure_port(f"unix:{base}/s.sock")
        server.start()
        stack.callback(lambda: server.stop(None).wait())
        plugins = {"soci": base / "s.sock"}
        containerd = stack.enter_context(start_containerd(base / "c", proxy_plugins=plugins))
        yield Node(base, containerd, snapshotter, layers)


def labels(chain: int, layer: int) -> dict[str, str]:
    return {
        policy.TARGET: D[chain],
        policy.IMAGE_REF: "registry.test/image:1",
        policy.MANIFEST_DIGEST: D[15],
        policy.LAYER_DIGEST: D[layer],
        policy.IMAGE_LAYERS: f"{D[8]},{D[9]}",
    }


def test_ordinary_image(node: Node, tmp_path: Path) -> None:
    """An image unpacked through our mounts runs and writes; once it is deleted nothing of it is left."""
    second = tmp_path / "second"
    (second / "etc").mkdir(parents=True)
    (second / "etc/motd").write_text("from the second layer\n")
    stack = [layer_from_dir(shell_rootfs(tmp_path / "rootfs")), layer_from_dir(second)]
    load(write_layout(tmp_path / "layout", stack, name="test.local/shell:latest"), node.containerd)
    run = ("run", "--rm", "--snapshotter", "soci", "test.local/shell:latest")
    said = node.containerd.ctr(*run, "one", "sh", "-c", "echo x >/etc/new; cat /etc/motd /etc/new").stdout
    assert said == "from the second layer\nx\n"
    node.containerd.garbage_collect()
    kinds = sorted(row.kind.name for row in node.snapshotter.walk())
    assert kinds == ["COMMITTED", "COMMITTED"]

    node.containerd.ctr("images", "rm", "--sync", "test.local/shell:latest")
    node.containerd.garbage_collect()
    assert node.keys() == []
    assert node.directories() == []


def test_lazy_chain(node: Node, tmp_path: Path) -> None:
    """containerd takes our lazy rows for its chain, stacks a container on them, and collects them."""
    rootfs, top = shell_rootfs(tmp_path / "rootfs"), tmp_path / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc/motd").write_text("lazily\n")
    node.layers.directories = {D[8]: rootfs, D[9]: top}
    with ContainerdClient(node.containerd.address, "default") as client, client.lease() as leased:
        snapshots = leased.snapshots("soci")
        with pytest.raises(AlreadyExists):
            snapshots.prepare("extract-1", "", labels(0, 8))
        with pytest.raises(AlreadyExists):
            snapshots.prepare("extract-2", D[0], labels(1, 9))
        assert [snapshots.stat(key).parent for key in (D[0], D[1])] == ["", D[0]]
        [mount] = snapshots.prepare("container", D[1])
        assert f"lowerdir={top}:{rootfs}" in mount.options
        snapshots.remove("container")
        lower, upper = node.layers.requests
        # containerd 1.6 sends no namespace header on: it comes from the key
        assert (lower.namespace, lower.target, lower.parent_chain_id) == ("default", D[0], "")
        assert (upper.target, upper.parent_chain_id) == (D[1], D[0])
    node.containerd.garbage_collect()
    assert node.keys() == []
    assert sorted(node.layers.released) == [0, 1]


def test_two_namespaces(node: Node, tmp_path: Path) -> None:
    """A second namespace takes over the first one's rows; they stay until neither needs them."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    node.layers.directories = {D[8]: tmp_path / "a", D[9]: tmp_path / "b"}
    with ExitStack() as first:
        for namespace in ("one", "two"):
            client = ContainerdClient(node.containerd.address, namespace)
            leases = first if namespace == "one" else ExitStack()
            with leases if namespace == "two" else ExitStack():
                leased = leases.enter_context(leases.enter_context(client).lease())
                snapshots = leased.snapshots("soci")
                for chain, layer, parent in ((0, 8, ""), (1, 9, D[0])):
                    with pytest.raises(AlreadyExists):
                        snapshots.prepare(f"extract-{chain}", parent, labels(chain, layer))
        assert len(node.keys()) == 2
        assert len(node.layers.requests) == 2
        node.containerd.garbage_collect("two")
        assert len(node.keys()) == 2
    node.containerd.garbage_collect("one")
    assert node.keys() == []


def test_declined_layer_above_a_lazy_one(node: Node, tmp_path: Path) -> None:
    """A declined layer is an ordinary snapshot on a lazy parent, committed by containerd as ever."""
    (tmp_path / "a").mkdir()
    node.layers.directories = {D[8]: tmp_path / "a"}
    with ContainerdClient(node.containerd.address, "default") as client, client.lease() as leased:
        snapshots = leased.snapshots("soci")
        with pytest.raises(AlreadyExists):
            snapshots.prepare("extract-1", "", labels(0, 8))
        [mount] = snapshots.prepare("extract-2", D[0], labels(1, 9))
        assert mount.type == "overlay"
        snapshots.commit(D[1], "extract-2", labels(1, 9))
        [mount] = snapshots.prepare("container", D[1])
        assert any(option.endswith(f":{tmp_path}/a") for option in mount.options)
