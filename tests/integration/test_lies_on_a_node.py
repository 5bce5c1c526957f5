"""Tables of contents that lie about a file, end to end: an error, a log line, and no other image is harmed."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from harness.coldcache import drop_caches
from harness.daemon import CONFIG
from harness.images import Layer, Layout, layer_from_tar
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_lazy import big_layer, manifest_descriptor, push_index, sum_of

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import sociindex, ztoc, ztoc_writer
from soci_snapshotter.index.build import build_ztoc

pytestmark = pytest.mark.root

LIES: dict[str, dict[str, object]] = {
    "mode": {"mode": 0o4755},
    "uid": {"uid": 4711},
    "name": {"name": b"dir/invented"},
    "uncompressed_size": {"size": 300_001},
}


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One node for the module; each test has repositories of its own."""
    with lazy_rig() as found:
        yield found


def layer_with_a_file(seed: str) -> tuple[Layer, dict[str, str]]:
    """Ten files of 300,000 bytes that do not compress, in several spans, and their sums; dir/5 is to be lied about."""
    sums = {}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(10):
            data = hashlib.shake_128(f"{seed}/{number}".encode()).digest(300_000)
            member = tarfile.TarInfo(f"dir/{number}")
            member.size, member.mode, member.mtime = len(data), 0o640, 1_600_000_000
            tar.addfile(member, io.BytesIO(data))
            sums[member.name] = hashlib.sha256(data).hexdigest()
    return layer_from_tar(stream.getvalue()), sums


def index_with(layer: Layer, **changes: object) -> bytes:
    """The ztoc of `layer` with spans of half a MiB, and with other fields in the entry of dir/5."""
    built = build_ztoc([layer.blob], compression=ztoc.Compression.GZIP, span_size=1 << 19, build_tool="test")
    table = ztoc.decode(built.data)
    entries = [e._replace(**changes) if e.name == b"dir/5" else e for e in table.entries]  # type: ignore[arg-type]
    return ztoc_writer.encode(replace(table, entries=entries))


def publish(rig: Rig, repository: str, seed: int, layer: Layer, data: bytes) -> Layout:
    """An image of a layer of its own and `layer`, whose ztoc is `data`."""
    below, _ = big_layer(seed, files=1, size=512)  # a chain of its own: no other image's snapshot serves it
    layout = rig.publish(repository, [below, layer], index=False)
    entry = sociindex.ZtocDescriptor(
        digest=digests.sha256(data),
        size=len(data),
        layer_digest=digests.parse(layer.digest),
        layer_media_type=layer.media_type,
        span_size=1 << 19,
    )
    push_index(rig, repository, sociindex.build(manifest_descriptor(layout), [entry], "test"), data)
    return layout


def lines(rig: Rig, message: str, ztoc_digest: str) -> list[dict[str, str]]:
    """The daemon's log lines with this message that name this ztoc."""
    found = [json.loads(line) for line in rig.daemon.log.splitlines() if message in line]
    return [line for line in found if ztoc_digest in json.dumps(line)]


def fails(path: Path) -> bool:
    """Whether reading the file gives EIO, soon."""
    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output") as caught:
        path.read_bytes()
    assert time.monotonic() - started < 10
    return caught.value.errno == errno.EIO


@contextmanager
def config(rig: Rig, text: str) -> Iterator[None]:
    """The daemon with another configuration, while the block lasts."""
    restart(rig, text)
    try:
        yield
    finally:
        restart(rig, CONFIG)


def restart(rig: Rig, text: str) -> None:
    """Crash the daemon and start it with this configuration; wait until containerd has found it again."""
    rig.daemon.kill()
    rig.daemon.config = text
    rig.daemon.start()
    end = time.monotonic() + 20
    while True:
        try:
            rig.containerd.ctr("snapshots", "--snapshotter", "soci", "ls")
            return
        except RuntimeError:
            assert time.monotonic() < end
            time.sleep(0.2)


@pytest.mark.parametrize("field", LIES)
def test_a_lie_is_an_error_and_a_log_line(rig: Rig, field: str) -> None:
    """Mode, owner, name or size: EIO for the file and all later reads, also after a restart; one line that names layer,
    ztoc, entry and field; an image of the same layer with an honest ztoc is whole; the next pull
    takes the layer whole, and is right.
    """
    layer, sums = layer_with_a_file(field)
    honest, lying = index_with(layer), index_with(layer, **LIES[field])
    name, seed = field.replace("_", ""), 7000 + 10 * list(LIES).index(field)
    good = publish(rig, f"honest{name}", seed, layer, honest)
    bad = publish(rig, f"lying{name}", seed + 1, layer, lying)
    rig.pull(f"honest{name}")
    rig.pull(f"lying{name}")
    ztocs = {digests.sha256(data).hex for data in (honest, lying)}
    assert set(os.listdir(rig.daemon.root / "layers" / digests.parse(layer.digest).hex)) == ztocs
    with rig.rootfs(bad, "soci") as root, rig.rootfs(good, "soci") as other:
        assert sum_of(root / "dir/0") == sums["dir/0"]
        assert fails(root / ("dir/invented" if field == "name" else "dir/5"))
        drop_caches()
        assert fails(root / "dir/0")
        end = time.monotonic() + 10
        while not (found := lines(rig, "layer condemned", digests.sha256(lying))) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(found) == 1
        text = json.dumps(found[0])
        shown = "dir/invented" if field == "name" else "dir/5"
        assert all(word in text for word in (layer.digest, f"entry b'{shown}': {field} is "))
        assert found[0]["level"].lower() == "error"
        assert any(
            rig.name(f"lying{name}") in json.dumps(line) for line in lines(rig, "snapshot condemned", "")
        )
        restart(rig, CONFIG)
        drop_caches()
        assert fails(root / "dir/9")
        assert {path: sum_of(other / path) for path in sums} == sums
        assert os.stat(other / "dir/5").st_mode & 0o7777 == 0o640
    rig.containerd.ctr("images", "rm", "--sync", rig.name(f"lying{name}"))
    rig.pull(f"lying{name}")
    with rig.rootfs(bad, "soci") as root:
        assert {path: sum_of(root / path) for path in sums} == sums
        status = os.stat(root / "dir/5")
        assert (status.st_mode & 0o7777, status.st_uid, status.st_size) == (0o640, 0, 300_000)
    assert digests.sha256(lying).hex not in os.listdir(
        rig.daemon.root / "layers" / digests.parse(layer.digest).hex
    )


def test_disable_verification_serves_and_says_so(rig: Rig) -> None:
    """With the key set a lie about the owner goes unseen, and the log says at start that nobody looks."""
    layer, sums = layer_with_a_file("unverified")
    layout = publish(rig, "unverified", 7100, layer, index_with(layer, uid=4711))
    with config(rig, "disable_verification = true\n" + CONFIG):
        assert "disable_verification is set" in rig.daemon.log
        assert "unknown key" not in rig.daemon.log
        rig.pull("unverified")
        with rig.rootfs(layout, "soci") as root:
            assert {path: sum_of(root / path) for path in sums} == sums
            assert os.stat(root / "dir/5").st_uid == 4711
