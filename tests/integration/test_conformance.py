"""containerd's own snapshotter suite (Go, harness/conformance) against the daemon."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from harness.daemon import start_daemon

from soci_snapshotter.containerd.stubs import snapshots_pb2
from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import SnapshotsStub

REPOSITORY = Path(__file__).resolve().parents[2]
MODULE = REPOSITORY / "harness/conformance"
BINARY = REPOSITORY / ".cache/bin/conformance.test"

# As containerd 2.4 spells them; a suite that shrinks must not look like one that passes.
SUITE = {
    "Basic",
    "StatActive",
    "StatComitted",
    "TransitivityTest",
    "PreareViewFailingtest",
    "Update",
    "Remove",
    "Walk",
    "LayerFileupdate",
    "RemoveDirectoryInLowerLayer",
    "Chown",
    "DirectoryPermissionOnCommit",
    "RemoveIntermediateSnapshot",
    "DeletedFilesInChildSnapshot",
    "MoveFileFromLowerLayer",
    "ViewReadonly",
    "StatInWalk",
    "CloseTwice",
    "RootPermission",
    "Rename",
    "128LayersMount",
}

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def suite() -> Path:
    """The compiled suite; Go's own build cache makes this cheap when nothing changed."""
    go = shutil.which("go") or "/usr/local/go/bin/go"
    BINARY.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["nice", go, "test", "-c", "-o", BINARY, "."], cwd=MODULE, check=True)
    return BINARY


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A scratch directory whose mounts, if a failed test left some, go before it does."""
    yield tmp_path
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        target = line.split()[1]
        if target.startswith(str(tmp_path)):
            subprocess.run(["umount", "-l", target], check=False)


@pytest.fixture
def socket(root: Path) -> Iterator[str]:
    """The daemon itself, on a scratch root; its socket."""
    with start_daemon(root / "d", address=root / "run" / "s.sock") as daemon:
        yield str(daemon.address)


def test_containerd_suite(suite: Path, socket: str, root: Path) -> None:
    """Every test of containerd's suite passes, and Cleanup then leaves one directory per snapshot."""
    play = root / "play"
    play.mkdir()
    environment = {**os.environ, "SNAPSHOTS_SOCKET": socket, "TMPDIR": str(play)}
    command = [str(suite), "-test.v", "-test.root"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, check=False, env=environment, cwd=root, **pipes)
    found = re.findall(r"--- (\w+): TestConformance/(\S+)", done.stdout)
    results = {name: word for word, name in found}
    assert results == dict.fromkeys(SUITE, "PASS"), done.stdout[-20_000:]
    assert done.returncode == 0

    with grpc.insecure_channel(f"unix:{socket}") as channel:
        stub = SnapshotsStub(channel)
        stub.Cleanup(snapshots_pb2.CleanupRequest())
        rows = sum(len(batch.info) for batch in stub.List(snapshots_pb2.ListSnapshotsRequest()))
    assert len(os.listdir(root / "d/root/snapshotter/snapshots")) == rows > 0
