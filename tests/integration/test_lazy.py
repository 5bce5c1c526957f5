"""Lazy layers end to end: real registry, containerd, daemon and kernel."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import rootfs_walk
from harness.coldcache import drop_caches
from harness.images import Layer, layer_from_blob, layer_from_tar
from harness.lazyrig import Rig, lazy_rig

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex, ztoc, ztoc_writer
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.registry.client import RegistryClient

pytestmark = pytest.mark.root
VECTORS = Path(__file__).parents[1] / "vectors"
EDGE1 = layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz")
EDGE2 = layer_from_blob(VECTORS / "go-edge2-whiteouts/layer.tar.gz")
EDGE3 = layer_from_blob(VECTORS / "pigz-edge3/layer.tar.gz")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One node for the module; each test has a repository of its own."""
    with lazy_rig() as found:
        yield found


def big_layer(seed: int, files: int = 24, size: int = 1 << 20) -> tuple[Layer, dict[str, str]]:
    """A layer of incompressible files, so that it has many spans; with the sha256 of each file."""
    sums = {}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(files):
            data = hashlib.shake_128(f"{seed}/{number}".encode()).digest(size)
            member = tarfile.TarInfo(f"data-{seed}-{number:03}")
            member.size = size
            tar.addfile(member, io.BytesIO(data))
            sums[member.name] = hashlib.sha256(data).hexdigest()
    return layer_from_tar(stream.getvalue()), sums


