"""Reading one FlatBuffer that a stranger wrote: every access checked, every refusal naming the field.

FlatBuffers in brief: a table starts with the signed distance back to its vtable; the vtable lists its own
size, the table's size, and for each field its place in the table (0: absent, the default holds); strings,
vectors and tables are reached by unsigned distances from the field that names them. All little endian.
"""

from __future__ import annotations

import struct
from typing import Final

from soci_snapshotter.errors import Integrity

MAX_STRING: Final = 1 << 20
"""Bytes: tar readers refuse a PAX or GNU long-name block over 1 MiB, so no ztoc's builder saw a longer
string."""

u32: Final = struct.Struct("<I").unpack_from
i32: Final = struct.Struct("<i").unpack_from

WIDTHS: Final = {"I": 4, "q": 8, "i": 4, "b": 1}
"""Bytes per struct letter."""


def read_string(data: memoryview, at: int, field: str, *, limit: int = MAX_STRING) -> bytes:
    """The FlatBuffers string at `at`: u32 length, bytes. Integrity if it leaves the buffer or exceeds
    `limit` bytes.
    """
    if not 0 <= at <= len(data) - 4:
        raise Integrity(f"ztoc: {field} points outside the file")
    size = u32(data, at)[0]
    if size > limit:
        raise Integrity(f"ztoc: {field} has {size} bytes, more than {limit}")
    if at + 4 + size > len(data):
        raise Integrity(f"ztoc: {field} ends outside the file")
    return bytes(data[at + 4 : at + 4 + size])


class Table:
    """One FlatBuffers table, every access checked. Slow and exact: for the few tables that are not
    entries.
    """

    __slots__ = ("_places", "_size", "data", "name", "pos")

    def __init__(self, data: memoryview, pos: int, name: str) -> None:
        """The table at byte `pos`; `name` is for messages. Integrity when it or its vtable leaves the
        buffer.
        """
        self.data, self.pos, self.name = data, pos, name
        if not 0 <= pos <= len(data) - 4:
            raise Integrity(f"ztoc: {name} points outside the file")
        vtable = pos - i32(data, pos)[0]
        if not 0 <= vtable <= len(data) - 4:
            raise Integrity(f"ztoc: the vtable of {name} lies outside the file")
        size, self._size = struct.unpack_from("<HH", data, vtable)
        if size < 4 or size % 2 or vtable + size > len(data):
            raise Integrity(f"ztoc: the vtable of {name} has an impossible size ({size})")
        if self._size < 4 or pos + self._size > len(data):
            raise Integrity(f"ztoc: the table {name} has an impossible size ({self._size})")
        self._places = struct.unpack_from(f"<{size // 2 - 2}H", data, vtable + 4)

    def where(self, index: int, width: int, field: str) -> int:
        """Position in the buffer of field `index`, which is `width` bytes wide; 0 if the field is absent."""
        place = self._places[index] if index < len(self._places) else 0
        if place == 0:
            return 0
        if place < 4 or place + width > self._size:
            raise Integrity(f"ztoc: {field} lies outside its table {self.name}")
        return self.pos + int(place)

    def scalar(self, index: int, code: str, field: str, *, default: int = 0) -> int:
        """An integer field; `code` is its struct letter."""
        at = self.where(index, WIDTHS[code], field)
        return int(struct.unpack_from("<" + code, self.data, at)[0]) if at else default

    def table(self, index: int, field: str) -> Table:
        """A table field, which must be there."""
        return Table(self.data, self._target(index, field), field)

    def vector(self, index: int, width: int, field: str) -> tuple[int, int]:
        """A vector field as (position of its first element, number of elements of `width` bytes); (0, 0) if
        absent.
        """
        if not self.where(index, 4, field):
            return 0, 0
        at = self._target(index, field)
        count = u32(self.data, at)[0]
        if at + 4 + count * width > len(self.data):
            raise Integrity(f"ztoc: {field} claims {count} elements and ends outside the file")
        return at + 4, int(count)

    def string(self, index: int, field: str) -> bytes:
        """A string field; an absent one is empty."""
        return (
            read_string(self.data, self._target(index, field), field) if self.where(index, 4, field) else b""
        )

    def text(self, index: int, field: str) -> str:
        """A string field that must be UTF-8."""
        try:
            return self.string(index, field).decode()
        except UnicodeDecodeError:
            raise Integrity(f"ztoc: {field} is not UTF-8") from None

    def _target(self, index: int, field: str) -> int:
        at = self.where(index, 4, field)
        if not at:
            raise Integrity(f"ztoc: {field} is missing")
        target = at + u32(self.data, at)[0]
        if target > len(self.data) - 4:
            raise Integrity(f"ztoc: {field} points outside the file")
        return int(target)
