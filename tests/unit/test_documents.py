"""OCI documents and SOCI indexes against what the Go tools wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats.oci import Descriptor

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "cases.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_index_v1_is_rebuilt_byte_for_byte(case: dict[str, object]) -> None:
    """From the subject and the ztoc's numbers comes the Go tool's own index."""
    data = (VECTORS / str(case["case"]) / "index-v1.json").read_bytes()
    assert digests.sha256(data) == case["v1_index_digest"]
    decoded = sociindex.decode(data)
    assert decoded.subject is not None
    gzipped = str(case["layer"]).endswith(".gz")
    entry = sociindex.ZtocDescriptor(
        digest=digests.parse(str(case["ztoc_digest"])),
        size=int(str(case["ztoc_size"])),
        layer_digest=digests.parse(str(case["layer_digest"])),
        layer_media_type="application/vnd.oci.image.layer.v1.tar" + ("+gzip" if gzipped else ""),
        span_size=int(str(case["span_size"])),
    )
    assert sociindex.build(decoded.subject, [entry], "AWS SOCI CLI v0.2") == data
    assert decoded.ztoc_for(entry.layer_digest) == entry.descriptor()
    assert decoded.version == 1


def name_of(path: Path) -> str:
    """Case and blob, short."""
    return f"{path.parts[-3]}-{path.stem[:8]}"


def compact_manifests() -> list[Path]:
    """The vectors' manifests and indexes that were written compactly; configs and hand-made inputs are not."""
    found = []
    for path in sorted(VECTORS.glob("*/v2/*.json")):
        document = json.loads(path.read_bytes())
        compact = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
        if "mediaType" in document and compact == path.read_bytes():
            found.append(path)
    return found


@pytest.mark.parametrize("path", compact_manifests(), ids=name_of)
def test_every_manifest_of_the_vectors_survives(path: Path) -> None:
    """Manifests and indexes that the Go tool wrote are encoded to the same bytes."""
    assert oci.encode(oci.decode_manifest(path.read_bytes())) == path.read_bytes()


def test_the_vectors_have_manifests_to_compare() -> None:
    """Each case brings at least the converted index and its SOCI manifest, so the test above compares something."""
    assert len(compact_manifests()) >= 2 * len(CASES)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"schemaVersion":2,"manifests":5}', b"\xff" * 40])
def test_other_documents_are_refused(data: bytes) -> None:
    """What is no manifest raises Integrity, nothing else."""
    with pytest.raises(Integrity):
        oci.decode_manifest(data)


@given(st.text(max_size=30), st.text(max_size=30))
def test_json_is_what_go_writes(key: str, value: str) -> None:
    """Whatever an annotation holds reads back the same, and the characters Go escapes are escaped."""
    made = oci.encode(Descriptor("text/plain", digests.sha256(b""), 0, annotations={key: value}))
    assert json.loads(made)["annotations"] == {key: value}
    assert not any(each in made.decode() for each in "<>&\u2028\u2029")


def test_chain_id_is_the_specification_s() -> None:
    """One layer: its DiffID; two: the digest of both, joined by a space (image-spec, config.md)."""
    one, two = digests.sha256(b"1"), digests.sha256(b"2")
    assert oci.chain_id([one]) == one
    assert oci.chain_id([one, two]) == digests.sha256(f"{one} {two}".encode())
