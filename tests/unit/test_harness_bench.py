"""How benches turn runs into a ratio, and how the demo's image turns a directory into a layer."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from bench.result import Result, interleaved, line, save, smaller_is_better
from harness import demo_image
from harness.coldcache import filesystem_type


def test_runs_alternate_in_order() -> None:
    """Neither side always goes first."""
    calls: list[str] = []

    def side(name: str) -> float:
        calls.append(name)
        return 1.0

    runs = interleaved(lambda: side("ours"), lambda: side("peer"), 3)
    assert calls == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert runs == [{"ours": 1.0, "peer": 1.0}] * 3


def _result(*ours: float) -> Result:
    runs = [{"ours": each, "peer": 4.0} for each in ours]
    return smaller_is_better("walk", "a walk", "s", runs, target=2.0)


def test_half_the_time_is_a_ratio_of_two() -> None:
    """The ratio is that of the medians, above 1 where ours is smaller; an outlier does not move it."""
    result = _result(2.0, 1.9, 50.0)
    assert (result.ours, result.peer, result.ratio, result.met) == (2.0, 4.0, 2.0, True)
    assert not _result(2.1).met


def test_a_result_is_kept_with_every_field(tmp_path: Path) -> None:
    """The file has the documented fields, and the line says whether the target was met."""
    kept = json.loads(save(_result(1.0), tmp_path).read_text())
    assert list(kept) == ["name", "what", "unit", "ours", "peer", "ratio", "target", "runs", "notes"]
    assert kept["runs"] == [{"ours": 1.0, "peer": 4.0}]
    assert line(_result(1.0)).endswith("met)")
    assert line(_result(3.0)).endswith("MISSED)")


@pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes and trusted xattrs")
@pytest.mark.parametrize("compressor", ["gzip", "pigz"])
def test_a_stage_becomes_a_layer(tmp_path: Path, compressor: str) -> None:
    """overlayfs's whiteouts and opaque directories become the layer format's; digests fit what is written."""
    stage, layout = tmp_path / "stage", tmp_path / "layout"
    (stage / "replaced").mkdir(parents=True)
    (layout / "blobs/sha256").mkdir(parents=True)
    (stage / "replaced/file").write_bytes(b"content")
    os.setxattr(stage / "replaced", "trusted.overlay.opaque", b"y")
    os.mknod(stage / "gone", 0o20000, 0)
    os.mknod(stage / "null", 0o20666, os.makedev(1, 3))
    layer = demo_image._archive(stage, compressor, layout)
    blob = (layout / "blobs/sha256" / layer.digest.removeprefix("sha256:")).read_bytes()
    tar = gzip.decompress(blob)
    assert (layer.size, layer.tar_size) == (len(blob), len(tar))
    assert layer.digest == "sha256:" + hashlib.sha256(blob).hexdigest()
    assert layer.diff_id == "sha256:" + hashlib.sha256(tar).hexdigest()
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        names = archive.getnames()
        assert not any("trusted" in key for member in archive for key in member.pax_headers)
    assert sorted(names) == [".wh.gone", "null", "replaced", "replaced/.wh..wh..opq", "replaced/file"]


def test_the_filesystem_is_that_of_the_deepest_mount() -> None:
    """/proc is proc although / is something else; a path that does not exist yet counts as its parent."""
    assert filesystem_type(Path("/proc/self")) == "proc"
    root = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", "/"], capture_output=True, text=True, check=True)
    assert filesystem_type(Path("/absent/path")) == root.stdout.split()[-1]
