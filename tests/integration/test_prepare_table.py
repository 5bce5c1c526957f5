"""Prepare's decision table at the daemon's socket: a real registry behind it, and what containerd would be answered."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from harness.images import Layer, Layout
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_eager import FALLBACK, PRIMARY
from tests.integration.test_lazy import big_layer

from soci_snapshotter.containerd.stubs import snapshots_pb2 as pb
from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import SnapshotsStub
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.policy import prepare as policy

pytestmark = pytest.mark.root

NAMESPACE = (("containerd-namespace", "k8s.io"),)
SIZE = "containerd.io/snapshot/remote/soci.size"
SMALL = 100_000
MIN_SIZE = f"[pull_modes.soci_v1]\nenable = true\n[snapshotter]\nmin_layer_size = {SMALL}\n"
Code = grpc.StatusCode


@dataclass
class Image:
    """An image in the registry, and the labels that containerd's unpacker would send for its layers."""

    rig: Rig
    layout: Layout
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        [image] = self.layout.images
        config = (self.layout.path / "blobs" / str(image.config["digest"]).replace(":", "/")).read_bytes()
        self.chain = [str(each) for each in oci.chain_ids(oci.decode_config(config).diff_ids)]
        self.manifest = str(image.manifest["digest"])
        self.layers = [(str(each["digest"]), str(each["size"])) for each in image.layers]

    def labels(self, position: int) -> dict[str, str]:
        """Of the Prepare of one layer."""
        return {
            policy.TARGET: self.chain[position],
            policy.IMAGE_REF: self.rig.name(self.layout.path.name),
            policy.MANIFEST_DIGEST: self.manifest,
            policy.LAYER_DIGEST: self.layers[position][0],
            policy.IMAGE_LAYERS: ",".join(digest for digest, _ in self.layers[position:]),
            SIZE: self.layers[position][1],
            **self.extra,
        }


