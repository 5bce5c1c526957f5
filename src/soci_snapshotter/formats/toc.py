"""The table of contents in a ztoc: one entry per tar member (FORMATS.md, 1).

The FlatBuffers library reads 40 us an entry and checks nothing. Here each vtable met is compiled into one
`struct` and one permutation, which leaves 3 to 4 us, checks included. What the fast path cannot read is read
again, slowly: an unusual entry, or an error to be named.
"""

from __future__ import annotations

import re
import struct
from operator import itemgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats.flatbuf import MAX_STRING, WIDTHS, Table, i32, u32

if TYPE_CHECKING:
    from collections.abc import Callable
    from mmap import mmap
    from typing import TypeAlias

    Mapped: TypeAlias = bytes | mmap
    """What gives bytes when sliced."""

MAX_ENTRIES: Final = 1 << 21
"""A decoded entry takes about 700 bytes; the largest layers seen have some 500,000. Four times that."""

MAX_ARCHIVE_SIZE: Final = 512 << 32
"""Bytes (2 TiB): EROFS numbers a layer's 512-byte blocks with 32 bits, so nothing larger can be served."""

MAX_SHARING: Final = 4
"""Known builders share no strings, so what is decoded never exceeds the file. One that shared owner names,
types and times would reach twice the file's size; beyond four times it is an amplification."""

BLOCK: Final = 512
"""Bytes: a tar's unit; every header takes at least one, and data starts and is padded to one."""

_TYPES: Final = {t.encode(): t for t in ("reg", "dir", "symlink", "hardlink", "char", "block", "fifo")}
_TIME: Final = re.compile(
    rb"\d{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12]\d|3[01])T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d"
    rb"(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
)
# FileMetadata's fields in declaration order: name, and struct code ("I" for offsets of strings and vectors
# too).
FIELDS: Final = (
    ("name", "I"),
    ("type", "I"),
    ("uncompressed_offset", "q"),
    ("uncompressed_size", "q"),
    ("linkname", "I"),
    ("mode", "q"),
    ("uid", "I"),
    ("gid", "I"),
    ("uname", "I"),
    ("gname", "I"),
    ("mod_time", "I"),
    ("devmajor", "q"),
    ("devminor", "q"),
    ("xattrs", "I"),
)
_STRINGS: Final = (0, 1, 4, 8, 9, 10)  # indexes in FIELDS of name, type, linkname, uname, gname, mod_time
_RECORDS: Final = 13


class Entry(NamedTuple):
    """One tar member. `offset` is where its data begins in the tar; only "reg" entries have data, whatever
    size says.
    """

    name: bytes
    type: str
    offset: int
    size: int
    linkname: bytes
    mode: int
    uid: int
    gid: int
    uname: bytes
    gname: bytes
    mod_time: str
    devmajor: int
    devminor: int
    records: tuple[tuple[bytes, bytes], ...]


class Outline(NamedTuple):
    """What decides where an entry is and what of it shows, as it is stored; `records` is how many it has."""

    name: bytes
    type: bytes
    offset: int
    size: int
    linkname: bytes
    mode: int
    uid: int
    gid: int
    mod_time: bytes
    records: int


class _Plan(NamedTuple):
    """A vtable of FileMetadata, compiled: one unpack, one permutation into declaration order, places of the
    offsets.
    """

    unpack: Callable[[Mapped, int], tuple[int, ...]]
    permute: Callable[[tuple[int, ...]], tuple[int, ...]]
    places: tuple[int, ...]


