"""What an indexing command makes, before it is stored anywhere: small documents in memory, ztocs in scratch files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import Integrity
from ..formats import digest as digests
from ..formats.digest import Digest
from ..formats.oci import Descriptor

# containerd's garbage collector follows labels with this prefix from blob to blob; what comes after it must
# only be unique on the blob. The names are the Go tool's.
GC_CONTENT = "containerd.io/gc.ref.content."
SOCI_INDEX_LABEL = GC_CONTENT + "soci-index"

# One read of a file on its way to a store.
_PIECE = 1 << 20


class Origin(Protocol):
    """Where a blob that exists already is read from."""

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """Its bytes in pieces, unchecked."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob and where its bytes are: in memory, in a file, or in another place. `refs` names the blobs it needs.

    Their names are those of containerd's labels `containerd.io/gc.ref.content.<name>`.
    """

    descriptor: Descriptor
    body: bytes | Path | Origin
    refs: tuple[tuple[str, Digest], ...] = ()

    @property
    def digest(self) -> Digest:
        """Of its content."""
        return self.descriptor.digest

    def pieces(self, offset: int = 0) -> Iterator[bytes]:
        """The content from `offset` (bytes) on; whatever comes from another place is checked."""
        if isinstance(self.body, bytes):
            return iter((self.body[offset:],))
        if isinstance(self.body, Path):
            return file_pieces(self.body, offset)
        return _from(_checked(self.body, self.descriptor), offset)


def document(media_type: str, data: bytes, refs: tuple[tuple[str, Digest], ...] = ()) -> Blob:
    """A small blob that is in memory."""
    return Blob(Descriptor(media_type, digests.sha256(data), len(data)), data, refs)


def distinct(blobs: Iterable[Blob]) -> list[Blob]:
    """Each blob once, where it stood first."""
    kept: dict[Digest, Blob] = {}
    for blob in blobs:
        kept.setdefault(blob.digest, blob)
    return list(kept.values())


def file_pieces(path: Path, offset: int) -> Iterator[bytes]:
    """A file from `offset` on, in pieces."""
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(_PIECE):
            yield piece


def _checked(content: Origin, descriptor: Descriptor) -> Iterator[bytes]:
    hasher = hashlib.new(descriptor.digest.algorithm)
    size = 0
    for piece in content.read(descriptor):
        hasher.update(piece)
        size += len(piece)
        if size > descriptor.size:
            break
        yield piece
    if size != descriptor.size or hasher.hexdigest() != descriptor.digest.hex:
        raise Integrity(
            f"blob {descriptor.digest}: its bytes have another size or digest; get the image again"
        )


def _from(pieces: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """Without the first `offset` bytes, which are read and checked all the same."""
    for piece in pieces:
        if offset < len(piece):
            yield piece[offset:] if offset else piece
        offset = max(0, offset - len(piece))