def sum_of(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_rootfs_equals_an_ordinary_pull(rig: Rig) -> None:
    """Every entry and byte of a lazy rootfs is what overlayfs gives, odd entries at the bottom and in the middle."""
    again = layer_from_tar(tar_of(EDGE1), "pigz")
    layout = rig.publish("equal", [EDGE1, EDGE2, again, EDGE3])
    rig.pull("equal")
    assert rig.lazy_layers() >= 4
    rig.pull("equal", snapshotter="overlayfs")
    with rig.rootfs(layout, "soci") as lazy, rig.rootfs(layout, "overlayfs") as ordinary:
        found = list(rootfs_walk.differences(os.fsencode(lazy), os.fsencode(ordinary)))
        # A directory that no layer has an entry for gets the time of the unpack there, and the epoch here.
        pulled = time.time_ns() - 600 * 10**9
        odd = [
            d for d in found if not (d.field == "mtime_ns" and isinstance(d.right, int) and d.right > pulled)
        ]
        assert odd == []


def test_the_same_layer_twice(rig: Rig) -> None:
    """A layer repeated in an image: one lowerdir, the same tree (directory link counts are overlayfs's own business)."""
    layout = rig.publish("twice", [EDGE3, EDGE2, EDGE3])
    rig.pull("twice")
    rig.pull("twice", snapshotter="overlayfs")
    with rig.rootfs(layout, "soci") as lazy, rig.rootfs(layout, "overlayfs") as ordinary:
        found = list(rootfs_walk.differences(os.fsencode(lazy), os.fsencode(ordinary)))
        recent = time.time_ns() - 600 * 10**9
        assert [
            d
            for d in found
            if d.field != "links"
            and not (d.field == "mtime_ns" and isinstance(d.right, int) and d.right > recent)
        ] == []


def test_index_of_the_go_tool_drives_the_daemon(rig: Rig) -> None:
    """The ztoc and index that the Go tool made serve its layer, named by --soci-index-digest, byte for byte."""
    layout = rig.publish("goindex", [EDGE1], index=False)
    index = (VECTORS / "gnu6-edge1/index-v1.json").read_bytes()
    push_index(rig, "goindex", index, (VECTORS / "gnu6-edge1/ztoc.bin").read_bytes())
    rig.pull("goindex", "--soci-index-digest", digests.sha256(index))
    with rig.rootfs(layout, "soci") as root, tarfile.open(fileobj=io.BytesIO(tar_of(EDGE1))) as tar:
        last = {os.path.normpath(m.name.lstrip("/")): m for m in tar}
        checked = 0
        for name, member in last.items():
            if member.isreg():
                content = tar.extractfile(member)
                assert content is not None
                assert (root / name).read_bytes() == content.read(), name
                checked += 1
        assert checked > 3000


def test_bad_ztocs_fall_back(rig: Rig) -> None:
    """A truncated ztoc, one for another layer's size, one with a path upwards: that layer is pulled whole instead."""
    good = (VECTORS / "pigz-edge3/ztoc.bin").read_bytes()
    table = ztoc.decode(good)
    upwards = table.entries[0]._replace(name=b"../escape")
    bad = {
        "cut": good[: len(good) // 2],
        "up": ztoc_writer.encode(replaced(table, entries=[upwards, *table.entries[1:]])),
        "digests": ztoc_writer.encode(
            replaced(table, span_digests=[*table.span_digests, table.span_digests[0]])
        ),
        "huge": ztoc_writer.encode(replaced(table, uncompressed_size=5 << 40)),
        "lies": ztoc_writer.encode(replaced(table, compressed_size=table.compressed_size + 1)),
    }
    for seed, (name, data) in enumerate(bad.items(), 100):
        below, _ = big_layer(
            seed, files=1, size=512
        )  # a chain of its own: no other image's snapshot serves it
        layout = rig.publish(f"bad{name}", [below, EDGE3], index=False)
        subject = manifest_descriptor(layout)
        entry = sociindex.ZtocDescriptor(
            digest=digests.sha256(data),
            size=len(data),
            layer_digest=digests.parse(EDGE3.digest),
            layer_media_type=EDGE3.media_type,
            span_size=4 << 20,
        )
        push_index(rig, f"bad{name}", sociindex.build(subject, [entry], "test"), data)
        log = rig.daemon.log
        rig.pull(f"bad{name}")
        said = rig.daemon.log[len(log) :]
        assert said.count("failed to prepare remote snapshot") == 1, name
        assert said.count('"local-snapshot-prepared": "true"') == 2, name
        used = rig.daemon.root / "layers" / digests.parse(EDGE3.digest).hex
        assert digests.sha256(data).hex not in os.listdir(used)
        with rig.rootfs(layout, "soci") as root:
            assert any(root.iterdir())
        assert f"layer {EDGE3.digest}" in rig.daemon.log
        rig.containerd.ctr("images", "rm", "--sync", rig.name(f"bad{name}"))


def test_reader_survives_kill_9(rig: Rig) -> None:
    """A reader of cold files while the daemon is killed and started again: the right bytes, no error."""
    layer, sums = big_layer(7, files=40)
    layout = rig.publish("kill", [layer])
    rig.pull("kill")
    with rig.rootfs(layout, "soci") as root:
        script = "import hashlib,sys\nfor n in sys.argv[1:]: print(hashlib.sha256(open(n,'rb').read()).hexdigest())"
        names = [str(root / name) for name in sums]
        rig.proxy.stall()
        reader = subprocess.Popen([sys.executable, "-c", script, *names], stdout=subprocess.PIPE, text=True)
        time.sleep(0.5)  # it is parked now
        rig.daemon.kill()
        rig.proxy.resume()
        rig.daemon.start()
        time.sleep(0.05)
        rig.daemon.kill()
        rig.daemon.start()
        out, _ = reader.communicate(timeout=60)
        assert reader.returncode == 0
        assert out.split() == list(sums.values())
        rig.reconnected()


def test_present_spans_are_served_while_reads_wait(rig: Rig) -> None:
    """500 reads parked on a dead registry: a read of a span that is here takes under 5 ms."""
    read_while_parked(rig, 500)


def read_while_parked(rig: Rig, parked: int) -> None:
    """Reads of a present span while `parked` reads of absent ones wait."""
    layer, sums = big_layer(9, files=60)
    layout = rig.publish("parked", [layer])
    rig.pull("parked")
    with rig.rootfs(layout, "soci") as root:
        names = list(sums)
        warm, cold = root / names[0], names[20:]
        assert sum_of(warm) == sums[names[0]]
        drop_caches()
        rig.proxy.stall()
        threads = [
            threading.Thread(
                target=read_at, args=(root / cold[n % len(cold)], 4096 * (n // len(cold)) * 16), daemon=True
            )
            for n in range(parked)
        ]
        for thread in threads:
            thread.start()
        time.sleep(1)
        took = []
        with open(warm, "rb") as file:
            for number in range(20):
                started = time.perf_counter()
                os.pread(file.fileno(), 4096, number * 40960)
                took.append(time.perf_counter() - started)
        os.statvfs(root)
        rig.proxy.resume()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert sorted(took)[len(took) // 2] < 0.005


def test_removing_images_leaves_nothing(rig: Rig) -> None:
    """After the image goes, its mounts and layer files go, and the ztoc."""
    layer, _ = big_layer(11, files=4)
    rig.publish("gone", [layer])
    rig.pull("gone")
    directory = rig.daemon.root / "layers" / digests.parse(layer.digest).hex
    [record] = directory.glob("*/layer.json")
    [mount] = json.loads(record.read_bytes())["mounts"].values()
    assert (rig.daemon.root / "m" / str(mount)).is_dir()
    rig.containerd.ctr("images", "rm", "--sync", rig.name("gone"))
    end = time.monotonic() + 10
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not directory.exists()
    assert not (rig.daemon.root / "m" / str(mount)).exists()


def read_at(path: Path, offset: int) -> None:
    """One read of 4 KiB."""
    with open(path, "rb") as file:
        os.pread(file.fileno(), 4096, offset)


def tar_of(layer: Layer) -> bytes:
    """The layer's uncompressed tar."""
    return subprocess.run(["gzip", "-dc"], input=layer.blob, stdout=subprocess.PIPE, check=True).stdout


def replaced(table: ztoc.Ztoc, **fields: object) -> ztoc.Ztoc:
    """A copy of a ztoc with other fields."""
    from dataclasses import replace

    return replace(table, **fields)  # type: ignore[arg-type]


def manifest_descriptor(layout: object) -> Descriptor:
    """The image manifest's descriptor of a layout with one image."""
    target = layout.images[0].manifest  # type: ignore[attr-defined]
    return Descriptor(str(target["mediaType"]), digests.parse(str(target["digest"])), int(target["size"]))


def push_index(rig: Rig, repository: str, index: bytes, *ztocs: bytes) -> None:
    """Push a hand-made SOCI index and its ztocs."""
    reference = references.parse(rig.name(repository))
    with RegistryClient() as client:
        for data in (oci.EMPTY_JSON, *ztocs):
            blob = Descriptor("application/octet-stream", digests.sha256(data), len(data))
            client.push_blob(reference, blob, lambda data=data: iter((data,)))
        client.push_manifest(reference, index, oci.MANIFEST)
