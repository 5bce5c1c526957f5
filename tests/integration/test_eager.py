"""Layers pulled whole, end to end: what is in them, who is told what, what is left behind, and every limit."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from harness import rootfs_walk
from harness.images import Layer, Layout, layer_from_tar
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_lazy import (
    EDGE1,
    EDGE2,
    EDGE3,
    big_layer,
    manifest_descriptor,
    push_index,
    sum_of,
    tar_of,
)

from soci_snapshotter.cli.main import run
from soci_snapshotter.errors import SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import sociindex
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index.build import DEFAULT_SPAN_SIZE, build_ztoc

pytestmark = pytest.mark.root

PARALLEL = """\
[pull_modes.soci_v1]
enable = true
[pull_modes.parallel_pull_unpack]
{switch} = true
discard_unpacked_layers = true
concurrent_download_chunk_size = "1mb"
max_concurrent_downloads_per_image = 4
max_concurrent_unpacks_per_image = 2
"""
PRIMARY = PARALLEL.format(switch="enable")
FALLBACK = PARALLEL.format(switch="experimental_parallel_pull_as_fallback")


@pytest.fixture(scope="module")
def primary() -> Iterator[Rig]:
    """A node that pulls every image whole."""
    with lazy_rig(PRIMARY) as found:
        yield found


def equal(rig: Rig, layout: Layout) -> None:
    """The image's rootfs is that of an ordinary pull (times of directories without an entry aside)."""
    rig.pull(layout.path.name, snapshotter="overlayfs")
    with rig.rootfs(layout, "soci") as ours, rig.rootfs(layout, "overlayfs") as ordinary:
        recent = time.time_ns() - 600 * 10**9
        assert [
            found
            for found in rootfs_walk.differences(os.fsencode(ours), os.fsencode(ordinary))
            if not (found.field == "mtime_ns" and isinstance(found.right, int) and found.right > recent)
        ] == []


def records(rig: Rig) -> list[dict[str, object]]:
    """Every layer.json."""
    return [json.loads(path.read_bytes()) for path in (rig.daemon.root / "layers").glob("*/*/layer.json")]


def record(rig: Rig, layer: Layer) -> dict[str, object]:
    """The layer's only record."""
    [found] = [each for each in records(rig) if each["layer_digest"] == layer.digest]
    return found


def whole(rig: Rig, layers: Sequence[Layer]) -> bool:
    """Whether each of these layers is here, filled as one stream, and mounted without FUSE."""
    return all(record(rig, layer)["made"] and record(rig, layer)["local"] for layer in layers)


def forget(rig: Rig, repository: str) -> None:
    """Remove the image and its snapshots."""
    rig.containerd.ctr("images", "rm", "--sync", rig.name(repository))


def until(condition: Callable[[], object], what: str, pause: float = 0.05) -> None:
    """Wait until it holds."""
    end = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(pause)


def pull_fails(rig: Rig, repository: str) -> bool:
    """Whether a pull ends with an error."""
    command = ("pull", "--quiet", "--plain-http", "--snapshotter", "soci")
    return rig.soci(*command, rig.name(repository)) != 0


def nothing_left(rig: Rig, layer: Layer) -> None:
    """Neither files of the layer nor of any pull."""
    until(lambda: not any((rig.daemon.root / "filling").iterdir()), "files of a pull stayed")
    assert not (rig.daemon.root / "layers" / digests.parse(layer.digest).hex).exists()


SIZES = ((411, 1, 50_000), (412, 1, 500_000), (413, 4, 1 << 20))
"""Seed, files, bytes of each: below the fallback node's min_layer_size, below the index's, above both."""
FORMS = ("pigz", "zstd", "none", "gzip")


def test_rootfs_equals_an_ordinary_pull(primary: Rig) -> None:
    """Every entry and byte, of layers as gzip, zstd and plain tars; no layer goes through FUSE."""
    layers = [
        EDGE1,
        EDGE2,
        *(layer_from_tar(tar_of(EDGE3) + bytes(512 * n), form) for n, form in enumerate(FORMS)),
    ]
    layout = primary.publish("forms", layers, index=False)
    primary.pull("forms")
    assert whole(primary, layers)
    assert not list((primary.daemon.root / "filling").iterdir())
    equal(primary, layout)
    forget(primary, "forms")


