"""A layer that no index makes lazy: found whole on this node, made lazy by a ztoc of our own, or pulled whole now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from soci_snapshotter.errors import Integrity, SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.sociindex import SociIndex
from soci_snapshotter.layers.eager import EagerPulls, Filled, Pull
from soci_snapshotter.layers.freeindex import FreeIndexes
from soci_snapshotter.layers.images import Images
from soci_snapshotter.layers.openlayer import LayerKey
from soci_snapshotter.layers.openlayers import Mounted, OpenLayers
from soci_snapshotter.policy.lazy import Declined
from soci_snapshotter.policy.proof import Claim

_log = logging.getLogger(__name__)

Mount = Callable[[LayerKey, int | None, Claim, Filled | None], Mounted | Declined]
"""Mounts a layer: its key, its blob's size in bytes, what it must turn out to be, and its files if it was just pulled."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One layer of one image. `small`: bytes; smaller layers are not worth being lazy."""

    pull: Pull
    layer: Digest
    index: SociIndex | None
    small: int
    claim: Claim


class WholeLayers:
    """Makes layers without an index's help. Thread safe."""

    def __init__(self, layers: OpenLayers, images: Images, pulls: EagerPulls, free: FreeIndexes) -> None:
        self._layers = layers
        self._images = images
        self._pulls = pulls
        self._free = free

    def mounted(self, wanted: Wanted, mount: Mount) -> Mounted:
        """Have the layer mounted. Raises what went wrong, naming it: Remote, Integrity, Unsupported, OSError."""
        found = self._known(wanted, mount)
        if found is not None:
            return found
        pull = wanted.pull
        layer = self._images.layer(pull.reference, pull.manifest, wanted.layer)
        with self._pulls.layer(pull, layer, self._ahead(wanted)) as filled:
            diff_id = filled.unpacked.diff_id
            if not wanted.claim.fits(diff_id):
                raise Integrity(
                    f"image {pull.reference}: layer {layer.digest} has the DiffID {diff_id}, which does not make "
                    f"{wanted.claim.target}"
                )
            self._free.keep(filled)
            key = LayerKey(layer.digest, digests.parse(filled.unpacked.ztoc_digest))
            mounted = mount(key, layer.size if filled.unpacked.by_span else None, wanted.claim, filled)
        if isinstance(mounted, Declined):
            raise Integrity(f"image {pull.reference}: {mounted.reason}")
        if wanted.index is None:
            self._free.offer(pull)
        return mounted

    def give_up(self) -> None:
        """The daemon stops: nobody is to wait for a layer any longer."""
        self._pulls.give_up()

    def serves(self, layer: Digest, layer_key: str) -> bool:
        """Whether a layer with this key is one of ours: whatever is in it was learned from the layer itself."""
        entry = self._free.ztocs.find(layer)
        return (
            entry is not None
            and bool(entry.ztoc)
            and layer_key == str(LayerKey(layer, digests.parse(entry.ztoc)))
        )

    def _known(self, wanted: Wanted, mount: Mount) -> Mounted | None:
        key = self._layers.made(wanted.layer)
        if key is None:
            entry = self._free.ztocs.find(wanted.layer)
            size = self._size(wanted) if wanted.small else None
            if entry is None or not entry.ztoc or (size is not None and size < wanted.small):
                return None
            key = LayerKey(wanted.layer, digests.parse(entry.ztoc))
        try:
            mounted = mount(key, None, wanted.claim, None)
        except (SociError, OSError) as error:
            _log.warning("a ztoc made here is of no use", extra={"layer": str(key), "error": str(error)})
            return None
        return None if isinstance(mounted, Declined) else mounted

    def _size(self, wanted: Wanted) -> int:
        return self._images.layer(wanted.pull.reference, wanted.pull.manifest, wanted.layer).size

    def _ahead(self, wanted: Wanted) -> list[Descriptor]:
        """The image's layers above this one that will have to be pulled whole, too."""
        _, manifest = self._images.manifest(wanted.pull.reference, wanted.pull.manifest)
        listed = [layer.digest for layer in manifest.layers]
        above = manifest.layers[listed.index(wanted.layer) + 1 :]
        return [layer for layer in above if layer.digest != wanted.layer and self._whole(layer, wanted)]

    def _whole(self, layer: Descriptor, wanted: Wanted) -> bool:
        index = wanted.index
        if index is not None and layer.size >= wanted.small and index.ztoc_for(layer.digest) is not None:
            return False
        if self._layers.made(layer.digest) is not None:
            return False
        entry = self._free.ztocs.find(layer.digest)
        return entry is None or not entry.ztoc or layer.size < wanted.small
