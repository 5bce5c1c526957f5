"""Requests that nobody well-meaning sends: each a clear status, and the next call is served as ever."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from tests.unit.test_snapshots_service import PULL, layers, prepare, status, stub

from soci_snapshotter.containerd.stubs import snapshots_pb2 as pb
from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import SnapshotsStub
from soci_snapshotter.policy import prepare as policy

__all__ = ["layers", "stub"]  # fixtures

CODES = grpc.StatusCode


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("default/1/" + "k" * 10_000, None),
        ("k" * 40_000, CODES.INVALID_ARGUMENT),
        ("é" * 20_000, CODES.INVALID_ARGUMENT),
        ("a\0b", CODES.INVALID_ARGUMENT),
        ("", CODES.INVALID_ARGUMENT),
        ("../../../escape", None),
        ("/absolute/x", None),
        ("a\nb\x1b[31m", None),
    ],
    ids=["10 KB", "40 KB", "40 KB of two", "NUL", "none", "upwards", "absolute", "control"],
)
def test_keys(stub: SnapshotsStub, tmp_path: Path, key: str, code: CODES | None) -> None:
    """A key is text and no path: 32 KiB of it are stored as they are, and nothing is made outside of the root."""
    if code is None:
        [mount] = prepare(stub, key).mounts
        assert Path(mount.source).resolve().is_relative_to(tmp_path / "root" / "snapshots")
        assert stub.Stat(pb.StatSnapshotRequest(key=key)).info.name == key
        stub.Commit(pb.CommitSnapshotRequest(key=key, name=key + "c"))
        stub.Remove(pb.RemoveSnapshotRequest(key=key + "c"))
    else:
        for call in (
            lambda: prepare(stub, key),
            lambda: stub.View(pb.ViewSnapshotRequest(key=key)),
            lambda: stub.Commit(pb.CommitSnapshotRequest(key="x", name=key)),
        ):
            found, text = status(call)
            assert found == code and len(text) < 2049
    stub.Cleanup(pb.CleanupRequest())
    assert {path.name for path in (tmp_path / "root").iterdir()} >= {"snapshots", "metadata.sqlite"}
    assert not any((tmp_path / "root" / "snapshots").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"root", "s.sock"}


def test_labels(stub: SnapshotsStub) -> None:
    """A megabyte is stored and listed; two are INVALID_ARGUMENT, ten RESOURCE_EXHAUSTED; nothing is left of those."""
    many = {f"l{n}": "x" * 4000 for n in range(250)}
    for number in range(5):
        stub.Prepare(pb.PrepareSnapshotRequest(key=f"k{number}", labels=many))
    sizes = [len(part.info) for part in stub.List(pb.ListSnapshotsRequest())]
    assert sum(sizes) == 5 and len(sizes) > 1
    for size, code in ((2 << 20, CODES.INVALID_ARGUMENT), (10 << 20, CODES.RESOURCE_EXHAUSTED)):
        big = pb.PrepareSnapshotRequest(key="big", labels={"l": "x" * size})
        assert status(lambda request=big: stub.Prepare(request))[0] == code  # type: ignore[misc]
        update = pb.UpdateSnapshotRequest(info=pb.Info(name="k0", labels={"l": "x" * size}))
        assert status(lambda request=update: stub.Update(request))[0] == code  # type: ignore[misc]
    assert status(lambda: stub.Stat(pb.StatSnapshotRequest(key="big")))[0] == CODES.NOT_FOUND
    assert dict(stub.Stat(pb.StatSnapshotRequest(key="k0")).info.labels) == many


@pytest.mark.parametrize(
    "labels",
    [
        {policy.TARGET: "\0"},
        {policy.TARGET: "sha256:" + "1" * 64 + "/../.."},
        {policy.IMAGE_REF: "\x1b[2J"},
        {policy.MANIFEST_DIGEST: "sha512:" + "1" * 64},
        {policy.LAYER_DIGEST: "../../../etc"},
        {policy.INDEX_DIGEST: "latest"},
        {policy.IMAGE_LAYERS: ",,,;\0" * 100},
        {"containerd.io/snapshot/remote/soci.size": "9" * 4000},
    ],
)
def test_garbage_in_the_labels_of_a_pull(stub: SnapshotsStub, labels: dict[str, str]) -> None:
    """It is left to containerd, or the layer is asked for without what is garbage; never an internal error."""
    request = pb.PrepareSnapshotRequest(key="default/1/k", labels=PULL | labels)
    try:
        assert stub.Prepare(request).mounts
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() == CODES.ALREADY_EXISTS


def test_a_parent_that_is_not_there(stub: SnapshotsStub) -> None:
    """NOT_FOUND with its name, for ordinary snapshots, views and layers; an active one is no parent."""
    for call in (
        lambda: prepare(stub, "k", "no/such\n"),
        lambda: stub.View(pb.ViewSnapshotRequest(key="k", parent="no/such\n")),
        lambda: stub.Prepare(pb.PrepareSnapshotRequest(key="default/1/k", parent="no/such\n", labels=PULL)),
    ):
        code, text = status(call)
        assert code == CODES.NOT_FOUND and repr("no/such\n") in text
    prepare(stub, "active")
    assert status(lambda: prepare(stub, "k", "active"))[0] == CODES.INVALID_ARGUMENT


def test_bytes_that_are_no_message(stub: SnapshotsStub, tmp_path: Path) -> None:
    """Labels that are not UTF-8, a message that ends early: gRPC's own INTERNAL, and the next call is served."""
    not_text = b"\x12\x01k\x22\x06\x0a\x01l\x12\x01\xff"
    with grpc.insecure_channel(f"unix:{tmp_path}/s.sock") as channel:
        call = channel.unary_unary("/containerd.services.snapshots.v1.Snapshots/Prepare")
        for message in (not_text, not_text[:-3], b"\xff" * 100):
            assert status(lambda message=message: call(message))[0] == CODES.INTERNAL  # type: ignore[misc]
    assert prepare(stub, "k").mounts
