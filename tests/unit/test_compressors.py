"""A layer from every compressor, several megabytes of real files: indexed, and read back span by span."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sysconfig
import tarfile
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from harness.compressors import LIBRARIES, PROGRAMS, Deflate, Header, estargz, member, members
from tests.unit import unpacked
from tests.unit.indexed_layer import IndexedLayer

if TYPE_CHECKING:
    from collections.abc import Callable

EVERYTHING = Header(name=b"layer.tar", comment=b"made by hand", extra=b"XX\4\0data", crc=True, text=True)
BY_HAND: dict[str, Callable[[bytes], bytes]] = {
    "python-1": lambda tar: gzip.compress(tar, 1),
    "python-9": lambda tar: gzip.compress(tar, 9),
    "stored": lambda tar: gzip.compress(tar, 0),
    "fixed-codes": lambda tar: member(tar, Deflate(strategy=zlib.Z_FIXED), Header()),
    "small-blocks": lambda tar: member(tar, Deflate(memory=1), Header()),
    "header-fields": lambda tar: member(tar, Deflate(), EVERYTHING),
    "full-flush": lambda tar: member(tar, Deflate(flush=zlib.Z_FULL_FLUSH, step=50_000), Header()),
    "partial-flush": lambda tar: member(tar, Deflate(flush=zlib.Z_PARTIAL_FLUSH, step=50_000), Header()),
    "members": lambda tar: members(tar, [1000, 1_500_000, len(tar) - 700], Deflate(), EVERYTHING),
    "empty-members": lambda tar: members(tar, [0, 0, 1_000_000, 1_000_000, len(tar)], Deflate(), Header()),
    "zeros-behind": lambda tar: gzip.compress(tar) + bytes(9999),
}
COMPRESSORS = PROGRAMS | LIBRARIES | BY_HAND
ONE_BLOCK = {"igzip-0", "isal-0", "zlib-ng-1"}
"""They end a block only where the stream ends, and a span can end nowhere else."""


@cache
def realistic_tar(size: int = 4_000_000) -> bytes:
    """Python's own sources and extension modules, noise and zeros, some links: about `size` bytes."""
    file = io.BytesIO()
    library = Path(sysconfig.get_path("stdlib"))
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        _add(out, "usr/share/noise", random.Random(1).randbytes(size // 16))
        _add(out, "usr/share/zeros", bytes(size // 8))
        for path in sorted([*library.glob("*.py"), *library.glob("lib-dynload/*.so")], key=lambda p: p.name):
            if file.tell() > size:
                break
            out.add(path, f"usr/lib/{path.name}")
            link = tarfile.TarInfo(f"usr/lib/links/{path.name}")
            link.type, link.linkname = tarfile.SYMTYPE, f"../{path.name}"
            out.addfile(link)
    return file.getvalue()


def _add(out: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    out.addfile(info, io.BytesIO(content))


def gunzipped(layer: bytes) -> bytes:
    """What GNU gzip makes of it; it warns (2) of nothing but zeros behind the end."""
    done = subprocess.run(["gzip", "-dc"], input=layer, capture_output=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    return done.stdout


def member_count(layer: bytes) -> int:
    """How many gzip members there are."""
    count = 0
    while layer.startswith(b"\x1f\x8b"):
        inflate = zlib.decompressobj(31)
        inflate.decompress(layer)
        layer, count = inflate.unused_data, count + 1
    return count


def starts_anew(layer: bytes, expected: bytes) -> bool:
    """Whether after some flush `expected` is inflated without looking back at anything."""
    at = 0
    while (at := layer.find(b"\0\0\xff\xff", at) + 4) > 3:
        try:
            if zlib.decompressobj(-15).decompress(layer[at:], len(expected)) == expected:
                return True
        except zlib.error:
            continue
    return False


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_compressor_is_indexed(name: str) -> None:
    """Each compressor's layer has as many spans as its blocks allow; from these come all files and the tar."""
    tar = realistic_tar(300_000 if name == "zopfli" else 4_000_000)
    layer = COMPRESSORS[name](tar)
    assert gunzipped(layer) == tar
    indexed = IndexedLayer(layer, span_size=len(tar) // 16)
    assert (len(indexed.spans) > 4) is (name not in ONE_BLOCK)
    unpacked.check_files(indexed, tar)


def test_the_layers_are_what_they_are_said_to_be() -> None:
    """Members where there should be several, blocks that look back at nothing, header fields, zeros."""
    tar = realistic_tar(1_000_000)
    assert member_count(PROGRAMS["bgzip"](tar)) > len(tar) // 65536
    assert PROGRAMS["bgzip"](tar)[12:14] == b"BC"
    assert member_count(BY_HAND["members"](realistic_tar())) == 4
    assert member_count(BY_HAND["empty-members"](realistic_tar())) == 6
    assert b"layer.tar\0made by hand\0" in BY_HAND["header-fields"](tar)[:60]
    assert BY_HAND["zeros-behind"](tar).endswith(bytes(9999))
    for name in ("pigz", "go", "pgzip", "igzip-3"):
        assert member_count(PROGRAMS[name](tar)) == 1
    text = realistic_tar()[-1_000_000:]
    assert starts_anew(PROGRAMS["pigz-independent"](text), text[128 << 10 :][:5000])
    assert not starts_anew(PROGRAMS["pigz"](text), text[128 << 10 :][:5000])


def test_estargz() -> None:
    """A layer of the eStargz writer, a member for each file, is indexed like any gzip, its own table included."""
    tar = realistic_tar()
    layer = estargz(tar, 100_000)
    footer = layer[-51:]
    assert (footer[:4], footer[12:14], footer[32:38]) == (b"\x1f\x8b\x08\x04", b"SG", b"STARGZ")
    assert member_count(layer) > 50
    whole = gunzipped(layer)
    indexed = IndexedLayer(layer, span_size=64 << 10)
    unpacked.check_files(indexed, whole)
    entries = {entry.name: entry for entry in indexed.ztoc.entries}
    table = entries[b"stargz.index.json"]
    assert json.loads(indexed.read(table.offset, table.size))["version"] == 1
    with tarfile.open(fileobj=io.BytesIO(tar)) as reader:
        for info in reader:
            entry = entries[info.name.encode()]
            if info.isreg():
                file = reader.extractfile(info)
                assert file is not None
                assert indexed.read(entry.offset, entry.size) == file.read()
