"""Pulling an image into containerd, layer by layer through a snapshotter that may have no need of the bytes.

For each layer, lowest first: ask the snapshotter to prepare it, with labels that say what it is of. A lazy
snapshotter answers that the layer exists already; any other answer is a set of mounts, and then the blob is
fetched and unpacked here, as every containerd client does. Everything happens under a lease, so that
garbage collection never sees a half-pulled image. The labels and names are containerd's own client's
(core/unpack, core/images).
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from ..containerd.client import ContainerdClient
from ..containerd.snapshots import Snapshots
from ..containerd.types import Mount
from ..errors import AlreadyExists, Config, Integrity, NotFound, Precondition, SociError, Unsupported
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor, Manifest, Platform
from ..formats.reference import Reference
from .downloads import Downloads, Registry

_SNAPSHOT_REF = "containerd.io/snapshot.ref"
_CRI = "containerd.io/snapshot/cri."
_REMOTE = "containerd.io/snapshot/remote/"
_GC_CONTENT = "containerd.io/gc.ref.content."
_GC_SNAPSHOT = "containerd.io/gc.ref.snapshot."
_SOURCE = "containerd.io/distribution.source."
_UNCOMPRESSED = "containerd.io/uncompressed"

# containerd refuses a label whose key and value together are longer (pkg labels, Validate).
_MAX_LABEL = 4096

# A snapshot of the same chain that another pull is committing at this moment makes Prepare answer
# AlreadyExists before it can be seen. containerd's client tries as often.
_TRIES = 3


class Report(Protocol):
    """Who is told how a pull goes on. Called from several threads."""

    def resolved(self, name: str, target: Digest, layers: Sequence[Descriptor]) -> None:
        """The image is known."""

    def received(self, layer: Descriptor, count: int) -> None:
        """`count` more bytes of the layer's blob arrived."""

    def unpacking(self, layer: Descriptor) -> None:
        """The whole blob is here."""

    def done(self, position: int, layer: Descriptor, how: str) -> None:
        """The layer is mountable; `how` is lazy, local or existing."""


@dataclass(frozen=True, slots=True)
class PullOptions:
    """What to pull and through which snapshotter."""

    snapshotter: str
    platform: Platform
    soci_index: Digest | None = None
    max_concurrent_downloads: int = 3


@dataclass(frozen=True, slots=True)
class Pulled:
    """How a pull ended: the target, layers by how they got here, bytes of layers fetched, seconds."""

    target: Digest
    lazy: int
    local: int
    existing: int
    fetched: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Image:
    """A resolved image: `target` is what the name points to, an index or `descriptor` itself."""

    target: Descriptor
    descriptor: Descriptor
    manifest: Manifest
    diff_ids: tuple[Digest, ...]


def pull(
    client: ContainerdClient, registry: Registry, ref: Reference, options: PullOptions, report: Report
) -> Pulled:
    """Pull `ref` and record it in containerd.

    Raises Remote and NotFound naming host and repository, Config when containerd does not know the
    snapshotter, Integrity when bytes are not what the image says. A failed pull leaves nothing that is not
    collected.
    """
    started = time.monotonic()
    proxied = _check_snapshotter(client, options.snapshotter)
    with client.lease() as leased:
        image = _fetch_image(leased, registry, ref, options.platform)
        layers = image.manifest.layers
        report.resolved(str(ref), image.target.digest, layers)
        with Downloads(
            leased,
            registry,
            ref,
            labels=_source_labels(ref),
            on_bytes=report.received,
            workers=options.max_concurrent_downloads,
        ) as downloads:
            if not proxied:
                # A snapshotter of containerd's own takes every layer as mounts: no need to ask before
                # fetching.
                for layer in _missing(leased.snapshots(options.snapshotter), image):
                    downloads.start(layer)
            unpacker = _Unpacker(leased, ref, image, options, downloads=downloads, report=report)
            how = unpacker.run()
        if image.diff_ids:
            label = {_GC_SNAPSHOT + options.snapshotter: oci.chain_id(image.diff_ids)}
            leased.content.update_labels(image.manifest.config.digest, label)
        leased.images.put(str(ref), image.target)
    return Pulled(
        target=image.target.digest,
        lazy=how.count("lazy"),
        local=how.count("local"),
        existing=how.count("existing"),
        fetched=downloads.received,
        seconds=time.monotonic() - started,
    )


