"""Layers that are all here: out of FUSE, proven, good without a daemon; and those that turn out to be a lie."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.coldcache import drop_caches
from harness.images import Layer, Layout, layer_from_blob, layer_from_tar
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_lazy import big_layer, manifest_descriptor, push_index, sum_of, tar_of

from soci_snapshotter.errors import SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import sociindex
from soci_snapshotter.linux import mounts
from soci_snapshotter.serve import keeper_client

pytestmark = pytest.mark.root
VECTORS = Path(__file__).parents[1] / "vectors"
EDGE3 = layer_from_blob(VECTORS / "pigz-edge3/layer.tar.gz")
EDGE3_ZTOC = (VECTORS / "pigz-edge3/ztoc.bin").read_bytes()
CONFIG = "[pull_modes.soci_v1]\nenable = true\n[background_fetch]\nsilence_period_msec = 200\n"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One node for the module, whose background fetch starts early; each test has a repository of its own."""
    with lazy_rig(CONFIG) as found:
        yield found


def until(condition: Callable[[], object], what: str, seconds: float = 40) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def directory(rig: Rig, layer: Layer) -> Path:
    """The layer's only directory."""
    [found] = (rig.daemon.root / "layers" / digests.parse(layer.digest).hex).iterdir()
    return found


def record(rig: Rig, layer: Layer) -> dict[str, object]:
    """What layer.json says."""
    return dict(json.loads((directory(rig, layer) / "layer.json").read_bytes()))


def wait_complete(rig: Rig, layer: Layer) -> None:
    """Until the layer is complete and shown locally."""
    until(lambda: record(rig, layer)["diff_id"], "the layer was not completed")
    until(lambda: local_mounts(rig, layer) or record(rig, layer)["condemned"], "no local mount was made")


def mounted(rig: Rig) -> set[int]:
    """n of every m/<n>."""
    top = os.fsencode(rig.daemon.root / "m") + b"/"
    return {int(entry.target[len(top) :]) for entry in mounts.mountinfo() if entry.target.startswith(top)}


def local_mounts(rig: Rig, layer: Layer) -> set[int]:
    """Mounts whose device is the layer's data.tar, as the record has it; that it is true shows without a daemon."""
    local = record(rig, layer)["local"]
    assert isinstance(local, list)
    return mounted(rig) & set(local)


def holds_open(rig: Rig, layer: Layer) -> bool:
    """Whether the daemon has a descriptor on one of the layer's files."""
    fds = Path(f"/proc/{rig.daemon.pid}/fd")
    top = str(directory(rig, layer))
    found = []
    for fd in fds.iterdir():
        try:
            found.append(os.readlink(fd))
        except FileNotFoundError:
            continue
    return any(link.startswith(top) for link in found)


def start(rig: Rig) -> None:
    """Start the daemon again, and wait until containerd has noticed."""
    rig.daemon.start()
    command = ("snapshots", "--snapshotter", "soci", "ls")
    until(lambda: rig.containerd.ctr(*command, check=False).returncode == 0, "containerd does not come back")


def padded_layer(seed: int) -> Layer:
    """A tar that goes on behind its end blocks: 3,000 bytes of zeros more than a record, an odd length."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo("only")
        data = hashlib.shake_128(f"pad{seed}".encode()).digest(5000)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    return layer_from_tar(stream.getvalue() + bytes(3000), "python")


def test_a_complete_layer_leaves_fuse(rig: Rig) -> None:
    """Filled, its DiffID is proven and new containers mount data.tar itself, which needs neither daemon nor keeper;
    a container from before reads on, and when it goes nothing of the layer is in FUSE or open in the daemon."""
    layer, sums = big_layer(31, files=12)
    layout = rig.publish("leave", [layer])
    rig.pull("leave")
    with rig.rootfs(layout, "soci") as old:
        before = mounted(rig)
        names = list(sums)
        assert sum_of(old / names[0]) == sums[names[0]]
        wait_complete(rig, layer)
        found = record(rig, layer)
        assert found["diff_id"] == layer.diff_id
        tar = (directory(rig, layer) / "data.tar").read_bytes()
        assert digests.sha256(tar) == layer.diff_id
        assert not list(directory(rig, layer).glob("spans.*"))
        assert before <= mounted(rig), "a mount that was handed out went"
        drop_caches()
        assert {name: sum_of(old / name) for name in names} == sums
        assert holds_open(rig, layer)
    until(lambda: not holds_open(rig, layer), "the FUSE file stayed")
    assert mounted(rig) & before == set()
    assert "layer left FUSE" in rig.daemon.log
    with rig.rootfs(layout, "soci") as root:
        rig.daemon.kill()
        keeper_client.stop(rig.daemon.address.parent)
        drop_caches()
        assert {name: sum_of(root / name) for name in names} == sums
        start(rig)
        drop_caches()
        assert {name: sum_of(root / name) for name in names} == sums
        assert not holds_open(rig, layer)


def test_tails_and_odd_lengths(rig: Rig) -> None:
    """What follows a tar's end blocks is part of the DiffID: the odd layers and one of an odd length are proven."""
    layers = [
        padded_layer(1),
        EDGE3,
        layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz"),
        layer_from_tar(tar_of(EDGE3)[:-700], "python"),
    ]
    layout = rig.publish("tails", layers)
    rig.pull("tails")
    for layer in layers:
        wait_complete(rig, layer)
        found = record(rig, layer)
        assert found["diff_id"] == layer.diff_id
        assert found["tar_size"] == len(tar_of(layer))
    with rig.rootfs(layout, "soci") as root:
        assert len((root / "only").read_bytes()) == 5000


