"""Images with their SOCI indexes inside: what the conversion writes, from OCI layouts to OCI layouts."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import pytest

from soci_snapshotter.cli.main import run
from soci_snapshotter.formats import oci

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "cases.json").read_text())
GO_TOOL = "AWS SOCI CLI v0.2"


def blobs_of(layout: Path) -> dict[str, bytes]:
    """Every blob of a layout directory by its digest, which is checked."""
    found = {}
    for file in (layout / "blobs" / "sha256").iterdir():
        data = file.read_bytes()
        assert hashlib.sha256(data).hexdigest() == file.name
        found[f"sha256:{file.name}"] = data
    return found


def root_of(layout: Path) -> dict[str, object]:
    """The only descriptor of index.json."""
    (root,) = json.loads((layout / "index.json").read_bytes())["manifests"]
    assert isinstance(root, dict)
    return root


def unpack(archive: Path, target: Path) -> Path:
    """An archive as a directory."""
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target


def vector_layout(case: dict[str, object], path: Path) -> Path:
    """The layout that the Go tool converted: the vector's documents before the conversion, and its layer."""
    v2 = VECTORS / str(case["case"]) / "v2"
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    source = None
    for file in v2.glob("*.json"):
        document = json.loads(file.read_bytes())
        if "layers" in document and "annotations" not in document:
            source = file
        if file.name != "layout-index.json":
            (blobs / file.stem).write_bytes(file.read_bytes())
    assert source is not None
    layer = (VECTORS / str(case["case"]) / str(case["layer"])).read_bytes()
    (blobs / hashlib.sha256(layer).hexdigest()).write_bytes(layer)
    manifest = {
        "mediaType": oci.MANIFEST,
        "digest": f"sha256:{source.stem}",
        "size": source.stat().st_size,
    }
    (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
@pytest.mark.parametrize("form", ["oci-dir", "oci-archive"])
def test_a_conversion_is_the_go_tools_byte_for_byte(
    case: dict[str, object], form: str, tmp_path: Path
) -> None:
    """From the layout that the Go tool converted, and its name, come its ztoc, index, manifests and index.json."""
    source = vector_layout(case, tmp_path / "in")
    target = tmp_path / "out"
    flags = ["--min-layer-size", "0", "--span-size", str(case["span_size"]), "--format", form]
    flags += ["--build-tool", GO_TOOL]
    assert run(["convert", "--standalone", *flags, str(source), str(target)]) == 0
    layout = target if form == "oci-dir" else unpack(target, tmp_path / "unpacked")
    v2 = VECTORS / str(case["case"]) / "v2"
    assert (layout / "index.json").read_bytes() == (v2 / "layout-index.json").read_bytes()
    blobs = blobs_of(layout)
    assert blobs[str(case["ztoc_digest"])] == (VECTORS / str(case["case"]) / "ztoc.bin").read_bytes()
    written = {file.stem for file in v2.glob("*.json") if file.name != "layout-index.json"}
    source_manifest = root_of(source)["digest"]
    assert {f"sha256:{stem}" for stem in written} - {source_manifest} <= set(blobs)