def _check_snapshotter(client: ContainerdClient, name: str) -> bool:
    """True when the snapshotter is a proxied one. Config when containerd lacks it."""
    for plugin in client.snapshotter_plugins():
        if plugin.id != name:
            continue
        if plugin.error:
            raise Config(f"--snapshotter {name}: containerd could not start it: {plugin.error}")
        return "address" in plugin.exports
    raise Config(
        f"--snapshotter {name}: containerd at {client.address} has none of that name; add "
        f"[proxy_plugins.{name}] with type = 'snapshot' and the socket's address to its config, restart it"
    )


def _fetch_image(client: ContainerdClient, registry: Registry, ref: Reference, platform: Platform) -> _Image:
    target = registry.resolve(ref)
    document = oci.decode_manifest(_document(client, registry, ref, target))
    descriptor = target
    if isinstance(document, oci.Index):
        try:
            descriptor = oci.select_platform(document, platform)
        except NotFound as error:
            raise NotFound(f"image {ref}: {error}") from None
        document = oci.decode_manifest(_document(client, registry, ref, descriptor))
    if not isinstance(document, Manifest):
        raise Integrity(f"image {ref}: {descriptor.digest} is an index inside an index")
    for layer in document.layers:
        if oci.layer_compression(layer.media_type) is None:
            raise Unsupported(
                f"image {ref}: layer {layer.digest} is {layer.media_type!r}, no container layer"
            )
    config = oci.decode_config(_document(client, registry, ref, document.config, oci.CONFIG_LIMIT))
    if len(config.diff_ids) != len(document.layers):
        raise Integrity(
            f"image {ref}: {len(document.layers)} layers, but {len(config.diff_ids)} diff_ids in its config"
        )
    return _Image(target, descriptor, document, config.diff_ids)


def _document(
    client: ContainerdClient,
    registry: Registry,
    ref: Reference,
    descriptor: Descriptor,
    limit: int = oci.MANIFEST_LIMIT,
) -> bytes:
    """A manifest, index or config: from containerd if it is there, else fetched; labelled and leased."""
    try:
        data = client.content.get(descriptor.digest, limit)
    except NotFound:
        data = registry.fetch(ref, descriptor, limit)
    labels = _source_labels(ref)
    if descriptor.media_type in oci.MANIFEST_TYPES + oci.INDEX_TYPES:
        labels |= _children_labels(oci.decode_manifest(data))
    client.content.write(descriptor, lambda offset: (data[offset:],), labels=labels)
    return data


def _children_labels(document: Manifest | oci.Index) -> dict[str, str]:
    """The labels by which containerd's garbage collector finds what a document refers to."""
    if isinstance(document, oci.Index):
        return {f"{_GC_CONTENT}m.{i}": entry.digest for i, entry in enumerate(document.manifests)}
    labels = {_GC_CONTENT + "config": str(document.config.digest)}
    # The config is child 0, so that layers count from 0 on their own.
    return labels | {f"{_GC_CONTENT}l.{i}": layer.digest for i, layer in enumerate(document.layers)}


def _source_labels(ref: Reference) -> dict[str, str]:
    """Where content came from; containerd mounts blobs across repositories by it when it pushes."""
    return {_SOURCE + _host_name(ref): ref.path}


def _missing(snapshots: Snapshots, image: _Image) -> list[Descriptor]:
    """The layers above the highest chain ID that the snapshotter has."""
    chain = oci.chain_ids(image.diff_ids)
    for position in range(len(chain) - 1, -1, -1):
        if snapshots.exists(chain[position]):
            return list(image.manifest.layers[position + 1 :])
    return list(image.manifest.layers)


