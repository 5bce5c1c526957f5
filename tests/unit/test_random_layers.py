"""Every file read through an index is what tar extracts: random tars, random and real compressors."""

from __future__ import annotations

import gzip
import json
import subprocess
import zlib
from base64 import b64decode
from typing import TYPE_CHECKING, Any

import pytest
from harness.compressors import LIBRARIES, PROGRAMS, Deflate, Header, estargz, gotools, members
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit import tar_strategies, unpacked
from tests.unit.indexed_layer import IndexedLayer
from tests.unit.tar_strategies import FLAGS, Member, layers, seal, tars

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.tar import TarParser, format_time
from soci_snapshotter.formats.ztoc import Compression, Entry

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = {flag.decode(): kind for kind, flag in FLAGS.items()}
SPAN_SIZES = st.sampled_from([1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 20]).flatmap(
    lambda most: st.integers(1 << 10, most)
)
STEPS = st.one_of(st.just(1 << 20), st.integers(1, 50_000))


def repeat(body: Callable[[st.DataObject], None], examples: int) -> None:
    """Run `body` so often. No deadline, since programs are run; a failure can be repeated from its blob."""
    chosen = settings(
        max_examples=examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    chosen(given(st.data())(body))()


_TEXT = st.one_of(st.none(), st.binary(max_size=30).map(lambda raw: raw.replace(b"\0", b"")))
HEADERS = st.builds(
    Header,
    name=_TEXT,
    comment=_TEXT,
    extra=st.one_of(st.none(), st.binary(max_size=300)),
    crc=st.booleans(),
    text=st.booleans(),
)
FLUSHES = [None, zlib.Z_PARTIAL_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_BLOCK]
STRATEGIES = [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FILTERED, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED]
DEFLATES = st.builds(
    Deflate,
    level=st.integers(0, 9),
    strategy=st.sampled_from(STRATEGIES),
    memory=st.integers(1, 9),
    window=st.integers(9, 15),
    flush=st.sampled_from(FLUSHES),
    step=st.sampled_from([2000, 10_000, 100_000]).flatmap(lambda most: st.integers(1000, most)),
)


@st.composite
def by_zlib(draw: st.DrawFn, tar: bytes) -> bytes:
    """zlib's whole range: levels, strategies, flushes, headers, several members, empty ones, zeros behind."""
    cuts = sorted(draw(st.lists(st.integers(0, len(tar)), max_size=4)))
    return members(tar, cuts, draw(DEFLATES), draw(HEADERS)) + bytes(draw(st.sampled_from([0, 0, 1, 3000])))


def zlibs_whole_range(data: st.DataObject) -> None:
    """Any tar in any gzip that zlib can make."""
    tar = data.draw(tars())
    blob = data.draw(by_zlib(tar))
    unpacked.check_files(IndexedLayer(blob, span_size=data.draw(SPAN_SIZES), step=data.draw(STEPS)), tar)


FILLER = b"".join(b"%d is not %x, " % (n, n * n) for n in range(60_000))[:1_000_000]


def real_compressors(data: st.DataObject) -> None:
    """Any tar through a program or library that makes layers, zopfli on small ones, or through none.

    A file before the random ones makes several blocks of deflate, hence spans: compressors choose where to cut.
    """
    filler = Member(b"filler", "reg", content=FILLER[: data.draw(st.sampled_from([0, 200_000, len(FILLER)]))])
    tar = tar_strategies.encode(filler) + data.draw(tars())
    names = [name for name in (*PROGRAMS, *LIBRARIES) if name != "zopfli" or len(tar) < 200_000]
    name = data.draw(st.sampled_from([*names, "estargz", "none"]))
    compression, blob = Compression.GZIP, tar
    if name == "none":
        compression = Compression.UNCOMPRESSED
    elif name == "estargz":
        blob = estargz(tar_strategies.plain(data.draw(layers())), data.draw(st.integers(1000, 1 << 20)))
        tar = gzip.decompress(blob)  # it adds entries of its own
    else:
        blob = (PROGRAMS | LIBRARIES)[name](tar)
    layer = IndexedLayer(
        blob, span_size=data.draw(SPAN_SIZES), step=data.draw(STEPS), compression=compression
    )
    unpacked.check_files(layer, tar)


def what_tar_extracts(data: st.DataObject) -> None:
    """Content and metadata of the whole tree, as GNU tar leaves it and as a node would show it."""
    tar = data.draw(tars(tame=True))
    blob = data.draw(st.sampled_from(list(LIBRARIES.values())))(tar)
    layer = IndexedLayer(blob, span_size=data.draw(SPAN_SIZES))
    extracted = unpacked.by_tar(tar)
    unpacked.compare(unpacked.by_index(layer), unpacked.without_whiteouts(extracted))
    unpacked.compare(unpacked.by_index(layer, bottom=False), unpacked.as_overlayfs(extracted))


# Offsets and lengths of a header's fields; the numbers, names, type, magic, prefix and the trailers in it.
FIELDS = (
    (0, 100),
    (100, 8),
    (108, 8),
    (116, 8),
    (124, 12),
    (136, 12),
    (156, 1),
    (157, 100),
    (257, 8),
    (265, 32),
)
FIELDS += ((329, 8), (337, 8), (345, 155), (345, 12), (357, 12), (476, 12), (508, 4))
NUMBERS = [
    b"",
    b"0",
    b" 644 ",
    b"\x80\0\0\0\0\0\1\0",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"9",
    b"-1",
    b"7\0" * 6,
    b"a/b",
]
OTHERS = [
    b"ustar  \0",
    b"ustar\x0000",
    b"ustar\0",
    b"tar\0",
    b"x/",
    b"d/" * 60,
    b"\xe9t\xe9",
    b"0",
    b"5",
    b"\0",
    b"7",
    b"g",
    b"S",
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A tar some of whose headers say something else, checksums right."""
    blocks = bytearray(draw(tars()))
    headers = [at for at in range(0, len(blocks) - 511, 512) if blocks[at + 154 : at + 156] == b"\0 "]
    for at in draw(st.lists(st.sampled_from(headers), max_size=3)) if headers else ():
        place, size = draw(st.sampled_from(FIELDS))
        value = draw(st.one_of(st.sampled_from(NUMBERS), st.sampled_from(OTHERS), st.binary(max_size=12)))
        if draw(st.booleans()):
            value = value.ljust(size, b"\0")
        blocks[at + place : at + place + min(size, len(value))] = value[:size]
        blocks[at : at + 512] = seal(blocks[at : at + 512], signed=draw(st.booleans()))
    return bytes(blocks)


def by_go(tar: bytes) -> list[dict[str, Any]]:
    """What Go's archive/tar reads: entries, then where it ended, or its error."""
    done = subprocess.run([gotools(), "tarlist"], input=tar, capture_output=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def as_entry(seen: dict[str, Any]) -> Entry:
    """An entry of ours with what Go saw."""
    records = sorted((b64decode(key), b64decode(value)) for key, value in seen["records"])
    return Entry(
        b64decode(seen["name"]),
        KINDS.get(chr(seen["type"]), "odd"),
        seen["offset"],
        seen["size"],
        b64decode(seen["link"]),
        seen["mode"],
        seen["uid"],
        seen["gid"],
        b64decode(seen["uname"]),
        b64decode(seen["gname"]),
        format_time(seen["seconds"] * 10**9 + seen["nanoseconds"]),
        seen["major"],
        seen["minor"],
        tuple(records),
    )


def as_go_reads(data: st.DataObject) -> None:
    """The reader that containerd and the Go tool have; what it reads, ours reads alike or calls unsupported."""
    tar = data.draw(mutated())
    *seen, end = by_go(tar)
    parser = TarParser()
    try:
        step = data.draw(STEPS)
        for at in range(0, len(tar), step):
            parser.feed(tar[at : at + step])
        entries, size = parser.finish()
    except Unsupported:
        assert "error" in end or any(chr(each["type"]) not in KINDS for each in seen)
    except Integrity:
        assert "error" in end
    else:
        if "error" not in end:
            assert size == end["end"]
            assert entries == [as_entry(each) for each in seen]


def test_any_gzip_that_zlib_makes() -> None:
    """Each file of random tars reads back through spans of streams with any levels, flushes and members."""
    repeat(zlibs_whole_range, 80)


def test_real_compressors() -> None:
    """Each file of random tars reads back through spans of what real compressors make of them."""
    repeat(real_compressors, 60)


def test_the_tree_is_what_tar_extracts() -> None:
    """GNU tar, run as root, leaves the same names, content, modes, owners, times, devices, links and xattrs."""
    repeat(what_tar_extracts, 80)


def test_headers_are_read_as_go_reads_them() -> None:
    """Of tars whose headers were tampered with, the parser says what archive/tar says of them, or refuses them."""
    repeat(as_go_reads, 200)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("body", [zlibs_whole_range, real_compressors, what_tar_extracts, as_go_reads])
def test_much_more_of_the_same(body: Callable[[st.DataObject], None]) -> None:
    """The tests above with twenty times the examples."""
    repeat(body, 1500)
