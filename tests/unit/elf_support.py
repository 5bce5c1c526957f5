"""Small ELF files by hand, for what no compiler of this machine makes: other classes, byte orders, loaders."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from soci_snapshotter.formats.elf import ReadAt


def reader(data: bytes) -> ReadAt:
    """Read `data` as the parser wants to."""

    def read(offset: int, size: int) -> bytes:
        assert 0 <= offset < 2**63 and 0 <= size <= 1 << 20, "every read is one that a file can answer"
        return data[offset : offset + size]

    return read


def made(
    bits: int = 64,
    order: str = "<",
    *,
    machine: int = 21,
    interpreter: bytes = b"/lib/ld.so.1",
    needed: Sequence[bytes] = (b"libc.so.6", b"libm.so.6"),
    soname: bytes = b"me.so",
    runpath: bytes = b"$ORIGIN/../lib",
    rpath: bytes = b"/old",
) -> bytes:
    """An ELF file: headers (interpreter, load, dynamic), the interpreter, strings, a dynamic section with two
    words after its end; mapped 4096 up.
    """
    strings = b"\0"
    tags: list[tuple[int, int]] = []
    for tag, text in [*((1, name) for name in needed), (14, soname), (29, runpath), (15, rpath)]:
        if text:
            tags.append((tag, len(strings)))
            strings += text + b"\0"
    ehdr, phdr, pair = ("HHIQQQIHHHHHH", 56, "qQ") if bits == 64 else ("HHIIIIIHHHHHH", 32, "iI")
    head = 16 + struct.calcsize(order + ehdr)
    at_interpreter = head + 3 * phdr
    at_strings = at_interpreter + len(interpreter) + 1
    at_dynamic = at_strings + len(strings)
    tags += [(5, 4096 + at_strings), (10, len(strings)), (0, 0), (1, 9999)]
    dynamic = b"".join(struct.pack(order + pair, *tag) for tag in tags)
    total = at_dynamic + len(dynamic)

    def segment(kind: int, offset: int, size: int) -> bytes:
        if bits == 64:
            return struct.pack(order + "IIQQQQQQ", kind, 4, offset, 4096 + offset, 0, size, size, 8)
        return struct.pack(order + "IIIIIIII", kind, offset, 4096 + offset, 0, size, size, 4, 4)

    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    header = struct.pack(order + ehdr, 3, machine, 1, 0, head, 0, 0, head, phdr, 3, 0, 0, 0)
    segments = segment(3 if interpreter else 0, at_interpreter, len(interpreter) + 1) + segment(1, 0, total)
    segments += segment(2, at_dynamic, len(dynamic))
    return ident + header + segments + interpreter + b"\0" + strings + dynamic