def test_restarts_and_reboots(rig: Rig) -> None:
    """With the registry away: SIGTERM, kill -9 and what a reboot leaves (no mounts, no FUSE) keep a complete layer."""
    layer, sums = big_layer(33, files=4)
    layout = rig.publish("again", [layer])
    rig.pull("again")
    wait_complete(rig, layer)
    rig.proxy.stall()
    try:
        for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
            rig.daemon.stop(number)
            if number == signal.SIGINT:
                assert not mounted(rig)
            start(rig)
            drop_caches()
            with rig.rootfs(layout, "soci") as root:
                assert {name: sum_of(root / name) for name in sums} == sums, number
            until(lambda: not holds_open(rig, layer), "the FUSE file stayed")
    finally:
        rig.proxy.resume()


@pytest.mark.parametrize("how", ["flipped", "cut", "grown", "gone", "touched"])
def test_data_that_changed_while_the_daemon_was_down(rig: Rig, how: str) -> None:
    """Changed in any way it is fetched again, with a log line; touched only, it is hashed and kept."""
    layer, sums = big_layer(40 + ord(how[1]), files=3)
    layout = rig.publish(how, [layer])
    rig.pull(how)
    wait_complete(rig, layer)
    logged = rig.daemon.log.count("was changed by somebody else")
    rig.daemon.stop(signal.SIGINT)
    data = directory(rig, layer) / "data.tar"
    if how == "flipped":
        with open(data, "r+b") as file:
            file.seek(1 << 20)
            byte = file.read(1)
            file.seek(1 << 20)
            file.write(bytes([byte[0] ^ 1]))
    elif how == "cut":
        os.truncate(data, (1 << 20) + 7)
    elif how == "grown":
        os.truncate(data, 1 << 30)
        data.rename(data.with_name("x"))
        data.write_bytes(bytes(data.with_name("x").stat().st_size >> 6))
        data.with_name("x").unlink()
    elif how == "gone":
        data.unlink()
    else:
        os.utime(data)
    start(rig)
    with rig.rootfs(layout, "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums
    assert rig.daemon.log.count("was changed by somebody else") == logged + (how != "touched")
    wait_complete(rig, layer)
    assert record(rig, layer)["diff_id"] == layer.diff_id


def publish_edge3(rig: Rig, repository: str, below: Layer, claimed: str) -> Layout:
    """An image of `below` and EDGE3, whose config says that EDGE3's DiffID is `claimed`."""
    layout = rig.publish(repository, [below, Layer(EDGE3.blob, claimed)], index=False)
    entry = sociindex.ZtocDescriptor(
        digest=digests.sha256(EDGE3_ZTOC),
        size=len(EDGE3_ZTOC),
        layer_digest=digests.parse(EDGE3.digest),
        layer_media_type=EDGE3.media_type,
        span_size=4 << 20,
    )
    push_index(rig, repository, sociindex.build(manifest_descriptor(layout), [entry], "test"), EDGE3_ZTOC)
    return layout


def edge3_files() -> dict[str, bytes]:
    """Name -> content of EDGE3's regular files."""
    with tarfile.open(fileobj=io.BytesIO(tar_of(EDGE3))) as tar:
        last = {os.path.normpath(member.name.lstrip("/")): member for member in tar}
        return {
            name: stream.read()
            for name, member in last.items()
            if member.isreg() and (stream := tar.extractfile(member)) is not None
        }


def condemned_images(rig: Rig) -> list[str]:
    """Who the log says lied."""
    lines = [line for line in rig.daemon.log.splitlines() if "snapshot condemned" in line]
    return [json.loads(line)["image"] for line in lines]


def test_an_image_that_lies_about_a_diff_id(rig: Rig) -> None:
    """The liar's snapshot is condemned when the layer is complete, with a line that has the image's name, and refused
    from then on. An honest image with the same layer and ztoc is served; the liar, pulled again, is not lazy."""
    rig.containerd.ctr("images", "rm", "--sync", rig.name("tails"), check=False)
    below, _ = big_layer(50, files=1, size=512)
    liar = publish_edge3(rig, "liar", below, digests.sha256(b"something else"))
    rig.pull("liar")
    wait_complete(rig, EDGE3)
    until(lambda: condemned_images(rig) == [rig.name("liar")], "no line in the log")
    assert record(rig, EDGE3)["condemned"]
    with pytest.raises(SociError, match="DiffID"), rig.rootfs(liar, "soci"):
        pass
    honest = publish_edge3(rig, "honest", below, EDGE3.diff_id)
    rig.pull("honest")
    assert not record(rig, EDGE3)["condemned"]
    files = edge3_files()
    with rig.rootfs(honest, "soci") as root:
        assert {name: (root / name).read_bytes() for name in files} == files
    rig.containerd.ctr("images", "rm", "--sync", rig.name("liar"))
    declined = rig.daemon.log.count("layer declined")
    with pytest.raises(AssertionError):
        rig.pull("liar")  # containerd unpacks the layer, and finds the lie too
    assert rig.daemon.log.count("layer declined") > declined
    with rig.rootfs(honest, "soci") as root:
        assert {name: (root / name).read_bytes() for name in files} == files


def test_readers_of_a_lie_get_eio() -> None:
    """A container that runs while its layer turns out to be a lie reads errors from then on, after a restart too."""
    with lazy_rig("[pull_modes.soci_v1]\nenable = true\n[background_fetch]\ndisable = true\n") as rig:
        below, sums = big_layer(51, files=1, size=512)
        liar = publish_edge3(rig, "liar", below, digests.sha256(b"something else"))
        rig.pull("liar")
        files = edge3_files()
        names = [name for name, content in files.items() if content]
        with rig.rootfs(liar, "soci") as root:
            for name, content in files.items():  # the last span comes with the last of them, or ahead of it
                try:
                    assert (root / name).read_bytes() == content
                except OSError as error:
                    assert error.errno == errno.EIO
                    break
            until(lambda: condemned_images(rig) == [rig.name("liar")], "nobody was condemned")
            for _ in range(2):
                drop_caches()
                with pytest.raises(OSError, match="Input/output error") as caught:
                    (root / names[0]).read_bytes()
                assert caught.value.errno == errno.EIO
                [other] = sums
                assert sum_of(root / other) == sums[other]
                rig.daemon.kill()
                start(rig)


def test_another_ztoc_of_a_complete_layer_needs_no_span(rig: Rig) -> None:
    """Two images with one layer and two ztocs: the second is complete at once, the registry is asked for no byte of it,
    and both read right; when the first goes the second stays."""
    rig.containerd.ctr("images", "rm", "--sync", rig.name("honest"), check=False)
    below, _ = big_layer(70, files=1, size=512)
    other, _ = big_layer(71, files=1, size=512)
    rig.publish("ours", [below, EDGE3])
    rig.pull("ours")
    wait_complete(rig, EDGE3)
    theirs = publish_edge3(rig, "theirs", other, EDGE3.diff_id)
    rig.pull("theirs")
    top = rig.daemon.root / "layers" / digests.parse(EDGE3.digest).hex
    one, two = top.glob("*/data.tar")
    assert one.stat().st_ino == two.stat().st_ino
    assert "layer shared" in rig.daemon.log
    files = edge3_files()
    rig.containerd.ctr("images", "rm", "--sync", rig.name("ours"))
    until(lambda: len(list(top.iterdir())) == 1, "the first stayed")
    with rig.rootfs(theirs, "soci") as root:
        assert {name: (root / name).read_bytes() for name in files} == files


def test_two_namespaces_with_one_claim(rig: Rig) -> None:
    """Another image that claims the same chain ID, with another layer, in another namespace: while nothing is proven it
    gets its own bytes, unpacked by containerd; the same image gets the same snapshot."""
    layer, sums = big_layer(72, files=2)
    layout = rig.publish("mine", [layer])
    same, _ = big_layer(72, files=2)
    again = layer_from_tar(tar_of(same), "python")  # the same tar, another blob
    assert again.digest != layer.digest and again.diff_id == layer.diff_id
    rig.publish("yours", [again])
    rig.pull("mine")
    before = rig.lazy_layers()
    pull = ("pull", "--quiet", "--plain-http", "--snapshotter", "soci")
    assert rig.soci("--namespace", "other", *pull, rig.name("mine")) == 0
    assert rig.lazy_layers() <= before + 1  # the local mount beside the lazy one, at most
    assert rig.soci("--namespace", "third", *pull, rig.name("yours")) == 0
    for name, number in (("mine", "other"), ("yours", "third")):
        rig.containerd.ctr("images", "rm", "--sync", rig.name(name), namespace=number)
    with rig.rootfs(layout, "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums


@pytest.mark.timeout(180)
def test_the_quota_empties_layers_without_containers() -> None:
    """Above max_cache_bytes a layer that no container has gives its bytes back; one that has goes on; the emptied one
    reads right again."""
    config = f"{CONFIG}[snapshotter]\nmax_cache_bytes = {9 << 20}\n"
    with lazy_rig(config) as rig:
        kept, kept_sums = big_layer(80, files=6)
        idle, idle_sums = big_layer(81, files=6)
        kept_layout, idle_layout = rig.publish("kept", [kept]), rig.publish("idle", [idle])
        rig.pull("kept")
        with rig.rootfs(kept_layout, "soci") as root:
            rig.pull("idle")
            wait_complete(rig, kept)
            until(lambda: record(rig, idle)["diff_id"], "never complete")
            until(lambda: not (directory(rig, idle) / "data.tar").exists(), "never emptied", 60)
            drop_caches()
            assert {name: sum_of(root / name) for name in kept_sums} == kept_sums
            assert (directory(rig, kept) / "data.tar").stat().st_blocks * 512 >= 6 << 20
            with rig.rootfs(idle_layout, "soci") as other:
                assert {name: sum_of(other / name) for name in idle_sums} == idle_sums


def test_a_full_disk_serves_without_keeping() -> None:
    """A root of 24 MiB and a layer of 40: every byte is right, one line says that nothing is kept, the disk is no fuller
    than full; what is kept is served with the registry away."""
    with lazy_rig("[pull_modes.soci_v1]\nenable = true\n[background_fetch]\ndisable = true\n") as rig:
        rig.daemon.stop()
        image = rig.base / "small"
        with open(image, "wb") as file:
            os.truncate(file.fileno(), 24 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(rig.daemon.root)], check=True)
        start(rig)
        layer, sums = big_layer(90, files=40)
        layout = rig.publish("big", [layer])
        rig.pull("big")
        with rig.rootfs(layout, "soci") as root:
            assert {name: sum_of(root / name) for name in sums} == sums
            assert rig.daemon.log.count("the disk takes no spans") == 1
            drop_caches()
            rig.proxy.stall()
            first = next(iter(sums))
            assert sum_of(root / first) == sums[first]
            rig.proxy.resume()
            assert {name: sum_of(root / name) for name in sums} == sums
        rig.containerd.ctr("images", "rm", "--sync", rig.name("big"))
        until(lambda: not list((rig.daemon.root / "layers").iterdir()), "the layer stayed")


def test_removal_returns_the_disk(rig: Rig) -> None:
    """With the image go its mounts, layer directories and ztocs, of complete layers too."""
    layer, _ = big_layer(60, files=6)
    layout = rig.publish("remove", [layer])
    before = kept(rig)
    rig.pull("remove")
    wait_complete(rig, layer)
    with rig.rootfs(layout, "soci"):
        pass
    assert kept(rig) != before
    rig.containerd.ctr("images", "rm", "--sync", rig.name("remove"))
    until(lambda: kept(rig) == before, "something stayed")


def kept(rig: Rig) -> tuple[set[int], set[Path], set[str]]:
    """Mounts, layer directories, ztocs."""
    return mounted(rig), set((rig.daemon.root / "layers").iterdir()), ztocs(rig)


def ztocs(rig: Rig) -> set[str]:
    """Blobs in the daemon's content store."""
    return set(os.listdir(rig.daemon.root / "content/blobs/sha256"))
