"""From an image's manifest and layer to the Go tool's own ztoc and index, nothing taken from what it wrote."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
from tests.unit.ztoc_support import GO_TOOL, VECTORS, Case, cases

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import sociindex
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.index.build import write_ztoc

if TYPE_CHECKING:
    from pathlib import Path

ANNOTATION = "com.amazon.soci.index-digest"


def image_manifest(case: Case) -> bytes:
    """The manifest that was indexed: the one in the vector that no conversion has annotated."""
    found = []
    for path in (VECTORS / case.name / "v2").glob("*.json"):
        document = json.loads(path.read_bytes())
        layers = [layer["digest"] for layer in document.get("layers", [])]
        if layers == [case.raw["layer_digest"]] and ANNOTATION not in document.get("annotations", {}):
            found.append(path.read_bytes())
    (manifest,) = found
    return manifest


def test_no_vector_is_left_out() -> None:
    """Every directory with a ztoc is a case, so the tests over cases are over all vectors."""
    assert {path.parent.name for path in VECTORS.glob("*/ztoc.bin")} == {case.name for case in cases()}
    assert len(cases()) == 8


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ztoc_and_index_are_the_go_tools_bytes(case: Case, tmp_path: Path) -> None:
    """Layer in, ztoc out as a file, and the v1 index over it: both byte for byte, both digests as recorded."""
    manifest = image_manifest(case)
    described = json.loads(manifest)
    layer = described["layers"][0]
    output = tmp_path / "ztoc"
    written = write_ztoc(
        [case.layer],
        output,
        compression=case.compression,
        span_size=case.raw["span_size"],
        build_tool=GO_TOOL,
        expected=digests.parse(layer["digest"]),
    )
    assert output.read_bytes() == case.ztoc
    assert (written.digest, written.size) == (case.raw["ztoc_digest"], len(case.ztoc))
    assert (written.diff_id, written.layer_size) == ("sha256:" + case.raw["tar_sha256"], layer["size"])
    assert os.listdir(tmp_path) == ["ztoc"]
    subject = Descriptor(described["mediaType"], digests.sha256(manifest), len(manifest))
    ztoc = sociindex.ZtocDescriptor(
        digest=written.digest,
        size=written.size,
        layer_digest=written.layer_digest,
        layer_media_type=layer["mediaType"],
        span_size=case.raw["span_size"],
    )
    index = sociindex.build(subject, [ztoc], GO_TOOL)
    assert index == (VECTORS / case.name / "index-v1.json").read_bytes()
    assert digests.sha256(index) == case.raw["v1_index_digest"]
