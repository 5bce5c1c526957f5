"""`soci create`: the v1 SOCI index of an image that is in containerd's content store.

Nothing is stored until every layer of the image has its ztoc: a layer that cannot be indexed leaves no trace.
Building the same image again with the same options gives the same bytes, hence the same digests.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..containerd.client import ContainerdClient
from ..errors import Invalid, NotFound, Unsupported
from ..formats import oci, sociindex
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.sociindex import ZtocDescriptor
from ..formats.ztoc import Compression
from .images import LocalImage
from .sinks import Store
from .workers import Built, Job, build_all

# What the Go tool uses; a span is one request of a lazy start.
DEFAULT_SPAN_SIZE = 4 << 20
# The Go tool's: below it a layer is fetched whole as quickly as its ztoc and its spans.
DEFAULT_MIN_LAYER_SIZE = 10 << 20

# Written into indexes and ztocs. It names the tool and the version of what it writes, not the package's, so
# that an upgrade does not give every index a new digest.
BUILD_TOOL = "soci-snapshotter Python v0.1"

_COMPRESSIONS = {"gzip": Compression.GZIP, "": Compression.UNCOMPRESSED}


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """Sizes in bytes: of a span uncompressed, of a layer as stored. `workers`: layers built at once."""

    span_size: int = DEFAULT_SPAN_SIZE
    min_layer_size: int = DEFAULT_MIN_LAYER_SIZE
    build_tool: str = BUILD_TOOL
    workers: int = 0

    def worker_count(self) -> int:
        """As asked for; 0 means one per processor this process may use."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer that gets no ztoc, and why."""

    layer: Descriptor
    why: str


@dataclass(frozen=True, slots=True)
class CreatedIndex:
    """An index that is stored now. `ztocs` in image order, a repeated layer repeated."""

    image: LocalImage
    digest: Digest
    size: int
    ztocs: tuple[ZtocDescriptor, ...]
    skipped: tuple[Skipped, ...]


def why_skipped(layer: Descriptor, min_layer_size: int) -> str | None:
    """Why a layer is left without a ztoc, None when it gets one.

    Raises Unsupported for what is no container layer at all: such an image is an artifact of another kind.
    """
    compression = oci.layer_compression(layer.media_type)
    if compression is None:
        raise Unsupported(
            f"layer {layer.digest}: {layer.media_type!r} is no container layer; cannot index it"
        )
    if oci.is_nondistributable(layer.media_type):
        return "non-distributable"
    if compression not in _COMPRESSIONS:
        return f"{compression} is not indexed"
    if layer.size < min_layer_size:
        return f"smaller than --min-layer-size {min_layer_size}"
    return None


def create(
    client: ContainerdClient,
    store: Store,
    image: LocalImage,
    options: CreateOptions,
    on_built: Callable[[Built], None] = lambda _: None,
) -> CreatedIndex:
    """Index one image and store the result.

    `on_built` is told of every ztoc as it is finished. Raises Invalid when no layer is to be indexed,
    NotFound when a layer is not in containerd, Integrity when one is damaged; then nothing was written.
    """
    layers = image.manifest.layers
    reasons = [why_skipped(layer, options.min_layer_size) for layer in layers]
    skipped = tuple(Skipped(layer, why) for layer, why in zip(layers, reasons, strict=True) if why)
    if len(skipped) == len(layers):
        reasons_text = ", ".join(sorted({skip.why for skip in skipped})) or "it has none"
        raise Invalid(f"image {image.name} ({image.platform}): no layer to index: {reasons_text}")
    wanted = [position for position, why in enumerate(reasons) if why is None]
    _check_present(client, image, [layers[position] for position in wanted])
    with tempfile.TemporaryDirectory(prefix="soci-create-") as scratch:
        jobs = _jobs(client, image, wanted, options, Path(scratch))
        built = {}
        for result in build_all(jobs, options.worker_count()):
            built[result.layer] = result
            on_built(result)
        ztocs = tuple(_ztoc(layers[position], built, options.span_size) for position in wanted)
        index = sociindex.build(image.descriptor, ztocs, options.build_tool)
        ordered = [built[layer] for layer in dict.fromkeys(ztoc.layer_digest for ztoc in ztocs)]
        digest = store.put_index(image.descriptor.digest, index, ordered)
    return CreatedIndex(image, digest, len(index), ztocs, skipped)


def _check_present(client: ContainerdClient, image: LocalImage, layers: Sequence[Descriptor]) -> None:
    for layer in layers:
        if not client.content.exists(layer.digest):
            raise NotFound(
                f"image {image.name}: layer {layer.digest} is not in containerd's content store (pulled "
                f"lazily, or discarded after unpacking); get it with: ctr content fetch {image.name}"
            )


def _jobs(
    client: ContainerdClient, image: LocalImage, wanted: Sequence[int], options: CreateOptions, scratch: Path
) -> list[Job]:
    """One job per different layer, the biggest first: the last to finish should be a small one."""
    by_digest = {image.manifest.layers[position].digest: position for position in reversed(wanted)}
    jobs = []
    for digest, position in by_digest.items():
        layer = image.manifest.layers[position]
        compression = _COMPRESSIONS[oci.layer_compression(layer.media_type) or ""]
        job = Job(
            address=client.address,
            namespace=client.namespace,
            layer=digest,
            diff_id=image.config.diff_ids[position],
            compression=compression,
            span_size=options.span_size,
            build_tool=options.build_tool,
            output=scratch / digest.hex,
        )
        jobs.append((layer.size, position, job))
    return [job for _, _, job in sorted(jobs, key=lambda item: (-item[0], item[1]))]


def _ztoc(layer: Descriptor, built: dict[Digest, Built], span_size: int) -> ZtocDescriptor:
    result = built[layer.digest]
    return ZtocDescriptor(
        digest=result.digest,
        size=result.size,
        layer_digest=layer.digest,
        layer_media_type=layer.media_type,
        span_size=span_size,
    )
