"""The tar's own headers against a table of contents that claims to describe them (FORMATS.md, 1).

Entry i's region is what lies between the data of entry i-1, padded, and its own data: the header, and the PAX
and GNU headers before it. It is parsed as a builder parses it, and must give what the table says. What cannot
show in a mounted tree may differ (owner names, a file's `./`, a time's zone), so that no honest builder's table
is refused.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.tar import TarParser, format_time, parse_number
from soci_snapshotter.formats.toc import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from soci_snapshotter.formats.toc import Entry, Outline
    from soci_snapshotter.formats.tree import Clock

_XATTR: Final = b"SCHILY.xattr."
_ENOUGH: Final = 100
"""Characters of a stranger's value that a log line shows."""


# name, owner (mode, uid, gid), size, mtime, type, linkname, magic and version, prefix, star's trailer
_PLAIN: Final = struct.Struct("100s24s12s12s8xc100s8s80x155s8x4s").unpack_from
_FLAGS: Final = {b"reg": b"0", b"dir": b"5", b"symlink": b"2", b"hardlink": b"1"}
_USTAR, _GNU = b"ustar\x0000", b"ustar  \0"


class Difference(NamedTuple):
    """Where a table of contents and the tar differ; `str()` is one line of printable ASCII, a few hundred
    characters at most.
    """

    name: bytes
    """The entry's, as the table has it (or the tar, if the table lacks it)."""
    field: str
    stated: str
    found: str

    def __str__(self) -> str:
        return (
            f"entry {_short(self.name)}: {self.field} is {self.stated} in the table of contents and"
            f" {self.found} in the tar"
        )


class Headers(NamedTuple):
    """What `read_headers` found: whole entries in order, what stopped it early, whether the end was seen."""

    entries: list[Entry]
    error: str
    ended: bool


def read_headers(start: int, chunks: Iterable[bytes | memoryview]) -> Headers:
    """Parse `chunks`, the tar's bytes from a region's start on; file data among them is stepped over."""
    parser = TarParser(at=start)
    error = ""
    try:
        for chunk in chunks:
            parser.feed(chunk)
    except (Integrity, Unsupported) as e:
        error = str(e)
    return Headers(parser.entries, error, parser.ended)


def after(offset: int, size: int, *, has_data: bool) -> int:
    """Where the region behind the entry whose data begins at `offset` begins."""
    return offset + (size + BLOCK - 1 & -BLOCK if has_data else 0)


def unlike(stated: Sequence[Outline], start: int, data: bytes, base: int) -> list[int]:
    """Numbers of those entries that a glance does not show to be what is stated: the others are.

    `start`: where the region of the first one begins; `data` holds all regions and begins at `base`. A glance is
    enough for a header alone, in the usual formats; that takes a third of the time of `read_headers`. Its checksum is
    of no interest then: every field that shows is what it should be.
    """
    rest = []
    owners: dict[bytes, tuple[int, int, int]] = {}
    times: dict[bytes, bytes] = {}
    flags = _FLAGS.get
    for number, (name, kind, offset, size, link, mode, uid, gid, time, records) in enumerate(stated):
        plain = False
        if offset - start == BLOCK and not records:
            short, owner, length, mtime, flag, target, magic, prefix, star = _PLAIN(data, start - base)
            try:
                if prefix[0] and magic == _USTAR and star != b"tar\0":
                    short = prefix.rstrip(b"\0") + b"/" + short
                    prefix = b"\0"
                plain = (
                    flag == flags(kind)
                    and short.rstrip(b"\0") == name
                    and (owners.get(owner) or _owner(owners, owner)) == (mode, uid, gid)
                    and (times.get(mtime) or _time(times, mtime)) == time
                    and (kind != b"reg" or parse_number(length, "size") == size)
                    and (flag in b"05" or target.rstrip(b"\0") == link)
                    and not prefix[0]
                    and magic in (_USTAR, _GNU)
                )
            except Integrity:  # to be named by whoever looks closer
                pass
        if not plain:
            rest.append(number)
        start = offset + (size + 511 & -512) if kind == b"reg" else offset
    return rest


