"""The snapshotter's port to lazy layers: index, ztoc, tree, mount, one call a layer."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from soci_snapshotter.errors import SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.layers import ztocs
from soci_snapshotter.layers.openlayer import LayerKey
from soci_snapshotter.layers.openlayers import OpenLayers
from soci_snapshotter.layers.prefetching import Prefetcher
from soci_snapshotter.layers.resolve import IndexResolver
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.policy.lazy import (
    Declined,
    LazyLayer,
    LazyLower,
    LazyRequest,
    LocalLower,
    Usage,
    ztoc_of,
)
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.store.content import ContentStore

_log = logging.getLogger(__name__)

SIZE_LABEL = "containerd.io/snapshot/remote/soci.size"
_DIGITS = 20  # beyond 64 bits it is no size
SYNC_SECONDS = 30.0
SYNC_BYTES = 64 << 20  # how much a power loss may cost: fetched again, never wrong (HOUSE.md, Durability)
_LOOK_SECONDS = 1.0


class Lazy:
    """Implements snapshotter.ports.LazyLayers over the open layers."""

    def __init__(
        self,
        layers: OpenLayers,
        resolver: IndexResolver,
        client: RegistryClient,
        content: ContentStore,
        prefetcher: Prefetcher,
    ) -> None:
        self._layers = layers
        self._resolver = resolver
        self._client = client
        self._content = content
        self._prefetcher = prefetcher
        self._turns = Turns()

    def prepare(self, request: LazyRequest) -> LazyLayer | Declined:
        """Mount the layer of `request`. A SociError or OSError means it could not be; nothing is left of the try."""
        reference = references.parse(request.image_ref)
        layer = digests.parse(request.layer_digest)
        manifest = digests.parse(request.manifest_digest)
        explicit = digests.parse(request.index_digest) if request.index_digest else None
        index = self._resolver.index_for(reference, manifest, explicit)
        ztoc = ztoc_of(index, layer)
        if isinstance(ztoc, Declined):
            return ztoc
        self._fetch_ztoc(reference, ztoc)
        lowers = [self._lower(lower) for lower in request.parent_chain]
        stated = request.labels.get(SIZE_LABEL, "")
        layer_size = (
            int(stated) if stated.isascii() and stated.isdecimal() and len(stated) < _DIGITS else None
        )
        mounted = self._layers.prepare(LayerKey(layer, ztoc.digest), str(reference), lowers, layer_size)
        opened = self._layers.layer_of(mounted.number)
        if opened is not None and index is not None:
            self._prefetcher.prepared(reference, index, opened.reader)
        size = opened.allocated() if opened is not None else 0
        return LazyLayer(str(mounted.key), mounted.number, size, mounted.entries)

    def lowerdir(self, mount_id: int) -> bytes:
        """The path of the mount. Raises Remote when it is not available."""
        return os.fsencode(self._layers.lowerdir(mount_id))

    def usage(self, mount_id: int) -> Usage:
        """What the layer's files take on disk now."""
        layer = self._layers.layer_of(mount_id)
        if layer is None:
            return Usage()
        return Usage(layer.allocated(), 1)

    def release(self, mount_ids: Sequence[int]) -> None:
        """Take back one reference for each id."""
        for number in mount_ids:
            self._layers.release(number)

    def returned(self, paths: frozenset[bytes]) -> None:
        """Mounts are never superseded while a snapshot names them, so nothing waits for this."""

    def _fetch_ztoc(self, reference: Reference, ztoc: Descriptor) -> None:
        with self._turns.turn(ztoc.digest):
            if not self._content.exists(ztoc.digest):
                ztocs.fetch(self._client, self._content, reference, ztoc)

    def _lower(self, lower: LocalLower | LazyLower) -> Path:
        if isinstance(lower, LocalLower):
            return Path(os.fsdecode(lower.path))
        return self._layers.lowerdir(lower.mount_id)


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
                try:
                    layer.files.make_durable()
                except (SociError, OSError) as error:
                    _log.error(
                        "the disk lost writes of a layer; its spans will be fetched again",
                        extra={"layer": str(layer.key), "error": str(error)},
                    )
