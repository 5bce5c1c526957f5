"""What a daemon fetches that nobody asked for: in the background, and what prefetch artifacts name."""

from __future__ import annotations

import io
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.images import Layer, Layout, push, write_layout
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_lazy import big_layer, manifest_descriptor, sum_of, tar_of

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.registry.client import RegistryClient

pytestmark = pytest.mark.root
V1 = "[pull_modes.soci_v1]\nenable = true\n"
EARLY = V1 + "[background_fetch]\nsilence_period_msec = 200\n[blob]\nmax_retries = 1\n"
NEVER = V1 + "[background_fetch]\ndisable = true\n[prefetch]\nenable = true\nmax_concurrency = 2\n"


@pytest.fixture(scope="module")
def early() -> Iterator[Rig]:
    """A node whose background fetch starts at once, and whose requests fail soon."""
    with lazy_rig(EARLY) as rig:
        yield rig


@pytest.fixture(scope="module")
def never() -> Iterator[Rig]:
    """A node without background fetch that follows prefetch artifacts."""
    with lazy_rig(NEVER) as rig:
        yield rig


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def data_tar(rig: Rig, layer: Layer) -> Path:
    """The layer's file on the node."""
    [found] = (rig.daemon.root / "layers" / digests.parse(layer.digest).hex).iterdir()
    return found / "data.tar"


def is_whole(rig: Rig, layer: Layer) -> bool:
    """Whether the node has every byte of the layer's tar, each right."""
    want = tar_of(layer)
    return data_tar(rig, layer).read_bytes()[: len(want)] == want


def test_everything_arrives_with_nobody_reading(early: Rig) -> None:
    """Two images, three layers, no reader: all bytes come, right; then the registry is of no interest any more."""
    layers = [big_layer(seed, files=12) for seed in (201, 202, 203)]
    first = early.publish("all-1", [layers[0][0], layers[1][0]])
    early.publish("all-2", [layers[2][0]])
    early.pull("all-1")
    early.pull("all-2")
    for layer, _ in layers:
        until(lambda layer=layer: is_whole(early, layer), "the layer does not become whole")
    early.proxy.stall()
    try:
        with early.rootfs(first, "soci") as root:
            for _, sums in layers[:2]:
                assert {name: sum_of(root / name) for name in sums} == sums
    finally:
        early.proxy.resume()


