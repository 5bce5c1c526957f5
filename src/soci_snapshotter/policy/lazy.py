"""The values that pass between the snapshotter and whoever makes lazy layers.

snapshotter/ports.py has the verbs. The values live on this floor because layers/ makes them and snapshotter/,
above it, reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import SociError
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.sociindex import SociIndex
from .eager import Way
from .prepare import TARGET, TryLazy
from .proof import DIFF_ID

# containerd 2.4's unpacker sets it above the lowest layer, beside DIFF_ID.
PARENT_CHAIN_ID = "containerd.io/snapshot/parent-chain-id"


@dataclass(frozen=True)
class Usage:
    """Disk usage of one snapshot: `size` in bytes allocated, `inodes` each counted once."""

    size: int = 0
    inodes: int = 0


@dataclass(frozen=True)
class LocalLower:
    """A parent unpacked by containerd: the absolute path of its top directory."""

    path: bytes


@dataclass(frozen=True)
class LazyLower:
    """A parent that is a lazy mount."""

    mount_id: int


Lower: TypeAlias = LocalLower | LazyLower


@dataclass(frozen=True)
class LazyRequest:
    """One layer that containerd would like not to unpack.

    `target` is the chain ID the layer gives on top of its parents (label snapshot.ref); `parent_chain_id` is
    the parent's own, "" without a parent, None when the parent does not say. `parent_chain` is topmost first.
    `image_layers` is containerd's list of the image's layer digests, possibly cut short, possibly empty.
    `index_digest` is the SOCI index a label asks for explicitly.
    """

    namespace: str
    image_ref: str
    manifest_digest: str
    layer_digest: str
    image_layers: tuple[str, ...]
    index_digest: str | None
    target: str
    parent_chain_id: str | None
    parent_chain: tuple[Lower, ...]
    labels: Mapping[str, str]

    @classmethod
    def of(
        cls,
        wanted: TryLazy,
        labels: Mapping[str, str],
        *,
        parent_chain_id: str | None,
        parent_chain: tuple[Lower, ...],
    ) -> LazyRequest:
        """What Prepare decided to try, on these parents."""
        return cls(
            namespace=wanted.namespace,
            image_ref=wanted.image_ref,
            manifest_digest=wanted.manifest_digest,
            layer_digest=wanted.layer_digest,
            image_layers=wanted.image_layers,
            index_digest=wanted.index_digest,
            target=wanted.target,
            parent_chain_id=parent_chain_id,
            parent_chain=parent_chain,
            labels=dict(labels),
        )


@dataclass(frozen=True)
class LazyLayer:
    """A mounted lazy layer: one reference on `mount_id`. `labels` are added to the committed snapshot's.

    `way`: how it was made, if no index made it lazy.
    """

    layer_key: str
    mount_id: int
    size: int
    inodes: int
    labels: Mapping[str, str] = field(default_factory=dict)
    way: Way | None = None


@dataclass(frozen=True)
class Failed:
    """No layer, and containerd is not to try: the pull has failed with `error`."""

    error: SociError


@dataclass(frozen=True)
class Declined:
    """No lazy layer, for this ordinary reason (no index, no ztoc for the layer): containerd unpacks it."""

    reason: str


def ztoc_of(
    index: SociIndex | None, layer: Digest, size: int | None = None, min_size: int = 0
) -> Descriptor | Declined:
    """The ztoc that makes `layer` lazy, or why there is none.

    `size`: bytes of the layer, None when nobody said; `min_size`: below it a layer is not worth a mount
    ([snapshotter] min_layer_size).
    """
    if index is None:
        return Declined("no valid SOCI index found")
    if size is not None and size < min_size:
        return Declined(f"the layer has {size} bytes, less than [snapshotter] min_layer_size {min_size}")
    ztoc = index.ztoc_for(layer)
    if ztoc is None:
        return Declined(f"the SOCI index has no ztoc for layer {layer}")
    return ztoc


def is_lowest(request: LazyRequest) -> bool | None:
    """Whether a layer that was asked for without a parent is the lowest of its image; None when no label says.

    It is not where containerd unpacks layers side by side (capability rebase, from 2.2): their parents are named at
    Commit. A snapshot that is committed at Prepare would never get its own.
    """
    if request.parent_chain or side_by_side(request.labels):
        return False
    return True if request.labels.get(DIFF_ID) else None


def side_by_side(labels: Mapping[str, str]) -> bool:
    """Whether the labels of a snapshot without a parent say that its layer has one: 2.4's do, those of 2.2 do not."""
    diff_id = labels.get(DIFF_ID)
    return bool(labels.get(PARENT_CHAIN_ID)) or (diff_id is not None and diff_id != labels.get(TARGET))
