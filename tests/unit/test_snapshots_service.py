"""The gRPC edge: messages, status codes and the namespace, over a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf import field_mask_pb2

from soci_snapshotter import errors
from soci_snapshotter.containerd.stubs import snapshots_pb2 as pb
from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import (
    SnapshotsStub,
    add_SnapshotsServicer_to_server,
)
from soci_snapshotter.daemon.snapshots_service import SnapshotsService
from soci_snapshotter.policy import prepare as policy
from soci_snapshotter.snapshotter.ports import Declined, LazyLayer, LazyRequest, Usage
from soci_snapshotter.snapshotter.snapshotter import Snapshotter

DIGEST = "sha256:" + "1" * 64
PULL = {
    policy.TARGET: DIGEST,
    policy.IMAGE_REF: "registry.test/image:1",
    policy.MANIFEST_DIGEST: DIGEST,
    policy.LAYER_DIGEST: DIGEST,
}


class Layers:
    """Lazy layers whose every verb does what the test sets."""

    def __init__(self) -> None:
        self.requests: list[LazyRequest] = []
        self.path: Callable[[], bytes] = lambda: b"/nowhere"

    def prepare(self, request: LazyRequest) -> LazyLayer | Declined:
        self.requests.append(request)
        return LazyLayer("layer", 1, 4096, 1)

    def serves(self, request: LazyRequest, mount_id: int, layer_key: str) -> None:
        assert (mount_id, layer_key) == (1, "layer")

    def committed(self, mount_id: int) -> None:
        assert mount_id == 1

    def lowerdir(self, mount_id: int) -> bytes:
        assert mount_id == 1
        return self.path()

    def usage(self, mount_id: int) -> Usage:
        return Usage(8192 * mount_id, 2)

    def release(self, mount_ids: object) -> None:
        del mount_ids

    def returned(self, paths: object) -> None:
        del paths


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    made = Layers()
    made.path = lambda: bytes(tmp_path)
    return made


@pytest.fixture
def stub(tmp_path: Path, layers: Layers) -> Iterator[SnapshotsStub]:
    socket = f"unix:{tmp_path}/s.sock"
    with Snapshotter(bytes(tmp_path / "root"), lazy=layers) as snapshotter, ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), server)
        server.add_insecure_port(socket)
        server.start()
        try:
            with grpc.insecure_channel(socket) as channel:
                yield SnapshotsStub(channel)
        finally:
            server.stop(None).wait()


def status(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    assert isinstance(error, grpc.Call)
    return error.code(), error.details() or ""


def prepare(stub: SnapshotsStub, key: str, parent: str = "", **labels: str) -> pb.PrepareSnapshotResponse:
    return stub.Prepare(pb.PrepareSnapshotRequest(snapshotter="soci", key=key, parent=parent, labels=labels))


def test_life_of_a_snapshot(stub: SnapshotsStub, tmp_path: Path) -> None:
    """Prepare, Stat, Usage, Commit, View, Mounts, Remove and Cleanup carry their fields both ways."""
    [mount] = prepare(stub, "a", l="1").mounts
    assert (mount.type, list(mount.options)) == ("bind", ["rw", "rbind"])
    assert mount.source == f"{tmp_path}/root/snapshots/1/fs"
    assert list(stub.Mounts(pb.MountsRequest(key="a")).mounts) == [mount]
    info = stub.Stat(pb.StatSnapshotRequest(key="a")).info
    assert (info.name, info.parent, info.kind, dict(info.labels)) == ("a", "", pb.ACTIVE, {"l": "1"})
    assert info.created_at == info.updated_at
    made = Path(mount.source).stat().st_ctime_ns
    assert abs(info.created_at.ToNanoseconds() - made) < 10_000_000_000
    assert stub.Usage(pb.UsageRequest(key="a")).inodes == 1
    stub.Commit(pb.CommitSnapshotRequest(name="c", key="a", labels={"m": "2"}))
    assert stub.Stat(pb.StatSnapshotRequest(key="c")).info.kind == pb.COMMITTED
    [view] = stub.View(pb.ViewSnapshotRequest(key="v", parent="c")).mounts
    assert (view.source, list(view.options)) == (mount.source, ["ro", "rbind"])
    assert stub.Stat(pb.StatSnapshotRequest(key="v")).info.parent == "c"
    stub.Remove(pb.RemoveSnapshotRequest(key="v"))
    stub.Remove(pb.RemoveSnapshotRequest(key="c"))
    assert (tmp_path / "root/snapshots/1").exists()
    stub.Cleanup(pb.CleanupRequest())
    assert not (tmp_path / "root/snapshots/1").exists()


def test_update(stub: SnapshotsStub) -> None:
    """Update takes labels and a field mask, and answers with the new record."""
    prepare(stub, "a", x="1", y="2")
    info = pb.Info(name="a", parent="ignored", labels={"x": "3"})
    mask = field_mask_pb2.FieldMask(paths=["labels.x", "labels.y"])
    updated = stub.Update(pb.UpdateSnapshotRequest(info=info, update_mask=mask)).info
    assert (dict(updated.labels), updated.parent) == ({"x": "3"}, "")
    assert updated.updated_at.ToNanoseconds() > updated.created_at.ToNanoseconds()
    mask = field_mask_pb2.FieldMask(paths=["parent"])
    code, _ = status(lambda: stub.Update(pb.UpdateSnapshotRequest(info=info, update_mask=mask)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT


def test_list(stub: SnapshotsStub) -> None:
    """List streams in batches, filters, and fails with INVALID_ARGUMENT on a bad filter."""
    for n in range(250):
        prepare(stub, f"k{n}", n=str(n))
    sizes = [len(batch.info) for batch in stub.List(pb.ListSnapshotsRequest())]
    assert sizes == [100, 100, 50]
    [batch] = stub.List(pb.ListSnapshotsRequest(filters=["name==k7", "labels.n==9"]))
    assert [info.name for info in batch.info] == ["k7", "k9"]
    assert list(stub.List(pb.ListSnapshotsRequest(filters=["name==x"]))) == []
    code, text = status(lambda: list(stub.List(pb.ListSnapshotsRequest(filters=["name="]))))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "name=" in text


def test_status_codes(stub: SnapshotsStub) -> None:
    """containerd's codes for what can go wrong with a snapshot."""
    prepare(stub, "a")
    stub.Commit(pb.CommitSnapshotRequest(name="c", key="a"))
    prepare(stub, "b", "c")
    stub.View(pb.ViewSnapshotRequest(key="v", parent="c"))
    code = grpc.StatusCode
    remove, commit = pb.RemoveSnapshotRequest, pb.CommitSnapshotRequest
    assert status(lambda: stub.Stat(pb.StatSnapshotRequest(key="x")))[0] == code.NOT_FOUND
    assert status(lambda: stub.Usage(pb.UsageRequest(key="x")))[0] == code.NOT_FOUND
    assert status(lambda: stub.Mounts(pb.MountsRequest(key="x")))[0] == code.NOT_FOUND
    assert status(lambda: stub.Mounts(pb.MountsRequest(key="c")))[0] == code.FAILED_PRECONDITION
    assert status(lambda: prepare(stub, "b", "c"))[0] == code.ALREADY_EXISTS
    assert status(lambda: prepare(stub, "n", "x"))[0] == code.NOT_FOUND
    assert status(lambda: prepare(stub, "n", "b"))[0] == code.INVALID_ARGUMENT
    assert status(lambda: prepare(stub, ""))[0] == code.INVALID_ARGUMENT
    assert status(lambda: stub.Commit(commit(name="c", key="b")))[0] == code.ALREADY_EXISTS
    assert status(lambda: stub.Commit(commit(name="n", key="x")))[0] == code.NOT_FOUND
    assert status(lambda: stub.Commit(commit(name="n", key="v")))[0] == code.FAILED_PRECONDITION
    assert status(lambda: stub.Commit(commit(name="", key="b")))[0] == code.INVALID_ARGUMENT
    assert status(lambda: stub.Remove(remove(key="c"))) == (
        code.FAILED_PRECONDITION,
        "cannot remove snapshot 'c': 'b' is its child",
    )
    assert status(lambda: stub.Remove(remove(key="x")))[0] == code.NOT_FOUND
    assert status(lambda: stub.Stat(pb.StatSnapshotRequest(key="x" * 100_000)))[0] == code.NOT_FOUND


