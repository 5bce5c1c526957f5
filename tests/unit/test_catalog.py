"""Listing, showing, removing and finding again, in the soci store, through the command line: no containerd."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ztoc_support import VECTORS, Case, cases, entry, small_ztoc

from soci_snapshotter.cli.main import run
from soci_snapshotter.cli.tables import age, print_table, rfc3339
from soci_snapshotter.cli.ztoc import info_lines
from soci_snapshotter.errors import Config, Integrity, Invalid, NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, prefetch, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.prefetch import SpanRange
from soci_snapshotter.formats.sociindex import INDEX_V1, INDEX_V2, LAYER_DIGEST, PREFETCH
from soci_snapshotter.store.artifacts import Artifacts, IndexRecord
from soci_snapshotter.store.content import ContentStore

GNU, PIGZ = (next(case for case in cases() if case.name == name) for name in ("gnu6-edge1", "pigz-edge3"))
OTHER = digests.sha256(b"nothing")


class Soci:
    """The CLI on one root's own store, without a containerd; `store` and `artifacts` are what it works on."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.store = ContentStore(root / "content")
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run a command line; return stdout, or stderr when a failure is expected."""
        flags = ["--address", "/nowhere/c.sock", "--root", str(self.root), "--content-store", "soci"]
        found = run([*flags, *arguments])
        out, err = self._capsys.readouterr()
        assert found == code, (out, err)
        if code:
            assert (out, err.count("\n")) == ("", 1), err
        return str(err if code else out)

    def json(self, *arguments: str) -> Any:  # noqa: ANN401 - JSON
        """What a command prints, decoded."""
        return json.loads(self(*arguments, "--json"))

    def artifacts(self) -> Artifacts:
        """The table."""
        return Artifacts(self.root / "content/artifacts.sqlite")

    def index(
        self, *wanted: Case, image: str = "x", created_ns: int = 1, spans: tuple[SpanRange, ...] = ()
    ) -> Digest:
        """Store and record a v1 index over the vectors' layers, and a prefetch artifact of the first."""
        layers = []
        for case in wanted:
            manifest = json.loads((VECTORS / case.name / "index-v1.json").read_bytes())
            layers.append(oci.decode_manifest(json.dumps(manifest).encode()).layers[0])  # type: ignore[union-attr]
            self.store.put(case.ztoc)
        if spans:
            data = prefetch.encode(spans)
            marks = {LAYER_DIGEST: layers[0].annotations[LAYER_DIGEST]}
            layers.append(Descriptor(PREFETCH, self.store.put(data), len(data), annotations=marks))
        self.store.put(oci.EMPTY_JSON)
        subject = Descriptor(oci.MANIFEST, digests.sha256(image.encode()), 5)
        manifest = oci.Manifest(
            schema_version=2,
            media_type=oci.MANIFEST,
            config=Descriptor(INDEX_V1, oci.EMPTY_JSON_DIGEST, 2),
            layers=tuple(layers),
            subject=subject,
        )
        data = oci.encode(manifest)
        digest = self.store.put(data)
        self.record(digest, subject.digest, f"docker.io/library/{image}:1", len(data), created_ns)
        return digest

    def record(self, digest: Digest, image: Digest, name: str, size: int, created_ns: int = 1) -> None:
        """Record an index in the table."""
        record = IndexRecord(
            digest, "soci", "default", image, name, "linux/amd64", INDEX_V1, size, created_ns
        )
        with self.artifacts() as artifacts:
            artifacts.add(record, only=False)

    def blobs(self) -> set[Digest]:
        """Every blob in the store."""
        return set(self.store.digests())


