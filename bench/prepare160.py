"""prepare-160: the Prepares of an image of 160 small lazy layers, one after another, from a registry 10 ms away."""

import hashlib
import io
import tarfile
import time
from collections.abc import Iterator

from harness import images
from harness.coldcache import drop_caches
from harness.proxy import Link

from bench.node import NO_BACKGROUND, OURS, Site, site
from bench.result import Result, smaller_is_better
from soci_snapshotter.cli.pulling import snapshot_labels
from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.errors import AlreadyExists
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats import reference as references

NAMES = ("prepare-160",)

MOST_SECONDS = 3.0
"""For all of them."""

LINK = Link(0.010)
"""Round trip in seconds; no rate: nothing of the layers is fetched."""

_LAYERS = 160
_TARGET = "containerd.io/snapshot.ref"


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """Each run with a containerd and a daemon that have never seen the image, and cold caches."""
    made = [_layer(number) for number in range(_LAYERS)]
    with site() as place:
        layout = images.write_layout(place.scratch / "layout", made)
        place.publish(layout.path, "bench/many")
        place.warm()
        runs = [{"ours": _prepares(place, layout), "peer": MOST_SECONDS} for _ in range(1 if smoke else 3)]
    yield smaller_is_better(
        names[0],
        f"Prepare of {_LAYERS} lazy layers in turn, registry {LINK.round_trip * 1000:.0f} ms away",
        "s",
        runs,
        target=1.0,
        notes={"peer": "the limit"},
    )


def _prepares(place: Site, layout: images.Layout) -> float:
    """Seconds from the first call to the last answer; after each, as containerd does, the row is looked for."""
    [image] = layout.images
    layers = [
        oci.Descriptor(str(each["mediaType"]), digests.parse(str(each["digest"])), int(each["size"]))
        for each in image.layers
    ]
    config = (layout.path / "blobs" / str(image.config["digest"]).replace(":", "/")).read_bytes()
    chain = oci.chain_ids(oci.decode_config(config).diff_ids)
    with place.far(LINK) as proxy, place.node({OURS: NO_BACKGROUND}) as node:
        reference = references.parse(f"{proxy.host}/bench/many:1")
        manifest = digests.parse(str(image.manifest["digest"]))
        drop_caches()
        with ContainerdClient(str(node.daemons[OURS].address)) as client:
            snapshots = client.snapshots(OURS)
            parent = ""
            started = time.monotonic()
            for position, chain_id in enumerate(chain):
                labels = snapshot_labels(reference, manifest, layers, position, None)
                try:
                    snapshots.prepare(
                        f"default/{position}/extract {chain_id}", parent, {**labels, _TARGET: chain_id}
                    )
                except AlreadyExists:
                    found = snapshots.find(f'labels."{_TARGET}"=={chain_id},parent=="{parent}"')
                    parent = next(found).name
                else:
                    raise RuntimeError(f"layer {position} was left to containerd")
            return time.monotonic() - started


def _layer(number: int) -> images.Layer:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for file in range(4):
            member = tarfile.TarInfo(f"layer-{number:03}/file-{file}")
            data = hashlib.shake_128(f"{number}/{file}".encode()).digest(1000)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return images.layer_from_tar(stream.getvalue(), "python")
