"""`soci create` and `soci push` with a real containerd and real registries."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.containerd import Containerd
from harness.images import Layer, layer_from_tar, load, write_multi_layout
from tests.integration.support import GNU, PIGZ, PLAIN, Soci, image

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex, ztoc
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.store.artifacts import Artifacts
from soci_snapshotter.store.content import ContentStore

pytestmark = pytest.mark.root
SOCI_LABEL = "containerd.io/gc.ref.content.soci-index"


def _index(client: ContainerdClient, digest: Digest) -> oci.Manifest:
    manifest = oci.decode_manifest(client.content.get(digest, oci.MANIFEST_LIMIT))
    assert isinstance(manifest, oci.Manifest)
    return manifest


def test_index_describes_every_layer(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """Gzip, pigz and uncompressed layers, one twice: a v1 index in image order, ztocs that fit."""
    layout = image(tmp_path, containerd, GNU, PIGZ, PLAIN, GNU)
    (digest,) = soci.create("x:1")
    manifest = _index(client, digest)
    assert manifest.config.media_type == sociindex.INDEX_V1
    assert client.content.get(manifest.config.digest, 2) == b"{}"
    assert manifest.subject is not None
    target = layout.target
    assert (manifest.subject.digest, manifest.subject.size) == (target["digest"], target["size"])
    annotated = [
        (entry.annotations[sociindex.LAYER_DIGEST], entry.annotations[sociindex.LAYER_MEDIA_TYPE])
        for entry in manifest.layers
    ]
    assert annotated == [(layer.digest, layer.media_type) for layer in (GNU, PIGZ, PLAIN, GNU)]
    for entry, layer in zip(manifest.layers, (GNU, PIGZ, PLAIN, GNU), strict=True):
        built = ztoc.decode(client.content.get(entry.digest, 1 << 24))
        assert built.compressed_size == len(layer.blob)
        assert entry.annotations[sociindex.SPAN_SIZE] == "4194304"


def test_rebuilding_gives_the_same_digests(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """Again, and after everything was removed: the same index; with another span size: another."""
    image(tmp_path, containerd, GNU, PIGZ)
    first = soci.create("x:1")
    assert soci.create("x:1") == first
    for entry in _index(client, first[0]).layers:
        client.content.delete(entry.digest)
    client.content.delete(first[0])
    assert soci.create("x:1") == first
    assert soci.create("x:1", "--span-size", "65536") != first


def test_index_lives_as_long_as_theimage(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """Collection leaves index, ztocs and config while the image is there, and takes all with it."""
    layout = image(tmp_path, containerd, GNU, PIGZ)
    (digest,) = soci.create("x:1")
    containerd.garbage_collect()
    manifest = _index(client, digest)
    kept = [digest, manifest.config.digest, *(entry.digest for entry in manifest.layers)]
    assert [client.content.exists(blob) for blob in kept] == [True] * 4
    labels = client.content.info(digests.parse(layout.digest)).labels
    assert labels[SOCI_LABEL] == digest
    client.images.delete("docker.io/library/x:1", collect=True)
    assert [client.content.exists(blob) for blob in kept] == [False] * 4


def test_newer_index_replaces_the_older(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """With other options the image has one index, the new one; the old goes at the next collection."""
    layout = image(tmp_path, containerd, GNU)
    (old,) = soci.create("x:1")
    (new,) = soci.create("x:1", "--span-size", "65536")
    containerd.garbage_collect()
    assert (client.content.exists(old), client.content.exists(new)) == (False, True)
    with Artifacts(soci.root / "content/artifacts.sqlite") as artifacts:
        records = artifacts.of_image(digests.parse(layout.digest), "containerd", "default")
    assert [record.digest for record in records] == [new]


def test_min_layer_size_decides(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """A layer of exactly the size is indexed, a smaller one is not and is named with the reason."""
    image(tmp_path, containerd, GNU, PIGZ)
    small, big = sorted((GNU, PIGZ), key=lambda layer: len(layer.blob))
    out = soci("create", "--min-layer-size", str(len(big.blob)), "x:1")
    assert f"layer {small.digest} skipped: smaller than --min-layer-size" in out
    digest = digests.parse(re.findall(r"^index (\S+)", out, re.MULTILINE)[0])
    found = [entry.annotations[sociindex.LAYER_DIGEST] for entry in _index(client, digest).layers]
    assert found == [big.digest]


@pytest.mark.parametrize("store", ["containerd", "soci"])
def test_nothing_to_index_writes_nothing(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path, store: str
) -> None:
    """All layers too small, or zstd: exit 1 with the reasons, and no new blob anywhere."""
    zstd = Layer(b"\x28\xb5\x2f\xfd", PIGZ.diff_id, "application/vnd.oci.image.layer.v1.tar+zstd")
    image(tmp_path, containerd, GNU, zstd)
    before = {blob.digest for blob in client.content.find()}
    err = soci("--content-store", store, "create", "x:1", code=1)
    assert "no layer to index" in err
    assert "zstd is not indexed" in err
    assert "smaller than --min-layer-size 10485760" in err
    assert {blob.digest for blob in client.content.find()} <= before
    assert not list(soci.root.rglob("sha256/*"))


@pytest.mark.parametrize("store", ["containerd", "soci"])
def test_damaged_layer_leaves_no_trace(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path, store: str
) -> None:
    """A layer whose bytes changed on containerd's disk: exit 1 naming it, nothing of the good one stored."""
    image(tmp_path, containerd, GNU, PIGZ)
    before = {blob.digest for blob in client.content.find()}
    blobs = containerd.root / "io.containerd.content.v1.content/blobs/sha256"
    damaged = blobs / PIGZ.digest.partition(":")[2]
    damaged.chmod(0o644)
    data = bytearray(damaged.read_bytes())
    data[9] ^= 1  # gzip's OS field: still a good stream, of another digest
    damaged.write_bytes(data)
    err = soci("--content-store", store, "create", "--min-layer-size", "0", "x:1", code=7)
    assert PIGZ.digest in err
    assert {blob.digest for blob in client.content.find()} <= before
    assert not list(soci.root.rglob("sha256/*"))


