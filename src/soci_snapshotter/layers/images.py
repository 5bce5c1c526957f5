"""Manifests and configs of the images that are being pulled: asked for once by however many layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TypeVar

from soci_snapshotter.errors import Integrity, NotFound
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.registry.client import RegistryClient

_KEPT = 16  # images; each a few KB, at most the 12 MB of MANIFEST_LIMIT and CONFIG_LIMIT

_T = TypeVar("_T")


class Images:
    """What the registries say of images, by the digest of their manifest. Thread safe. Raises Remote and Integrity."""

    def __init__(self, client: RegistryClient) -> None:
        self._client = client
        self._turns = Turns()
        self._lock = threading.Lock()
        self._manifests: OrderedDict[Digest, tuple[Descriptor, oci.Manifest]] = OrderedDict()
        self._configs: OrderedDict[Digest, oci.ImageConfig] = OrderedDict()

    def manifest(self, reference: Reference, digest: Digest) -> tuple[Descriptor, oci.Manifest]:
        """The manifest and its descriptor. Integrity when `digest` is an index of several images."""
        with self._turns.turn(digest):
            with self._lock:
                known = self._manifests.get(digest)
            if known is not None:
                return known
            described = self._client.resolve(reference.with_digest(digest))
            manifest = oci.decode_manifest(self._client.fetch(reference, described, oci.MANIFEST_LIMIT))
            if not isinstance(manifest, oci.Manifest):
                raise Integrity(f"{reference}: {digest} is an index, not the manifest of an image")
            return _keep(self._lock, self._manifests, digest, (described, manifest))

    def config(self, reference: Reference, digest: Digest) -> oci.ImageConfig:
        """The config of the image with this manifest."""
        _, manifest = self.manifest(reference, digest)
        with self._turns.turn(manifest.config.digest):
            with self._lock:
                known = self._configs.get(manifest.config.digest)
            if known is not None:
                return known
            config = oci.decode_config(self._client.fetch(reference, manifest.config, oci.CONFIG_LIMIT))
            return _keep(self._lock, self._configs, manifest.config.digest, config)

    def layer(self, reference: Reference, digest: Digest, layer: Digest) -> Descriptor:
        """The layer's descriptor. NotFound when the image has no such layer."""
        for descriptor in self.manifest(reference, digest)[1].layers:
            if descriptor.digest == layer:
                return descriptor
        raise NotFound(f"{reference}: {digest} has no layer {layer}")

    def diff_id(self, reference: Reference, digest: Digest, layer: Digest) -> str | None:
        """The DiffID that the image's config gives the layer, None when it gives none, or several."""
        _, manifest = self.manifest(reference, digest)
        config = self.config(reference, digest)
        if len(config.diff_ids) != len(manifest.layers):
            return None
        pairs = zip(manifest.layers, config.diff_ids, strict=True)
        named = {str(diff_id) for descriptor, diff_id in pairs if descriptor.digest == layer}
        return named.pop() if len(named) == 1 else None


def _keep(lock: threading.Lock, kept: OrderedDict[Digest, _T], digest: Digest, value: _T) -> _T:
    with lock:
        kept[digest] = value
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return value
