"""OCI image layouts (image-spec, "OCI Image Layout") as directories or tars: an image without any service.

A tar is never unpacked: its blobs are found once and then read where they lie.
"""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct, field

from ..errors import Integrity, Invalid, NotFound, Unsupported
from ..formats import digest as digests
from ..formats import jsonfmt, oci, sociindex
from ..formats.digest import Digest
from ..formats.oci import Descriptor, Index
from .outputs import Blob
from .places import ImageContent

ARCHIVE = "oci-archive"
DIRECTORY = "oci-dir"
LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
_REF_NAME = "org.opencontainers.image.ref.name"
# The marker file is one short line of JSON.
_MARKER_LIMIT = 4 << 10
_PIECE = 1 << 20
# Members of a tar: a blob each; images have tens. A tar of another kind must not fill the memory.
_MEMBERS = 100_000


class _Marker(Struct, frozen=True):
    version: str = field(name="imageLayoutVersion", default="")


@dataclass(frozen=True, slots=True)
class _Span:
    """Where a file lies: path, offset and size in bytes."""

    path: Path
    offset: int
    size: int


class LayoutContent:
    """The blobs of a layout; `find` says where a digest's blob lies."""

    def __init__(self, place: LayoutPlace) -> None:
        self._place = place

    def get(self, descriptor: Descriptor, limit: int) -> bytes:
        """See ImageContent."""
        span = self._find(descriptor)
        if span.size > limit:
            raise Integrity(f"blob {descriptor.digest}: {span.size} bytes, more than the {limit} allowed")
        data = b"".join(_read(span))
        if not descriptor.digest.matches(data):
            raise Integrity(f"{self._place.path}: the bytes of blob {descriptor.digest} have another digest")
        return data

    def has(self, descriptor: Descriptor) -> bool:
        """See ImageContent."""
        return self._place.find(descriptor.digest) is not None

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """See ImageContent. Integrity when the blob has another size than its descriptor says."""
        span = self._find(descriptor)
        if span.size != descriptor.size:
            raise Integrity(
                f"{self._place.path}: blob {descriptor.digest} has {span.size} bytes, "
                f"its descriptor says {descriptor.size}"
            )
        return _read(span)

    def read_range(self, descriptor: Descriptor, offset: int, size: int) -> Iterator[bytes]:
        """See ImageContent."""
        span = self._find(descriptor)
        left = min(size, span.size - offset)
        return _read(_Span(span.path, span.offset + offset, left)) if left > 0 else iter(())

    def _find(self, descriptor: Descriptor) -> _Span:
        span = self._place.find(descriptor.digest)
        if span is None:
            raise NotFound(f"{self._place.path}: blob {descriptor.digest} is not in it")
        return span


@dataclass(frozen=True, slots=True)
class LayoutPlace:
    """A layout. `blobs`: where each blob of a tar lies; None for a directory."""

    path: Path
    index: bytes
    blobs: dict[Digest, tuple[int, int]] | None = None

    @property
    def form(self) -> str:
        """`oci-dir` or `oci-archive`."""
        return DIRECTORY if self.blobs is None else ARCHIVE

    @property
    def missing(self) -> str:
        """See Place."""
        return f"not in {self.path}; save the image again with all its layers"

    @contextlib.contextmanager
    def open(self) -> Iterator[ImageContent]:
        """See Place."""
        yield LayoutContent(self)

    def find(self, digest: Digest) -> _Span | None:
        """Where the blob lies, None when it is not there."""
        if self.blobs is not None:
            place = self.blobs.get(digest)
            return None if place is None else _Span(self.path, *place)
        path = self.path / "blobs" / digest.algorithm / digest.hex
        try:
            size = path.stat().st_size if path.is_file() else -1
        except OSError as error:
            raise Invalid(f"{path}: {error.strerror}") from None
        return None if size < 0 else _Span(path, 0, size)

    def digests(self) -> list[Digest]:
        """Every blob there is."""
        if self.blobs is not None:
            return list(self.blobs)
        found = []
        for file in sorted(self.path.glob("blobs/*/*")):
            with contextlib.suppress(Invalid):
                found.append(digests.parse(f"{file.parent.name}:{file.name}"))
        return found


def open_layout(path: Path) -> LayoutPlace:
    """The layout at `path`, a directory or a tar. Invalid when it is neither, saying what it looks like."""
    try:
        if path.is_dir():
            return _directory(path)
        with path.open("rb") as file:
            return _archive(path, file)
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file or directory") from None
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}") from None


def is_layout(path: Path) -> bool:
    """True when there is a layout at `path`."""
    try:
        open_layout(path)
    except (Invalid, NotFound, Integrity):
        return False
    return True


