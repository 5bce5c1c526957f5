"""Layers that are odd, layers that no index can describe, and damaged ones: indexed, skipped, refused by name."""

from __future__ import annotations

import gzip
import os
import random
import re
import subprocess
import threading
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from harness.compressors import Deflate, Header, members
from tests.unit import unpacked
from tests.unit.indexed_layer import IndexedLayer
from tests.unit.tar_strategies import Member, encode, record, seal

from soci_snapshotter.errors import Integrity, SociError, Unsupported
from soci_snapshotter.formats import digest
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index.build import build_ztoc
from soci_snapshotter.linux.inflate import MAX_TAIL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

END = bytes(1024)
PLAIN = encode(Member(b"etc/plain", "reg", content=random.Random(1).randbytes(9000)))


def by_gnu_tar(*options: str) -> bytes:
    """A directory with a plain file and one with holes, as GNU tar writes it."""
    with TemporaryDirectory() as scratch:
        (Path(scratch) / "dir").mkdir()
        (Path(scratch) / "dir/plain").write_bytes(b"plain")
        with (Path(scratch) / "dir/holes").open("wb") as file:
            file.truncate(1 << 20)
            file.seek(500_000)
            file.write(b"in the middle")
        command = ["tar", "-c", "--sort=name", *options, "dir"]
        return subprocess.run(command, cwd=scratch, capture_output=True, check=True).stdout


def named(kind: bytes) -> bytes:
    """A plain file, then an entry called odd-one of an unusual type."""
    header = bytearray(encode(Member(b"odd-one", "reg")))
    header[156:157] = kind
    return PLAIN + seal(header) + END


def with_size(size: bytes) -> bytes:
    """An entry called odd-one whose header has this for a size; nothing follows."""
    header = bytearray(encode(Member(b"odd-one", "reg")))
    header[124:136] = size
    return PLAIN + seal(header) + END


def with_records(data: bytes) -> bytes:
    """An entry called odd-one behind a PAX header of just these bytes."""
    pax = bytearray(encode(Member(b"odd-one", "reg", others=((b"k", b"v"),)))[:512])
    pax[124:136] = b"%011o\0" % len(data)
    return PLAIN + seal(pax) + data + bytes(-len(data) % 512) + encode(Member(b"odd-one", "reg")) + END


BEYOND = 0x80 << 88  # base 256
CANNOT_BE_DESCRIBED: dict[str, tuple[Callable[[], bytes], str]] = {
    "global PAX header": (lambda: by_gnu_tar("--format=pax", "--pax-option=comment=x"), "global PAX header"),
    "GNU sparse": (lambda: by_gnu_tar("--format=gnu", "--sparse"), "dir/holes.*GNU sparse"),
    "old GNU sparse": (lambda: by_gnu_tar("--format=oldgnu", "--sparse"), "dir/holes.*GNU sparse"),
    "PAX sparse 0.0": (lambda: by_gnu_tar("--sparse", "--sparse-version=0.0", "-Hpax"), "dir/holes.*PAX sparse"),
    "PAX sparse 0.1": (lambda: by_gnu_tar("--sparse", "--sparse-version=0.1", "-Hpax"), "'dir/holes.*PAX sparse"),
    "PAX sparse 1.0": (lambda: by_gnu_tar("--sparse", "--sparse-version=1.0", "-Hpax"), "'dir/holes.*PAX sparse"),
    "volume label": (lambda: by_gnu_tar("-Hgnu", "-V", "a label"), "'a label' is a volume label"),
    "dump": (lambda: by_gnu_tar("-Hgnu", "--incremental"), "dir/' is a GNU dump"),
    "second volume": (lambda: named(b"M"), "odd-one.*several volumes"),
    "contiguous": (lambda: named(b"7"), "odd-one.*type b'7'"),
    "Solaris ACL": (lambda: named(b"A"), "odd-one.*type b'A'"),
    "Solaris PAX": (lambda: named(b"X"), "odd-one.*type b'X'"),
    "unknown": (lambda: named(b"\xff"), "odd-one.*type"),
    "beyond 2 TiB": (lambda: with_size((BEYOND | 1 << 41).to_bytes(12, "big")), "odd-one.*ends beyond"),
    "beyond 2 TiB in PAX": (lambda: with_records(record(b"size", b"%d" % (1 << 60))), "odd-one.*ends beyond"),
    "long tail": (lambda: PLAIN + END + bytes(MAX_TAIL + 10240), "after the tar's end"),
}  # fmt: skip


@cache
def _made(name: str) -> bytes:
    return CANNOT_BE_DESCRIBED[name][0]()


def refusal(layer: bytes, compression: Compression = Compression.GZIP, step: int = 1 << 20) -> SociError:
    """The error of a layer, which leaves no thread and no open file behind."""
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(SociError) as caught:
        IndexedLayer(layer, span_size=4096, compression=compression, step=step)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("compression", list(Compression), ids=lambda each: each.name.lower())
@pytest.mark.parametrize("name", CANNOT_BE_DESCRIBED)
def test_what_no_index_can_describe_is_unsupported(name: str, compression: Compression) -> None:
    """A sound layer that a ztoc has no words for is Unsupported, in one line that names the entry."""
    tar = _made(name)
    error = refusal(gzip.compress(tar, 1) if compression is Compression.GZIP else tar, compression)
    assert isinstance(error, Unsupported)
    assert re.search(CANNOT_BE_DESCRIBED[name][1], str(error)), error


