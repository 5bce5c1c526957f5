"""Which names in containerd lead to which image manifests, now."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..containerd.client import ContainerdClient
from ..errors import NotFound, SociError
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor, Manifest, Platform

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedManifest:
    """An image manifest behind a name; `platform` is normalised, None when nothing says it."""

    digest: Digest
    platform: Platform | None


class ImageNames:
    """containerd's images, by name and by manifest."""

    def __init__(self, client: ContainerdClient) -> None:
        self._client = client

    def manifests(self, name: str) -> list[NamedManifest]:
        """Every image manifest that `name` leads to, whether it was pulled or not.

        NotFound when there is no such image, or its index is not there.
        """
        return [
            NamedManifest(entry.digest, self._platform(entry))
            for entry in self._entries(self._client.images.get(name).target)
        ]

    def by_manifest(self) -> Mapping[Digest, Sequence[str]]:
        """The names of each image manifest, sorted."""
        names: dict[Digest, list[str]] = {}
        for image in self._client.images.find():
            try:
                entries = self._entries(image.target)
            except SociError as error:
                _log.debug("image %s: %s", image.name, error)
                continue
            for digest in {entry.digest for entry in entries}:
                names.setdefault(digest, []).append(image.name)
        return {digest: sorted(found) for digest, found in names.items()}

    def platform_of(self, manifest: Digest) -> Platform | None:
        """What the image's config says, normalised; None when manifest or config is not there."""
        try:
            document = oci.decode_manifest(self._client.content.get(manifest, oci.MANIFEST_LIMIT))
            if not isinstance(document, Manifest):
                return None
            config = oci.decode_config(self._client.content.get(document.config.digest, oci.CONFIG_LIMIT))
        except SociError:
            return None
        return config.platform.normalized()

    def _platform(self, entry: Descriptor) -> Platform | None:
        if entry.platform is not None:
            return entry.platform.normalized()
        return self.platform_of(entry.digest)

    def _entries(self, target: Descriptor) -> Sequence[Descriptor]:
        if target.media_type in oci.MANIFEST_TYPES:
            return [target]
        try:
            document = oci.decode_manifest(self._client.content.get(target.digest, oci.MANIFEST_LIMIT))
        except NotFound:
            raise NotFound(f"image index {target.digest} is not in containerd's content store") from None
        if isinstance(document, Manifest):
            return [target]
        return [
            entry
            for entry in document.manifests
            if entry.media_type in oci.MANIFEST_TYPES and not entry.artifact_type
        ]
