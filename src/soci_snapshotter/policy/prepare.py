"""What Prepare does with a snapshot, decided from its key and labels alone.

The table is "Prepare" of the compatibility target: no target, an ordinary snapshot; a target with all labels
of an image pull, a lazy try; a target without them, left to containerd.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import Invalid, Precondition
from ..formats import digest

# containerd's labels (core/snapshots and pkg/snapshotters of containerd) ...
TARGET = "containerd.io/snapshot.ref"
IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
MANIFEST_DIGEST = "containerd.io/snapshot/cri.manifest-digest"
LAYER_DIGEST = "containerd.io/snapshot/cri.layer-digest"
IMAGE_LAYERS = "containerd.io/snapshot/cri.image-layers"
UID_MAPPING = "containerd.io/snapshot/uidmapping"
GID_MAPPING = "containerd.io/snapshot/gidmapping"
# ... and those of SOCI.
INDEX_DIGEST = "containerd.io/snapshot/remote/soci.index.digest"
REMOTE = "containerd.io/snapshot/remote"
REMOTE_NAMESPACE = "containerd.io/snapshot/remote/namespace"
HAS_INDEX = "containerd.io/snapshot/remote/has.soci.index.digest"

# containerd's metadata store names backend keys <namespace>/<sequence number>/<client's key>.
_BACKEND_KEY = re.compile(r"([^/]+)/[0-9]+/(.+)", re.DOTALL | re.ASCII)
# What the snapshotter calls a lazy snapshot: no namespace can have this form, so the name is nobody's key.
_LAZY_KEY = re.compile(r"lazy:([0-9]+)/(.+)", re.DOTALL | re.ASCII)


@dataclass(frozen=True)
class Options:
    """`discover`: some pull mode that looks for an index is on; an index named by a label is used without.

    `whole`: images without an index are pulled whole here.
    """

    discover: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Ordinary:
    """An ordinary active snapshot."""


@dataclass(frozen=True)
class TryLazy:
    """Ask for a lazy layer; the fields are those of LazyRequest."""

    namespace: str
    image_ref: str
    manifest_digest: str
    layer_digest: str
    image_layers: tuple[str, ...]
    index_digest: str | None
    target: str


@dataclass(frozen=True)
class Defer:
    """Return mounts so that containerd unpacks the layer; `reason` says why, for the log."""

    reason: str


Decision: TypeAlias = Ordinary | TryLazy | Defer


def namespace_of(key: str) -> str:
    """The namespace in a backend key; "" when the key has another shape."""
    match = _BACKEND_KEY.fullmatch(key)
    return match[1] if match else ""


def lazy_key(snapshot_id: int, target: str) -> str:
    """The key of a lazy snapshot of ours."""
    return f"lazy:{snapshot_id}/{target}"


def chain_id_of(key: str, labels: Mapping[str, str]) -> str | None:
    """The chain ID of a committed snapshot, from its label or its key; None when neither says."""
    match = _BACKEND_KEY.fullmatch(key) or _LAZY_KEY.fullmatch(key)
    for candidate in (labels.get(TARGET), match[2] if match else None):
        if candidate is not None and _is_digest(candidate):
            return candidate
    return None


def decide(key: str, labels: Mapping[str, str], *, namespace: str, options: Options) -> Decision:
    """Choose for one Prepare. `namespace` is the call's own, "" when the caller sent none.

    Raises Precondition when a lazy try needs a namespace and neither the call nor the key gives one.
    """
    target = labels.get(TARGET)
    if not target:
        return Ordinary()
    for label in (IMAGE_REF, MANIFEST_DIGEST, LAYER_DIGEST):
        if not labels.get(label):
            return Defer(f"label {label} is missing: the client's pull does not describe the image")
    for label in (TARGET, MANIFEST_DIGEST, LAYER_DIGEST):
        if not _is_digest(labels[label]):
            return Defer(f"label {label} is not a digest: {labels[label][:160]!r}")
    index = labels.get(INDEX_DIGEST) or None
    if index is not None and not _is_digest(index):
        return Defer(f"label {INDEX_DIGEST} is not a digest: {index[:160]!r}")
    if index is None and not options.discover and not options.whole:
        return Defer("no pull mode that looks for a SOCI index is enabled, and no label names one")
    namespace = namespace or namespace_of(key)
    if not namespace:
        raise Precondition(
            f"snapshot {key!r}: a namespace is required: neither the header containerd-namespace names one "
            "nor the key, which then must be <namespace>/<n>/<name>"
        )
    # The client cuts this list to fit containerd's limit for a label: what is not a digest is a cut end.
    layers = tuple(text for text in labels.get(IMAGE_LAYERS, "").split(",") if _is_digest(text))
    return TryLazy(
        namespace=namespace,
        image_ref=labels[IMAGE_REF],
        manifest_digest=labels[MANIFEST_DIGEST],
        layer_digest=labels[LAYER_DIGEST],
        image_layers=layers,
        index_digest=index,
        target=target,
    )


def _is_digest(text: str) -> bool:
    try:
        digest.parse(text)
    except Invalid:
        return False
    return True