def root_of(place: LayoutPlace) -> Descriptor | Index:
    """The image of a layout: the descriptor of its only image or list, or index.json itself when it is the list
    of platforms (as go-containerregistry writes). Invalid when there are several images, or none.
    """
    top = _decode(place)
    # A SOCI index that `create --standalone` added is no image.
    images = [entry for entry in top.manifests if entry.artifact_type != sociindex.INDEX_V1]
    if not images:
        raise Invalid(f"{place.path}: its {INDEX_FILE} names no image")
    if len(images) == 1 and images[0].media_type not in oci.INDEX_TYPES:
        return images[0]
    if len(images) == 1:
        nested = oci.decode_manifest(LayoutContent(place).get(images[0], oci.MANIFEST_LIMIT))
        if not isinstance(nested, Index):
            raise Integrity(f"{place.path}: {images[0].digest} is announced as an index and is none")
        return _present(place, nested) or images[0]
    names = {entry.annotations[_REF_NAME] for entry in images if _REF_NAME in entry.annotations}
    if any(entry.media_type in oci.INDEX_TYPES for entry in images) or len(names) > 1:
        raise Invalid(
            f"{place.path}: holds {len(images)} images; save the one to index in a layout of its own"
        )
    whole_list = msgspec.structs.replace(top, manifests=tuple(images), media_type=top.media_type or oci.INDEX)
    return _present(place, whole_list) or whole_list


def _present(place: LayoutPlace, index: Index) -> Descriptor | Index | None:
    """What is left of a list of platforms when some were not saved; None when all were."""
    present = tuple(entry for entry in index.manifests if place.find(entry.digest) is not None)
    if not present:
        raise Invalid(f"{place.path}: none of the manifests that it lists is in it")
    if len(present) == 1 and present[0].media_type in oci.MANIFEST_TYPES:
        return present[0]
    return None if len(present) == len(index.manifests) else msgspec.structs.replace(index, manifests=present)


def listed(place: LayoutPlace) -> tuple[Descriptor, ...]:
    """What index.json names."""
    return _decode(place).manifests


def whole(place: LayoutPlace) -> list[Blob]:
    """Every blob of the layout, to be copied."""
    content = LayoutContent(place)
    found = []
    for digest in place.digests():
        span = place.find(digest)
        if span is not None:
            found.append(Blob(Descriptor("application/octet-stream", digest, span.size), content))
    return found


def _decode(place: LayoutPlace) -> Index:
    try:
        document = oci.decode_manifest(place.index)
    except (Integrity, Unsupported) as error:
        raise type(error)(f"{place.path}: {INDEX_FILE}: {error}") from None
    if not isinstance(document, Index):
        raise Invalid(f"{place.path}: its {INDEX_FILE} is no image index")
    return document


def _directory(path: Path) -> LayoutPlace:
    _check_marker(path, _small(path / LAYOUT_FILE, _MARKER_LIMIT))
    index = _small(path / INDEX_FILE, oci.MANIFEST_LIMIT)
    if index is None:
        raise Invalid(f"{path}: {INDEX_FILE} is missing; this is no complete OCI image layout")
    return LayoutPlace(path, index)


def _small(path: Path, limit: int) -> bytes | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Integrity(f"{path}: more than the {limit} bytes allowed")
    return data


def _archive(path: Path, file: BinaryIO) -> LayoutPlace:
    blobs: dict[Digest, tuple[int, int]] = {}
    small: dict[str, bytes] = {}
    docker = False
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for count, member in enumerate(tar):
                if count > _MEMBERS:
                    raise Invalid(f"{path}: more than {_MEMBERS} members; this is no OCI image layout")
                name = os.path.normpath(member.name)
                docker = docker or name == "manifest.json"
                if not member.isfile() or member.sparse is not None:
                    continue
                if name in (LAYOUT_FILE, INDEX_FILE):
                    limit = _MARKER_LIMIT if name == LAYOUT_FILE else oci.MANIFEST_LIMIT
                    if member.size > limit:
                        raise Integrity(f"{path}: {name} has more than the {limit} bytes allowed")
                    small[name] = os.pread(file.fileno(), member.size, member.offset_data)
                parts = name.split("/")
                if len(parts) == 3 and parts[0] == "blobs":
                    with contextlib.suppress(Invalid):
                        blobs[digests.parse(f"{parts[1]}:{parts[2]}")] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise Invalid(f"{path}: neither a directory nor a plain tar: {error}") from None
    if docker and LAYOUT_FILE not in small:
        raise Invalid(f"{path}: this is what `docker save` wrote before Docker 25; save it as an OCI layout")
    _check_marker(path, small.get(LAYOUT_FILE))
    if INDEX_FILE not in small:
        raise Invalid(f"{path}: {INDEX_FILE} is missing; this is no complete OCI image layout")
    return LayoutPlace(path, small[INDEX_FILE], blobs)


def _check_marker(path: Path, marker: bytes | None) -> None:
    if marker is None:
        raise Invalid(f"{path}: no {LAYOUT_FILE} file in it; this is no OCI image layout")
    version = jsonfmt.decode(marker, _Marker, f"{path}: {LAYOUT_FILE}", _MARKER_LIMIT).version
    if version.partition(".")[0] != "1":
        raise Invalid(f"{path}: OCI image layout version {version[:20]!r}, want 1.0.0")


def _read(span: _Span) -> Iterator[bytes]:
    with span.path.open("rb") as file:
        file.seek(span.offset)
        left = span.size
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                raise Integrity(f"{span.path}: ends {left} bytes too early")
            left -= len(piece)
            yield piece
