"""Layers that are pulled whole, as they came, into containerd's content store: the image can be exported and pushed."""

from __future__ import annotations

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.layers.download import Download
from soci_snapshotter.layers.eager import Pull

SOURCE_LABEL = "containerd.io/distribution.source."
"""With the registry's host: the repository that has the blob (containerd's core/remotes/docker)."""


class ContainerdKeeper:
    """Called by layers.eager.EagerPulls, from many threads."""

    def __init__(self, address: str) -> None:
        """`address`: containerd's socket. It is looked for when there is a layer to keep."""
        self._address = address

    def __call__(self, pull: Pull, layer: Descriptor, download: Download) -> None:
        """Store the blob while it is downloaded; containerd checks its digest. Raises Remote, Integrity.

        What keeps it is the manifest, whose labels containerd wrote before it asked for the first layer.
        """
        labels = {f"{SOURCE_LABEL}{pull.reference.host}": pull.reference.repository}
        with ContainerdClient(self._address, pull.namespace) as client:
            client.content.write(layer, download.read, labels=labels)
