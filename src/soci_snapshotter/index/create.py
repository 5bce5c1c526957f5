"""The SOCI index of one image, whatever place it is in: its ztocs and prefetch artifacts, then the manifest.

Nothing is stored here and nothing is stored before every layer of the image has its ztoc: a damaged layer leaves
no trace. Building the same image again with the same options gives the same bytes, hence the same digests.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import Invalid, NotFound, SociError, Unsupported
from ..formats import oci, sociindex
from ..formats import ztoc as ztocs
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.sociindex import ZtocDescriptor
from ..formats.ztoc import Compression
from .images import LocalImage
from .outputs import Blob, document
from .places import ImageContent, Place
from .prefetch import Prefetched, PrefetchRequest, prefetch_artifacts
from .workers import Built, Job, Outcome, Refused, Told, build_all

# What the Go tool uses; a span is one request of a lazy start.
DEFAULT_SPAN_SIZE = 4 << 20
# The Go tool's: below it a layer is fetched whole as quickly as its ztoc and its spans.
DEFAULT_MIN_LAYER_SIZE = 10 << 20

# Written into indexes and ztocs. It names the tool and the version of what it writes, not the package's, so
# that an upgrade does not give every index a new digest.
BUILD_TOOL = "soci-snapshotter Python v0.1"

XATTR = "xattr"
OPTIMIZATIONS = (XATTR,)

_COMPRESSIONS = {"gzip": Compression.GZIP, "": Compression.UNCOMPRESSED}
_XATTR_RECORD = b"SCHILY.xattr."
_OPAQUE = b".wh..wh..opq"
# Entries looked at at once: 700 bytes each while they are.
_BATCH = 4096

Known = Callable[[Descriptor, int, str], tuple[Digest, bytes] | None]
"""A ztoc that was made earlier: of a layer, with a span size in bytes, by a build tool; None when there is none."""


@dataclass(frozen=True, slots=True)
class CreateOptions:
    """Sizes in bytes: of a span uncompressed, of a layer as stored. `workers`: layers built at once."""

    span_size: int = DEFAULT_SPAN_SIZE
    min_layer_size: int = DEFAULT_MIN_LAYER_SIZE
    build_tool: str = BUILD_TOOL
    optimizations: frozenset[str] = frozenset()
    prefetch: PrefetchRequest = field(default_factory=PrefetchRequest)
    workers: int = 0

    def worker_count(self) -> int:
        """As asked for; 0 means one per processor this process may use."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer that gets no ztoc, and why. `odd`: it could not have one; `small`: it need not."""

    layer: Descriptor
    why: str
    odd: bool = False
    small: bool = False

    def __str__(self) -> str:
        return f"layer {self.layer.digest}: {self.why}" if self.odd else self.why


