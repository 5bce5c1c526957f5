"""`soci index`, `ztoc`, `prefetch` and `rebuild-db` with a real containerd, in both content stores."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.containerd import Containerd, start_containerd
from harness.images import (
    Layer,
    Layout,
    layer_from_blob,
    layer_from_tar,
    load,
    write_layout,
    write_multi_layout,
)

from soci_snapshotter.cli.main import run
from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.errors import Integrity, Invalid, NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.sociindex import INDEX_V2
from soci_snapshotter.store.content import ContentStore

pytestmark = pytest.mark.root
VECTORS = Path(__file__).parents[1] / "vectors"
GNU = layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz")
PIGZ = layer_from_blob(VECTORS / "pigz-edge3/layer.tar.gz")
PLAIN = layer_from_blob(VECTORS / "none-edge3-span1m/layer.tar")
SOCI_LABEL = "containerd.io/gc.ref.content.soci-index"
NAME = "docker.io/library/x:1"
STORES = ("containerd", "soci")


@pytest.fixture
def containerd() -> Iterator[Containerd]:
    """A containerd of the test's own: what is collected and what is not must not depend on others."""
    with start_containerd() as daemon:
        yield daemon


class Soci:
    """The CLI, run in this process, against one containerd and one root."""

    def __init__(self, containerd: Containerd, root: Path, capsys: pytest.CaptureFixture[bytes]) -> None:
        self.flags = ["--address", containerd.address, "--root", str(root)]
        self.root = root
        self._capsys = capsys

    def raw(self, *arguments: str, code: int = 0) -> bytes:
        """Run a command line; return stdout, or stderr when a failure is expected."""
        found = run([*self.flags, *arguments])
        out, err = self._capsys.readouterr()
        assert found == code, (out, err)
        return err if code else out

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """The same, as text."""
        return self.raw(*arguments, code=code).decode()

    def json(self, *arguments: str) -> Any:  # noqa: ANN401 - JSON
        """What a command prints with --json, decoded."""
        return json.loads(self(*arguments, "--json"))

    def create(self, *arguments: str, store: str = "containerd") -> list[Digest]:
        """Run create with every layer counting; return the digests of the indexes."""
        out = self("--content-store", store, "create", "--min-layer-size", "0", *arguments)
        return [digests.parse(found) for found in re.findall(r"^index (sha256:\S+) ", out, re.MULTILINE)]

    def indexes(self, *arguments: str) -> list[str]:
        """The digests that `index list` prints."""
        return self("index", "list", "-q", *arguments).split()

    def ztocs(self, *arguments: str) -> list[str]:
        """The digests that `ztoc list` prints."""
        return self("ztoc", "list", "-q", *arguments).split()

    def ztoc_of(self, layer: Layer) -> str:
        """The ztoc of a layer, from the list."""
        rows = [line.split() for line in self("ztoc", "list").splitlines()]
        return next(row[0] for row in rows if row[2] == layer.digest)

    def blobs(self) -> set[Digest]:
        """Every blob in the soci store."""
        return set(ContentStore(self.root / "content").digests())