def test_lazy(stub: SnapshotsStub, layers: Layers) -> None:
    """A lazy layer is ALREADY_EXISTS, found by containerd's own query; unreachable later, UNAVAILABLE."""
    request = pb.PrepareSnapshotRequest(key="default/1/x", labels=PULL)
    assert status(lambda: stub.Prepare(request))[0] == grpc.StatusCode.ALREADY_EXISTS
    query = f'labels."{policy.TARGET}"=={DIGEST},parent==""'
    [batch] = stub.List(pb.ListSnapshotsRequest(filters=[query]))
    [info] = batch.info
    assert info.kind == pb.COMMITTED
    assert info.labels[policy.REMOTE] == "remote snapshot"
    assert stub.Usage(pb.UsageRequest(key=info.name)) == pb.UsageResponse(size=8192, inodes=2)
    prepare(stub, "container", info.name)

    def away() -> bytes:
        raise errors.Remote("registry.test: image: connection refused")

    layers.path = away
    code, text = status(lambda: stub.Mounts(pb.MountsRequest(key="container")))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "registry.test" in text


def test_namespace(stub: SnapshotsStub, layers: Layers) -> None:
    """The namespace is the header's, else the key's, else the call fails."""
    request = pb.PrepareSnapshotRequest(key="k8s.io/1/x", labels=PULL)
    status(lambda: stub.Prepare(request, metadata=(("containerd-namespace", "moby"),)))
    request.labels[policy.TARGET] = "sha256:" + "2" * 64
    status(lambda: stub.Prepare(request))
    assert [asked.namespace for asked in layers.requests] == ["moby", "k8s.io"]
    request.key = "x"
    assert status(lambda: stub.Prepare(request))[0] == grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("error", errors.SociError.__subclasses__())
def test_each_error_class(stub: SnapshotsStub, layers: Layers, error: type[errors.SociError]) -> None:
    """Every class of errors.py arrives as the code it owns, with its text."""
    request = pb.PrepareSnapshotRequest(key="default/1/x", labels=PULL)
    status(lambda: stub.Prepare(request))
    [batch] = stub.List(pb.ListSnapshotsRequest())

    def fail() -> bytes:
        raise error("what and why")

    layers.path = fail
    code, text = status(lambda: prepare(stub, "k", batch.info[0].name))
    assert (code.name, text) == (error.grpc_code, "what and why")


def test_unexpected_error(stub: SnapshotsStub, layers: Layers, caplog: pytest.LogCaptureFixture) -> None:
    """A bug is INTERNAL for the caller and a trace in the log; the service goes on."""
    request = pb.PrepareSnapshotRequest(key="default/1/x", labels=PULL)
    status(lambda: stub.Prepare(request))
    [batch] = stub.List(pb.ListSnapshotsRequest())
    layers.path = lambda: b"/" + bytes(1 // 0)
    code, text = status(lambda: prepare(stub, "k", batch.info[0].name))
    assert (code, text.split(":")[0]) == (grpc.StatusCode.INTERNAL, "ZeroDivisionError")
    assert any(record.exc_info for record in caplog.records)
    prepare(stub, "fine")
