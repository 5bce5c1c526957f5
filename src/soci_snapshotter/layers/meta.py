"""From a ztoc in the content store to meta-<h>.erofs beside the layer's data, as one call for a worker process."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from soci_snapshotter.errors import Integrity, SociError
from soci_snapshotter.formats import erofs, tree, ztoc
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.layers.inherit import look_up_all, meta_hash, meta_uuid
from soci_snapshotter.layers.wholecheck import check_whole
from soci_snapshotter.store.layerfiles import sync_directory

BLOCK = 512  # tar's own block: its offsets are EROFS block addresses (DATA-PLANE.md)


class MetaRequest(msgspec.Struct, frozen=True):
    """What to build."""

    ztoc_path: str
    ztoc_digest: str
    layer_digest: str
    directory: str
    """Where meta-<h>.erofs goes; exists."""
    layer_size: int | None
    """Bytes of the layer blob as its descriptor says; None when nobody said."""
    lowers: tuple[bytes, ...]
    """Directories of the layers below, topmost first; empty for a bottom layer."""
    whole: str = ""
    """The complete tar, when it came with another table of contents: every header is held against this one."""
    whole_size: int = 0
    """Bytes of it."""


class MetaResult(msgspec.Struct, frozen=True):
    """What was built, or that it was there already."""

    meta_hash: str
    data_size: int
    """Bytes of data.tar, a multiple of 512."""
    entries: int


def data_size(uncompressed_size: int) -> int:
    """Bytes of data.tar for a tar of `uncompressed_size`: EROFS reads whole 512-byte blocks."""
    return -(-uncompressed_size // BLOCK) * BLOCK


def meta_path(directory: Path, hash_text: str) -> Path:
    """The file for hash `hash_text`."""
    return directory / f"meta-{hash_text}.erofs"


def build(request: MetaRequest) -> MetaResult:
    """Check the ztoc whole and write its EROFS image.

    Raises Integrity or Unsupported naming the layer and the field. The file appears under its name complete or not
    at all, after a power loss too.
    """
    raw = Path(request.ztoc_path).read_bytes()
    try:
        table = ztoc.decode(raw)
        span_table(table, request.layer_size)
        root = tree.build_tree(table.entries)
        size = data_size(table.uncompressed_size)
        if request.whole:
            check_whole(table, request.whole, request.whole_size)
        bottom = not request.lowers
        inherited = look_up_all(tree.implicit_directories(root), request.lowers)
        hash_text = meta_hash(inherited, bottom=bottom)
        path = meta_path(Path(request.directory), hash_text)
        if not path.exists():
            image = erofs.build_meta(
                root,
                data_size=size,
                uuid=meta_uuid(request.ztoc_digest, hash_text),
                inherited=inherited,
                bottom=bottom,
            )
            _write(path, image)
    except SociError as error:
        raise type(error)(f"layer {request.layer_digest}, ztoc {request.ztoc_digest}: {error}") from None
    except RecursionError:
        raise Integrity(
            f"layer {request.layer_digest}, ztoc {request.ztoc_digest}: paths nested too deep"
        ) from None
    return MetaResult(meta_hash=hash_text, data_size=size, entries=len(table.entries))


def _write(path: Path, image: bytes) -> None:
    """Durable before its name is: a meta file that exists under its name is whole, after a power loss too."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(image)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_directory(path.parent)