@pytest.fixture
def soci(containerd: Containerd, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> Soci:
    """The CLI with a root of the test's own."""
    return Soci(containerd, tmp_path / "root", capsysbinary)


@pytest.fixture
def client(containerd: Containerd) -> Iterator[ContainerdClient]:
    """A client in the namespace the CLI uses by default."""
    with ContainerdClient(containerd.address) as found:
        yield found


def _image(tmp_path: Path, containerd: Containerd, *layers: Layer, name: str = NAME) -> Layout:
    layout = write_layout(tmp_path / f"layout-{name.replace('/', '-')}", layers, name=name)
    load(layout, containerd)
    return layout


@pytest.mark.parametrize("store", STORES)
def test_lists_show_what_create_made(soci: Soci, containerd: Containerd, tmp_path: Path, store: str) -> None:
    """One index: a row for each of the image's names of now, its ztocs, the same in JSON."""
    layout = _image(tmp_path, containerd, GNU, PIGZ)
    (digest,) = soci.create("x:1", store=store)
    containerd.ctr("images", "tag", NAME, "docker.io/library/y:2")
    rows = [line.split() for line in soci("index", "ls").splitlines()[1:]]
    assert [(row[0], row[2], row[3], row[5]) for row in rows] == [
        (digest, name, "linux/amd64", "v1") for name in (NAME, "docker.io/library/y:2")
    ]
    (listed,) = soci.json("index", "ls", "--ref", "y:2", "-p", "linux/amd64")
    assert listed["image_refs"] == [NAME, "docker.io/library/y:2"]
    assert (listed["content_stores"], listed["image_digest"]) == ([store], layout.digest)
    ztocs = soci.json("ztoc", "ls", "--image-ref", "x:1")
    assert {ztoc["layer_digest"] for ztoc in ztocs} == {GNU.digest, PIGZ.digest}
    assert [ztoc["digest"] for ztoc in ztocs] == soci.ztocs()
    assert soci.json("index", "info", digest)["image_refs"] == listed["image_refs"]


def test_both_stores_at_once(soci: Soci, containerd: Containerd, tmp_path: Path) -> None:
    """The same index in both is listed once; --content-store, when given, is the one that is listed and cleared."""
    _image(tmp_path, containerd, GNU)
    (digest,) = soci.create("x:1")
    assert soci.create("x:1", store="soci") == [digest]
    assert soci.indexes() == [digest]
    assert soci.json("index", "ls")[0]["content_stores"] == ["containerd", "soci"]
    soci("--content-store", "soci", "index", "rm", digest)
    assert soci.blobs() == set()
    assert soci.json("index", "ls")[0]["content_stores"] == ["containerd"]
    assert soci("--content-store", "soci", "index", "ls", "-q") == ""
    soci.create("x:1", store="soci")
    soci("index", "rm", digest)
    assert soci.indexes() == []
    assert soci.blobs() == set()


def test_listed_as_long_as_the_image(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """In containerd an index and its ztocs survive collection, go with the image, and are then in no list."""
    _image(tmp_path, containerd, GNU, PIGZ)
    (digest,) = soci.create("x:1")
    containerd.garbage_collect()
    assert soci.indexes() == [digest]
    assert len(soci.ztocs()) == 2
    client.images.delete(NAME, collect=True)
    assert soci.indexes() == soci.ztocs() == []
    assert soci("index", "info", digest, code=NotFound.exit_code).count("\n") == 1


def test_removed_from_containerd(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """The index and its label go at once, its ztocs with the next collection; what another index names stays."""
    first = _image(tmp_path, containerd, GNU, PIGZ)
    second = _image(tmp_path, containerd, GNU, PLAIN, name="docker.io/library/y:1")
    (index,) = soci.create("x:1")
    (other,) = soci.create("y:1")
    before = set(soci.ztocs())
    kept = set(soci.ztocs("--image-ref", "y:1"))
    assert soci("index", "rm", index) == ""
    assert soci.indexes() == [other]
    assert set(soci.ztocs()) == kept < before
    assert not client.content.exists(index)
    assert SOCI_LABEL not in client.content.info(digests.parse(first.digest)).labels
    assert client.content.info(digests.parse(second.digest)).labels[SOCI_LABEL] == other
    containerd.garbage_collect()
    assert [client.content.exists(digests.parse(ztoc)) for ztoc in before - kept] == [False]
    assert all(client.content.exists(digests.parse(ztoc)) for ztoc in kept)
    assert client.content.exists(digests.parse(GNU.digest))
    assert "no such SOCI index" in soci("index", "rm", index, code=NotFound.exit_code)


def test_removing_an_older_index_leaves_the_newer_ones_label(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """`rm` of an index that a newer one replaced, found again before its collection, takes no other's label."""
    layout = _image(tmp_path, containerd, GNU)
    (old,) = soci.create("x:1")
    client.content.update_labels(old, {"containerd.io/gc.root": "now"})
    (new,) = soci.create("x:1", "--span-size", "65536")
    soci("rebuild-db")
    assert set(soci.indexes()) == {old, new}
    soci("index", "rm", old)
    assert client.content.info(digests.parse(layout.digest)).labels[SOCI_LABEL] == new
    assert soci.indexes() == [new]


@pytest.mark.parametrize("store", STORES)
def test_platforms_of_an_image(soci: Soci, containerd: Containerd, tmp_path: Path, store: str) -> None:
    """--platform and --ref choose among the indexes of a multi-platform image; rm --ref takes them all."""
    layout = write_multi_layout(
        tmp_path / "multi", {"amd64": [GNU], "arm64": [PIGZ]}, name="docker.io/library/m:1"
    )
    load(layout, containerd)
    _image(tmp_path, containerd, PLAIN)
    amd, arm = soci.create("--all-platforms", "m:1", store=store)
    (other,) = soci.create("x:1", store=store)
    assert set(soci.indexes("--ref", "m:1")) == {amd, arm}
    assert soci.indexes("--ref", "m:1", "-p", "linux/arm64") == [arm]
    assert soci.indexes("-p", "arm64") == [arm]
    assert set(soci.indexes("-p", "amd64")) == {amd, other}
    assert "linux/riscv64" in soci("index", "ls", "--ref", "m:1", "-p", "riscv64", code=NotFound.exit_code)
    assert "none:latest" in soci("index", "ls", "--ref", "none", code=NotFound.exit_code)
    soci("index", "rm", "--ref", "m:1")
    assert soci.indexes() == [other]


def test_soci_store_outlives_the_image(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """In the soci store an index stays when its image goes: listed without a name, removed by its old one."""
    _image(tmp_path, containerd, GNU)
    (digest,) = soci.create("x:1", store="soci")
    client.images.delete(NAME, collect=True)
    row = soci("index", "ls").splitlines()[1].split()
    assert (row[0], row[2]) == (digest, "linux/amd64")
    assert soci.indexes("--ref", "x:1") == [digest]
    soci("index", "rm", "--ref", "x:1")
    assert soci.blobs() == set()


@pytest.mark.parametrize("store", STORES)
def test_rebuilding_restores_the_lists(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path, store: str
) -> None:
    """The table deleted, rebuild-db brings back v1 and v2 indexes with names, platforms and times."""
    layout = write_multi_layout(
        tmp_path / "multi", {"amd64": [GNU], "arm64": [PIGZ]}, name="docker.io/library/m:1"
    )
    load(layout, containerd)
    _image(tmp_path, containerd, PLAIN)
    flags = ("--content-store", store)
    soci.create("x:1", store=store)
    soci.create("--all-platforms", "m:1", store=store)
    soci(*flags, "convert", "--all-platforms", "--min-layer-size", "0", "m:1", "v:2")
    before, ztocs = soci.json(*flags, "index", "ls"), soci.ztocs()
    assert sorted(one["manifest_version"] for one in before) == ["v1", "v1", "v1", "v2", "v2"]
    (soci.root / "content/artifacts.sqlite").unlink()
    assert soci(*flags, "index", "ls", "-q") == ""
    assert soci(*flags, "rebuild-db").startswith("5 indexes found: 5 added")

    def by_digest(listed: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {one.pop("digest"): one for one in listed if one.pop("created_at")}

    after = soci.json(*flags, "index", "ls")
    assert by_digest(after) == by_digest(before)
    assert soci.ztocs() == ztocs
    assert soci(*flags, "rebuild-db").startswith("5 indexes found: 0 added to the list, 0")
    client.images.delete(NAME, collect=True)
    client.images.delete("docker.io/library/m:1", collect=True)
    client.images.delete("docker.io/library/v:2", collect=True)
    gone = 5 if store == "containerd" else 0
    assert f"0 added to the list, {gone} that are gone" in soci(*flags, "rebuild-db")
    assert len(soci(*flags, "index", "ls", "-q").split()) == 5 - gone


def test_converted_image_made_elsewhere(soci: Soci, containerd: Containerd, tmp_path: Path) -> None:
    """A converted image that was imported, not made here, is listed after rebuild-db; rm warns of its name."""
    _image(tmp_path, containerd, GNU)
    soci("convert", "--min-layer-size", "0", "x:1", "v:2")
    (digest,) = (one["digest"] for one in soci.json("index", "ls") if one["manifest_version"] == "v2")
    elsewhere = Soci(containerd, tmp_path / "elsewhere", soci._capsys)
    assert elsewhere.indexes() == []
    elsewhere("rebuild-db")
    (one,) = elsewhere.json("index", "ls", "--ref", "v:2")
    assert (one["digest"], one["artifact_type"], one["platform"]) == (digest, INDEX_V2, "linux/amd64")
    assert one["image_refs"] == ["docker.io/library/v:2"]
    assert elsewhere.ztocs("--image-ref", "v:2")
    assert run([*elsewhere.flags, "index", "rm", digest]) == 0
    out, err = soci._capsys.readouterr()
    assert out == b""
    assert b"warning: image docker.io/library/v:2" in err
    assert elsewhere.indexes() == []


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("layer", [GNU, PIGZ, PLAIN], ids=["gnu", "pigz", "plain"])
def test_file_is_what_tar_extracts(
    soci: Soci, containerd: Containerd, tmp_path: Path, store: str, layer: Layer
) -> None:
    """get-file to stdout and to a file: exactly the bytes that tar extracts, and no newline."""
    _image(tmp_path, containerd, layer)
    soci.create("x:1", store=store)
    ztoc = soci.ztoc_of(layer)
    blob = layer.blob if layer is PLAIN else gzip.decompress(layer.blob)
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        names = [member.name for member in tar if member.isreg() or member.islnk()]
        for name in [*names[:6], names[-1]]:
            member = tar.extractfile(tar.getmember(name))
            assert member is not None
            data = member.read()
            assert soci.raw("ztoc", "get-file", ztoc, name) == data
            assert soci.raw("ztoc", "get-file", ztoc, "/" + name, "-o", str(tmp_path / "out")) == b""
            assert (tmp_path / "out").read_bytes() == data


def test_output_file_is_replaced_whole_or_not_at_all(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """Through a link, over an old file; a device is written to; an error leaves the old content and no trace."""
    _image(tmp_path, containerd, GNU)
    soci.create("x:1")
    ztoc = soci.ztoc_of(GNU)
    get = ("ztoc", "get-file", ztoc, "edge/text-100k.txt", "-o")
    directory = tmp_path / "out"
    directory.mkdir()
    real, link = directory / "real", directory / "link"
    real.write_bytes(b"old")
    link.symlink_to("real")
    soci(*get, str(link))
    assert (link.is_symlink(), real.stat().st_size) == (True, 100000)
    soci(*get, "/dev/null")
    assert Path("/dev/null").is_char_device()
    assert str(directory) in soci(*get, str(directory), code=10)
    assert "none" in soci(*get, str(directory / "none/f"), code=10)
    real.write_bytes(b"old")
    assert "not in this layer" in soci(
        "ztoc", "get-file", ztoc, "nope", "-o", str(real), code=NotFound.exit_code
    )
    assert "directory" in soci("ztoc", "get-file", ztoc, "edge", "-o", str(real), code=Invalid.exit_code)
    blobs = containerd.root / "io.containerd.content.v1.content/blobs/sha256"
    damaged = blobs / GNU.digest.partition(":")[2]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.chmod(0o644)
    damaged.write_bytes(data)
    err = soci(*get, str(real), code=Integrity.exit_code)
    assert GNU.digest in err
    assert "span 0" in err
    client.content.delete(digests.parse(GNU.digest))
    err = soci(*get, str(real), code=NotFound.exit_code)
    assert f"ctr content fetch {NAME}" in err
    assert (sorted(directory.iterdir()), real.read_bytes()) == ([link, real], b"old")


@pytest.mark.parametrize("span_size", [4 << 20, 1 << 40], ids=["4m-spans", "one-giant-span"])
def test_large_file_takes_little_memory(
    soci: Soci, containerd: Containerd, tmp_path: Path, span_size: int
) -> None:
    """A file of 256 MiB is written with at most 120 MB of memory, whether it is in many spans or in one."""
    size = 256 << 20
    header = tarfile.TarInfo("big")
    header.size = size
    tar = header.tobuf() + bytes(size) + bytes(1024)
    layer = layer_from_tar(tar, "gzip")
    del tar
    _image(tmp_path, containerd, layer)
    soci.create("--span-size", str(span_size), "x:1")
    command = ["ztoc", "get-file", soci.ztoc_of(layer), "big", "-o", "/dev/null"]
    program = (
        "import re, sys; from soci_snapshotter.cli.main import run; code = run(sys.argv[1:]);"
        # Not ru_maxrss, which a child takes over from its parent.
        "print(code, re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *soci.flags, *command],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "src"},
    )
    code, kib = map(int, done.stdout.split())
    assert code == 0, done.stderr
    assert kib < 120_000