def _owner(known: dict[bytes, tuple[int, int, int]], field: bytes) -> tuple[int, int, int]:
    uid, gid = parse_number(field[8:16], "uid") & 0xFFFFFFFF, parse_number(field[16:], "gid") & 0xFFFFFFFF
    value = known[field] = parse_number(field[:8], "mode"), uid, gid
    return value


def _time(known: dict[bytes, bytes], field: bytes) -> bytes:
    """As the ztoc has it. Times that differ mostly share their day."""
    seconds = parse_number(field, "mtime")
    day, second = divmod(seconds, 86400)
    key = b"%d" % day  # shorter than any field
    date = known.get(key)
    if date is None:
        date = known[key] = format_time(day * 86400_000_000_000)[:-9].encode()
    minute, second = divmod(second, 60)
    value = b"%s%02d:%02d:%02dZ" % (date, minute // 60, minute % 60, second) if date else b""
    known[field] = value
    return value


def compare(stated: Sequence[Entry], headers: Headers, clock: Clock) -> Difference | None:
    """The first difference between `stated`, whose regions were all read, and what was found there."""
    found = headers.entries
    for number, entry in enumerate(stated):
        if number >= len(found):
            wrong = headers.error or "longer than the room for it"
            return Difference(entry.name, "header", "one", f"unreadable: {_short(wrong)}")
        if entry != found[number]:
            difference = _compare_shown(entry, found[number], clock)
            if difference is not None:
                return difference
    return None


def compare_end(headers: Headers, count: int) -> Difference | None:
    """What stands after the last of `count` entries read, which is the table's last, besides the tar's end."""
    if len(headers.entries) > count:
        more = headers.entries[count]
        return Difference(more.name, "entry", "missing", f"a {more.type} at {more.offset}")
    if headers.error:
        return Difference(b"", "end", "after the last entry", f"not there: {_short(headers.error)}")
    return None


def _compare_shown(stated: Entry, found: Entry, clock: Clock) -> Difference | None:
    try:
        pairs = zip(_shown(stated, clock), _shown(found, clock), strict=False)
        for (field, said), (_, is_) in pairs:  # a type that differs comes first, and ends it
            if said != is_:
                return _difference(stated, field, said, is_)
    except Integrity as e:  # a time that is none
        return Difference(stated.name, "mod_time", "no time", _short(str(e)))
    return None


def _shown(entry: Entry, clock: Clock) -> Iterator[tuple[str, object]]:
    """What of an entry a mounted tree can show, by the ztoc's names (formats.tree has the rules)."""
    kind = entry.type
    yield "type", kind
    yield "name", _path(entry.name)
    yield "uncompressed_offset", entry.offset
    if kind == "reg":
        yield "uncompressed_size", entry.size
    elif kind == "symlink":
        yield "linkname", entry.linkname
    elif kind == "hardlink":
        yield "linkname", _path(entry.linkname)
    elif kind in ("char", "block"):
        yield "devmajor", entry.devmajor
        yield "devminor", entry.devminor
    if kind != "symlink":  # symlink(2) gives every link the same mode
        yield "mode", entry.mode & 0o7777
    yield "uid", entry.uid
    yield "gid", entry.gid
    yield "mod_time", clock.known.get(entry.mod_time) or clock.read(0, entry)
    yield "xattrs", {key[len(_XATTR) :]: value for key, value in entry.records if key.startswith(_XATTR)}


def _path(name: bytes) -> bytes:
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


def _difference(entry: Entry, field: str, stated: object, found: object) -> Difference:
    if field == "mode":
        return Difference(entry.name, field, f"{stated:04o}", f"{found:04o}")
    if isinstance(stated, dict) and isinstance(found, dict):  # values may be long, and secret
        keys = sorted(key for key in stated.keys() | found.keys() if stated.get(key) != found.get(key))
        said, is_ = (
            "absent" if keys[0] not in xattrs else f"{len(xattrs[keys[0]])} bytes"
            for xattrs in (stated, found)
        )
        if said == is_:
            is_ = "others"
        return Difference(entry.name, f"xattr {_short(keys[0])}", said, is_)
    return Difference(entry.name, field, _short(stated), _short(found))


def _short(value: object) -> str:
    text = value if isinstance(value, str) else ascii(value)
    text = text if text.isascii() and text.isprintable() else ascii(text)
    return text if len(text) <= _ENOUGH else text[:_ENOUGH] + "..."
