"""What an ELF file asks the loader for: its interpreter, the libraries it needs, where to look for them.

Layouts from the System V gABI (elf.h): file header, program headers, dynamic section. Section headers are not
looked at; the loader does not either. The file is somebody else's: sizes are bounded, and whatever lies outside
it is Integrity.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

from soci_snapshotter.errors import Integrity

MAGIC: Final = b"\x7fELF"

ReadAt: TypeAlias = Callable[[int, int], bytes]
"""(offset, size) -> the file's bytes there; fewer than `size` only where the file ends."""

MAX_HEADERS: Final = 65536
"""Bytes of program headers: Linux runs nothing with more (fs/binfmt_elf.c)."""

MAX_DYNAMIC: Final = 4096
"""Entries of a dynamic section. Real ones have some 30 and one for each library; 300 is a lot."""

MAX_STRING: Final = 4096
"""Bytes of a path or list of paths: PATH_MAX, which the kernel holds an interpreter to."""

MAX_STRINGS: Final = 1 << 20
"""Bytes of all strings of one file together: MAX_DYNAMIC libraries with names of 255 bytes."""

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH = 0, 1, 5, 10, 14, 15, 29
_WANTED: Final = frozenset({_DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_SONAME, _DT_RPATH, _DT_RUNPATH})


@dataclass(frozen=True, slots=True)
class Elf:
    """One file. `machine` as in e_machine; `interpreter` and `soname` b"" for none; `rpath` and `runpath` as
    they stand there, colons and $ORIGIN and all.
    """

    bits: int
    little_endian: bool
    machine: int
    interpreter: bytes
    needed: tuple[bytes, ...]
    soname: bytes
    rpath: bytes
    runpath: bytes

    def loads(self, other: Elf) -> bool:
        """Whether `other` is for the same kind of process; the loader passes over what is not."""
        return (self.bits, self.little_endian, self.machine) == (
            other.bits,
            other.little_endian,
            other.machine,
        )


class _Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


class _Layout(NamedTuple):
    """The fields used, of one class. Program headers: their struct, and where kind, offset, address, size are."""

    header: str
    program: str
    places: tuple[int, int, int, int]
    dynamic: str


# After e_ident's 16 bytes: e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize,
# e_phentsize, e_phnum. The two classes order a program header's fields differently.
_LAYOUTS: Final = {
    1: _Layout("HHIIIIIHHH", "IIIIIIII", (0, 1, 2, 4), "iI"),
    2: _Layout("HHIQQQIHHH", "IIQQQQQQ", (0, 2, 3, 5), "qQ"),
}


def parse(read: ReadAt) -> Elf:
    """Read what the loader would of the file behind `read`. Integrity when it is no ELF file, or broken."""
    read = _bounded(read)
    head = read(0, 64)
    if head[:4] != MAGIC:
        raise Integrity("ELF: the file does not begin as one")
    if len(head) < 7 or head[4] not in _LAYOUTS or head[5] not in (1, 2) or head[6] != 1:
        raise Integrity(f"ELF: class, byte order or version {head[4:7]!r} is unknown")
    layout, order = _LAYOUTS[head[4]], "<" if head[5] == 1 else ">"
    header = struct.Struct(order + layout.header)
    if len(head) < 16 + header.size:
        raise Integrity("ELF: the file ends within its header")
    _, machine, _, _, table, _, _, _, stride, count = header.unpack_from(head, 16)
    segments = _segments(read, order, layout, table, stride, count)
    strings: dict[int, list[bytes]] = {}
    for segment in segments:
        if segment.kind == _PT_DYNAMIC:
            strings = _dynamic(read, struct.Struct(order + layout.dynamic), segment, segments)
            break
    return Elf(
        bits=32 * head[4],
        little_endian=head[5] == 1,
        machine=machine,
        interpreter=_interpreter(read, segments),
        needed=tuple(strings.get(_DT_NEEDED, ())),
        soname=_last(strings, _DT_SONAME),
        rpath=_last(strings, _DT_RPATH),
        runpath=_last(strings, _DT_RUNPATH),
    )