@dataclass(frozen=True, slots=True)
class Indexed:
    """An image's ztocs, built. `ztocs` in image order, a repeated layer repeated; `files` by their digests."""

    image: LocalImage
    ztocs: tuple[ZtocDescriptor, ...]
    files: dict[Digest, Path]
    skipped: tuple[Skipped, ...]
    prefetch: Prefetched


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a caller is told while layers are indexed, and what it knows already."""

    told: Told = lambda _layer, _count: None
    outcome: Callable[[Outcome], None] = lambda _: None
    known: Known = lambda _layer, _span_size, _tool: None


def why_skipped(layer: Descriptor, min_layer_size: int) -> Skipped | None:
    """Why a layer is left without a ztoc, None when it gets one."""
    compression = oci.layer_compression(layer.media_type)
    if compression is None:
        return Skipped(layer, f"{layer.media_type!r} is no container layer", odd=True)
    if oci.is_nondistributable(layer.media_type):
        return Skipped(layer, "non-distributable")
    if compression not in _COMPRESSIONS:
        return Skipped(layer, f"{compression} is not indexed yet", odd=True)
    if layer.size < min_layer_size:
        return Skipped(layer, f"smaller than --min-layer-size {min_layer_size}", small=True)
    return None


def index_image(
    place: Place,
    content: ImageContent,
    image: LocalImage,
    options: CreateOptions,
    scratch: Path,
    hooks: Hooks = Hooks(),
) -> Indexed:
    """Build the ztocs of one image into the directory `scratch`.

    A layer that no ztoc can describe is skipped, and said so. Raises Invalid or Unsupported when no layer is left,
    NotFound when one is not there, Integrity when one is damaged.
    """
    layers = image.manifest.layers
    skipped = {
        n: skip for n, layer in enumerate(layers) if (skip := why_skipped(layer, options.min_layer_size))
    }
    wanted = [position for position in range(len(layers)) if position not in skipped]
    if not wanted:
        raise nothing_to_index(image, list(skipped.values()))
    # What is prefetched depends on the small layers too; their ztocs are not published.
    small = [n for n, skip in skipped.items() if skip.small] if options.prefetch else []
    quiet = Hooks(hooks.told, known=hooks.known)
    built = _build(place, content, image, wanted, options, scratch, hooks)
    built = {**_build(place, content, image, small, options, scratch, quiet), **built}
    described = []
    for position in wanted:
        outcome = built[layers[position].digest]
        if isinstance(outcome, Refused):
            skipped[position] = Skipped(layers[position], outcome.why, odd=True)
        else:
            described.append(_describe(layers[position], outcome, options))
    if not described:
        raise nothing_to_index(image, list(skipped.values()))
    files = {outcome.digest: outcome.output for outcome in built.values() if isinstance(outcome, Built)}
    found = Prefetched((), (), 0, 0)
    if options.prefetch:
        by_layer = {layer: outcome.output for layer, outcome in built.items() if isinstance(outcome, Built)}
        indexed = frozenset(each.layer_digest for each in described)
        found = prefetch_artifacts(content, image, by_layer, indexed, options.prefetch)
    return Indexed(image, tuple(described), files, tuple(skip for _, skip in sorted(skipped.items())), found)


def _build(
    place: Place,
    content: ImageContent,
    image: LocalImage,
    wanted: Sequence[int],
    options: CreateOptions,
    scratch: Path,
    hooks: Hooks,
) -> dict[Digest, Outcome]:
    """What became of each of these layers: known from earlier, or built now."""
    layers = image.manifest.layers
    built = _known(image, wanted, options, scratch, hooks)
    missing = [position for position in wanted if layers[position].digest not in built]
    for position in missing:
        if not content.has(layers[position]):
            raise NotFound(f"image {image.name}: layer {layers[position].digest} is {place.missing}")
    jobs = _jobs(place, image, missing, options, scratch)
    for outcome in build_all(jobs, options.worker_count(), hooks.told) if jobs else ():
        built[outcome.layer] = outcome
        hooks.outcome(outcome)
    return built


def nothing_to_index(image: LocalImage, skipped: Sequence[Skipped]) -> SociError:
    """The error when an image gets no index: Unsupported if no layer could have a ztoc, else Invalid."""
    reasons = ", ".join(sorted({str(skip) for skip in skipped})) or "it has no layers"
    text = f"image {image.name} ({image.platform}): no layer to index: {reasons}"
    return Unsupported(text) if skipped and all(skip.odd for skip in skipped) else Invalid(text)


def soci_index(indexed: Indexed, build_tool: str, *, version: int) -> tuple[Blob, ...]:
    """The blobs of the image's SOCI index (version 1 or 2), the index manifest last."""
    subject = indexed.image.descriptor if version == 1 else None
    artifacts = tuple(descriptor for descriptor, _ in indexed.prefetch.artifacts)
    manifest = sociindex.build(subject, indexed.ztocs, build_tool, artifacts)
    config = document(sociindex.INDEX_V1 if version == 1 else sociindex.INDEX_V2, oci.EMPTY_JSON)
    needed = [Blob(ztoc.descriptor(), indexed.files[ztoc.digest]) for ztoc in indexed.ztocs]
    needed += [Blob(descriptor.descriptor(), data) for descriptor, data in indexed.prefetch.artifacts]
    distinct = list({blob.digest: blob for blob in needed}.values())
    refs = [("config", config.digest)]
    refs += [(f"ztoc.{position}", blob.digest) for position, blob in enumerate(needed)]
    return (config, *distinct, document(oci.MANIFEST, manifest, tuple(refs)))


def _known(
    image: LocalImage, wanted: Sequence[int], options: CreateOptions, scratch: Path, hooks: Hooks
) -> dict[Digest, Outcome]:
    found: dict[Digest, Outcome] = {}
    for position in wanted:
        layer = image.manifest.layers[position]
        if layer.digest in found:
            continue
        known = hooks.known(layer, options.span_size, options.build_tool)
        if known is not None:
            output = scratch / f"{layer.digest.hex}.{options.span_size}"
            output.write_bytes(known[1])
            found[layer.digest] = Built(layer.digest, known[0], len(known[1]), output)
    return found


def _jobs(
    place: Place, image: LocalImage, wanted: Sequence[int], options: CreateOptions, scratch: Path
) -> list[Job]:
    """One job per different layer, the biggest first: the last to finish should be a small one."""
    by_digest = {image.manifest.layers[position].digest: position for position in reversed(wanted)}
    jobs = []
    for digest, position in by_digest.items():
        layer = image.manifest.layers[position]
        compression = _COMPRESSIONS[oci.layer_compression(layer.media_type) or ""]
        job = Job(
            place=place,
            layer=layer,
            diff_id=image.config.diff_ids[position],
            compression=compression,
            span_size=options.span_size,
            build_tool=options.build_tool,
            output=scratch / f"{digest.hex}.{options.span_size}",
        )
        jobs.append((layer.size, position, job))
    return [job for _, _, job in sorted(jobs, key=lambda item: (-item[0], item[1]))]


def _describe(layer: Descriptor, built: Built, options: CreateOptions) -> ZtocDescriptor:
    plain = XATTR in options.optimizations and not _has_xattrs(built.output)
    return ZtocDescriptor(
        digest=built.digest,
        size=built.size,
        layer_digest=layer.digest,
        layer_media_type=layer.media_type,
        span_size=options.span_size,
        disable_xattrs=plain,
    )


def _has_xattrs(output: Path) -> bool:
    """True when the layer has an extended attribute, or an opaque directory, which overlayfs makes one of."""
    with output.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        contents = ztocs.locate_contents(data)
        return any(
            entry.name.endswith(_OPAQUE) or any(key.startswith(_XATTR_RECORD) for key, _ in entry.records)
            for first in range(0, contents.count, _BATCH)
            for entry in contents.read(data, first, min(first + _BATCH, contents.count))
        )
