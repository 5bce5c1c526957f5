"""Images with their SOCI indexes inside: what the conversion writes, from OCI layouts to OCI layouts."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from soci_snapshotter.cli.main import run
from soci_snapshotter.errors import Integrity, Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociconvert
from soci_snapshotter.formats.oci import Descriptor, Index, Platform
from soci_snapshotter.formats.sociconvert import PlatformIndex

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "cases.json").read_text())
CONVERSIONS = json.loads((VECTORS / "convert" / "cases.json").read_text())
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


def conversion_name(case: dict[str, object]) -> str:
    """Layout and flags."""
    flags = case["flags"]
    assert isinstance(flags, list)
    return f"{case['layout']} {' '.join(flags)}"


@pytest.mark.parametrize("case", CONVERSIONS, ids=conversion_name)
def test_platforms_are_converted_as_the_go_tool_does(case: dict[str, list[str]], tmp_path: Path) -> None:
    """Several platforms, some not saved, Docker's types, attestations: index.json and root are the Go tool's."""
    target = tmp_path / "out"
    source = VECTORS / "convert" / str(case["layout"])
    flags = [*case["flags"], "--format", "oci-dir", "--build-tool", GO_TOOL]
    assert run(["convert", "--standalone", *flags, str(source), str(target)]) == 0
    assert (target / "index.json").read_text() == case["index"]
    assert blobs_of(target)[str(root_of(target)["digest"])].decode() == case["root"]


@pytest.mark.parametrize("layout", ["multi", "docker", "single64"])
def test_converting_again_changes_nothing(layout: str, tmp_path: Path) -> None:
    """All platforms, then all again, then one of them: the same digest each time, and no blob is lost."""
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    flags = ["--min-layer-size", "0", "--format", "oci-dir"]
    source = VECTORS / "convert" / layout
    assert run(["convert", "--standalone", *flags, "--all-platforms", str(source), str(first)]) == 0
    assert run(["convert", "--standalone", *flags, "--all-platforms", str(first), str(second)]) == 0
    assert run(["convert", "--standalone", *flags, "-p", "linux/arm64", str(second), str(third)]) == 0
    assert root_of(first) == root_of(second) == root_of(third)
    assert blobs_of(first) == blobs_of(second) == blobs_of(third)


def test_an_older_index_of_the_platform_is_replaced(tmp_path: Path) -> None:
    """Converted again with another span size, the platform has one SOCI index, the new one, in the same place."""
    first, second = tmp_path / "1", tmp_path / "2"
    flags = ["--min-layer-size", "0", "--format", "oci-dir", "-p", "linux/amd64"]
    source = VECTORS / "convert" / "multi"
    assert run(["convert", "--standalone", *flags, str(source), str(first)]) == 0
    assert run(["convert", "--standalone", *flags, "--span-size", "1024", str(first), str(second)]) == 0
    before, after = (
        json.loads(blobs_of(each)[str(root_of(each)["digest"])])["manifests"] for each in (first, second)
    )
    assert [entry.get("artifactType") for entry in before] == [entry.get("artifactType") for entry in after]
    assert before[-1]["digest"] != after[-1]["digest"]
    assert before[-1]["digest"] not in blobs_of(second)


def test_the_archive_is_the_directory(tmp_path: Path) -> None:
    """A tar goes in and out as well as a directory: the same blobs and index.json, and the same bytes each time."""
    source = tmp_path / "in.tar"
    with tarfile.open(source, "w") as tar:
        tar.add(VECTORS / "convert" / "multi", arcname=".")
    outputs = [tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "dir"]
    for output in outputs:
        form = "oci-archive" if output.suffix else "oci-dir"
        flags = ["--min-layer-size", "0", "--format", form]
        assert run(["convert", "--standalone", *flags, str(source), str(output)]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    unpacked = unpack(outputs[0], tmp_path / "unpacked")
    assert blobs_of(unpacked) == blobs_of(outputs[2])
    assert (unpacked / "index.json").read_bytes() == (outputs[2] / "index.json").read_bytes()


def test_create_standalone_adds_the_index_beside_the_image(tmp_path: Path) -> None:
    """In place, and again: index.json keeps the image and names one SOCI index, whose subject is the image."""
    layout = tmp_path / "layout"
    shutil.copytree(VECTORS / "convert" / "single64", layout)
    image = root_of(layout)
    for _ in range(2):
        assert run(["create", "--standalone", "--min-layer-size", "0", str(layout)]) == 0
    manifests = json.loads((layout / "index.json").read_bytes())["manifests"]
    assert manifests[0] == image
    (soci,) = manifests[1:]
    assert soci["artifactType"] == "application/vnd.amazon.soci.index.v1+json"
    blobs = blobs_of(layout)
    index = json.loads(blobs[soci["digest"]])
    assert index["subject"]["digest"] == image["digest"]
    assert all(layer["digest"] in blobs for layer in index["layers"])


def test_create_standalone_writes_a_copy(tmp_path: Path) -> None:
    """From a directory to a tar: the copy has every blob of the original and the index; the original is as it was."""
    source, target = VECTORS / "convert" / "single64", tmp_path / "out.tar"
    before = sorted(path.name for path in source.rglob("*"))
    flags = ["--min-layer-size", "0", "--format", "oci-archive"]
    assert run(["create", "--standalone", *flags, str(source), str(target)]) == 0
    assert sorted(path.name for path in source.rglob("*")) == before
    copy = unpack(target, tmp_path / "copy")
    assert blobs_of(source).items() <= blobs_of(copy).items()
    assert len(json.loads((copy / "index.json").read_bytes())["manifests"]) == 2


def layer_of(layout: Path) -> Path:
    """The blob of the first layer."""
    blobs = layout / "blobs" / "sha256"
    manifest = json.loads((blobs / str(root_of(layout)["digest"])[7:]).read_bytes())
    return blobs / str(manifest["layers"][0]["digest"])[7:]


def damaged(kind: str, path: Path) -> None:
    """A layout that is wrong in one way."""
    shutil.copytree(VECTORS / "convert" / "single64", path)
    if kind == "no-index":
        (path / "index.json").unlink()
    elif kind == "no-images":
        (path / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')
    elif kind == "bad-json":
        (path / "index.json").write_text('{"schemaVersion":2,')
    elif kind == "old-version":
        (path / "oci-layout").write_text('{"imageLayoutVersion":"2.0.0"}')
    elif kind == "no-blob":
        layer_of(path).unlink()
    elif kind == "bad-layer":
        blob = layer_of(path)
        blob.write_bytes(blob.read_bytes()[:-4] + b"1234")
    elif kind == "bad-manifest":
        blob = path / "blobs/sha256" / str(root_of(path)["digest"])[7:]
        blob.write_bytes(blob.read_bytes() + b" ")


def prepared(kind: str, path: Path) -> Path:
    """A source that is none, or is damaged."""
    if kind == "empty":
        path.mkdir()
    elif kind == "docker-save":
        with tarfile.open(path, "w") as tar:
            tar.addfile(tarfile.TarInfo("manifest.json"))
    elif kind == "no-tar":
        path.write_bytes(b"hello" * 1000)
    elif kind in {"gzipped", "truncated"}:
        with tarfile.open(path, "w:gz" if kind == "gzipped" else "w") as tar:
            tar.add(VECTORS / "convert" / "single64", arcname=".")
        if kind == "truncated":
            path.write_bytes(path.read_bytes()[:3000])
    elif kind != "absent":
        damaged(kind, path)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "no oci-layout file in it"),
        ("docker-save", "docker save"),
        ("no-tar", "neither a directory nor a plain tar"),
        ("gzipped", "neither a directory nor a plain tar"),
        ("truncated", "source"),
        ("no-index", "index.json is missing"),
        ("no-images", "names no image"),
        ("bad-json", "index"),
        ("old-version", "version '2.0.0'"),
        ("no-blob", "save the image again"),
        ("bad-layer", "sha256:"),
        ("bad-manifest", "sha256:"),
        ("absent", "no such file"),
    ],
)
@pytest.mark.parametrize("command", ["create", "convert"])
def test_bad_layouts_are_named_and_nothing_is_written(
    command: str, kind: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layout that is none, or is damaged, is one line that names it, and no output is left."""
    source = prepared(kind, tmp_path / "source")
    target = tmp_path / "target"
    assert run([command, "--standalone", "--min-layer-size", "0", str(source), str(target)]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert "source" in error or "sha256:" in error
    assert [path.name for path in tmp_path.iterdir() if path != source] == []


@pytest.mark.parametrize("kind", ["file", "directory", "other-form", "no-parent"])
def test_what_is_no_layout_is_never_replaced(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output path that holds something else is refused, and what it holds stays."""
    target = tmp_path / "target"
    form = "oci-dir"
    if kind == "file":
        target.write_text("precious")
    elif kind == "directory":
        target.mkdir()
        (target / "precious").write_text("precious")
    elif kind == "other-form":
        shutil.copytree(VECTORS / "convert" / "single64", target)
        form = "oci-archive"
    else:
        target = tmp_path / "no" / "target"
    before = sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    source = VECTORS / "convert" / "multi"
    flags = ["--min-layer-size", "0", "--format", form]
    assert run(["convert", "--standalone", *flags, str(source), str(target)]) == 1
    assert str(target) in capsys.readouterr().err
    assert sorted((str(path), path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", ["oci-dir", "oci-archive"])
def test_an_older_output_is_replaced_whole(form: str, tmp_path: Path) -> None:
    """Where a layout is already, the new image takes its place, and the old one stays when the conversion fails."""
    target = tmp_path / "target"
    flags = ["--format", form, "--min-layer-size"]
    multi, single = VECTORS / "convert" / "multi", VECTORS / "convert" / "single64"
    assert run(["convert", "--standalone", *flags, "0", str(single), str(target)]) == 0
    assert run(["convert", "--standalone", *flags, "1000000000", str(multi), str(target)]) == 1
    assert run(["convert", "--standalone", *flags, "0", str(multi), str(target)]) == 0
    layout = target if form == "oci-dir" else unpack(target, tmp_path / "unpacked")
    root = json.loads(blobs_of(layout)[str(root_of(layout)["digest"])])
    assert len(root["manifests"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"target", layout.name})


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "a/b:1", "x/y"],
        ["convert", "a/b:1", "a/b@sha256:" + "0" * 64],
        ["convert", "a/b:1", "a/b:1@sha256:" + "0" * 64],
        ["create", "--optimizations", "speed", "a/b:1"],
        ["create", "--span-size", "0", "a/b:1"],
        ["create", "--span-size", "-1", "a/b:1"],
        ["create", "--span-size", "four", "a/b:1"],
        ["create", "--min-layer-size", "99999999999999999999", "a/b:1"],
        ["convert", "--standalone", "--format", "zip", "a", "b"],
        ["convert", "--standalone", "--from-registry", "a", "b:1"],
        ["create", "a/b:1", "out"],
        ["--content-store", "soci", "convert", "--standalone", "a", "b"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_one_line_and_exit_1(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A bad flag or name is refused before anything is opened, in a line that names it."""
    assert run(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert any(word in error for word in arguments[1:] if word != "a/b:1")


def test_a_manifest_that_is_gone_is_no_conversion() -> None:
    """An index of a manifest that the image does not have, or that cannot be read any more, is an error."""
    entry = Descriptor(oci.MANIFEST, digests.sha256(b"x"), 1)
    root = Index(schema_version=2, manifests=(entry,))
    index = PlatformIndex(entry.digest, digests.sha256(b"i"), 1, Platform("amd64", "linux"))
    other = PlatformIndex(digests.sha256(b"y"), digests.sha256(b"i"), 1, Platform("amd64", "linux"))
    with pytest.raises(Integrity, match=entry.digest):
        sociconvert.convert(root, lambda _: None, [index])
    with pytest.raises(Integrity, match=other.manifest):
        sociconvert.convert(root, lambda _: b"", [other])
    with pytest.raises(Invalid):
        sociconvert.convert(root, lambda _: b"", [])


def test_prefetch_artifacts_go_into_the_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths from flags and a list become one artifact per layer, named in the index; a path nobody has is a warning."""
    target = tmp_path / "out"
    names = tmp_path / "names.json"
    names.write_text('["./bin/*"]')
    flags = ["--min-layer-size", "0", "--span-size", "1024", "--format", "oci-dir"]
    flags += ["--prefetch-file", "/b", "--prefetch-file", "nowhere", "--prefetch-files-json", str(names)]
    assert run(["convert", "--standalone", *flags, str(VECTORS / "convert" / "multi"), str(target)]) == 0
    assert "prefetch: /nowhere: in no layer" in capsys.readouterr().err
    blobs = blobs_of(target)
    root = json.loads(blobs[str(root_of(target)["digest"])])
    index = json.loads(blobs[root["manifests"][-1]["digest"]])
    ztocs = [entry for entry in index["layers"] if entry["mediaType"] == "application/octet-stream"]
    artifacts = [entry for entry in index["layers"] if entry not in ztocs]
    layers = [entry["annotations"]["com.amazon.soci.image-layer-digest"] for entry in ztocs]
    assert index["layers"] == ztocs + artifacts
    assert [entry["annotations"] for entry in artifacts] == [
        {"com.amazon.soci.image-layer-digest": layer} for layer in layers
    ]
    for entry in artifacts:
        assert entry["mediaType"] == "application/vnd.amazon.soci.prefetch.v1+json"
        document = json.loads(blobs[entry["digest"]])
        assert document["version"] == "1.0"
        assert document["prefetch_spans"]


@pytest.mark.parametrize("content", [None, "{}", '["a", 1]', "[", '"a"'])
def test_a_bad_list_of_paths_is_named(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list that is missing or no JSON array of strings is one line naming flag and file."""
    names = tmp_path / "names.json"
    if content is not None:
        names.write_text(content)
    target = tmp_path / "out"
    source = VECTORS / "convert" / "multi"
    assert (
        run(["convert", "--standalone", "--prefetch-files-json", str(names), str(source), str(target)]) == 1
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--prefetch-files-json {names}" in error
    assert not target.exists()
