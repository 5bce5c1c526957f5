"""`soci create` where things go wrong: odd and damaged layers, several at once, signals, full disks."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.containerd import Containerd
from harness.images import Layer, layer_from_tar, push, write_layout
from harness.proxy import Proxy
from harness.registries import RunningRegistry
from tests.integration.support import GNU, PIGZ, PLAIN, Soci, image, indexes_in, tree

from soci_snapshotter.cli.main import run
from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.store.artifacts import Artifacts, IndexRecord
from soci_snapshotter.store.content import ContentStore

pytestmark = pytest.mark.root
STORES = ["containerd", "soci"]


def tar_of(*names: str, size: int = 3000, fields: dict[str, str] | None = None) -> bytes:
    """A tar of regular files; `fields` go into a global PAX header."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers=fields or {}) as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = size
            tar.addfile(member, io.BytesIO(hashlib.shake_128(name.encode()).digest(size)))
    return stream.getvalue()


def header(size: bytes) -> bytes:
    """A tar with one entry, whose size field is as given and whose checksum is right."""
    block = bytearray(tar_of("f")[:512])
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(10240 - 512)


ODD = {
    "zstd": layer_from_tar(tar_of("z"), "zstd"),
    "global": layer_from_tar(tar_of("g", fields={"comment": "from git archive"})),
    "mislabelled": Layer(PIGZ.blob, PIGZ.diff_id, "application/vnd.oci.image.layer.v1.tar"),
    "no-layer": Layer(b'{"a":1}', GNU.diff_id, "application/vnd.example+json"),
    "endless": layer_from_tar(header(b"\x80" + bytes(3) + b"\x7f" + bytes(7)), "none"),
}


