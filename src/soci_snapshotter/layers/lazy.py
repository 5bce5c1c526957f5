"""The snapshotter's port to lazy layers: index, ztoc, tree, mount, one call a layer."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import TracebackType

from soci_snapshotter.errors import Integrity, NotFound, SociError, Unsupported
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.formats.sociindex import SociIndex
from soci_snapshotter.layers import ztocs
from soci_snapshotter.layers.ahead import MOST_LAYERS, ZtocsAhead
from soci_snapshotter.layers.eager import Filled, Pull
from soci_snapshotter.layers.images import Images
from soci_snapshotter.layers.openlayer import LayerKey
from soci_snapshotter.layers.openlayers import Mounted, OpenLayers
from soci_snapshotter.layers.prefetching import Prefetcher
from soci_snapshotter.layers.resolve import IndexResolver
from soci_snapshotter.layers.timing import measured
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.layers.whole import Wanted, WholeLayers
from soci_snapshotter.policy.counters import Counters
from soci_snapshotter.policy.eager import Eager, Way
from soci_snapshotter.policy.lazy import (
    Declined,
    Failed,
    LazyLayer,
    LazyLower,
    LazyRequest,
    LocalLower,
    Usage,
    is_lowest,
    ztoc_of,
)
from soci_snapshotter.policy.proof import DIFF_ID, Claim, claim_of
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.store.content import ContentStore

_log = logging.getLogger(__name__)

SIZE_LABEL = "containerd.io/snapshot/remote/soci.size"
_DIGITS = 20  # beyond 64 bits it is no size
SYNC_SECONDS = 30.0
SYNC_BYTES = 64 << 20  # how much a power loss may cost: fetched again, never wrong (HOUSE.md, Durability)
_LOOK_SECONDS = 1.0
_SIDE_BY_SIDE = "containerd unpacks the image's layers side by side, and names no parent before Commit"
_NO_CLAIM = "neither the chain nor the image's config says what the layer must be"
_LAZY_ONLY = Eager()


class Lazy:
    """Implements snapshotter.ports.LazyLayers over the open layers."""

    def __init__(
        self,
        layers: OpenLayers,
        resolver: IndexResolver,
        client: RegistryClient,
        content: ContentStore,
        prefetcher: Prefetcher | None = None,
        *,
        min_layer_size: int = 0,
        counters: Counters | None = None,
        images: Images | None = None,
        rules: Eager = _LAZY_ONLY,
        wholes: WholeLayers | None = None,
        ahead: ZtocsAhead | None = None,
    ) -> None:
        """`min_layer_size`: bytes; smaller layers are not lazy. `wholes` makes what is not lazy; without it containerd
        does. `ahead` fetches ztocs of the layers that come next.
        """
        self._min_layer_size = min_layer_size
        self._counters = Counters() if counters is None else counters
        self._layers = layers
        self._resolver = resolver
        self._client = client
        self._content = content
        self._prefetcher = prefetcher
        self._turns = Turns()
        self._images = Images(client) if images is None else images
        self._rules = rules
        self._wholes = wholes
        self._ahead = ahead

    def prepare(self, request: LazyRequest, *, must: bool = False) -> LazyLayer | Declined | Failed:
        """Mount the layer of `request`. A SociError or OSError means it could not be; nothing is left of the try.

        `must`: containerd will not unpack it, so that what has no index is pulled whole.
        """
        started = time.monotonic()
        try:
            made = self._prepare(request, must)
        except Exception:
            self._counters.layer("").count("fuse_mount_failure_count").add()
            raise
        if isinstance(made, LazyLayer):
            now = time.monotonic()
            self._counters.layer(request.layer_digest).duration("mount").observe((now - started) * 1000)
            self._counters.mounted(request.manifest_digest, request.layer_digest, now)
        return made

    def _prepare(self, request: LazyRequest, must: bool) -> LazyLayer | Declined | Failed:
        try:
            lowest = bool(request.parent_chain) or self._is_lowest(request)
        except SociError as error:
            if not self._rules.primary:
                raise
            return Failed(error)
        if not lowest:
            return Declined(_SIDE_BY_SIDE)
        if self._rules.primary:
            return self._whole(request, None, Way.PARALLEL, Declined("parallel_pull_unpack is enabled"))
        try:
            index = self._index(request, references.parse(request.image_ref))
        except NotFound:  # the one that a label names
            if not must:
                raise
            index = None
        try:
            made = self._lazily(request, index)
        except (Integrity, Unsupported) as error:
            made = Declined(f"the lazy try failed: {error}")
            self._counters.layer("").count("fuse_mount_failure_count").add()
            _log.warning(
                "failed to prepare remote snapshot",
                extra={
                    "layer": request.layer_digest,
                    "error": str(error),
                    "remote-snapshot-prepared": "false",
                },
            )
        if isinstance(made, LazyLayer):
            return made
        way = self._rules.without_index() if index is None and not must else Way.LOCAL
        return self._whole(request, index, way, made)

    def _is_lowest(self, request: LazyRequest) -> bool:
        """Whether a layer without a parent has none in its image either."""
        said = is_lowest(request)
        if said is not None:
            return said
        reference, manifest = references.parse(request.image_ref), digests.parse(request.manifest_digest)
        layers = [str(layer.digest) for layer in self._images.manifest(reference, manifest)[1].layers]
        if layers.count(request.layer_digest) == 1:
            return layers[0] == request.layer_digest
        return list(map(str, self._images.config(reference, manifest).diff_ids[:1])) == [request.target]

    def _lazily(self, request: LazyRequest, index: SociIndex | None) -> LazyLayer | Declined:
        reference = references.parse(request.image_ref)
        layer = digests.parse(request.layer_digest)
        size = _stated_size(request)
        if size is None and self._min_layer_size and index is not None:
            size = self._images.layer(reference, digests.parse(request.manifest_digest), layer).size
        ztoc = ztoc_of(index, layer, size, self._min_layer_size)
        if isinstance(ztoc, Declined):
            return ztoc
        claim, labels = self._claim(request, reference)
        if claim is None:
            return Declined(_NO_CLAIM)
        if self._ahead is not None and index is not None:
            self._ahead.expect(reference, _next_ztocs(request, index))
        self._fetch_ztoc(reference, layer, ztoc)
        mounted = self._mount(request, LayerKey(layer, ztoc.digest), size, claim)
        if isinstance(mounted, Declined):
            _log.error("layer declined: it is not what the image says", extra={"reason": mounted.reason})
            return mounted
        opened = self._layers.layer_of(mounted.number)
        reading = opened.lazy if opened is not None else None
        if reading is not None and index is not None and self._prefetcher is not None:
            self._prefetcher.prepared(reference, index, reading.reader)
        return self._made(mounted, labels)

    def _whole(
        self, request: LazyRequest, index: SociIndex | None, way: Way, declined: Declined
    ) -> LazyLayer | Declined | Failed:
        """The layer without an index's help, if `way` is ours; `declined` says why not with it."""
        if self._wholes is None or way is Way.DEFER:
            return declined
        try:
            reference = references.parse(request.image_ref)
            claim, labels = self._claim(request, reference)
            if claim is None:
                raise Integrity(f"image {reference}: layer {request.layer_digest}: {_NO_CLAIM}")
            pull = Pull(reference, digests.parse(request.manifest_digest), request.namespace)
            layer = digests.parse(request.layer_digest)
            wanted = Wanted(pull, layer, index, self._min_layer_size if index is not None else 0, claim)
            mounted = self._wholes.mounted(
                wanted, lambda key, size, claim, filled: self._mount(request, key, size, claim, filled)
            )
        except (SociError, OSError) as error:
            self._counters.layer("").count("local_mount_failure_count").add()
            _log.warning(
                "a layer could not be pulled whole",
                extra={
                    "layer": request.layer_digest,
                    "error": str(error),
                    "local-snapshot-prepared": "false",
                },
            )
            if way is Way.PARALLEL:
                return Failed(error if isinstance(error, SociError) else SociError(str(error)))
            return Declined(f"{declined.reason}; and it could not be pulled whole: {error}")
        return replace(self._made(mounted, labels), way=way)

    def _mount(
        self,
        request: LazyRequest,
        key: LayerKey,
        size: int | None,
        claim: Claim,
        filled: Filled | None = None,
    ) -> Mounted | Declined:
        lazy = [lower.mount_id for lower in request.parent_chain if isinstance(lower, LazyLower)]
        with self._layers.pinned(lazy) as paths:
            lowers = [
                lower.path if isinstance(lower, LocalLower) else paths[lower.mount_id]
                for lower in request.parent_chain
            ]
            return self._layers.prepare(
                key, str(references.parse(request.image_ref)), lowers, size, claim, filled
            )

    def _made(self, mounted: Mounted, labels: dict[str, str]) -> LazyLayer:
        usage = self.usage(mounted.number)
        return LazyLayer(str(mounted.key), mounted.number, usage.size, usage.inodes, labels)

    def give_up(self) -> None:
        """The daemon stops: calls that wait for a whole layer end with an error."""
        if self._wholes is not None:
            self._wholes.give_up()

    def serves(self, request: LazyRequest, mount_id: int, layer_key: str) -> str | None:
        """None when a lazy snapshot of the same chain ID may stand for `request`, else why not.

        While nothing is proven the same chain ID is only a claim: then it must be the same layer with the same ztoc.
        """
        layer = self._layers.layer_of(mount_id)
        if layer is None:
            return f"the snapshot that is here already has lost its layer {request.layer_digest}"
        if layer.record.complete:
            return None  # its snapshots were judged, or will be in a moment
        reference = references.parse(request.image_ref)
        digest = digests.parse(request.layer_digest)
        ztoc = ztoc_of(self._index(request, reference), digest)
        if not isinstance(ztoc, Declined) and layer_key == str(LayerKey(digest, ztoc.digest)):
            return None
        if self._wholes is not None and self._wholes.serves(digest, layer_key):
            return None
        return "another image's layer has the same chain ID, and is not complete yet: it may be a lie"

    def committed(self, mount_id: int) -> None:
        """The snapshot of a prepared layer is committed."""
        self._layers.committed(mount_id)

    def lowerdir(self, mount_id: int) -> bytes:
        """The path of the mount. Raises Remote when it is not available."""
        return os.fsencode(self._layers.lowerdir(mount_id))

    def usage(self, mount_id: int) -> Usage:
        """What the layer's files take on disk now."""
        layer = self._layers.layer_of(mount_id)
        return Usage() if layer is None else Usage(*layer.allocated())

    def release(self, mount_ids: Sequence[int]) -> None:
        """Take back one reference for each id."""
        for number in mount_ids:
            self._layers.release(number)

    def returned(self, paths: frozenset[bytes]) -> None:
        """No active or view snapshot holds these lowerdirs any longer."""
        self._layers.returned(paths)

    def _index(self, request: LazyRequest, reference: Reference) -> SociIndex | None:
        explicit = digests.parse(request.index_digest) if request.index_digest else None
        return self._resolver.index_for(reference, digests.parse(request.manifest_digest), explicit)

    def _claim(self, request: LazyRequest, reference: Reference) -> tuple[Claim | None, dict[str, str]]:
        """What the layer must turn out to be, and the label that says it where only the image's config does."""
        image = str(reference)
        claim = claim_of(
            request.labels, target=request.target, parent_chain_id=request.parent_chain_id, image=image
        )
        if claim.provable:
            return claim, {}
        manifest, layer = digests.parse(request.manifest_digest), digests.parse(request.layer_digest)
        diff_id = self._images.diff_id(reference, manifest, layer)
        if diff_id is None:
            return None, {}
        return replace(claim, diff_id=diff_id), {DIFF_ID: diff_id}

    def _fetch_ztoc(self, reference: Reference, layer: Digest, ztoc: Descriptor) -> None:
        with self._turns.turn(ztoc.digest):
            if not self._content.exists(ztoc.digest):
                with measured(self._counters.layer(str(layer)).duration("ztoc_fetch")):
                    ztocs.fetch(self._client, self._content, reference, ztoc, self._ahead)


