"""The ELF parser: real files of this machine as readelf sees them, both classes and byte orders, hostile ones."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.elf_support import made, reader

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import elf
from soci_snapshotter.formats.elf import Elf


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_classes_and_byte_orders(bits: int, order: str) -> None:
    """The same file in each of the four forms gives the same values; entries after DT_NULL do not count."""
    assert elf.parse(reader(made(bits, order))) == Elf(
        bits=bits,
        little_endian=order == "<",
        machine=21,
        interpreter=b"/lib/ld.so.1",
        needed=(b"libc.so.6", b"libm.so.6"),
        soname=b"me.so",
        rpath=b"/old",
        runpath=b"$ORIGIN/../lib",
    )


def programs() -> list[Path]:
    """Real ELF files: this Python, a shell, ls, extension modules and libraries Python has mapped."""
    found = {Path(sys.executable).resolve(), Path("/bin/sh").resolve(), Path("/bin/ls").resolve()}
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if ".so" in path.name and path.is_file():
            found.add(path.resolve())
    return sorted(found)[:40]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_real_files_as_readelf_sees_them() -> None:
    """Interpreter, needed libraries, soname and runpath of real files equal what binutils prints."""
    for path in programs():
        found = elf.parse(reader(path.read_bytes()))
        command = ["readelf", "-W", "-l", "-d", path]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={"LC_ALL": "C"})
        text = done.stdout
        assert [name.decode() for name in found.needed] == re.findall(r"\(NEEDED\).*\[(.*)\]", text), path
        for field, value in [("SONAME", found.soname), ("RPATH", found.rpath), ("RUNPATH", found.runpath)]:
            assert re.findall(rf"\({field}\).*\[(.*)\]", text) == ([value.decode()] if value else []), path
        asked = re.findall(r"program interpreter: (.*)\]", text)
        assert asked == ([found.interpreter.decode()] if found.interpreter else []), path


@pytest.mark.parametrize("bits", [32, 64])
def test_a_file_cut_anywhere_is_refused(bits: int) -> None:
    """Truncated at every offset it is Integrity, never another exception and never a value."""
    data = made(bits, "<")
    needed = len(data) - 2 * (bits // 4)  # the last pair follows DT_NULL, whose own bytes all count
    for size in range(len(data)):
        if size <= needed + bits // 4 - 1:
            with pytest.raises(Integrity, match="ELF"):
                elf.parse(reader(data[:size]))
        else:
            elf.parse(reader(data[:size]))


def test_a_real_file_cut_anywhere_does_no_harm() -> None:
    """The first pages of ls, cut at every offset that the parser looks at."""
    data = Path("/bin/ls").read_bytes()
    cuts = [*range(1200), *range(1200, len(data), 997)]
    for size in cuts:
        try:
            elf.parse(reader(data[:size]))
        except Integrity as error:
            assert "ELF" in str(error)


@given(
    st.sampled_from([(32, "<"), (32, ">"), (64, "<"), (64, ">")]),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=6),
)
def test_changed_bytes_do_no_harm(form: tuple[int, str], changes: list[tuple[int, int]]) -> None:
    """Bytes changed at random give Integrity or bounded values, and no read outside the bounds."""
    data = bytearray(made(*form))
    for at, value in changes:
        data[at % len(data)] = value
    try:
        found = elf.parse(reader(bytes(data)))
    except Integrity:
        return
    assert all(len(name) < elf.MAX_STRING for name in (*found.needed, found.interpreter, found.runpath))


@given(st.binary(max_size=200))
def test_any_bytes_after_the_magic_do_no_harm(tail: bytes) -> None:
    """Noise that begins as an ELF file is refused or harmless."""
    try:
        elf.parse(reader(b"\x7fELF" + tail))
    except Integrity as error:
        assert "ELF" in str(error)


def test_what_is_beyond_its_bound_is_named() -> None:
    """An endless dynamic section, a path without end, and no ELF file at all: each says what is wrong."""
    with pytest.raises(Integrity, match="does not begin as one"):
        elf.parse(reader(b"#!/bin/sh\n"))
    with pytest.raises(Integrity, match="does not begin as one"):
        elf.parse(reader(b""))
    with pytest.raises(Integrity, match="interpreter's path has"):
        elf.parse(reader(made(64, "<", interpreter=b"/" * 5000)))
    with pytest.raises(Integrity, match="does not end within"):
        elf.parse(reader(made(64, "<", runpath=b"/" * 5000)))
    endless = made(64, "<")
    at = struct.unpack_from("<Q", endless, 64 + 2 * 56 + 8)[0]
    flood = bytearray(endless[:at] + struct.pack("<qQ", 1, 1) * 5000)
    struct.pack_into("<Q", flood, 64 + 2 * 56 + 32, 16 * 5000)
    with pytest.raises(Integrity, match="more than 4096 entries"):
        elf.parse(reader(bytes(flood)))