def test_a_registry_that_goes_away_and_comes_back(early: Rig) -> None:
    """Cut off in the middle: nobody gets an error; when the registry answers again, everything arrives."""
    layer, sums = big_layer(211, files=40)
    layout = early.publish("away", [layer])
    logged = early.daemon.log.count("span not available")
    early.pull("away")
    early.proxy.stall()

    def failed() -> bool:
        early.proxy.cut()
        return early.daemon.log.count("background fetch failed") >= 2

    try:
        until(failed, "no range fails")
    finally:
        early.proxy.resume()
        early.proxy.cut()
    until(lambda: is_whole(early, layer), "the layer does not become whole", 90)
    assert early.daemon.log.count("span not available") == logged
    with early.rootfs(layout, "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums


def test_readers_while_everything_arrives(early: Rig) -> None:
    """Files read in a wild order while the rest comes in the background: every byte right."""
    layer, sums = big_layer(221, files=40)
    layout = early.publish("both", [layer])
    early.pull("both")
    with early.rootfs(layout, "soci") as root:
        names = sorted(sums, key=lambda name: sums[name])
        for name in names:
            assert sum_of(root / name) == sums[name]
            time.sleep(0.02)
    until(lambda: is_whole(early, layer), "the layer does not become whole")


def test_the_off_switch(never: Rig) -> None:
    """Disabled, nothing comes but what is read and its neighbors."""
    layer, sums = big_layer(231, files=40)
    layout = never.publish("off", [layer])
    never.pull("off")
    with never.rootfs(layout, "soci") as root:
        name = sorted(sums)[0]
        assert sum_of(root / name) == sums[name]
        time.sleep(1)
        before = never.proxy.received
        time.sleep(5)  # longer than the silence that would be kept
        assert never.proxy.received == before
    assert data_tar(never, layer).stat().st_blocks * 512 < 20 << 20


def publish_with_prefetch(rig: Rig, repository: str, layer: Layer, *paths: str) -> Layout:
    """As Rig.publish, with small spans and a prefetch artifact for `paths`."""
    layout = write_layout(rig.base / repository, [layer])
    name = rig.name(repository)
    push(layout, name)
    rig.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", name)
    flags = [flag for path in paths for flag in ("--prefetch-file", path)]
    assert rig.soci("create", "--min-layer-size", "0", "--span-size", str(1 << 20), *flags, name) == 0
    assert rig.soci("push", "--plain-http", name) == 0
    rig.containerd.ctr("images", "rm", "--sync", name)
    return layout


def test_a_prefetch_artifact_is_followed(never: Rig) -> None:
    """What the artifact names is there without a read: it can be read with the registry gone. The rest is not."""
    layer, sums = big_layer(241, files=30)
    wanted = sorted(sums)[20:23]
    layout = publish_with_prefetch(never, "first", layer, *(f"/{name}" for name in wanted))
    never.pull("first")
    with tarfile.open(fileobj=io.BytesIO(tar_of(layer))) as tar:
        places = [(member.offset_data, member.size) for name in wanted if (member := tar.getmember(name))]
    whole = tar_of(layer)

    def here() -> bool:
        with open(data_tar(never, layer), "rb") as file:
            for offset, size in places:
                file.seek(offset)
                if file.read(size) != whole[offset : offset + size]:
                    return False
        return True

    until(here, "the prefetched files do not come")
    assert data_tar(never, layer).stat().st_blocks * 512 < 10 << 20
    never.proxy.stall()
    try:
        with never.rootfs(layout, "soci") as root:
            assert {name: sum_of(root / name) for name in wanted} == {name: sums[name] for name in wanted}
    finally:
        never.proxy.resume()


@pytest.mark.parametrize(
    "artifact",
    [
        b"no artifact at all",
        b'{"version":"1.0","prefetch_spans":[{"start_span":0,"end_span":2147483647}]}',
    ],
    ids=["junk", "spans-that-are-not"],
)
def test_a_bad_artifact_is_a_warning(never: Rig, artifact: bytes) -> None:
    """An artifact that is none, or names spans the layer lacks: a warning, and a layer that works."""
    seed = 251 + len(artifact)
    layer, sums = big_layer(seed, files=4)
    repository = f"bad-{seed}"
    layout = never.publish(repository, [layer])
    reference = references.parse(never.name(repository))
    with RegistryClient() as client:
        [listed] = client.referrers(reference, manifest_descriptor(layout).digest, sociindex.INDEX_V1)
        good = sociindex.decode(client.fetch(reference, listed, oci.MANIFEST_LIMIT))
        described = Descriptor(sociindex.PREFETCH, digests.sha256(artifact), len(artifact))
        client.push_blob(reference, described, lambda: iter((artifact,)))
        ztoc = good.ztocs[digests.parse(layer.digest)]
        index = sociindex.build(
            good.subject,
            [
                sociindex.ZtocDescriptor(
                    ztoc.digest, ztoc.size, digests.parse(layer.digest), layer.media_type, 4 << 20
                )
            ],
            "test",
            [sociindex.PrefetchDescriptor(described.digest, described.size, digests.parse(layer.digest))],
        )
        client.push_manifest(reference, index, oci.MANIFEST)
    warned = never.daemon.log.count("prefetch artifact cannot be used")
    never.pull(repository, "--soci-index-digest", digests.sha256(index))
    until(
        lambda: never.daemon.log.count("prefetch artifact cannot be used") == warned + 1, "no warning comes"
    )
    with never.rootfs(layout, "soci") as root:
        assert {name: sum_of(root / name) for name in sums} == sums