LAYER = gzip.compress(PLAIN + END)
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "cut off"),
    "cut": (LAYER[:-3000], "cut off"),
    "cut before the CRC": (LAYER[:-8], "cut off"),
    "wrong CRC": (LAYER[:-8] + bytes(4) + LAYER[-4:], "check"),
    "wrong length": (LAYER[:-4] + bytes(4), "check"),
    "a bit turned": (LAYER[:4000] + bytes([LAYER[4000] ^ 1]) + LAYER[4001:], "not valid gzip|check|tar"),
    "something behind": (LAYER + b"x", "something else"),
    "zlib's wrapper": (b"\x78\x9c" + LAYER[10:-8] + bytes(4), "not gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + LAYER, "not gzip"),
    "tar cut in a file": (gzip.compress(PLAIN[:5000]), "cut off.*etc/plain"),
    "tar cut in a header": (gzip.compress(PLAIN + PLAIN[:100]), "cut off.*etc/plain"),
    "tar with a gap": (gzip.compress(PLAIN + bytes(512) + PLAIN), "zero block"),
    "no tar": (gzip.compress(b"#!/bin/sh\n" * 1000), "checksum"),
    "checksum": (gzip.compress(PLAIN[:1536] + b"y" + PLAIN[1537:] + PLAIN[:100] + b"y" + PLAIN[101:]), "checksum"),
    "size negative": (gzip.compress(with_size(b"\xff" * 12)), "odd-one.*size is -1"),
    "size no number": (gzip.compress(with_size(b"many\0\0\0\0\0\0\0\0")), "size is b'many'"),
    "size over 64 bits": (gzip.compress(with_size(b"\x80" + b"\xff" * 11)), "size does not fit"),
    "size beyond the end": (gzip.compress(with_size(b"00000100000\0")), "cut off.*odd-one"),
    "size negative in PAX": (gzip.compress(with_records(record(b"size", b"-5"))), "odd-one.*size is -5"),
    "NUL in a name": (gzip.compress(with_records(record(b"path", b"a\0b"))), "NUL in b'path'"),
    "NUL in a key": (gzip.compress(with_records(record(b"a\0b", b"c"))), "NUL in"),
    "time": (gzip.compress(with_records(record(b"mtime", b"noon"))), "mtime is b'noon'"),
    "record length": (gzip.compress(with_records(b"99 path=x\n")), "malformed record"),
}  # fmt: skip


@pytest.mark.parametrize("step", [1 << 20, 700])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_layer_is_an_integrity_error(name: str, step: int) -> None:
    """What containerd could not unpack either is Integrity, in one line that says what is wrong where."""
    layer, message = DAMAGED[name]
    error = refusal(layer, step=step)
    assert isinstance(error, Integrity)
    assert re.search(message, str(error)), error


def test_the_wrong_layer_is_an_integrity_error() -> None:
    """Bytes that are not the digest's are refused even if they make a sound layer."""
    wanted = digest.sha256(b"another")
    with pytest.raises(Integrity, match=str(wanted)):
        build_ztoc([LAYER], compression=Compression.GZIP, build_tool="tests", expected=wanted)


def _incomplete_pax() -> bytes:
    """A PAX header for an entry that never comes."""
    whole = encode(Member(b"x", "reg", others=((b"k", b"v"),)))
    return PLAIN + whole[:1024]


SURVIVED: dict[str, tuple[bytes, bytes]] = {
    "zeros behind": (LAYER + bytes(5000), PLAIN + END),
    "one zero behind": (LAYER + bytes(1), PLAIN + END),
    "empty members": (members(PLAIN + END, [0, 0, 700, 700, 700], Deflate(), Header()), PLAIN + END),
    "only empty members": (members(b"", [0, 0], Deflate(), Header()), b""),
    "empty members and zeros": (members(b"", [0], Deflate(level=0), Header()) + bytes(99), b""),
    "no end blocks": (gzip.compress(PLAIN), PLAIN),
    "no padding": (gzip.compress(PLAIN[: 1024 + 9000 - 512]), PLAIN[: 1024 + 9000 - 512]),
    "one end block": (gzip.compress(PLAIN + bytes(512)), PLAIN + bytes(512)),
    "something behind the end": (gzip.compress(PLAIN + END + b"junk" * 9), PLAIN + END + b"junk" * 9),
    "no entries": (gzip.compress(END), END),
    "a PAX header for nothing": (gzip.compress(_incomplete_pax()), _incomplete_pax()),
}


@pytest.mark.parametrize("step", [1 << 20, 700])
@pytest.mark.parametrize("name", SURVIVED)
def test_an_odd_layer_is_indexed(name: str, step: int) -> None:
    """What tar and gzip read is indexed, where other tools give up on zeros, and reads back."""
    layer, tar = SURVIVED[name]
    indexed = IndexedLayer(layer, span_size=4096, step=step)
    indexed.check(tar)
    if "padding" not in name and "nothing" not in name:  # tarfile wants whole blocks
        unpacked.check_files(indexed, tar)
    assert [each.name for each in indexed.ztoc.entries] == [b"etc/plain"] * (PLAIN[:512] in tar)


def test_a_layer_given_up_is_not_read_to_its_end() -> None:
    """What follows an entry that no index can describe is not asked of the source."""
    asked = []

    def chunks() -> Iterator[bytes]:
        yield named(b"7")
        for n in range(1000):
            asked.append(n)
            yield bytes(1 << 16)

    with pytest.raises(Unsupported, match="odd-one"):
        build_ztoc(chunks(), compression=Compression.UNCOMPRESSED, build_tool="tests")
    assert not asked
