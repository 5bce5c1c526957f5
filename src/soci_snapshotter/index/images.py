"""The images behind a name in containerd: one manifest per wanted platform, whose content is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..containerd.client import ContainerdClient
from ..errors import Integrity, NotFound
from ..formats import oci
from ..formats.oci import Descriptor, Manifest, Platform
from ..formats.platforms import matching


@dataclass(frozen=True, slots=True)
class LocalImage:
    """One platform's image of a name: the manifest's descriptor, the manifest, and the config."""

    name: str
    descriptor: Descriptor
    manifest: Manifest
    config: oci.ImageConfig
    platform: Platform


def find_images(
    client: ContainerdClient, name: str, platforms: Sequence[Platform] | None
) -> list[LocalImage]:
    """The images of `name` for these platforms, in this order; None means every platform that was pulled.

    Raises NotFound naming image and platform when there is none, or when its manifest was never pulled.
    """
    record = client.images.get(name)
    root = _read(client, name, record.target)
    if isinstance(root, Manifest):
        return [_single(client, name, record.target, root, platforms)]
    if platforms is None:
        return _pulled(client, name, root)
    found: list[LocalImage] = []
    for platform in platforms:
        try:
            entry = oci.select_platform(root, platform)
        except NotFound as error:
            raise NotFound(f"image {name}: {error}") from None
        image = _load(client, name, entry, _manifest(client, name, entry))
        if image.descriptor.digest not in [other.descriptor.digest for other in found]:
            found.append(image)
    return found


def _single(
    client: ContainerdClient,
    name: str,
    descriptor: Descriptor,
    manifest: Manifest,
    platforms: Sequence[Platform] | None,
) -> LocalImage:
    image = _load(client, name, descriptor, manifest)
    for platform in platforms or ():
        if not any(runs.same_as(image.platform) for runs in matching(platform)):
            raise NotFound(f"image {name}: no image for platform {platform}; it is for {image.platform}")
    return image


def _pulled(client: ContainerdClient, name: str, index: oci.Index) -> list[LocalImage]:
    """Every image of the index whose manifest and config are there; attestations and the like are none."""
    found = []
    for entry in index.manifests:
        if entry.media_type not in oci.MANIFEST_TYPES or entry.artifact_type:
            continue
        if entry.platform is not None and entry.platform.os == "unknown":
            continue  # BuildKit's attestation manifests
        try:
            found.append(_load(client, name, entry, _manifest(client, name, entry)))
        except NotFound:
            continue
    if not found:
        raise NotFound(f"image {name}: no platform of it was pulled; pull it first")
    return found


def _load(client: ContainerdClient, name: str, descriptor: Descriptor, manifest: Manifest) -> LocalImage:
    data = client.content.get(manifest.config.digest, oci.CONFIG_LIMIT)
    config = oci.decode_config(data)
    if len(config.diff_ids) != len(manifest.layers):
        raise Integrity(
            f"image {name}: {len(manifest.layers)} layers, but {len(config.diff_ids)} diff_ids in its config"
        )
    platform = (descriptor.platform or config.platform).normalized()
    bare = Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)
    return LocalImage(name, bare, manifest, config, platform)


def _manifest(client: ContainerdClient, name: str, descriptor: Descriptor) -> Manifest:
    document = _read(client, name, descriptor)
    if not isinstance(document, Manifest):
        raise Integrity(f"image {name}: {descriptor.digest} is an index inside an index")
    return document


def _read(client: ContainerdClient, name: str, descriptor: Descriptor) -> Manifest | oci.Index:
    try:
        data = client.content.get(descriptor.digest, oci.MANIFEST_LIMIT)
    except NotFound:
        of = f" of platform {descriptor.platform}" if descriptor.platform else ""
        raise NotFound(
            f"image {name}: manifest {descriptor.digest}{of} is not in containerd's content store; "
            f"pull the image for that platform first"
        ) from None
    return oci.decode_manifest(data)