def test_odd_layers_cost_the_others_nothing(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """Five layers that no ztoc can describe among two good ones: named with the reason, and the index has the two."""
    image(tmp_path, containerd, GNU, *ODD.values(), PLAIN)
    out = soci("create", "--min-layer-size", "0", "x:1")
    for layer in ODD.values():
        assert f"layer {layer.digest} skipped: " in out
    (digest,) = indexes_in(out)
    index = sociindex.decode(client.content.get(digest, oci.MANIFEST_LIMIT))
    assert list(index.ztocs) == [GNU.digest, PLAIN.digest]
    assert f"index {digest} (linux/amd64): 2 of 7 layers" in out


@pytest.mark.parametrize("store", STORES)
def test_odd_layers_only(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path, store: str
) -> None:
    """Nothing but odd layers: exit 8 with every layer and its reason in one line, and nothing is written."""
    image(tmp_path, containerd, *ODD.values())
    before = {blob.digest for blob in client.content.find()}
    err = soci("--content-store", store, "create", "--min-layer-size", "0", "x:1", code=8)
    assert all(layer.digest in err for layer in ODD.values())
    assert err.count("\n") == 1
    assert {blob.digest for blob in client.content.find()} <= before
    assert not list(soci.root.rglob("sha256/*"))


@pytest.mark.parametrize("store", STORES)
def test_known_ztocs_are_taken_unless_forced_or_damaged(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path, store: str
) -> None:
    """Without its layer a known ztoc will do; --force and another span size need it; a damaged one is made again."""
    image(tmp_path, containerd, GNU)
    flags = ("--content-store", store, "create", "--min-layer-size", "0", "x:1")
    (first,) = indexes_in(soci(*flags))
    manifest = oci.decode_manifest(blob_in(soci, client, store, first))
    assert isinstance(manifest, oci.Manifest)
    (ztoc,) = (entry.digest for entry in manifest.layers)
    base = (
        containerd.root / "io.containerd.content.v1.content"
        if store == "containerd"
        else soci.root / "content"
    )
    file = base / "blobs/sha256" / ztoc.hex
    good = file.read_bytes()
    for damage in (lambda data: data[:-1] + b"\xff", lambda data: data[: len(data) // 2]):
        file.chmod(0o644)
        file.write_bytes(damage(good))
        out = soci(*flags)
        assert "already exists" not in out
        assert indexes_in(out) == [first]
        assert file.read_bytes() == good
    client.content.delete(digests.parse(GNU.digest))
    out = soci(*flags)
    assert f"layer {GNU.digest} -> ztoc {ztoc} (already exists)" in out
    assert indexes_in(out) == [first]
    for again in (["--force"], ["--span-size", "65536"], ["--build-tool", "other"]):
        assert GNU.digest in soci(*flags[:-1], *again, "x:1", code=4)


def blob_in(soci: Soci, client: ContainerdClient, store: str, digest: Digest) -> bytes:
    """A small blob out of either store, checked."""
    if store == "containerd":
        return client.content.get(digest, 1 << 24)
    return ContentStore(soci.root / "content").get(digest, 1 << 24)


def damaged_gzip(kind: str) -> bytes:
    """A gzip layer whose digest is right and whose content is not."""
    tar = tar_of("a", "b", "c")
    whole = gzip.compress(tar, mtime=0)
    crc = bytearray(whole)
    crc[-8] ^= 1
    length = bytearray(whole)
    length[-4] ^= 1
    return {
        "truncated": whole[: len(whole) // 2],
        "cut-in-trailer": whole[:-3],
        "crc": bytes(crc),
        "length": bytes(length),
        "rubbish-behind": whole + b"rubbish",
        "tar-ends-early": gzip.compress(tar[:5000], mtime=0),
        "tar-ends-in-header": gzip.compress(tar[:700], mtime=0),
        "checksum": gzip.compress(b"x" + tar[1:], mtime=0),
        "negative-size": gzip.compress(header(b"\xff" * 12), mtime=0),
        "no-number": gzip.compress(header(b"12x4567890"), mtime=0),
        "empty": b"",
        "zeros": bytes(5000),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        *("truncated", "cut-in-trailer", "crc", "length", "rubbish-behind", "tar-ends-early"),
        *("tar-ends-in-header", "checksum", "negative-size", "no-number", "empty", "zeros"),
    ],
)
def test_a_damaged_layer_is_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged layer, alone or beside a good one: exit 7, one line that names it, and the layout is as it was."""
    blob = damaged_gzip(kind)
    bad = Layer(blob, "sha256:" + hashlib.sha256(blob).hexdigest())
    layout = write_layout(tmp_path / "layout", [GNU, bad] if kind in ("truncated", "crc") else [bad]).path
    before = {file: file.read_bytes() for file in layout.rglob("*") if file.is_file()}
    assert run(["create", "--standalone", "--min-layer-size", "0", str(layout)]) == 7
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert bad.digest in err
    assert {file: file.read_bytes() for file in layout.rglob("*") if file.is_file()} == before


def started(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    """Python in a process group of its own, its temporary files in `scratch`."""
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the signals below must reach nobody else
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "src", "TMPDIR": str(tmp_path / "scratch")},
    )


# Another span size each time: nothing of the last round is known.
FIVE_TIMES = """
import sys
from soci_snapshotter.cli.main import run
name, *flags = sys.argv[1:]
sys.exit(max(run([*flags, "--span-size", str(65536 + n), name]) for n in range(5)))
"""


@pytest.mark.parametrize("store", STORES)
def test_several_at_once_do_no_harm(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path, store: str
) -> None:
    """Twice the same image and another one, at once, five times: all succeed, are listed, and every blob is right."""
    image(tmp_path, containerd, GNU, name="docker.io/library/x:1")
    image(tmp_path, containerd, PIGZ, name="docker.io/library/y:1")
    flags = [*soci.flags, "--content-store", store, "create", "--min-layer-size", "0"]
    running = [started(tmp_path, "-c", FIVE_TIMES, name, *flags) for name in ("x:1", "x:1", "y:1")]
    outputs = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert [err for _, err in outputs] == ["", "", ""]
    first, again, other = (indexes_in(out) for out, _ in outputs)
    assert first == again
    assert len({*first, *other}) == 10
    listed = soci("index", "list", "-q").split()
    # In containerd an image has one index: the newest.
    assert set(listed) == {*first[-1:], *other[-1:]} if store == "containerd" else {*first, *other}
    containerd.garbage_collect()
    for index in listed:
        manifest = oci.decode_manifest(blob_in(soci, client, store, digests.parse(index)))
        assert isinstance(manifest, oci.Manifest)
        for entry in manifest.layers:
            assert len(blob_in(soci, client, store, entry.digest)) == entry.size
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.fixture(scope="module")
def big(registry: RunningRegistry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image of two layers of 32 MB in the registry: what the sockets take of them does not matter."""
    layers = [layer_from_tar(tar_of(each, size=32 << 20), "none") for each in ("a", "b")]
    push(write_layout(tmp_path_factory.mktemp("big"), layers), f"{registry.host}/big:1")
    return "big:1"


@pytest.fixture
def waiting(registry: RunningRegistry, big: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command with two workers, in the middle of layers of a registry that says nothing any more."""
    with Proxy(registry.address) as proxy:
        flags = ["create", "--from-registry", f"{proxy.host}/{big}"]
        process = started(tmp_path, "-m", "soci_snapshotter.cli.main", *flags)
        try:
            wait_for(lambda: proxy.received > 1 << 20)
            proxy.stall()
            # The command, multiprocessing's tracker and a worker for each layer.
            wait_for(lambda: len(group(process.pid)) == 4)
            yield process
        finally:
            process.kill()
            process.communicate(timeout=20)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "soci: interrupted\n"), (signal.SIGTERM, 143, "soci: terminated\n")],
)
@pytest.mark.parametrize("whole", [True, False], ids=["group", "command"])
def test_a_signal_ends_it(
    waiting: subprocess.Popen[str],
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    says: str,
    whole: bool,
) -> None:
    """Ctrl-C or a stop, of the group or of the command: its exit code and one line; no process and no file is left."""
    assert os.getpgid(waiting.pid) == waiting.pid != os.getpgrp()
    (os.killpg if whole else os.kill)(waiting.pid, number)
    _, err = waiting.communicate(timeout=20)
    assert (waiting.returncode, err) == (code, says)
    wait_for(lambda: group(waiting.pid) == [])  # multiprocessing's tracker ends a moment later
    assert list((tmp_path / "scratch").iterdir()) == []


def test_workers_do_not_outlive_a_killed_command(waiting: subprocess.Popen[str]) -> None:
    """SIGKILL of the command alone, while its workers wait for a registry: they end, and say nothing."""
    waiting.kill()
    _, err = waiting.communicate(timeout=20)
    wait_for(lambda: group(waiting.pid) == [])
    assert err == ""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_full_store_keeps_what_it_had(
    soci: Soci, containerd: Containerd, small: Path, tmp_path: Path
) -> None:
    """No room for a ztoc in the soci store: exit 10 naming the file, the older index whole and listed, nothing else."""
    little = layer_from_tar(tar_of("a"))
    image(tmp_path, containerd, little, name="docker.io/library/little:1")
    image(tmp_path, containerd, little, GNU, name="docker.io/library/x:1")
    soci.flags = [*soci.flags[:-1], str(small / "root"), "--content-store", "soci"]
    (first,) = indexes_in(soci("create", "--min-layer-size", "0", "little:1"))
    content = ContentStore(small / "root/content")
    before = content.digests()
    assert len(before) == 3
    # The ztoc that both images have in common is not to go with the failure.
    err = soci("create", "--min-layer-size", "0", "--span-size", "4096", "x:1", code=10)
    assert str(small) in err
    assert "No space left" in err
    assert err.count("\n") == 1
    assert content.digests() == before
    assert list((small / "root/content/ingest").iterdir()) == []
    assert soci("index", "list", "-q").split() == [first]
    soci("index", "info", first)


def test_a_full_disk_is_not_blamed_on_the_table(small: Path) -> None:
    """No room for a row: an error of the system that names artifacts.sqlite, and the rows before it are there."""
    record = IndexRecord(
        *(digests.sha256(b"1"), "soci", "default", digests.sha256(b"i"), "x:1", "linux/amd64"),
        *(sociindex.INDEX_V1, 1, 1),
    )
    with Artifacts(small / "content/artifacts.sqlite") as artifacts:
        artifacts.add(record, only=False)
        with contextlib.suppress(OSError), (small / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        with pytest.raises(OSError, match=r"No space left.*artifacts\.sqlite"):
            artifacts.add(dataclasses.replace(record, digest=digests.sha256(b"2")), only=False)
        assert artifacts.all() == [record]


@pytest.mark.parametrize("form", ["oci-archive", "oci-dir"])
def test_a_full_disk_leaves_the_older_output(
    small: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No room for the new layout: exit 10 naming it, the old one as it was, and nothing beside it."""
    little = write_layout(tmp_path / "little", [layer_from_tar(tar_of("a"))]).path
    big = write_layout(tmp_path / "big", [PIGZ]).path
    target = small / "out"
    flags = ["convert", "--standalone", "--min-layer-size", "0", "--format", form]
    assert run([*flags, str(little), str(target)]) == 0
    before = {file: file.is_file() and file.read_bytes() for file in small.rglob("*")}
    capsys.readouterr()
    assert run([*flags, str(big), str(target)]) == 10
    err = capsys.readouterr().err
    assert str(target) in err
    assert "No space left" in err
    assert err.count("\n") == 1
    assert (target / "index.json" if form == "oci-dir" else target) in before
    after = {file: file.is_file() and file.read_bytes() for file in small.rglob("*")}
    assert {file: data for file, data in after.items() if file in before} == before
    extra = after.keys() - before.keys()
    assert extra == set()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_full_temporary_directory_is_named(
    small: Path,
    tmp_path: Path,
    layers: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No room for a ztoc in TMPDIR, in this process or in a worker: exit 10, one line with the path, nothing left."""
    layout = write_layout(tmp_path / "layout", [GNU, PIGZ][:layers]).path
    before = sorted(layout.rglob("*"))
    monkeypatch.setattr("tempfile.tempdir", str(small))
    (small / "ballast").write_bytes(bytes(400 << 10))
    assert run(["create", "--standalone", "--min-layer-size", "0", "--span-size", "4096", str(layout)]) == 10
    err = capsys.readouterr().err
    assert str(small) in err
    assert "No space left" in err
    assert err.count("\n") == 1
    assert [path.name for path in small.iterdir()] == ["ballast"]
    assert sorted(layout.rglob("*")) == before


def test_what_nerdctl_passes_works(
    soci: Soci,
    client: ContainerdClient,
    containerd: Containerd,
    registry: RunningRegistry,
    name: str,
    tmp_path: Path,
) -> None:
    """The words that nerdctl runs soci with: create and push for one platform and for all, and convert."""
    image(tmp_path, containerd, GNU, PIGZ, name=name)
    push(write_layout(tmp_path / "pushed", [GNU, PIGZ]), name)
    soci.flags = ["--address", containerd.address, "--namespace", "default"]
    root = ("--root", str(soci.root))  # not nerdctl's: the test must not write to the machine's own
    sizes = ("--span-size", "4194304", "--min-layer-size", "0")
    first = indexes_in(soci(*root, "create", "--platform", "linux/amd64", *sizes, name))
    assert indexes_in(soci(*root, "create", "--all-platforms", *sizes, name)) == first
    hosts = tmp_path / "a", tmp_path / "b"
    out = soci(
        *(*root, "push", "--platform", "linux/amd64", "--skip-verify", "--plain-http"),
        *("--hosts-dir", ",".join(map(str, hosts)), name),
    )
    assert first[0] in out
    converted = name.removesuffix(":1") + ":soci"
    soci(*root, "convert", "--platform", "linux/amd64", *sizes, name, converted)
    assert tree(client, client.images.get(converted).target.digest)[1] == set()


def group(leader: int) -> list[int]:
    """Pids of the processes in a process group that are not zombies."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in found.stdout.splitlines())
    return [int(pid) for pid, owner, state in rows if int(owner) == leader and not state.startswith("Z")]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Fail when it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
