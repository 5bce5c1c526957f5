"""The committed stubs are what scripts/protos makes of the committed .proto files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from soci_snapshotter.containerd.stubs import snapshots_pb2

ROOT = Path(__file__).resolve().parents[2]
STUBS = {"soci_snapshotter/containerd/stubs": ROOT / "src", "harness/stubs": ROOT}


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    """Running the generator elsewhere gives the committed files, byte for byte, and no others."""
    subprocess.run([sys.executable, ROOT / "scripts/protos", "--out", tmp_path], check=True)
    for package, base in STUBS.items():
        made = {p.name: p.read_bytes() for p in (tmp_path / package).iterdir()}
        here = (base / package).iterdir()
        committed = {p.name: p.read_bytes() for p in here if p.suffix in {".py", ".pyi"}}
        assert committed == made


def test_wire_names() -> None:
    """The service and its messages carry containerd's package name, which is part of every call's path."""
    service = snapshots_pb2.DESCRIPTOR.services_by_name["Snapshots"]
    assert service.full_name == "containerd.services.snapshots.v1.Snapshots"
    assert [m.name for m in service.methods] == [
        "Prepare", "View", "Mounts", "Commit", "Remove", "Stat", "Update", "List", "Usage", "Cleanup",
    ]  # fmt: skip
