"""Writing a ztoc, byte for byte as the Go tool's FlatBuffers builder would (FORMATS.md, 1, "Byte identity").

Such a builder works from the end of the file to its start, so every position here is a distance from the
END: an object "at" 40 begins 40 bytes before the file's last. Alignment counts from the end too, which is
why the padding of an entry depends only on where it lies modulo 8. The library's builder takes 26 us an
entry; packing a whole entry with one struct per (fields present, position modulo 8) takes 4.
"""

from __future__ import annotations

import struct
from operator import itemgetter
from typing import TYPE_CHECKING, Final

from soci_snapshotter.errors import Unsupported
from soci_snapshotter.formats.flatbuf import WIDTHS
from soci_snapshotter.formats.toc import FIELDS
from soci_snapshotter.formats.ztoc import Compression, Ztoc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from soci_snapshotter.formats.ztoc import Entry

MAX_SIZE: Final = (1 << 31) - 1
"""Bytes: a vtable's distance is a signed 32-bit number."""

_u32: Final = struct.Struct("<I").pack
_PADS: Final = (bytes(4), bytes(3), bytes(2), bytes(1))
"""What follows a string of length n: at least one zero, up to a multiple of 4; by n modulo 4."""

_OFFSETS: Final = (0, 1, 4, 8, 9, 10, 13)
"""FileMetadata's fields that are offsets, and so always present."""

_SCALARS: Final = (2, 3, 5, 6, 7, 11, 12)
"""Its other fields, left out when 0."""

_NOTHING: Final = bytes(8)
"""An empty string."""

_pair: Final = struct.Struct("<II").pack
_RECORD_VTABLE: Final = struct.pack("<4H", 8, 12, 8, 4)
"""Xattr: two offsets, key added first and so the last in the table."""


def encode(ztoc: Ztoc) -> bytes:
    """The file. Unsupported when it would exceed FlatBuffers' 2 GiB."""
    out = _Builder()
    version = out.string(ztoc.version.encode())
    tool = out.string(ztoc.build_tool.encode())
    places = _write_entries(out, ztoc.entries)
    metadata = out.vector(places)
    toc = out.table(1, [(0, "I", metadata)])
    checkpoints = out.blob(ztoc.checkpoints)
    digests = out.vector([out.string(d.encode()) for d in ztoc.span_digests])
    info = out.table(
        4,
        [
            (1, "i", ztoc.max_span_id),
            (2, "I", digests),
            (3, "I", checkpoints),
            (0, "b", 0 if ztoc.compression is Compression.GZIP else ztoc.compression),
        ],
    )
    root = out.table(
        6,
        [
            (0, "I", version),
            (1, "I", tool),
            (4, "I", toc),
            (2, "q", ztoc.compressed_size),
            (3, "q", ztoc.uncompressed_size),
            (5, "I", info),
        ],
    )
    return out.finish(root)


def encode_tarinfo(span_size: int, size: int) -> bytes:
    """The checkpoints of an uncompressed layer of `size` bytes: a TarZinfo, a FlatBuffer of its own
    (FORMATS.md, 3).
    """
    out = _Builder()
    return out.finish(out.table(3, [(0, "i", 2), (1, "q", span_size), (2, "q", size)]))


class _Builder:
    """What is written so far, last part first; `size` is its length in bytes."""

    def __init__(self) -> None:
        self.parts: list[bytes | memoryview] = []
        self.size = 0
        self.vtables: dict[bytes, int] = {}

    def put(self, data: bytes | memoryview) -> int:
        """Put `data` before everything so far; returns where it begins."""
        self.parts.append(data)
        self.size += len(data)
        return self.size

    def align(self, width: int, extra: int = 0) -> None:
        """Pad so that what begins after `extra` more bytes is aligned to `width`."""
        if pad := -(self.size + extra) % width:
            self.put(bytes(pad))

    def string(self, text: bytes) -> int:
        """Length, bytes, a zero, padding."""
        self.align(4, len(text) + 1)
        return self.put(_u32(len(text)) + text + b"\0")

    def blob(self, data: bytes | memoryview) -> int:
        """A vector of bytes."""
        self.align(4, len(data))
        self.put(data)
        return self.put(_u32(len(data)))

    def vector(self, targets: Sequence[int]) -> int:
        """A vector of offsets to what is at `targets`."""
        self.align(4)
        n = len(targets)
        first = self.size + 4 * n
        self.put(struct.pack(f"<{n}I", *[first - 4 * i - target for i, target in enumerate(targets)]))
        return self.put(_u32(n))

    def table(self, fields: int, values: Iterable[tuple[int, str, int]]) -> int:
        """A table of `fields` fields; `values` (index, struct letter, value or target) in the order of
        adding.

        Values of 0 are left out: the default.
        """
        end = self.size
        places = [0] * fields
        for index, code, value in values:
            if value:
                self.align(WIDTHS[code])
                here = self.size + WIDTHS[code]
                self.put(struct.pack("<" + code, here - value if code == "I" else value))
                places[index] = here
        self.align(4)
        here = self.size + 4
        while places and not places[-1]:
            places.pop()
        vtable = struct.pack(
            f"<{len(places) + 2}H", 2 * len(places) + 4, here - end, *[p and here - p for p in places]
        )
        return self.start_table(vtable)

    def start_table(self, vtable: bytes) -> int:
        """The last (first) four bytes of a table: the way to its vtable, which is written before it if it is
        new.
        """
        here = self.size + 4
        known = self.vtables.get(vtable)
        if known is not None:
            return self.put(struct.pack("<i", known - here))
        self.vtables[vtable] = here + len(vtable)
        self.put(struct.pack("<i", len(vtable)))
        self.put(vtable)
        return here

    def finish(self, root: int) -> bytes:
        """The file: everything so far after the way to `root`."""
        self.align(8, 4)
        here = self.size + 4
        self.put(_u32(here - root))
        if self.size > MAX_SIZE:
            raise Unsupported(f"the ztoc would have {self.size} bytes; its format ends at {MAX_SIZE}")
        return b"".join(reversed(self.parts))


