"""Where an image's blobs come from: containerd's content store, an OCI layout, or a registry.

A Place is a small value that a spawned worker gets by its pipe; the worker opens it for itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ..containerd.client import ContainerdClient
from ..errors import NotFound, Remote
from ..formats.oci import Descriptor
from ..formats.reference import Reference
from ..registry.access import RegistryAccess
from ..registry.client import RegistryClient

# A connection that broke after it brought bytes does not count: only a registry that is really gone uses these
# up, and the client has retried each request by then.
_TRIES = 3
_PAUSE_S = 0.5


class ImageContent(Protocol):
    """An opened place: blobs by descriptor. Safe for threads."""

    def get(self, descriptor: Descriptor, limit: int) -> bytes:
        """A small blob of at most `limit` bytes, checked; NotFound when it is not there."""

    def has(self, descriptor: Descriptor) -> bool:
        """True when the whole blob is there."""

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes in pieces of about a MiB. Not necessarily checked: whoever reads hashes."""

    def read_range(self, descriptor: Descriptor, offset: int, size: int) -> Iterator[bytes]:
        """`size` (above 0) of its bytes from `offset` on, in pieces, fewer only where it ends. Unchecked."""


class Place(Protocol):
    """How to open an ImageContent; picklable."""

    def open(self) -> contextlib.AbstractContextManager[ImageContent]:
        """Open it for the length of a `with`."""

    @property
    def missing(self) -> str:
        """What a user can do about a layer that is not there."""


class ContainerdContent:
    """containerd's content store, of one namespace."""

    def __init__(self, client: ContainerdClient) -> None:
        self._content = client.content

    def get(self, descriptor: Descriptor, limit: int) -> bytes:
        """See ImageContent."""
        return self._content.get(descriptor.digest, limit)

    def has(self, descriptor: Descriptor) -> bool:
        """See ImageContent."""
        return self._content.exists(descriptor.digest)

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See ImageContent."""
        return self._content.read(descriptor.digest)

    def read_range(self, descriptor: Descriptor, offset: int, size: int) -> Iterator[bytes]:
        """See ImageContent."""
        return self._content.read(descriptor.digest, offset, size)


@dataclass(frozen=True, slots=True)
class ContainerdPlace:
    """containerd's socket and a namespace."""

    address: str
    namespace: str

    @property
    def missing(self) -> str:
        """See Place."""
        return (
            "not in containerd's content store (pulled lazily, or discarded after unpacking); "
            "get it with: ctr content fetch"
        )

    @contextlib.contextmanager
    def open(self) -> Iterator[ImageContent]:
        """See Place."""
        with ContainerdClient(self.address, self.namespace) as client:
            yield ContainerdContent(client)


class RegistryContent:
    """One repository of a registry; nothing is kept."""

    def __init__(self, client: RegistryClient, reference: Reference) -> None:
        self._client = client
        self._reference = reference

    def get(self, descriptor: Descriptor, limit: int) -> bytes:
        """See ImageContent."""
        return self._client.fetch(self._reference, descriptor, limit)

    def has(self, descriptor: Descriptor) -> bool:
        """See ImageContent."""
        return self._client.exists(self._reference, descriptor)

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See ImageContent. A connection that breaks is opened again where it broke."""
        return self._read(descriptor, 0)

    def read_range(self, descriptor: Descriptor, offset: int, size: int) -> Iterator[bytes]:
        """See ImageContent. The rest of the answer is thrown away with its connection."""
        pieces = self._read(descriptor, offset)
        while size > 0 and (piece := next(pieces, b"")):
            yield piece[:size]
            size -= len(piece)

    def _read(self, descriptor: Descriptor, offset: int) -> Iterator[bytes]:
        at, tries = offset, 0
        while True:
            before = at
            try:
                with self._client.open_blob(self._reference, descriptor, at) as pieces:
                    for piece in pieces:
                        at += len(piece)
                        yield piece
                return
            except Remote:
                tries = 1 if at > before else tries + 1
                if tries >= _TRIES:
                    raise
                time.sleep(_PAUSE_S * tries)


@dataclass(frozen=True, slots=True)
class RegistryPlace:
    """A repository and how to get in."""

    access: RegistryAccess
    reference: Reference

    @property
    def missing(self) -> str:
        """See Place."""
        return f"not in {self.reference.host}/{self.reference.repository}; push the image again"

    @contextlib.contextmanager
    def open(self) -> Iterator[ImageContent]:
        """See Place."""
        with self.access.open() as client:
            yield RegistryContent(client, self.reference)


def require(content: ImageContent, place: Place, name: str, layers: list[Descriptor]) -> None:
    """NotFound for the first of these layers that is not there."""
    for layer in layers:
        if not content.has(layer):
            raise NotFound(f"image {name}: layer {layer.digest} is {place.missing}")