def _next_ztocs(request: LazyRequest, index: SociIndex) -> Iterator[Descriptor]:
    """Ztocs of the layers that are prepared next, as the request lists them; the farthest first."""
    layers, here = request.image_layers, request.layer_digest
    first = layers.index(here) + 1 if here in layers else len(layers)
    for layer in reversed(layers[first : first + MOST_LAYERS]):
        ztoc = index.ztoc_for(digests.parse(layer))
        if ztoc is not None:
            yield ztoc


def _stated_size(request: LazyRequest) -> int | None:
    """Bytes of the layer's blob as a label says, None without one."""
    stated = request.labels.get(SIZE_LABEL, "")
    return int(stated) if stated.isascii() and stated.isdecimal() and len(stated) < _DIGITS else None


class Syncer:
    """The thread that makes marks durable: every 30 s or 64 MiB a layer, and when it is left. A context manager."""

    def __init__(self, layers: OpenLayers) -> None:
        self._layers = layers
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)

    def __enter__(self) -> Syncer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._sync(0)

    def _run(self) -> None:
        elapsed = 0.0
        while not self._ending.wait(_LOOK_SECONDS):
            elapsed += _LOOK_SECONDS
            if elapsed >= SYNC_SECONDS:
                elapsed = 0.0
                self._sync(0)
            else:
                self._sync(SYNC_BYTES)

    def _sync(self, more_than: int) -> None:
        for layer in self._layers.layers():
            if layer.files.unsynced > more_than:
                epoch = layer.files.epoch
                try:
                    layer.files.make_durable()
                except (SociError, OSError) as error:
                    lost = layer.files.epoch != epoch
                    _log.error(
                        "the disk lost writes of a layer; its spans will be fetched again"
                        if lost
                        else "cannot note what is durable of a layer: after a power loss it is fetched again",
                        extra={"layer": str(layer.key), "error": str(error)},
                    )