def _bounded(read: ReadAt) -> ReadAt:
    """`read`, never asked for an offset that a file cannot have, nor believed to have read too much."""

    def bounded(offset: int, size: int) -> bytes:
        return read(offset, size)[:size] if offset + size < 2**63 else b""

    return bounded


def _segments(
    read: ReadAt, order: str, layout: _Layout, table: int, stride: int, count: int
) -> list[_Segment]:
    program = struct.Struct(order + layout.program)
    if not count:
        return []  # an object file: nothing to load
    if stride != program.size:
        raise Integrity(f"ELF: program headers of {stride} bytes, not {program.size}")
    if count * stride > MAX_HEADERS:
        raise Integrity(f"ELF: {count} program headers, more than {MAX_HEADERS // stride}")
    data = _exactly(read, table, count * stride, "program headers")
    return [_Segment(*(fields[place] for place in layout.places)) for fields in program.iter_unpack(data)]


def _interpreter(read: ReadAt, segments: list[_Segment]) -> bytes:
    for segment in segments:
        if segment.kind == _PT_INTERP:
            if not 2 <= segment.size <= MAX_STRING:
                raise Integrity(f"ELF: the interpreter's path has {segment.size} bytes")
            path, end, _ = _exactly(read, segment.offset, segment.size, "interpreter").partition(b"\0")
            if not path or not end:
                raise Integrity("ELF: the interpreter's path is empty or does not end")
            return path
    return b""


def _dynamic(
    read: ReadAt, pair: struct.Struct, segment: _Segment, segments: list[_Segment]
) -> dict[int, list[bytes]]:
    """The strings of the dynamic section by tag, in its order."""
    data = read(segment.offset, min(segment.size, (MAX_DYNAMIC + 1) * pair.size))
    found: dict[int, list[int]] = {}
    for number, (tag, value) in enumerate(pair.iter_unpack(data[: len(data) // pair.size * pair.size])):
        if tag == _DT_NULL:
            break
        if number == MAX_DYNAMIC:
            raise Integrity(f"ELF: the dynamic section has more than {MAX_DYNAMIC} entries")
        if tag in _WANTED:
            found.setdefault(tag, []).append(value)
    else:
        raise Integrity("ELF: the dynamic section does not end")
    addresses, sizes = found.pop(_DT_STRTAB, []), found.pop(_DT_STRSZ, [])
    if not found:
        return {}
    if not addresses or not sizes:
        raise Integrity("ELF: the dynamic section has no string table")
    start, size = _in_file(addresses[-1], segments), sizes[-1]
    known: dict[int, bytes] = {}
    spent = 0
    for place in (place for places in found.values() for place in places):
        if place not in known:
            known[place] = _string(read, start, size, place)
            spent += len(known[place])
            if spent > MAX_STRINGS:
                raise Integrity(f"ELF: names of more than {MAX_STRINGS} bytes")
    return {tag: [known[place] for place in places] for tag, places in found.items()}


def _in_file(address: int, segments: list[_Segment]) -> int:
    """Where in the file the byte is that the loader maps at `address`."""
    for segment in segments:
        if segment.kind == _PT_LOAD and 0 <= address - segment.address < segment.size:
            return segment.offset + address - segment.address
    raise Integrity(f"ELF: the string table's address {address:#x} is in no segment")


def _string(read: ReadAt, start: int, size: int, place: int) -> bytes:
    if place >= size:
        raise Integrity(f"ELF: a name at {place} of a string table of {size} bytes")
    text, end, _ = read(start + place, min(size - place, MAX_STRING)).partition(b"\0")
    if not end:
        raise Integrity(f"ELF: a name at {place} of the string table does not end within {MAX_STRING} bytes")
    return text


def _exactly(read: ReadAt, offset: int, size: int, what: str) -> bytes:
    data = read(offset, size)
    if len(data) != size:
        raise Integrity(f"ELF: the {what} at {offset} lie outside the file")
    return data


def _last(strings: dict[int, list[bytes]], tag: int) -> bytes:
    return strings[tag][-1] if tag in strings else b""
