"""Every kind of gzip that layers come in, made by the programs and libraries that make them.

A program that is missing is an error, not a layer less: scripts/install-deps brings all of them.
"""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Final

from isal import igzip
from zlib_ng import gzip_ng

from harness.gobuild import build_go

FTEXT, FHCRC, FEXTRA, FNAME, FCOMMENT = 1, 2, 4, 8, 16
"""Flags of a gzip header (RFC 1952)."""


@dataclass(frozen=True, slots=True)
class Header:
    """A gzip header's optional fields; None leaves one out."""

    name: bytes | None = None
    comment: bytes | None = None
    extra: bytes | None = None
    crc: bool = False
    text: bool = False

    def encode(self) -> bytes:
        """10 bytes and the fields."""
        flags = FTEXT * self.text | FHCRC * self.crc
        fields = b""
        if self.extra is not None:
            flags |= FEXTRA
            fields += len(self.extra).to_bytes(2, "little") + self.extra
        if self.name is not None:
            flags |= FNAME
            fields += self.name + b"\0"
        if self.comment is not None:
            flags |= FCOMMENT
            fields += self.comment + b"\0"
        header = b"\x1f\x8b\x08" + bytes([flags]) + b"\x2a\0\0\0\0\x03" + fields
        return header + ((zlib.crc32(header) & 0xFFFF).to_bytes(2, "little") if self.crc else b"")


@dataclass(frozen=True, slots=True)
class Deflate:
    """How zlib compresses a member: its parameters, and a flush (a zlib constant) after each `step` bytes."""

    level: int = 6
    strategy: int = zlib.Z_DEFAULT_STRATEGY
    memory: int = 8
    window: int = 15
    flush: int | None = None
    step: int = 1 << 62


def member(data: bytes, how: Deflate, header: Header) -> bytes:
    """One gzip member."""
    deflate = zlib.compressobj(how.level, zlib.DEFLATED, -how.window, how.memory, how.strategy)
    out = [header.encode()]
    for start in range(0, len(data), how.step):
        out.append(deflate.compress(data[start : start + how.step]))
        if how.flush is not None:
            out.append(deflate.flush(how.flush))
    out.append(deflate.flush())
    out.append(zlib.crc32(data).to_bytes(4, "little") + (len(data) & 0xFFFFFFFF).to_bytes(4, "little"))
    return b"".join(out)


def members(data: bytes, cuts: Sequence[int], how: Deflate, header: Header) -> bytes:
    """`data` in several members, cut at these offsets; equal ones make empty members."""
    edges = [0, *cuts, len(data)]
    return b"".join(member(data[start:end], how, header) for start, end in pairwise(edges))


def through(*command: str) -> Callable[[bytes], bytes]:
    """A program from standard input to standard output; CalledProcessError if it fails."""
    return lambda data: subprocess.run(command, input=data, capture_output=True, check=True).stdout


@cache
def gotools() -> Path:
    """harness/gotools, built."""
    return build_go("gotools")


def through_go(*arguments: str) -> Callable[[bytes], bytes]:
    """The same for harness/gotools."""
    return lambda data: through(str(gotools()), *arguments)(data)  # noqa: PLW0108 -- built when first used


def zopfli(data: bytes) -> bytes:
    """zopfli reads no pipe. One iteration: its blocks are as they are with fifteen, its time is not."""
    return through(
        "sh", "-c", 'd=$(mktemp -d) && cat >"$d/t" && zopfli --i1 -c "$d/t"; s=$?; rm -r "$d"; exit $s'
    )(data)


PROGRAMS: Final[dict[str, Callable[[bytes], bytes]]] = {
    "gzip-1": through("gzip", "-1", "-n"),
    "gzip-6": through("gzip", "-6", "-n"),
    "gzip-9": through("gzip", "-9", "-n"),
    "gzip-rsyncable": through("gzip", "--rsyncable"),
    "pigz": through("pigz", "-p2"),
    "pigz-independent": through("pigz", "-p2", "-i"),
    "pigz-small-blocks": through("pigz", "-p2", "-b", "32", "-9"),
    "pigz-stored": through("pigz", "-p2", "-0"),
    "bgzip": through("bgzip", "-c"),
    "igzip-0": through("igzip", "-0", "-c"),
    "igzip-3": through("igzip", "-3", "-c"),
    "zopfli": zopfli,
    "go": through_go("gzip", "-1"),
    "go-fastest": through_go("gzip", "1"),
    "go-huffman": through_go("gzip", "-2"),
    "pgzip": through_go("pgzip", "-1"),
}
"""Compressors that keep the tar as it is."""

LIBRARIES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "isal-0": lambda data: igzip.compress(data, 0),
    "isal-3": lambda data: igzip.compress(data, 3),
    "zlib-ng-1": lambda data: gzip_ng.compress(data, 1),
    "zlib-ng-9": lambda data: gzip_ng.compress(data, 9),
}
"""The same in this process: some milliseconds less each time."""


def estargz(data: bytes, chunk: int = 1 << 20) -> bytes:
    """The tar as an eStargz layer: a member for each file or `chunk` bytes, its own entries added."""
    return through_go("estargz", str(chunk))(data)