class EntryReader:
    """Reads the metadata vector. `usize` is the tar's size in bytes, which bounds every offset."""

    def __init__(self, data: Mapped, usize: int) -> None:
        self._data = data
        self._view = memoryview(data)
        self._usize = usize
        self._budget = MAX_SHARING * len(data)
        self._plans: dict[int, _Plan | None] = {}
        self._record_places: dict[int, tuple[int, int] | None] = {}
        self._times = {b"": ""}
        self._names: dict[bytes, bytes] = {}

    def read(self, start: int, count: int) -> list[Entry]:
        """All entries, in the tar's order, none overlapping the next."""
        data, usize, plans, names, times = self._data, self._usize, self._plans, self._names, self._times
        entries: list[Entry] = []
        append, new, types = entries.append, tuple.__new__, _TYPES
        first = BLOCK  # the earliest place where this entry's data may begin: after one header block
        for i, distance in enumerate(struct.unpack_from(f"<{count}I", data, start)):
            pos = start + 4 * i + distance
            try:
                vtable = pos - i32(data, pos)[0]
                plan = plans[vtable] if vtable in plans else self._plan(vtable)
                if plan is None:
                    entry = self._slowly(i, pos)
                else:
                    unpack, permute, (p0, p1, p4, p8, p9, p10, p13) = plan
                    fields = permute((*unpack(data, pos), 0))
                    a, b, offset, size, c, mode, uid, gid, d, e, f, major, minor, r = fields
                    a += pos + p0
                    an = u32(data, a)[0]
                    name = data[a + 4 : a + 4 + an]
                    b += pos + p1
                    kind = types[data[b + 4 : b + 4 + u32(data, b)[0]]]
                    c += pos + p4
                    cn = u32(data, c)[0]
                    link = data[c + 4 : c + 4 + cn]
                    d += pos + p8
                    dn = u32(data, d)[0]
                    user = data[d + 4 : d + 4 + dn]
                    e += pos + p9
                    en = u32(data, e)[0]
                    group = data[e + 4 : e + 4 + en]
                    f += pos + p10
                    time = times.get(when := data[f + 4 : f + 4 + u32(data, f)[0]]) or self._time(when)
                    spent = an + cn + dn + en
                    if spent != len(name) + len(link) + len(user) + len(group) or spent > MAX_STRING:
                        entry = self._slowly(i, pos)
                    else:
                        self._budget -= spent + 64
                        user, group = names.setdefault(user, user), names.setdefault(group, group)
                        records = self._records(i, r + pos + p13)
                        row = name, kind, offset, size, link, mode, uid, gid, user, group, time, major, minor
                        entry = new(Entry, (*row, records))
            except (KeyError, struct.error):  # no time, an unknown type, or something outside the file
                entry = self._slowly(i, pos)
            offset, size = entry.offset, entry.size
            end = offset + size if entry.type == "reg" else offset
            if offset < first or offset & 511 or size < 0 or end > usize:
                self._refuse(i, entry, first)
            if self._budget < 0:
                raise Integrity(
                    f"ztoc: metadata[{i}]: the strings so far exceed {MAX_SHARING} times the file"
                )
            first = (end + 1023) & -512
            append(entry)
        return entries

    def outlines(self, start: int, count: int) -> list[Outline]:
        """The same of a table that `read` has accepted before, in half the time: only what `Outline` has.

        Integrity when the file is not what it was then.
        """
        data, plans, new = self._data, self._plans, tuple.__new__
        rows: list[Outline] = []
        try:
            for i, distance in enumerate(struct.unpack_from(f"<{count}I", data, start)):
                pos = start + 4 * i + distance
                vtable = pos - i32(data, pos)[0]
                plan = plans[vtable] if vtable in plans else self._plan(vtable)
                if plan is None:
                    e = self._slowly(i, pos)
                    row = (*e[:1], e.type.encode(), *e[2:8], e.mod_time.encode(), len(e.records))
                    rows.append(new(Outline, row))
                    continue
                unpack, permute, (a, b, c, _, _, f, r) = plan
                p, q, offset, size, s, mode, uid, gid, _, _, t, _, _, v = permute((*unpack(data, pos), 0))
                a += pos + p
                b += pos + q
                c += pos + s
                f += pos + t
                name = data[a + 4 : a + 4 + u32(data, a)[0]]
                kind = data[b + 4 : b + 4 + u32(data, b)[0]]
                link = data[c + 4 : c + 4 + n] if (n := u32(data, c)[0]) else b""
                time = data[f + 4 : f + 4 + u32(data, f)[0]]
                records = u32(data, pos + r + v)[0]
                row = name, kind, offset, size, link, mode, uid, gid, time, records
                rows.append(new(Outline, row))
        except (struct.error, IndexError):
            raise Integrity("ztoc: the table of contents changed since it was checked") from None
        return rows

    def _plan(self, vtable: int) -> _Plan | None:
        """Compile a vtable; None if it is not of the usual kind (then `_slowly` reads it, or says what is
        wrong).
        """
        self._plans[vtable] = None
        if vtable < 0 or len(self._plans) > 4096:  # known builders make a few dozen; each costs a struct
            return None
        size, room = struct.unpack_from("<HH", self._data, vtable)
        if size < 4 + 2 * len(FIELDS):
            return None
        places = struct.unpack_from(f"<{len(FIELDS)}H", self._data, vtable + 4)
        if not all(places[i] for i in (*_STRINGS, _RECORDS)):
            return None
        at, layout = 0, "<"
        order: dict[int, int] = {}
        for place, index in sorted((p, i) for i, p in enumerate(places) if p):
            code = FIELDS[index][1]
            if place < max(at, 4) or place + WIDTHS[code] > room:
                return None
            order[index] = len(order)
            layout += f"{place - at}x{code}"
            at = place + WIDTHS[code]
        absent = len(order)  # the caller appends one 0 there
        plan = self._plans[vtable] = _Plan(
            struct.Struct(layout).unpack_from,
            itemgetter(*(order.get(i, absent) for i in range(len(FIELDS)))),
            tuple(places[i] for i in (*_STRINGS, _RECORDS)),
        )
        return plan

    def _records(self, index: int, at: int) -> tuple[tuple[bytes, bytes], ...]:
        """The PAX records of the vector at `at`. Every byte read is charged to the budget."""
        data, seen = self._data, self._record_places
        count = u32(data, at)[0]
        if not count:
            return ()
        self._budget -= 32 * count
        if self._budget < 0 or at + 4 + 4 * count > len(data):
            raise Integrity(
                f"ztoc: metadata[{index}].xattrs claims {count} elements, more than the file can hold"
            )
        records = []
        for distance in struct.unpack_from(f"<{count}I", data, at + 4):
            at += 4
            pos = at + distance
            try:
                vtable = pos - i32(data, pos)[0]
                places = seen[vtable] if vtable in seen else self._record_vtable(vtable)
                if places is None:
                    record = self._record_slowly(index, pos)
                else:
                    k = pos + places[0]
                    v = pos + places[1]
                    k += u32(data, k)[0]
                    v += u32(data, v)[0]
                    kn, vn = u32(data, k)[0], u32(data, v)[0]
                    record = (data[k + 4 : k + 4 + kn], data[v + 4 : v + 4 + vn])
                    if len(record[0]) != kn or len(record[1]) != vn or kn + vn > MAX_STRING:
                        record = self._record_slowly(index, pos)
            except struct.error:  # something outside the file
                record = self._record_slowly(index, pos)
            self._budget -= len(record[0]) + len(record[1])
            if self._budget < 0:
                raise Integrity(
                    f"ztoc: metadata[{index}].xattrs: strings exceed {MAX_SHARING} times the file"
                )
            records.append(record)
        return tuple(records)

    def _record_vtable(self, vtable: int) -> tuple[int, int] | None:
        self._record_places[vtable] = None
        if vtable < 0 or len(self._record_places) > 4096:
            return None
        size, room, key, value = struct.unpack_from("<4H", self._data, vtable)
        if size < 8 or not 4 <= key <= room - 4 or not 4 <= value <= room - 4:
            return None
        self._record_places[vtable] = key, value
        return key, value

    def _record_slowly(self, index: int, pos: int) -> tuple[bytes, bytes]:
        what = f"metadata[{index}].xattrs"
        table = Table(self._view, pos, what)
        return table.string(0, f"{what}.key"), table.string(1, f"{what}.value")

    def _time(self, text: bytes) -> str:
        """The time as it is written, the same object each time. KeyError for what is none."""
        if text not in self._times:
            if not _TIME.fullmatch(text):
                raise KeyError(text)
            self._times[text] = text.decode()
        return self._times[text]

    def _slowly(self, index: int, pos: int) -> Entry:
        """One entry, with every step checked: raises Integrity naming the field, or reads an unusual
        entry.
        """
        what = f"metadata[{index}]"
        table = Table(self._view, pos, what)

        def text(i: int) -> bytes:
            return table.string(i, f"{what}.{FIELDS[i][0]}")

        def number(i: int) -> int:
            return table.scalar(i, FIELDS[i][1], f"{what}.{FIELDS[i][0]}")

        name, kind, link, user, group, time = map(text, _STRINGS)
        if kind not in _TYPES:
            raise Integrity(
                f"ztoc: {what}.type is {kind[:80]!r}, which is none of {', '.join(_TYPES.values())}"
            )
        try:
            when = self._time(time)
        except KeyError:
            raise Integrity(f"ztoc: {what}.mod_time is {time[:80]!r}, not an RFC 3339 time") from None
        self._budget -= len(name) + len(link) + len(user) + len(group) + 64
        at, count = table.vector(_RECORDS, 4, f"{what}.xattrs")
        records = self._records(index, at - 4) if count else ()
        offset, size, mode, uid, gid, major, minor = map(number, (2, 3, 5, 6, 7, 11, 12))
        return Entry(
            name,
            _TYPES[kind],
            offset,
            size,
            link,
            mode,
            uid,
            gid,
            user,
            group,
            when,
            major,
            minor,
            records,
        )

    def _refuse(self, index: int, entry: Entry, first: int) -> None:
        what = f"ztoc: metadata[{index}] ({entry.name!r:.120})"
        if entry.size < 0:
            raise Integrity(f"{what}: uncompressed_size is {entry.size}")
        if entry.offset % BLOCK:
            raise Integrity(f"{what}: uncompressed_offset {entry.offset} is not a multiple of {BLOCK}")
        if entry.offset < first:
            raise Integrity(
                f"{what}: uncompressed_offset {entry.offset} overlaps what is before it (up to {first})"
            )
        raise Integrity(
            f"{what}: uncompressed_offset {entry.offset} and uncompressed_size {entry.size} pass the tar's"
            f" end (uncompressed_archive_size is {self._usize})"
        )