class Socket:
    """The daemon's gRPC socket, spoken to as containerd does, but without containerd."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._channel = grpc.insecure_channel(f"unix:{rig.daemon.address}")
        self.stub = SnapshotsStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def prepare(
        self,
        key: str,
        parent: str = "",
        labels: dict[str, str] | None = None,
        header: Sequence[tuple[str, str]] = NAMESPACE,
    ) -> list[str] | Code:
        """The options of the mount to make, or the status."""
        request = pb.PrepareSnapshotRequest(snapshotter="soci", key=key, parent=parent, labels=labels or {})
        try:
            [mount] = self.stub.Prepare(request, metadata=tuple(header), timeout=120).mounts
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            self.details = error.details() or ""
            return error.code()
        return [mount.type, mount.source, *mount.options]

    def lazily(self, image: Image, position: int, parent: str = "", key: str = "") -> pb.Info:
        """Prepare a layer that must be ALREADY_EXISTS; the row that containerd then looks for."""
        key = key or new_key(image.chain[position])
        assert self.prepare(key, parent, image.labels(position)) == Code.ALREADY_EXISTS, key
        self.gone(key)
        return self.found(image.chain[position], parent)

    def found(self, target: str, parent: str) -> pb.Info:
        """The only committed row with this target on this parent (containerd's proxy asks for just that)."""
        query = f'labels."{policy.TARGET}"=={target},parent=="{parent}"'
        [row] = [row for row in self.rows(query) if row.kind == pb.COMMITTED]
        return row

    def rows(self, query: str = "") -> list[pb.Info]:
        """What List says."""
        request = pb.ListSnapshotsRequest(snapshotter="soci", filters=[query] if query else [])
        return [row for answer in self.stub.List(request, metadata=NAMESPACE) for row in answer.info]

    def gone(self, key: str) -> None:
        """There is no such snapshot."""
        assert self.code(self.stub.Stat, pb.StatSnapshotRequest(key=key)) == Code.NOT_FOUND

    def code(self, method: object, request: object) -> Code:
        """The status of a call."""
        assert callable(method)
        try:
            method(request, metadata=NAMESPACE, timeout=60)
        except grpc.RpcError as error:
            assert isinstance(error, grpc.Call)
            self.details = error.details() or ""
            return error.code()
        return Code.OK

    def remove(self, key: str) -> Code:
        """Remove."""
        return self.code(self.stub.Remove, pb.RemoveSnapshotRequest(key=key))

    def clear(self) -> None:
        """Remove every snapshot, children first."""
        while rows := self.rows():
            parents = {row.parent for row in rows}
            for row in rows:
                if row.name not in parents:
                    assert self.remove(row.name) == Code.OK
        self._rig.proxy.resume()


def new_key(name: str) -> str:
    """A key of an extraction, as containerd's metadata hands it on."""
    return f"k8s.io/7/extract-{secrets.token_hex(4)} {name}"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A node with v1 and v2 on; each test has images of its own."""
    with lazy_rig() as found:
        yield found


@pytest.fixture
def socket(rig: Rig) -> Iterator[Socket]:
    """The socket; what a test prepared is removed."""
    made = Socket(rig)
    yield made
    made.clear()
    made.close()


def image(rig: Rig, name: str, *layers: Layer, index: bool = True) -> Image:
    """Publish an image."""
    return Image(rig, rig.publish(name, list(layers), index=index))


def layer(seed: int) -> Layer:
    """A layer of one file."""
    return big_layer(seed, files=1, size=200_000)[0]


def lower(options: list[str] | Code) -> list[Path]:
    """The lowerdirs of an overlay."""
    assert isinstance(options, list)
    [found] = [each for each in options if each.startswith("lowerdir=")]
    return [Path(each) for each in found.removeprefix("lowerdir=").split(":")]


def test_no_target(socket: Socket) -> None:
    """Without snapshot.ref: an ordinary snapshot, whatever else is labelled, with no namespace either."""
    labels = {policy.IMAGE_REF: "registry.test/x:1", policy.LAYER_DIGEST: "sha256:" + "a" * 64}
    for key, header in (("k8s.io/1/a", NAMESPACE), ("no namespace", ())):
        made = socket.prepare(key, "", labels, header)
        assert isinstance(made, list) and made[0] == "bind"


def test_lazy_rows(rig: Rig, socket: Socket) -> None:
    """A lazy layer is a committed row found by its target and parent, with its labels; the key asked for is gone. Asked
    again, it is the same row; on another parent another one; a namespace comes from the header, or else from the key,
    and is required.
    """
    made = image(rig, "rows", layer(801), layer(802))
    assert socket.prepare("no/namespace", "", made.labels(0), ()) == Code.FAILED_PRECONDITION
    assert "namespace" in socket.details
    first = socket.lazily(made, 0)
    assert first.labels[policy.REMOTE] == "remote snapshot"
    assert first.labels[policy.REMOTE_NAMESPACE] == "k8s.io"
    assert first.labels[policy.HAS_INDEX] == "true"
    assert socket.lazily(made, 0).name == first.name
    second = socket.lazily(made, 1, first.name)
    assert second.parent == first.name
    # Another namespace unpacked the first layer itself: its chain is another one.
    assert isinstance(socket.prepare("other/1/x", "", {}), list)
    commit = pb.CommitSnapshotRequest(
        key="other/1/x", name=f"other/2/{made.chain[0]}", labels={policy.TARGET: made.chain[0]}
    )
    assert socket.code(socket.stub.Commit, commit) == Code.OK
    key = f"other/3/extract-1 {made.chain[1]}"
    assert socket.prepare(key, commit.name, made.labels(1), ()) == Code.ALREADY_EXISTS
    other = socket.found(made.chain[1], commit.name)
    assert other.name != second.name
    assert other.labels[policy.REMOTE_NAMESPACE] == "other"
    socket.gone(key)
    # A lazy layer above one that was unpacked: a container has both below it.
    mixed = lower(socket.prepare("other/4/container", other.name))
    assert (mixed[0].parent.name, mixed[1].name) == ("m", "fs")
    assert (mixed[0] / "data-802-000").stat().st_size == 200_000


def test_left_to_containerd(rig: Rig, socket: Socket) -> None:
    """No index, a label missing or broken: mounts, under the key that was asked for, and nothing committed."""
    plain = image(rig, "noindex", layer(811), index=False)
    made = socket.prepare(key := new_key("x"), "", plain.labels(0))
    assert isinstance(made, list) and made[0] == "bind"
    assert socket.code(socket.stub.Stat, pb.StatSnapshotRequest(key=key)) == Code.OK
    indexed = image(rig, "labels", layer(812))
    for missing in (policy.IMAGE_REF, policy.MANIFEST_DIGEST, policy.LAYER_DIGEST):
        labels = {name: text for name, text in indexed.labels(0).items() if name != missing}
        assert isinstance(socket.prepare(new_key("y"), "", labels), list), missing
    for broken in (policy.TARGET, policy.MANIFEST_DIGEST, policy.LAYER_DIGEST, policy.INDEX_DIGEST):
        labels = {**indexed.labels(0), broken: "sha256:../../etc"}
        assert isinstance(socket.prepare(new_key("z"), "", labels), list), broken
    assert not [row for row in socket.rows() if row.kind == pb.COMMITTED]


def test_registry_away(rig: Rig, socket: Socket) -> None:
    """What fails for want of the registry is left to containerd, and tried anew with the next Prepare."""
    made = image(rig, "away", layer(821))
    reference = made.labels(0)[policy.IMAGE_REF].replace(str(rig.proxy.port), "1")
    labels = {**made.labels(0), policy.IMAGE_REF: reference}
    assert isinstance(socket.prepare(new_key("x"), "", labels), list)
    socket.lazily(made, 0)


def test_views_and_removal(rig: Rig, socket: Socket) -> None:
    """A view of one lazy layer is a read-only bind of it, of two an overlay; a parent cannot be removed before its
    children, a committed snapshot has no mounts, a parent that is not there is NOT_FOUND.
    """
    made = image(rig, "views", layer(831), layer(832))
    first = socket.lazily(made, 0)
    second = socket.lazily(made, 1, first.name)
    view = pb.ViewSnapshotRequest
    [one] = socket.stub.View(view(key="k8s.io/1/v1", parent=first.name)).mounts
    assert (one.type, list(one.options)) == ("bind", ["ro", "rbind"])
    assert os.listdir(one.source) == ["data-831-000"]
    [two] = socket.stub.View(view(key="k8s.io/2/v2", parent=second.name)).mounts
    assert two.type == "overlay"
    assert not [each for each in two.options if each.startswith("upperdir")]
    assert socket.remove(first.name) == Code.FAILED_PRECONDITION
    assert socket.code(socket.stub.Mounts, pb.MountsRequest(key=first.name)) == Code.FAILED_PRECONDITION
    assert socket.prepare("k8s.io/3/x", "nobody") == Code.NOT_FOUND
    for key in ("k8s.io/1/v1", "k8s.io/2/v2", second.name, first.name):
        assert socket.remove(key) == Code.OK, key
    assert socket.rows() == []


def test_unreachable_ancestors(rig: Rig, socket: Socket) -> None:
    """While a lazy layer below cannot be brought up, Mounts and Prepare above it are UNAVAILABLE and name it; what does
    not stand on it is as ever.
    """
    made = image(rig, "lost", layer(841))
    row = socket.lazily(made, 0)
    assert isinstance(socket.prepare("k8s.io/1/container", row.name), list)
    rig.daemon.stop()
    [record] = (rig.daemon.root / "layers" / digests.parse(made.layers[0][0]).hex).glob("*/layer.json")
    kept = record.read_bytes()
    record.write_bytes(b"{")
    rig.daemon.start()
    mounts = pb.MountsRequest(key="k8s.io/1/container")
    assert socket.code(socket.stub.Mounts, mounts) == Code.UNAVAILABLE
    assert made.layers[0][0] in socket.details
    assert socket.prepare("k8s.io/2/container", row.name) == Code.UNAVAILABLE
    assert isinstance(socket.prepare("k8s.io/3/other"), list)
    rig.daemon.stop()
    record.write_bytes(kept)
    rig.daemon.start()
    assert socket.code(socket.stub.Mounts, mounts) == Code.OK


def test_layers_that_are_not_lazy() -> None:
    """Below min_layer_size (by the label, and by the manifest without one), and where the index has no ztoc, the layer is
    fetched and unpacked here: a committed row that is not lazy. Where that fails, containerd does it.
    """
    small = big_layer(851, files=1, size=50_000)[0]
    with lazy_rig(MIN_SIZE) as node:
        socket = Socket(node)
        made = image(node, "small", small, layer(852))
        for drop in ("", SIZE):
            labels = {name: text for name, text in made.labels(0).items() if name != drop}
            assert socket.prepare(new_key("s"), "", labels) == Code.ALREADY_EXISTS
        row = socket.found(made.chain[0], "")
        assert policy.REMOTE not in row.labels
        assert row.labels[policy.HAS_INDEX] == "true"
        assert socket.lazily(made, 1, row.name).labels[policy.REMOTE]
        sparse = Image(node, node.publish("sparse", [layer(853), big_layer(854, files=2)[0]], index=False))
        name = node.name("sparse")
        node.containerd.ctr("images", "pull", "--plain-http", name)
        assert node.soci("create", "--min-layer-size", "1000000", name) == 0
        assert node.soci("push", "--plain-http", name) == 0
        lie = {**sparse.labels(0), policy.TARGET: "sha256:" + "5" * 64}
        assert isinstance(socket.prepare(new_key("lie"), "", lie), list)
        row = socket.lazily(sparse, 0)
        assert policy.REMOTE not in row.labels
        assert socket.lazily(sparse, 1, row.name).labels[policy.REMOTE]
        socket.clear()
        socket.close()


@pytest.mark.parametrize("config", [PRIMARY, FALLBACK], ids=["primary", "fallback"])
def test_parallel_pull(config: str) -> None:
    """An image without an index is pulled whole here; a failure of that is an error, and neither the key nor mounts nor
    anything else of the try is left.
    """
    with lazy_rig(config) as node:
        socket = Socket(node)
        made = image(node, "whole", layer(861), layer(862), index=False)
        first = socket.lazily(made, 0)
        assert policy.REMOTE not in first.labels
        lie = {**made.labels(1), policy.TARGET: "sha256:" + "5" * 64}
        answer = socket.prepare(key := new_key("lie"), first.name, lie)
        assert answer == Code.DATA_LOSS, socket.details
        socket.gone(key)
        assert [row.name for row in socket.rows()] == [first.name]
        assert socket.lazily(made, 1, first.name).parent == first.name
        socket.clear()
        socket.close()
