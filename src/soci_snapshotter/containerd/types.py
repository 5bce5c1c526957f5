"""What containerd's services speak of, as values of our own: the generated messages stay inside this room."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from ..errors import Integrity, Invalid
from ..formats import digest as digests
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from .stubs import types_pb2


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount a snapshotter asks for, as mount(2) takes it; `target` is a path below the mount point."""

    type: str
    source: str
    options: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class ContentInfo:
    """A blob in containerd's content store; size in bytes."""

    digest: Digest
    size: int
    labels: Mapping[str, str]
    created_at: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """An image record: a name and the descriptor of an index or a manifest."""

    name: str
    target: Descriptor
    labels: Mapping[str, str]
    updated_at: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot; kind is `view`, `active` or `committed`."""

    name: str
    parent: str
    kind: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of the running containerd; `error` is empty when it started."""

    type: str
    id: str
    exports: Mapping[str, str]
    error: str


def mount_from(message: types_pb2.Mount) -> Mount:
    """The value for a message."""
    return Mount(message.type, message.source, tuple(message.options), message.target)


def mounts_to(mounts: Iterable[Mount]) -> list[types_pb2.Mount]:
    """The messages for values."""
    return [
        types_pb2.Mount(type=mount.type, source=mount.source, target=mount.target, options=mount.options)
        for mount in mounts
    ]


def descriptor_from(message: types_pb2.Descriptor) -> Descriptor:
    """The value for a message. Integrity when containerd's record holds no proper digest."""
    try:
        digest = digests.parse(message.digest)
    except Invalid as error:
        raise Integrity(f"containerd's descriptor: {error}") from None
    return Descriptor(message.media_type, digest, message.size, annotations=dict(message.annotations))


def descriptor_to(descriptor: Descriptor) -> types_pb2.Descriptor:
    """The message for a value; platform, urls and data have no place in it."""
    return types_pb2.Descriptor(
        media_type=descriptor.media_type,
        digest=descriptor.digest,
        size=descriptor.size,
        annotations=descriptor.annotations,
    )


def time_from(message: Timestamp) -> datetime.datetime | None:
    """UTC time; None for the zero value of Go and of protobuf (containerd leaves some fields unset)."""
    if message.seconds <= 0:
        return None
    return message.ToDatetime(tzinfo=datetime.UTC)