class _Layout:
    """FileMetadata with certain scalars present, ending at a certain position modulo 8."""

    __slots__ = ("pack", "pick", "rel", "size", "vtable", "vtable_at")

    def __init__(self, out: _Builder, absent: tuple[bool, ...], end: int) -> None:
        """`absent`: for each of _SCALARS, whether it is 0 and left out."""
        missing = {index for index, gone in zip(_SCALARS, absent, strict=True) if gone}
        present = [index for index in range(len(FIELDS)) if index not in missing]
        position = end
        begins = {}
        code = ""
        for index in present:
            letter = FIELDS[index][1]
            pad = -position % WIDTHS[letter]
            position += pad + WIDTHS[letter]
            begins[index] = position
            code = f"{letter}{pad}x{code}"
        pad = -position % 4
        here = position + pad + 4
        self.size = here - end
        self.pack: Callable[..., bytes] = struct.Struct(f"<i{pad}x{code}").pack
        self.pick = itemgetter(*reversed(present))
        self.rel = tuple(begins[index] - end for index in _OFFSETS)
        places = [here - begins[index] if index in begins else 0 for index in range(len(FIELDS))]
        self.vtable = struct.pack(f"<{len(places) + 2}H", 2 * len(places) + 4, self.size, *places)
        self.vtable_at = out.vtables.get(self.vtable, 0)  # 0: to be written


def _write_entries(out: _Builder, entries: Sequence[Entry]) -> list[int]:
    """All entries, last first; returns where their tables begin, first first."""
    chunks: dict[bytes | str, bytes] = {}
    layouts: dict[tuple[bool | int, ...], _Layout] = {}
    places = []
    put, known, size, empty = out.parts.append, chunks.get, out.size, bytes(4)
    for entry in reversed(entries):
        name, kind, offset, length, link, mode, uid, gid, user, group, time, major, minor, records = entry
        n = len(name)
        c0 = _u32(n) + name + _PADS[n & 3]
        c1 = known(kind) or chunks.setdefault(kind, _chunk(kind.encode()))
        c2 = _chunk(link) if link else _NOTHING
        c3 = known(user) or chunks.setdefault(user, _chunk(user))
        c4 = known(group) or chunks.setdefault(group, _chunk(group))
        c5 = known(time) or chunks.setdefault(time, _chunk(time.encode()))
        a0 = size + len(c0)
        a1 = a0 + len(c1)
        a2 = a1 + len(c2)
        a3 = a2 + len(c3)
        a4 = a3 + len(c4)
        a5 = a4 + len(c5)
        if records:
            put(b"".join((c5, c4, c3, c2, c1, c0)))
            out.size = a5
            a6 = size = _write_records(out, records)
            strings = b""
        else:
            strings = b"".join((empty, c5, c4, c3, c2, c1, c0))
            a6 = size = a5 + 4
        key = (not offset, not length, not mode, not uid, not gid, not major, not minor, size & 4)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = _Layout(out, key[:-1], size & 4)
        r0, r1, r2, r3, r4, r5, r6 = layout.rel
        fields = (
            *(size + r0 - a0, size + r1 - a1, offset, length, size + r2 - a2, mode, uid, gid),
            *(size + r3 - a3, size + r4 - a4, size + r5 - a5, major, minor, size + r6 - a6),
        )
        size += layout.size
        if layout.vtable_at:
            table = layout.pack(layout.vtable_at - size, *layout.pick(fields))
            put(table + strings)
            places.append(size)
        else:
            vtable = layout.vtable
            table = layout.pack(len(vtable), *layout.pick(fields))
            put(vtable + table + strings)
            places.append(size)
            size += len(vtable)
            out.vtables[vtable] = layout.vtable_at = size
    out.size = size
    places.reverse()
    return places


def _chunk(text: bytes) -> bytes:
    n = len(text)
    return _u32(n) + text + _PADS[n & 3]


def _write_records(out: _Builder, records: Sequence[tuple[bytes, bytes]]) -> int:
    """An entry's records and their vector; returns where that begins."""
    targets = []
    for key, value in records:
        k = out.put(_chunk(key))
        v = out.put(_chunk(value))
        out.put(_pair(8, v + 4 - k))
        targets.append(out.start_table(_RECORD_VTABLE))
    return out.vector(targets)
