"""Writing an OCI image layout, as a directory or a tar. It appears at its path whole, or not at all.

What is at the path already is replaced only if it is a layout too, and nothing in it is deleted.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import Invalid
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor, Index
from .layouts import ARCHIVE, DIRECTORY, INDEX_FILE, LAYOUT_FILE, is_layout
from .outputs import Blob

FORMATS = (ARCHIVE, DIRECTORY)

_MARKER = b'{"imageLayoutVersion":"1.0.0"}'


def check_output(path: Path, form: str) -> None:
    """Invalid when something is at `path` that may not be replaced by a layout of this form."""
    if not path.parent.is_dir():
        raise Invalid(f"{path}: the directory {path.parent} does not exist")
    if not os.path.lexists(path):
        return
    if form == DIRECTORY and path.is_dir() and not any(path.iterdir()):
        return
    if path.is_dir() != (form == DIRECTORY) or not is_layout(path):
        raise Invalid(f"{path}: exists and is no OCI image layout of the format {form}; choose another path")


def write_layout(path: Path, form: str, blobs: Iterable[Blob], roots: Sequence[Descriptor]) -> None:
    """Write the blobs, which come in any order, and an index.json that names `roots`."""
    check_output(path, form)
    index = oci.encode(Index(schema_version=2, media_type=oci.INDEX, manifests=tuple(roots)))
    with _named(path):
        if form == ARCHIVE:
            _archive(path, blobs, index)
        elif path.is_dir() and any(path.iterdir()):
            _extend(path, blobs, index)
        else:
            _directory(path, blobs, index)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An error of the system (a full disk, say) names what was being written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(error.filename or path)) from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}")


def _archive(path: Path, blobs: Iterable[Blob], index: bytes) -> None:
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, LAYOUT_FILE, io.BytesIO(_MARKER), len(_MARKER))
                for blob in blobs:
                    size = blob.descriptor.size
                    _add(tar, str(_place(blob.digest)), _Stream(blob.pieces()), size)
                _add(tar, INDEX_FILE, io.BytesIO(index), len(index))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _add(tar: tarfile.TarFile, name: str, file: io.BytesIO | _Stream, size: int) -> None:
    """A file of nobody in particular at no particular time: the same image gives the same tar."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    tar.addfile(info, file)


class _Stream(io.BufferedIOBase):
    """The pieces of a blob as a file to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end."""
        size = -1 if size is None else size
        held = [self._rest]
        length = len(self._rest)
        while size < 0 or length < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            held.append(piece)
            length += len(piece)
        data = b"".join(held)
        end = length if size < 0 else size
        self._rest = data[end:]
        return data[:end]


def _directory(path: Path, blobs: Iterable[Blob], index: bytes) -> None:
    temporary = _temporary(path)
    try:
        temporary.mkdir()
        _extend(temporary, blobs, index)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def _extend(path: Path, blobs: Iterable[Blob], index: bytes) -> None:
    """Blobs first, index.json last: whoever reads it meanwhile sees the old image or the new one."""
    new: list[Path] = []
    try:
        for blob in blobs:
            target = path / _place(blob.digest)
            if not target.is_file() or target.stat().st_size != blob.descriptor.size:
                target.parent.mkdir(parents=True, exist_ok=True)
                _replace(target, blob.pieces())
                new.append(target)
        if not (path / LAYOUT_FILE).is_file():
            _replace(path / LAYOUT_FILE, (_MARKER,))
        _replace(path / INDEX_FILE, (index,))
    except BaseException:
        for target in new:
            target.unlink(missing_ok=True)
        raise
    _sync(path)


def _replace(target: Path, pieces: Iterable[bytes]) -> None:
    temporary = _temporary(target)
    try:
        with temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _place(digest: Digest) -> Path:
    return Path("blobs") / digest.algorithm / digest.hex


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