class _Unpacker:
    """Takes an image's layers through the snapshotter, lowest first."""

    def __init__(
        self,
        client: ContainerdClient,
        ref: Reference,
        image: _Image,
        options: PullOptions,
        *,
        downloads: Downloads,
        report: Report,
    ) -> None:
        self._client = client
        self._snapshots = client.snapshots(options.snapshotter)
        self._ref = ref
        self._image = image
        self._soci_index = options.soci_index
        self._downloads = downloads
        self._report = report
        self._chain = oci.chain_ids(image.diff_ids)

    def run(self) -> list[str]:
        """How each layer got here: `existing`, `lazy` or `local`."""
        how = []
        for position, layer in enumerate(self._image.manifest.layers):
            how.append(self._layer(position, layer))
            self._report.done(position, layer, how[-1])
        return how

    def _layer(self, position: int, layer: Descriptor) -> str:
        chain_id = self._chain[position]
        if self._snapshots.exists(chain_id):
            # Only what is created under a lease is in it by itself.
            self._client.keep_snapshot(self._snapshots.name, chain_id)
            if self._snapshots.exists(chain_id):
                return "existing"
        parent = self._chain[position - 1] if position else ""
        labels = snapshot_labels(
            self._ref, self._image.descriptor.digest, self._image.manifest.layers, position, self._soci_index
        )
        labels[_SNAPSHOT_REF] = chain_id
        for _ in range(_TRIES):
            # The form of containerd's client: a snapshotter may recognize an extraction by it.
            key = f"extract-{time.time_ns()}-{secrets.token_urlsafe(3)} {chain_id}"
            try:
                mounts = self._snapshots.prepare(key, parent, labels)
            except AlreadyExists:
                if self._snapshots.exists(chain_id):
                    return "lazy"
                continue
            self._unpack(position, key, mounts, labels)
            return "local"
        raise Precondition(
            f"layer {layer.digest}: snapshotter {self._snapshots.name} says it exists, but shows no snapshot "
            f"{chain_id}; check the snapshotter's log"
        )

    def _unpack(self, position: int, key: str, mounts: Sequence[Mount], labels: Mapping[str, str]) -> None:
        layer = self._image.manifest.layers[position]
        diff_id = self._image.diff_ids[position]
        try:
            self._fetch(position)
            self._report.unpacking(layer)
            applied = self._client.diff.apply(layer, mounts)
            if applied.digest != diff_id:
                raise Integrity(
                    f"image {self._ref}: layer {layer.digest} unpacks to {applied.digest}, "
                    f"its config says {diff_id}"
                )
            self._commit(self._chain[position], key, labels)
        except BaseException:
            with contextlib.suppress(SociError):
                self._snapshots.remove(key)
            raise
        self._client.content.update_labels(layer.digest, {_UNCOMPRESSED: diff_id})

    def _fetch(self, position: int) -> None:
        """Wait for the blob; meanwhile let those come that will be needed too.

        An index leaves out layers below a size, so what is no bigger than a declined layer will be
        declined, and is fetched ahead. A bigger one may be lazy: that is asked first.
        """
        layers = self._image.manifest.layers
        self._downloads.start(layers[position])
        for layer in layers[position + 1 :]:
            if layer.size <= layers[position].size:
                self._downloads.start(layer)
        self._downloads.wait(layers[position])

    def _commit(self, chain_id: Digest, key: str, labels: Mapping[str, str]) -> None:
        try:
            self._snapshots.commit(chain_id, key, labels)
        except AlreadyExists:
            # Another pull was quicker with the same chain: the same content by definition.
            self._snapshots.remove(key)


def snapshot_labels(
    ref: Reference,
    manifest: Digest,
    layers: Sequence[Descriptor],
    position: int,
    soci_index: Digest | None,
) -> dict[str, str]:
    """What a lazy snapshotter wants to know about a layer (COMPATIBILITY-TARGET.md, Labels).

    The lists name this layer and those above it, as many as fit a label, with their sizes in the same order.
    """
    labels = {
        _CRI + "image-ref": str(ref),
        _CRI + "manifest-digest": str(manifest),
        _CRI + "layer-digest": str(layers[position].digest),
        _REMOTE + "soci.size": str(layers[position].size),
    }
    if soci_index is not None:
        labels[_REMOTE + "soci.index.digest"] = str(soci_index)
    rest = layers[position:]
    digests = _joined(_CRI + "image-layers", [str(layer.digest) for layer in rest])
    sizes = [str(layer.size) for layer in rest[: digests.count(",") + 1]]
    labels[_CRI + "image-layers"] = digests
    labels[_REMOTE + "image.layers.size"] = _joined(_REMOTE + "image.layers.size", sizes)
    return labels


def _joined(key: str, values: Sequence[str]) -> str:
    """As many of the values as a label of that key holds, joined by commas."""
    joined = ""
    for value in values:
        longer = f"{joined},{value}" if joined else value
        if len(key) + len(longer) > _MAX_LABEL:
            break
        joined = longer
    return joined


def _host_name(ref: Reference) -> str:
    """The registry's name without its port, as containerd's own client labels it."""
    return urlsplit("//" + ref.domain).hostname or ref.domain