def test_a_free_ztoc_makes_the_next_pull_lazy(primary: Rig) -> None:
    """What a pull learned stays when the image goes: then the same layer is lazy, and its bytes are right."""
    layer, sums = big_layer(301)
    layout = primary.publish("again", [layer], index=False)
    primary.pull("again")
    assert whole(primary, [layer])
    forget(primary, "again")
    top = primary.daemon.root / "layers" / digests.parse(layer.digest).hex
    until(lambda: not top.exists(), "the layer stayed")
    before = primary.proxy.received
    primary.pull("again")
    assert primary.proxy.received - before < len(layer.blob) // 2
    assert not record(primary, layer)["made"]
    with primary.rootfs(layout, "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums
    forget(primary, "again")


def test_the_index_can_be_listed_and_pushed(primary: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """An image whose layers were all pulled whole has the index that `soci create` makes; a zstd layer is left out."""
    large, _ = big_layer(311)
    other, _ = big_layer(312, files=1)
    zstd = layer_from_tar(tar_of(big_layer(313, files=1)[0]), "zstd")
    primary.publish("listed", [large, other, zstd], index=False)
    primary.pull("listed")
    store = (
        "--address",
        primary.containerd.address,
        "--root",
        str(primary.daemon.root),
        "--content-store",
        "soci",
    )
    capsys.readouterr()
    assert run([*store, "index", "list", "--quiet", "--ref", primary.name("listed")]) == 0
    [listed] = capsys.readouterr().out.split()
    assert run([*store, "index", "info", listed]) == 0
    info = json.loads(capsys.readouterr().out)
    ztocs = [entry["annotations"]["com.amazon.soci.image-layer-digest"] for entry in info["layers"]]
    assert ztocs == [large.digest]
    # containerd has no layers to push with, and needs none.
    assert run([*store, "push", "--plain-http", primary.name("listed")]) == 0
    primary.containerd.ctr(
        "images", "pull", "--plain-http", "--snapshotter", "overlayfs", primary.name("listed")
    )
    assert primary.soci("create", primary.name("listed")) == 0
    assert listed in capsys.readouterr().out
    forget(primary, "listed")


def test_two_images_share_a_layer(primary: Rig) -> None:
    """The second image's layer is here: nothing of it is fetched; it stays until both images are gone."""
    layer, sums = big_layer(321)
    below, _ = big_layer(322, files=1)
    layouts = [
        primary.publish("one", [layer], index=False),
        primary.publish("two", [below, layer], index=False),
    ]
    primary.pull("one")
    before = primary.proxy.received
    primary.pull("two")
    assert primary.proxy.received - before < len(below.blob) + (1 << 19)
    forget(primary, "one")
    with primary.rootfs(layouts[1], "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums
    forget(primary, "two")
    until(lambda: not records(primary), "something stayed")
    assert not list((primary.daemon.root / "m").iterdir())


def test_a_lie_fails_the_pull(primary: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """A layer that is not what the image's config says: an error that names it, no snapshot, nothing left on the disk."""
    good, _ = big_layer(331, files=2)
    lie = Layer(big_layer(332, files=2)[0].blob, digests.sha256(b"something else"))
    primary.publish("lie", [good, lie], index=False)
    assert pull_fails(primary, "lie")
    told = capsys.readouterr().err
    assert lie.digest in told and "DiffID" in told and primary.name("lie") in told
    nothing_left(primary, lie)


def test_a_registry_that_dies_fails_the_pull(capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of a layer: an error that names registry and layer, nothing left; the next pull is whole."""
    slow = "[http]\nMaxRetries = 1\nMaxWaitMsec = 100\nRequestTimeoutMsec = 2000\n[blob]\nfetching_timeout_sec = 3\n"
    with lazy_rig(PRIMARY + slow) as rig:
        layer, sums = big_layer(341, files=100)
        layout = rig.publish("dies", [layer], index=False)

        def stall() -> None:
            while not any((rig.daemon.root / "filling").glob("*/blob")):
                time.sleep(0.001)
            rig.proxy.stall()

        thread = threading.Thread(target=stall)
        thread.start()
        assert pull_fails(rig, "dies")
        thread.join()
        told = capsys.readouterr().err
        assert rig.proxy.host in told and layer.digest in told
        nothing_left(rig, layer)
        rig.proxy.resume()
        rig.pull("dies")
        with rig.rootfs(layout, "soci") as root:
            assert {name: sum_of(root / name) for name in sums} == sums


def test_a_daemon_that_is_killed_in_the_middle(primary: Rig) -> None:
    """What was under way is gone at the next start, and the image can be pulled."""
    layer, sums = big_layer(351, files=100)
    layout = primary.publish("killed", [layer], index=False)
    filling = primary.daemon.root / "filling"

    def kill() -> None:
        until(lambda: any(filling.glob("*/blob")), "the pull did not begin", pause=0.001)
        primary.daemon.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    assert pull_fails(primary, "killed")
    thread.join()
    assert any(filling.iterdir())
    primary.daemon.start()
    primary.reconnected()
    assert not any(filling.iterdir())
    primary.pull("killed")
    with primary.rootfs(layout, "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums
    forget(primary, "killed")


def test_a_daemon_that_is_stopped_in_the_middle(primary: Rig) -> None:
    """SIGTERM while a registry says nothing: the pull ends with an error, the daemon ends, nothing stays."""
    layer, _ = big_layer(355, files=100)
    primary.publish("stopped", [layer], index=False)
    filling = primary.daemon.root / "filling"

    def stop() -> None:
        until(lambda: any(filling.glob("*/blob")), "the pull did not begin", pause=0.001)
        primary.proxy.stall()
        primary.daemon.process.send_signal(signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert pull_fails(primary, "stopped")
    thread.join()
    primary.daemon.process.wait(20)
    primary.proxy.resume()
    primary.daemon.start()
    primary.reconnected()
    nothing_left(primary, layer)
    forget(primary, "stopped")


def test_a_changed_layer_that_cannot_be_fetched_by_spans(primary: Rig) -> None:
    """The bytes of a zstd layer, changed while the daemon was down: no new container gets them, and a log line says
    which image to remove; then it can be pulled again."""
    layer = layer_from_tar(tar_of(big_layer(361, files=2)[0]), "zstd")
    layout = primary.publish("changed", [layer], index=False)
    primary.pull("changed")
    [directory] = (primary.daemon.root / "layers" / digests.parse(layer.digest).hex).iterdir()
    primary.daemon.kill()
    with open(directory / "data.tar", "r+b") as file:
        file.seek(5000)
        file.write(b"changed")
    primary.daemon.start()
    primary.reconnected()
    with pytest.raises(SociError, match="remove the image"), primary.rootfs(layout, "soci"):
        pass
    assert any(
        primary.name("changed") in line for line in primary.daemon.log.splitlines() if "condemned" in line
    )
    forget(primary, "changed")
    until(lambda: not directory.exists(), "the layer stayed")
    primary.pull("changed")
    equal(primary, layout)
    forget(primary, "changed")


def test_a_power_loss_before_the_bytes_are_on_the_disk(primary: Rig) -> None:
    """Imitated: a layer of an earlier boot whose bytes are not what was written is fetched again, and right."""
    layer, sums = big_layer(371)
    layout = primary.publish("power", [layer], index=False)
    primary.pull("power")
    until(lambda: not record(primary, layer)["boot"], "the layer was not written to the disk")
    [directory] = (primary.daemon.root / "layers" / digests.parse(layer.digest).hex).iterdir()
    primary.daemon.kill()
    old = record(primary, layer)
    status = (directory / "data.tar").stat()
    with open(directory / "data.tar", "r+b") as file:  # as a file system leaves what it did not write
        file.seek(1 << 20)
        file.write(bytes(1 << 20))
    os.utime(directory / "data.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    (directory / "layer.json").write_text(json.dumps({**old, "boot": "another boot"}))
    primary.daemon.start()
    primary.reconnected()
    with primary.rootfs(layout, "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums
    forget(primary, "power")


@pytest.fixture(scope="module")
def fallback() -> Iterator[Rig]:
    """A node that looks for indexes, and pulls whole what has none."""
    with lazy_rig(FALLBACK + "[snapshotter]\nmin_layer_size = 100000\n") as found:
        yield found


def test_no_index_falls_back(fallback: Rig) -> None:
    """Without an index all layers are pulled whole; with one they are lazy, and nobody reads them."""
    layer, _ = big_layer(401)
    layout = fallback.publish("none", [layer], index=False)
    fallback.pull("none")
    assert whole(fallback, [layer])
    equal(fallback, layout)
    other, _ = big_layer(402)
    fallback.publish("some", [other])
    fallback.pull("some")
    assert not record(fallback, other)["made"]
    forget(fallback, "none")
    forget(fallback, "some")


def test_sparse_index_and_small_layers(fallback: Rig) -> None:
    """Layers without a ztoc, and those below min_layer_size, are pulled whole beside lazy ones."""
    small, middle, large = (big_layer(seed, files, size)[0] for seed, files, size in SIZES)
    layout = fallback.publish("sparse", [small, large, middle], index=False)
    fallback.containerd.ctr(
        "images", "pull", "--plain-http", "--snapshotter", "overlayfs", fallback.name("sparse")
    )
    assert fallback.soci("create", "--min-layer-size", "1000000", fallback.name("sparse")) == 0
    assert fallback.soci("push", "--plain-http", fallback.name("sparse")) == 0
    forget(fallback, "sparse")
    fallback.pull("sparse")
    assert [record(fallback, layer)["made"] for layer in (small, large, middle)] == [True, False, True]
    equal(fallback, layout)
    forget(fallback, "sparse")


def test_a_local_layer_that_fails_is_left_to_containerd(fallback: Rig) -> None:
    """An index, a layer without a ztoc that cannot be unpacked here: containerd is asked to do it."""
    good, _ = big_layer(421)
    odd = layer_from_tar(b"no tar at all")
    layout = fallback.publish("odd", [good, odd], index=False)
    built = build_ztoc([good.blob], compression=Compression.GZIP, build_tool="test")
    entry = sociindex.ZtocDescriptor(
        built.digest, len(built.data), built.layer_digest, good.media_type, DEFAULT_SPAN_SIZE
    )
    push_index(fallback, "odd", sociindex.build(manifest_descriptor(layout), [entry], "test"), built.data)
    said = len(fallback.daemon.log)
    assert pull_fails(fallback, "odd")
    log = fallback.daemon.log[said:]
    assert "could not be pulled whole" in log
    assert '"defer-snapshot-runtime": "true"' in log


def test_blobs_go_to_containerd() -> None:
    """With its content store the layers as they came are there, too, and the image can be exported."""
    with lazy_rig() as rig:
        rig.daemon.kill()
        store = f'[content_store]\ntype = "containerd"\ncontainerd_address = "{rig.containerd.address}"\n'
        rig.daemon.config = store + PRIMARY.replace("discard_unpacked_layers = true\n", "")
        rig.daemon.start()
        rig.reconnected()
        layer, _ = big_layer(431)
        zstd = layer_from_tar(tar_of(big_layer(432, files=1)[0]), "zstd")
        rig.publish("kept", [layer, zstd], index=False)
        rig.pull("kept")
        assert whole(rig, [layer, zstd])
        listed = rig.containerd.ctr("content", "ls", "--quiet").stdout.split()
        assert {layer.digest, zstd.digest} <= set(listed)
        rig.containerd.ctr("images", "export", str(rig.base / "exported.tar"), rig.name("kept"))


@pytest.mark.parametrize(
    "program", ["/usr/bin/unpigz", pytest.param("/usr/bin/igzip", marks=pytest.mark.slow)]
)
def test_external_decompressors(program: str) -> None:
    """The rootfs is the same when another program decompresses; without a ztoc the next pull fetches all again."""
    table = "[pull_modes.parallel_pull_unpack.decompress_streams.gzip]"
    with lazy_rig(f'{PRIMARY}{table}\npath = "{program}"\nargs = ["-d", "-c"]\n') as rig:
        layout = rig.publish("external", [EDGE1, EDGE2, EDGE3], index=False)
        for _ in range(2):
            rig.pull("external")
            assert whole(rig, [EDGE1, EDGE2, EDGE3])
            assert not any(each["by_span"] for each in records(rig))
            equal(rig, layout)
            forget(rig, "external")
            until(lambda: not records(rig), "a layer stayed")