@pytest.mark.parametrize(
    ("layer", "words", "code"),
    [
        (Layer(GNU.blob, GNU.diff_id, "application/vnd.oci.image.layer.v1.tar"), "gzip", 8),
        (Layer(GNU.blob[:-9], GNU.diff_id), "cut off", 7),
        (Layer(GNU.blob, PIGZ.diff_id), PIGZ.diff_id, 7),
        (Layer(b"{}", GNU.diff_id, "application/vnd.example+json"), "vnd.example", 8),
    ],
    ids=["gzip-called-tar", "truncated", "wrong-diff-id", "no-layer"],
)
def test_bad_layers_are_named(
    soci: Soci, containerd: Containerd, tmp_path: Path, layer: Layer, words: str, code: int
) -> None:
    """What ends the index of an image: one line with the layer's digest and the reason."""
    image(tmp_path, containerd, layer)
    err = soci("create", "--min-layer-size", "0", "x:1", code=code)
    assert layer.digest in err
    assert re.search(words, err)
    assert err.count("\n") == 1


def test_soci_store_keeps_blobs_under_root(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """--content-store soci gives the same index, stored under root/content and not in containerd."""
    image(tmp_path, containerd, GNU, PIGZ)
    out = soci("--content-store", "soci", "create", "--min-layer-size", "0", "x:1")
    digest = digests.parse(re.findall(r"^index (\S+)", out, re.MULTILINE)[0])
    store = ContentStore(soci.root / "content")
    index = sociindex.decode(store.get(digest, oci.MANIFEST_LIMIT))
    assert [store.exists(entry.digest) for entry in index.ztocs.values()] == [True, True]
    assert not client.content.exists(digest)
    assert soci.create("x:1") == [digest]


def test_platforms(soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path) -> None:
    """This machine's by default, a named one, all that are there, and what is not there is an error."""
    layout = write_multi_layout(
        tmp_path / "multi", {"amd64": [GNU], "arm64": [PIGZ], "s390x": [PLAIN]}, name="docker.io/library/m:1"
    )
    load(layout, containerd)

    def subjects(*arguments: str) -> list[str]:
        found = [_index(client, digest).subject for digest in soci.create("m:1", *arguments)]
        return [subject.digest for subject in found if subject is not None]

    manifests = [str(image.manifest["digest"]) for image in layout.images]
    assert subjects("--platform", "linux/amd64") == [manifests[0]]
    assert subjects("-p", "arm64", "-p", "linux/s390x") == manifests[1:]
    assert subjects("--all-platforms") == manifests
    err = soci("create", "-p", "riscv64", "m:1", code=4)
    assert "linux/riscv64" in err
    assert "linux/s390x" in err
    # A partially pulled image: one platform's manifest is gone.
    client.content.delete(digests.parse(manifests[2]))
    assert subjects("--all-platforms") == manifests[:2]
    assert manifests[2] in soci("create", "-p", "s390x", "m:1", code=4)


def test_missing_image_and_layer(
    soci: Soci, client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """An image that was not pulled, and one whose layer blob is gone: named, with what to do."""
    assert "docker.io/library/gone:latest is not in containerd" in soci("create", "gone", code=4)
    image(tmp_path, containerd, GNU)
    client.content.delete(digests.parse(GNU.digest))
    err = soci("create", "--min-layer-size", "0", "x:1", code=4)
    assert GNU.digest in err
    assert "ctr content fetch" in err


def test_interrupt_ends_the_workers(soci: Soci, containerd: Containerd, tmp_path: Path) -> None:
    """Ctrl-C in the middle of two big layers: exit 130, one line, no process and no temporary file left."""
    big = [layer_from_tar(_big_tar(seed), "none") for seed in (1, 2)]
    image(tmp_path, containerd, *big)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "soci_snapshotter.cli.main", *soci.flags, "create", "x:1"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own: the signal below must reach nobody else
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": "src", "TMPDIR": str(scratch)},
    )
    deadline = time.monotonic() + 20
    while len(_group(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(_group(process.pid)) >= 3
    assert os.getpgid(process.pid) == process.pid != os.getpgrp()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (130, "soci: interrupted\n")
    assert _group(process.pid) == []
    assert list(scratch.iterdir()) == []


def _group(leader: int) -> list[int]:
    """Pids of the processes in a process group that are not zombies."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True)
    rows = (line.split() for line in found.stdout.splitlines())
    return [int(pid) for pid, group, state in rows if int(group) == leader and not state.startswith("Z")]


def _big_tar(seed: int) -> bytes:
    """A tar with one member of 256 MB of zeros, named by its seed."""
    size = 256 << 20
    header = bytearray(512)
    header[0:4] = b"f%03d" % seed
    header[100:108] = b"0000644\0"
    header[124:136] = b"%011o\0" % size
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(size) + bytes(1024)
