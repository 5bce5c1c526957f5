"""Writing a ztoc, byte for byte as the Go tool's FlatBuffers builder would (FORMATS.md, 1, "Byte identity").

Such a builder works from the end of the file to its start, so every position here is a distance from the
END: an object "at" 40 begins 40 bytes before the file's last. Alignment counts from the end too, which is
why the padding of an entry depends only on where it lies modulo 8. The library's builder takes 26 us an
entry; packing a whole entry with one struct per (fields present, position modulo 8) takes 4.
"""

from __future__ import annotations

import struct
from array import array
from operator import itemgetter
from typing import TYPE_CHECKING, Final, Protocol

from soci_snapshotter.errors import Unsupported
from soci_snapshotter.formats.flatbuf import WIDTHS
from soci_snapshotter.formats.toc import FIELDS
from soci_snapshotter.formats.ztoc import Compression, Ztoc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

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

_MAX_CACHE: Final = 1 << 16
"""Strings that repeat are encoded once; a hostile layer may repeat none."""

_VECTOR_STEP: Final = 1 << 12
"""Elements of a vector made at once: each is an object for a moment."""

_record: Final = struct.Struct("<iII").pack
_RECORD_VTABLE: Final = struct.pack("<4H", 8, 12, 8, 4)
"""Xattr: two offsets, key added first and so the last in the table."""


class Stack(Protocol):
    """Where the parts of a file are kept while it is written, its last first: a list, or a file."""

    def append(self, data: bytes, /) -> None:
        """Keep one more."""

    def __reversed__(self) -> Iterator[bytes]:
        """What was kept, the file's first part first."""


def encode(ztoc: Ztoc) -> bytes:
    """The file. Unsupported when it would exceed FlatBuffers' 2 GiB."""
    blob = ztoc.checkpoints
    return b"".join(encode_pieces(ztoc, [ztoc.entries], len(blob), (blob,), [])[1])


def encode_pieces(
    ztoc: Ztoc,
    batches: Iterable[Sequence[Entry]],
    checkpoints_size: int,
    checkpoints: Iterable[bytes | memoryview],
    stack: Stack,
) -> tuple[int, Iterator[bytes | memoryview]]:
    """The file's size in bytes, and its pieces in order, for a ztoc that is too large for the memory.

    Instead of its own `entries`, those of `batches`, the last batch first, each in the tar's order; instead of
    its own `checkpoints`, so many bytes that are asked for when the pieces before them were taken. `stack`
    holds what was encoded of each batch. Unsupported when the file would exceed FlatBuffers' 2 GiB.
    """
    out = _Builder()
    version = out.string(ztoc.version.encode())
    tool = out.string(ztoc.build_tool.encode())
    places = array("I")  # last first
    chunks: dict[bytes | str, bytes] = {}
    layouts: dict[tuple[bool | int, ...], _Layout] = {}
    for entries in batches:
        _write_entries(out, entries, places, chunks, layouts)
        out.move_to(stack)
        if len(chunks) > _MAX_CACHE:
            chunks.clear()
    places.reverse()
    metadata = out.vector(places)
    toc = out.table(1, [(0, "I", metadata)])
    out.align(4, checkpoints_size)
    out.move_to(stack)
    behind = out.size  # of what is on the stack
    out.size += checkpoints_size
    blob = out.put(_u32(checkpoints_size))
    digests = out.vector([out.string(d.encode()) for d in ztoc.span_digests])
    info = out.table(
        4,
        [
            (1, "i", ztoc.max_span_id),
            (2, "I", digests),
            (3, "I", blob),
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
    head = out.finish(root)
    return out.size, _in_order(head, checkpoints, out.size - len(head) - behind, stack)


def _in_order(
    head: bytes, checkpoints: Iterable[bytes | memoryview], size: int, stack: Stack
) -> Iterator[bytes | memoryview]:
    yield head
    for piece in checkpoints:
        size -= len(piece)
        yield piece
    if size:
        raise ValueError(f"the checkpoints differ from their size by {size} bytes")
    yield from reversed(stack)


def encode_tarinfo(span_size: int, size: int) -> bytes:
    """The checkpoints of an uncompressed layer of `size` bytes: a TarZinfo, a FlatBuffer of its own
    (FORMATS.md, 3).
    """
    out = _Builder()
    return out.finish(out.table(3, [(0, "i", 2), (1, "q", span_size), (2, "q", size)]))


class _Builder:
    """What is written so far, last part first; `size` is its length in bytes, with what was moved elsewhere."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.size = 0
        self.vtables: dict[bytes, int] = {}

    def put(self, data: bytes) -> int:
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

    def move_to(self, stack: Stack) -> None:
        """Put on `stack`, as one, what is here."""
        stack.append(b"".join(reversed(self.parts)))
        self.parts.clear()

    def vector(self, targets: Sequence[int]) -> int:
        """A vector of offsets to what is at `targets`."""
        self.align(4)
        first = self.size + 4 * len(targets)
        packed = []
        for start in range(0, len(targets), _VECTOR_STEP):
            step = targets[start : start + _VECTOR_STEP]
            packed.append(
                struct.pack(f"<{len(step)}I", *[first - 4 * i - at for i, at in enumerate(step, start)])
            )
        self.put(b"".join(packed))
        return self.put(_u32(len(targets)))

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
        """What is here, after the way to `root`: the file, but for what was moved elsewhere."""
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


def _write_entries(
    out: _Builder,
    entries: Sequence[Entry],
    places: array[int],
    chunks: dict[bytes | str, bytes],
    layouts: dict[tuple[bool | int, ...], _Layout],
) -> None:
    """A batch of entries, last first; where their tables begin goes to `places`. `chunks` and `layouts` are
    what earlier batches had in common with it.
    """
    put, known, size, empty, place = out.parts.append, chunks.get, out.size, bytes(4), places.append
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
            parts = [c0, c1, c2, c3, c4, c5]
            a6 = size = _write_records(out, a5, parts, records, chunks)
            strings = b"".join(reversed(parts))
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
            place(size)
        else:
            vtable = layout.vtable
            table = layout.pack(len(vtable), *layout.pick(fields))
            put(vtable + table + strings)
            place(size)
            size += len(vtable)
            out.vtables[vtable] = layout.vtable_at = size
    out.size = size


def _chunk(text: bytes) -> bytes:
    n = len(text)
    return _u32(n) + text + _PADS[n & 3]


def _write_records(
    out: _Builder,
    size: int,
    parts: list[bytes],
    records: Sequence[tuple[bytes, bytes]],
    chunks: dict[bytes | str, bytes],
) -> int:
    """Add an entry's records and their vector to `parts`, of which the last so far is at `size`; returns
    where that vector begins.
    """
    vtable = out.vtables.get(_RECORD_VTABLE, 0)
    targets = []
    for key, value in records:
        k = chunks.get(key) or chunks.setdefault(key, _chunk(key))
        v = _chunk(value)
        here = size + len(k) + len(v) + 12
        way = vtable - here if vtable else len(_RECORD_VTABLE)
        parts += (k, v, _record(way, 8, len(v) + 4))
        targets.append(here)
        size = here
        if not vtable:
            parts.append(_RECORD_VTABLE)
            size += len(_RECORD_VTABLE)
            vtable = out.vtables[_RECORD_VTABLE] = size
    n = len(targets)
    first = size + 4 * n
    parts.append(struct.pack(f"<{n + 1}I", n, *[first - 4 * i - at for i, at in enumerate(targets)]))
    return first + 4
