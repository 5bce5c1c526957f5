"""The images behind a name, one manifest per wanted platform, whose content is in some place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..containerd.client import ContainerdClient
from ..errors import Integrity, NotFound
from ..formats import oci
from ..formats.oci import Descriptor, Index, Manifest, Platform
from .places import ContainerdContent, ImageContent


@dataclass(frozen=True, slots=True)
class LocalImage:
    """One platform's image of a name: the manifest's descriptor, the manifest, and the config.

    `platform` is normalised; `listed` is as the index of platforms has it, None without one.
    """

    name: str
    descriptor: Descriptor
    manifest: Manifest
    config: oci.ImageConfig
    platform: Platform
    listed: Platform | None = None


def find_images(
    client: ContainerdClient, name: str, platforms: Sequence[Platform] | None, *, implied: bool = False
) -> list[LocalImage]:
    """images_of for a name that containerd knows; NotFound when it knows none."""
    root = client.images.get(name).target
    return images_of(ContainerdContent(client), root, name, platforms, implied=implied)


def images_of(
    content: ImageContent,
    root: Descriptor | Index,
    name: str,
    platforms: Sequence[Platform] | None,
    *,
    implied: bool = False,
) -> list[LocalImage]:
    """The images of `root` for these platforms, in this order; None means every platform that is there.

    `implied`: nobody asked for the platforms, they are this machine's; then an image that runs on them will do, and
    one without an index is taken whatever it is for. Raises NotFound naming image and platform when there is none,
    or when its manifest was never pulled.
    """
    if isinstance(root, Descriptor):
        document = _read(content, name, root)
        if isinstance(document, Manifest):
            return [_single(content, name, root, document, None if implied else platforms)]
        root = document
    if platforms is None:
        return _pulled(content, name, root)
    found: list[LocalImage] = []
    for platform in platforms:
        try:
            entry = oci.select_platform(root, platform)
        except NotFound as error:
            raise NotFound(f"image {name}: {error}") from None
        if not implied and entry.platform is not None and not entry.platform.normalized().same_as(platform):
            raise NotFound(f"image {name}: no image for platform {platform}; the nearest is {entry.platform}")
        image = _load(content, name, entry, _manifest(content, name, entry))
        if image.descriptor.digest not in [other.descriptor.digest for other in found]:
            found.append(image)
    return found


def _single(
    content: ImageContent,
    name: str,
    descriptor: Descriptor,
    manifest: Manifest,
    platforms: Sequence[Platform] | None,
) -> LocalImage:
    image = _load(content, name, descriptor, manifest)
    for platform in platforms or ():
        if not platform.normalized().same_as(image.platform):
            raise NotFound(f"image {name}: no image for platform {platform}; it is for {image.platform}")
    return image


def _pulled(content: ImageContent, name: str, index: Index) -> list[LocalImage]:
    """Every image of the index whose manifest and config are there; attestations and the like are none."""
    found = []
    for entry in index.manifests:
        if entry.media_type not in oci.MANIFEST_TYPES or entry.artifact_type:
            continue
        if entry.platform is not None and entry.platform.os == "unknown":
            continue  # BuildKit's attestation manifests
        try:
            found.append(_load(content, name, entry, _manifest(content, name, entry)))
        except NotFound:
            continue
    if not found:
        raise NotFound(f"image {name}: no platform of it was pulled; pull it first")
    return found


def _load(content: ImageContent, name: str, descriptor: Descriptor, manifest: Manifest) -> LocalImage:
    data = content.get(manifest.config, oci.CONFIG_LIMIT)
    config = oci.decode_config(data)
    if len(config.diff_ids) != len(manifest.layers):
        raise Integrity(
            f"image {name}: {len(manifest.layers)} layers, but {len(config.diff_ids)} diff_ids in its config"
        )
    platform = (descriptor.platform or config.platform).normalized()
    bare = Descriptor(descriptor.media_type, descriptor.digest, descriptor.size)
    return LocalImage(name, bare, manifest, config, platform, descriptor.platform)


def _manifest(content: ImageContent, name: str, descriptor: Descriptor) -> Manifest:
    document = _read(content, name, descriptor)
    if not isinstance(document, Manifest):
        raise Integrity(f"image {name}: {descriptor.digest} is an index inside an index")
    return document


def _read(content: ImageContent, name: str, descriptor: Descriptor) -> Manifest | Index:
    try:
        data = content.get(descriptor, oci.MANIFEST_LIMIT)
    except NotFound:
        of = f" of platform {descriptor.platform}" if descriptor.platform else ""
        raise NotFound(
            f"image {name}: manifest {descriptor.digest}{of} is not there; pull the image for that platform first"
        ) from None
    return oci.decode_manifest(data)
