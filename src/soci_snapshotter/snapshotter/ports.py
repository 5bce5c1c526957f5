"""What the snapshotter needs from whoever makes lazy layers.

References are counted on the other side of this interface: every LazyLayer that `prepare` returns is one
reference on its mount id, and every id given to `release` takes one back. After a restart the references are
the rows, nothing else: `Snapshotter.lazy_rows()` lists them, a mount once for each row that shares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..policy.eager import Way
from ..policy.lazy import Declined, Failed, LazyLayer, LazyLower, LazyRequest, LocalLower, Lower, Usage

__all__ = [
    "Declined",
    "Failed",
    "LazyLayer",
    "LazyLayers",
    "LazyLower",
    "LazyRequest",
    "LocalLower",
    "Lower",
    "Usage",
    "Way",
]


class LazyLayers(Protocol):
    """Makes, finds and drops lazy layers. Called from many threads, never under the snapshotter's lock."""

    def prepare(self, request: LazyRequest, *, must: bool = False) -> LazyLayer | Declined | Failed:
        """Mount the layer. Bounded in time; a SociError means the try failed, and nothing is left of it.

        Failed: containerd is not to try either. `must`: a snapshot stands for the layer already, so that containerd
        cannot be left to unpack it.
        """

    def serves(self, request: LazyRequest, mount_id: int, layer_key: str) -> str | None:
        """None when a lazy snapshot with this mount, of the request's chain ID, may stand for it, else why not."""

    def committed(self, mount_id: int) -> None:
        """The snapshot for a layer from `prepare` is committed: what it says of its layer can be judged."""

    def lowerdir(self, mount_id: int) -> bytes:
        """The path to hand out now for this mount. Raises Remote when the layer cannot be reached."""

    def usage(self, mount_id: int) -> Usage:
        """What the layer takes on disk now."""

    def release(self, mount_ids: Sequence[int]) -> None:
        """Take back one reference for each id; their rows are gone. What nobody refers to is unmounted."""

    def returned(self, paths: frozenset[bytes]) -> None:
        """No active or view snapshot holds these lowerdirs any longer: a superseded mount there may go."""