@pytest.fixture
def soci(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    """The CLI with an empty root."""
    return Soci(tmp_path / "root", capsys)


def _ztoc(case: Case) -> Digest:
    return digests.sha256(case.ztoc)


def _layer(case: Case) -> Digest:
    return digests.sha256(case.layer)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_ztoc_info_is_the_go_tools(soci: Soci, case: Case) -> None:
    """For every vector the very bytes that the Go tool printed, but for a newline at the end."""
    digest = soci.store.put(case.ztoc)
    expected = (VECTORS / case.name / "ztoc-info.json").read_text()
    assert soci("ztoc", "info", digest).rstrip("\n") == expected.rstrip("\n")
    assert soci.json("ztoc", "info", digest) == case.info


def test_ztoc_info_of_odd_names() -> None:
    """Names of any bytes make JSON: U+FFFD for each bad byte, and Go's escapes."""
    names = [b"\xff\xfe<&>", b"\xc3\xa9\xed\xa0\x80", b'"\\\n\x01', "\u2028".encode()]
    entries = [entry(name, offset=512 + 1024 * n) for n, name in enumerate(names)]
    text = "\n".join(info_lines(small_ztoc(*entries), 7))
    found = [file["filename"] for file in json.loads(text)["files"]]
    assert found == ["\ufffd\ufffd<&>", "\u00e9\ufffd\ufffd\ufffd", '"\\\n\x01', "\u2028"]
    assert r"\u003c\u0026\u003e" in text
    assert r"\u2028" in text


def test_ztoc_info_of_many_entries() -> None:
    """More entries than are written at once: one document with all of them."""
    for count in (999, 1000, 1001, 2500):
        entries = [entry(b"f%d" % n, offset=512 + 1024 * n) for n in range(count)]
        ztoc = small_ztoc(*entries, uncompressed_size=1024 * 3000, compressed_size=10**5)
        document = json.loads("\n".join(info_lines(ztoc, 7)))
        assert (document["num_files"], len(document["files"])) == (count, count)
        assert document["files"][-1]["filename"] == f"f{count - 1}"


def test_index_list_columns(soci: Soci) -> None:
    """Columns and their order, newest first, padded as tabwriter pads them; no ztocs among them."""
    first = soci.index(GNU, image="old", created_ns=10)
    second = soci.index(PIGZ, image="new", created_ns=2_000_000_000_000_000_000)
    lines = soci("index", "list").splitlines()
    assert re.split(r" {4,}", lines[0]) == [
        "DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED", "",
    ]  # fmt: skip
    rows = [line.split() for line in lines[1:]]
    assert [row[:6] for row in rows] == [
        [
            digest,
            str(soci.store.size(digest)),
            f"docker.io/library/{name}:1",
            "linux/amd64",
            oci.MANIFEST,
            "v1",
        ]
        for digest, name in ((second, "new"), (first, "old"))
    ]
    starts = [lines[0].index(title) for title in ("SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "CREATED")]
    assert all(line[start - 4 : start] == "    " for line in lines for start in starts)
    assert all(line.endswith("    ") for line in lines)


def test_index_list_filters(soci: Soci) -> None:
    """--ref, --platform, -q and `ls`; an image without index, and a bad platform, are errors."""
    first = soci.index(GNU, image="a", created_ns=1)
    second = soci.index(PIGZ, image="b", created_ns=2)
    assert soci("index", "ls", "-q").split() == [second, first]
    assert soci("index", "list", "--quiet", "--ref", "a:1").split() == [first]
    assert soci("index", "ls", "-q", "-p", "linux/amd64", "-p", "arm64").split() == [second, first]
    assert soci("index", "ls", "-q", "--platform", "arm64").split() == []
    assert soci("index", "ls", "-q", "--ref", "b:1", "-p", "x86_64").split() == [second]
    assert "docker.io/library/c:1" in soci("index", "ls", "--ref", "c:1", code=NotFound.exit_code)
    assert "a/b/c/d" in soci("index", "ls", "-p", "a/b/c/d", code=Invalid.exit_code)


def test_index_list_json(soci: Soci) -> None:
    """Stable keys, sizes in bytes, RFC 3339 times; an empty list is an array."""
    assert soci.json("index", "ls") == []
    digest = soci.index(GNU, created_ns=1_700_000_000_500_000_000)
    assert soci.json("index", "ls") == [
        {
            "digest": digest,
            "size": soci.store.size(digest),
            "image_refs": ["docker.io/library/x:1"],
            "image_digest": digests.sha256(b"x"),
            "platform": "linux/amd64",
            "media_type": oci.MANIFEST,
            "artifact_type": INDEX_V1,
            "manifest_version": "v1",
            "created_at": "2023-11-14T22:13:20.5Z",
            "content_stores": ["soci"],
            "namespace": "default",
        }
    ]


def test_index_info_is_the_manifest(soci: Soci) -> None:
    """The manifest's own JSON, indented by two, keys and escapes as they are; --json says what it means."""
    digest = soci.store.put((VECTORS / "gnu6-edge1/index-v1.json").read_bytes())
    text = soci("index", "info", digest)
    assert text == json.dumps(json.loads(soci.store.get(digest, 1 << 20)), indent=2) + "\n"
    details = soci.json("index", "info", digest)
    assert (details["digest"], details["manifest_version"]) == (digest, "v1")
    assert details["ztocs"] == [
        {
            "digest": _ztoc(GNU),
            "size": len(GNU.ztoc),
            "layer_digest": _layer(GNU),
            "layer_media_type": "application/vnd.oci.image.layer.v1.tar+gzip",
        }
    ]


def test_infos_say_what_a_digest_is(soci: Soci) -> None:
    """A digest of another kind is named with the command for it; an unknown one is not found."""
    index = soci.index(GNU, spans=(SpanRange(0, 0),))
    artifact = Digest(soci.json("prefetch", "ls")[0]["digest"])
    kinds = {"index": index, "ztoc": _ztoc(GNU), "prefetch": artifact}
    for command in kinds:
        for kind, digest in kinds.items():
            if kind != command:
                assert f"soci {kind} info" in soci(command, "info", digest, code=Invalid.exit_code)
        assert OTHER in soci(command, "info", OTHER, code=NotFound.exit_code)
        soci(command, "info", "sha256:12", code=Invalid.exit_code)
    assert "a SOCI index" in soci("ztoc", "get-file", index, "f", code=Invalid.exit_code)
    damaged = soci.store.put(b"{}{}")
    soci("index", "info", damaged, code=Integrity.exit_code)
    soci("ztoc", "info", damaged, code=Integrity.exit_code)


def test_ztoc_list(soci: Soci) -> None:
    """Columns, filters, -q and JSON; a ztoc that two indexes name is there once."""
    soci.index(GNU, PIGZ, image="a", created_ns=1)
    second = soci.index(GNU, image="b", created_ns=2)
    lines = [line.split() for line in soci("ztoc", "list").splitlines()]
    assert lines[0] == ["DIGEST", "SIZE", "LAYER", "DIGEST"]
    expected = {(_ztoc(case), str(len(case.ztoc)), _layer(case)) for case in (GNU, PIGZ)}
    assert [tuple(line) for line in lines[1:]] == sorted(expected)
    assert soci("ztoc", "ls", "-q", "--image-ref", "b:1").split() == [_ztoc(GNU)]
    assert soci("ztoc", "ls", "-q", "--ztoc-digest", _ztoc(PIGZ)).split() == [_ztoc(PIGZ)]
    assert soci("ztoc", "ls", "-q", "--ztoc-digest", OTHER) == ""
    arguments = ("ztoc", "ls", "--image-ref", "b:1", "--ztoc-digest", _ztoc(PIGZ))
    assert _ztoc(PIGZ) in soci(*arguments, code=NotFound.exit_code)
    (one,) = soci.json("ztoc", "ls", "--ztoc-digest", _ztoc(GNU))
    assert one == {
        "digest": _ztoc(GNU),
        "size": len(GNU.ztoc),
        "layer_digest": _layer(GNU),
        "span_size": 4194304,
        "index_digest": second,
        "created_at": "1970-01-01T00:00:00.000000002Z",
        "content_store": "soci",
    }


def test_prefetch_list_and_info(soci: Soci) -> None:
    """Columns, the Go tool's text, and JSON with its names too; a damaged artifact is still listed."""
    assert soci("prefetch", "list").split() == ["DIGEST", "LAYER", "DIGEST", "SPANS", "CREATED"]
    index = soci.index(
        PIGZ, spans=(SpanRange(0, 3), SpanRange(7, 7, 2)), created_ns=1_700_000_000_000_000_000
    )
    lines = [line.split() for line in soci("prefetch", "ls").splitlines()]
    digest = lines[1][0]
    assert lines[1][1:3] == [_layer(PIGZ), "5"]
    (one,) = soci.json("prefetch", "ls")
    assert (one["digest"], one["layer_digest"], one["total_spans"]) == (digest, _layer(PIGZ), 5)
    assert (one["Digest"], one["LayerDigest"], one["TotalSpans"]) == (digest, _layer(PIGZ), 5)
    assert one["created_at"] == one["CreatedAt"] == "2023-11-14T22:13:20Z"
    text = soci("prefetch", "info", digest)
    assert (
        "[0] StartSpan: 0, EndSpan: 3 (covers 4 spans)\n  [1] StartSpan: 7, EndSpan: 7 (covers 1 spans)\n"
        in text
    )
    assert "      Priority: 2\n\nTotal spans to prefetch: 5\n" in text
    info = soci.json("prefetch", "info", digest)
    assert info["prefetch_spans"] == [
        {"start_span": 0, "end_span": 3, "priority": 0},
        {"start_span": 7, "end_span": 7, "priority": 2},
    ]
    assert (info["digest"], info["index_digest"], info["version"]) == (digest, index, "1.0")
    path = soci.store.path(Digest(digest))
    path.chmod(0o644)
    path.write_bytes(b"{}")
    assert soci("prefetch", "ls").splitlines()[1].split()[2] == "N/A"


def test_stale_records_are_not_listed(soci: Soci) -> None:
    """An index whose blob is gone, and a ztoc that is, are in no list; rebuild-db takes the record away."""
    stale, kept = soci.index(GNU, image="a"), soci.index(PIGZ, image="b")
    soci.store.delete(stale)
    assert soci("index", "ls", "-q").split() == [kept]
    assert soci("ztoc", "ls", "-q").split() == [_ztoc(PIGZ)]
    soci.store.delete(_ztoc(PIGZ))
    assert soci("ztoc", "ls", "-q") == ""
    assert "1 that are gone" in soci("rebuild-db")
    with soci.artifacts() as artifacts:
        assert [record.digest for record in artifacts.all()] == [kept]


def test_removing_keeps_what_others_name(soci: Soci) -> None:
    """The removed index's own blobs go; shared ztocs, and the config, only with the last that names them."""
    first = soci.index(GNU, PIGZ, image="a", spans=(SpanRange(0, 1),))
    artifact = soci.json("prefetch", "ls")[0]["digest"]
    second = soci.index(GNU, image="b")
    assert soci("index", "rm", first) == ""
    assert soci.blobs() == {second, _ztoc(GNU), oci.EMPTY_JSON_DIGEST}
    assert artifact not in soci.blobs()
    assert soci("index", "ls", "-q").split() == [second]
    soci("index", "remove", second)
    assert soci.blobs() == set()


def test_removing_keeps_what_no_list_knows(soci: Soci) -> None:
    """A ztoc is kept for an index that is in the store without a record, and for a layer the daemon has."""
    first = soci.index(GNU, PIGZ, image="a")
    unlisted = soci.index(GNU, image="b")
    with soci.artifacts() as artifacts:
        artifacts.remove(unlisted, "soci", "default")
    (soci.root / "layers" / _layer(PIGZ).hex / _ztoc(PIGZ).hex).mkdir(parents=True)
    soci("index", "rm", first)
    assert soci.blobs() == {unlisted, _ztoc(GNU), _ztoc(PIGZ), oci.EMPTY_JSON_DIGEST}


def test_removing_keeps_what_another_namespace_lists(soci: Soci) -> None:
    """The soci store is one for all namespaces: an index goes with the last of them that lists it."""
    digest = soci.index(GNU)
    with soci.artifacts() as artifacts:
        (record,) = artifacts.all()
        artifacts.add(dataclasses.replace(record, namespace="k8s.io"), only=False)
    soci("index", "rm", digest)
    assert soci("index", "ls", "-q") == ""
    assert soci("--namespace", "k8s.io", "index", "ls", "-q").split() == [digest]
    soci("rebuild-db")
    assert soci("index", "ls", "-q") == ""  # it is k8s.io's
    soci("--namespace", "k8s.io", "index", "rm", digest)
    assert soci.blobs() == set()


def test_removing_several(soci: Soci) -> None:
    """Unknown and malformed digests are one line, and the others are removed all the same; none is fine."""
    first, second, third = (soci.index(GNU, image=image) for image in "abc")
    err = soci("index", "rm", first, OTHER, second, code=NotFound.exit_code)
    assert OTHER in err
    assert soci("index", "ls", "-q").split() == [third]
    err = soci("index", "rm", "nonsense", OTHER, third, code=Invalid.exit_code)
    assert "nonsense" in err
    assert OTHER in err
    assert soci("index", "ls", "-q") == ""
    assert soci("index", "rm") == ""
    assert "--ref" in soci("index", "rm", "--ref", "a:1", OTHER, code=Invalid.exit_code)
    assert _ztoc(GNU) in soci("index", "rm", _ztoc(GNU), code=NotFound.exit_code)


def test_removing_by_ref(soci: Soci) -> None:
    """--ref removes all indexes of the image and no other's."""
    soci.index(GNU, image="a", created_ns=1)
    soci.index(PIGZ, image="a", created_ns=2)
    other = soci.index(PIGZ, image="b", created_ns=3)
    soci("index", "rm", "--ref", "a:1")
    assert soci.blobs() == {other, _ztoc(PIGZ), oci.EMPTY_JSON_DIGEST}
    assert "docker.io/library/a:1" in soci("index", "rm", "--ref", "a:1", code=NotFound.exit_code)


def test_removing_a_ztoc_is_refused(soci: Soci) -> None:
    """`index rm` of a ztoc says what it is and removes nothing."""
    soci.index(GNU)
    before = soci.blobs()
    assert "is a ztoc" in soci("index", "rm", _ztoc(GNU), code=Invalid.exit_code)
    assert soci.blobs() == before


def test_rebuilding_finds_version_1(soci: Soci) -> None:
    """The table deleted: indexes and ztocs are listed again, dated by their blobs; twice adds nothing."""
    digest = soci.index(GNU, PIGZ)
    before = soci.json("ztoc", "ls")
    (soci.root / "content/artifacts.sqlite").unlink()
    assert soci("index", "ls", "-q") == ""
    assert soci("rebuild-db").startswith("1 indexes found: 1 added")
    (one,) = soci.json("index", "ls")
    assert (one["digest"], one["image_digest"]) == (digest, digests.sha256(b"x"))
    modified = soci.store.path(digest).stat().st_mtime_ns
    assert one["created_at"] == rfc3339(modified)
    assert [ztoc["digest"] for ztoc in soci.json("ztoc", "ls")] == [ztoc["digest"] for ztoc in before]
    assert soci("rebuild-db").startswith("1 indexes found: 0 added")


@pytest.mark.parametrize("case", ["gnu6-edge1", "go-edge2-whiteouts", "pigz-edge3"])
def test_rebuilding_finds_version_2(soci: Soci, case: str) -> None:
    """A converted image's blobs in the store: its v2 index is found, with its manifest and platform."""
    converted = {digests.sha256(path.read_bytes()): path for path in (VECTORS / case / "v2").glob("*.json")}
    for path in converted.values():
        soci.store.put(path.read_bytes())
    soci("rebuild-db")
    (one,) = soci.json("index", "ls")
    index = oci.decode_manifest(soci.store.get(Digest(one["digest"]), 1 << 20))
    assert isinstance(index, oci.Manifest)
    assert index.config.media_type == one["artifact_type"] == INDEX_V2
    assert (one["manifest_version"], one["platform"]) == ("v2", "linux/amd64")
    manifest = oci.decode_manifest(soci.store.get(Digest(one["image_digest"]), 1 << 20))
    assert manifest.annotations[sociindex.INDEX_DIGEST] == one["digest"]


def test_rebuilding_passes_over_what_is_no_index(soci: Soci) -> None:
    """Ztocs, configs, other JSON, damaged and too large blobs are passed over; hostile annotations too."""
    digest = soci.index(GNU)
    for data in (b"{", b"{}x", b'{"a":1}', b"\xff" * 100, b"[" * 10000, b" {" * 5000):
        soci.store.put(data)
    soci.store.put(b"{" + b" " * (oci.MANIFEST_LIMIT + 1) + b"}")
    entries = (Descriptor(oci.MANIFEST, OTHER, 5, annotations={sociindex.MANIFEST_DIGEST: "x" * 100}),)
    soci.store.put(oci.encode(oci.Index(schema_version=2, manifests=entries)))
    damaged = soci.index(PIGZ, image="b")
    path = soci.store.path(damaged)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"octet", b"0ctet"))
    (soci.root / "content/artifacts.sqlite").unlink()
    soci("rebuild-db")
    assert soci("index", "ls", "-q").split() == [digest]


def test_damaged_table_is_mended(soci: Soci) -> None:
    """A table that is no database: the error says what to do, and doing it brings the list back."""
    digest = soci.index(GNU)
    table = soci.root / "content/artifacts.sqlite"
    table.write_bytes(b"garbage" * 1000)
    assert "rebuild-db" in soci("index", "ls", code=Config.exit_code)
    table.unlink()
    soci("rebuild-db")
    assert soci("index", "ls", "-q").split() == [digest]


def test_containerd_is_needed_unless_the_other_store_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --content-store an unreachable containerd is an error, not an empty list."""
    for command in (["index", "ls"], ["ztoc", "ls"], ["prefetch", "ls"], ["rebuild-db"]):
        assert run(["--address", "/nowhere/c.sock", "--root", str(tmp_path), *command]) != 0
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "/nowhere/c.sock" in err


def test_json_and_quiet_exclude_each_other(soci: Soci) -> None:
    """Two answers to how to print are refused."""
    for command in ("index", "ztoc"):
        assert "--json" in soci(command, "ls", "-q", "--json", code=Invalid.exit_code)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s ago"),
        (0.5, "1s ago"),
        (59.4, "59s ago"),
        (59.5, "1m0s ago"),
        (3600, "1h0m0s ago"),
        (90061, "25h1m1s ago"),
        (-3, "-3s ago"),
        (-0.2, "0s ago"),
    ],
)
def test_ages_are_gos(seconds: float, text: str) -> None:
    """Durations in Go's notation, rounded to seconds; no time is `n/a`."""
    now = 1_700_000_000_000_000_000
    assert age(now - int(seconds * 10**9), now) == text
    assert age(0, now) == "n/a"


@given(st.integers(1, 2**62))
def test_times_are_rfc_3339(created_ns: int) -> None:
    """Every time is UTC with at most nine digits of a fraction and no zero at its end."""
    text = rfc3339(created_ns)
    assert text is not None
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{0,8}[1-9]))?Z", text)
    assert match is not None
    assert int((match[2] or "").ljust(9, "0")) == created_ns % 10**9


def test_tables_show_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """A name with an escape sequence or a newline in it stays in its cell; narrow columns have 8 places."""
    print_table(("A", "B"), [("x\x1b[2J\n", "y")])
    assert capsys.readouterr().out == "A         B       \nx?[2J?    y       \n"


def test_file_goes_where_it_is_told(soci: Soci, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """get-file without containerd: the error is about containerd, and no output file is made or touched."""
    soci.index(GNU)
    output = tmp_path / "out"
    output.write_bytes(b"old")
    err = soci("ztoc", "get-file", _ztoc(GNU), "edge/empty", "-o", str(output), code=9)
    assert "/nowhere/c.sock" in err
    assert output.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name != "root"] == ["out"]
