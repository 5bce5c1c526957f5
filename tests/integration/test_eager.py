"""Layers pulled whole, end to end: what is in them, who is told what, what is left behind, and every limit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence

import pytest
from harness import rootfs_walk
from harness.images import Layer, Layout, layer_from_tar
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_lazy import EDGE1, EDGE2, EDGE3, tar_of

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
