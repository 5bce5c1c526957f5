"""Tar headers, streaming: ustar, star, GNU and PAX, as FORMATS.md 1 says an index sees them.

Feed the tar in chunks of any size; file contents are stepped over, and only a split header is kept. An index
that differs from what an ordinary unpack reads would lie, so the order is that reader's (Go's archive/tar):
the header, PAX records over it, GNU long names over both.
"""

from __future__ import annotations

import re
import struct
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final, TypeVar
from zlib import adler32

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.toc import BLOCK, MAX_ARCHIVE_SIZE, MAX_ENTRIES, Entry

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_SPECIAL: Final = 1 << 20
"""Bytes of a PAX header or GNU long name: what archive/tar accepts, and far beyond PATH_MAX."""

_MAX_CACHE: Final = 1 << 16
"""A hostile tar may repeat nothing; its caches must not grow with it."""

BATCH: Final = 1 << 14
"""Entries: some 10 MB of memory, after which they may be put elsewhere."""

_V = TypeVar("_V")
_ZERO: Final = bytes(BLOCK)
_MAX_INT64: Final = (1 << 63) - 1
_EPOCH: Final = datetime(1970, 1, 1)
_YEAR_0, _YEAR_1, _YEAR_10000 = -62167219200, -62135596800, 253402300800
"""Seconds since 1970. RFC 3339 has four digits for the year, `datetime` starts at 1."""
_400_YEARS: Final = 146097 * 86400
"""Seconds after which the calendar repeats."""

# name, owner (mode, uid, gid), size, mtime, checksum, type, linkname, magic and version, extension (uname,
# gname, devmajor, devminor), prefix (131 bytes of it in star, all 155 in ustar), star's trailer
_HEADER: Final = struct.Struct("100s24s12s12s8sc100s8s80s131s24s8x4s").unpack_from
_INTEGER: Final = re.compile(rb"[+-]?[0-9]+")
_TIME: Final = re.compile(rb"([+-]?[0-9]+)(?:\.([0-9]*))?")

_TYPES: Final = {
    b"0": "reg",
    b"1": "hardlink",
    b"2": "symlink",
    b"3": "char",
    b"4": "block",
    b"5": "dir",
    b"6": "fifo",
}
_KNOWN_ODD: Final = {
    b"g": "a global PAX header",
    b"S": "a GNU sparse file",
    b"D": "a GNU dump of a directory",
    b"M": "a part of a file on several volumes",
    b"V": "a volume label",
}
_PAX, _LONG_NAME, _LONG_LINK = b"x", b"L", b"K"
_SPECIAL: Final = (_PAX, _LONG_NAME, _LONG_LINK)


class TarParser:
    """One tar. `feed` it, then `finish`. Sizes and offsets in bytes of the uncompressed tar."""

    def __init__(self, put_aside: Callable[[list[Entry]], None] | None = None, *, at: int = 0) -> None:
        """`put_aside`: takes every BATCH entries, which `finish` then does not return. `at`: the offset in the
        tar of the first byte fed, where a header (or what belongs before one) begins.
        """
        self._entries: list[Entry] = []
        self._put_aside = put_aside
        self._count = 0  # of entries, those put aside too
        self._last = b""  # the last one's name
        self._base = at  # offset in the tar of the next chunk's first byte
        self._next = at  # offset in the tar of the next header or special file
        self._pending = bytearray()  # the part of it that is there
        self._want = BLOCK  # its size
        self._data_end = at  # where the last entry's data ends, without padding
        self._special = b""  # type of the special file wanted; b"": a header is next
        self._special_size = 0
        self._zero = False  # the last block was zero
        self._end = -1  # where the tar's end was recognised; -1: not yet
        self._records: dict[bytes, bytes] = {}
        self._long_name = self._long_link = b""
        # What repeats from header to header, by its bytes: parsed once, and one object for all entries.
        self._sums: dict[bytes, int] = {}
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._extensions: dict[bytes, tuple[bytes, bytes, int, int]] = {}
        self._times: dict[bytes, str] = {}

    @property
    def ended(self) -> bool:
        """Whether the end blocks were seen; what is fed after them is not looked at."""
        return self._end >= 0

    @property
    def tail(self) -> int:
        """Bytes fed after the end blocks."""
        return self._base - self._end if self.ended else 0

    @property
    def fed(self) -> int:
        """Where in the tar the next byte fed will be: bytes fed so far, when it began at 0."""
        return self._base

    @property
    def entries(self) -> list[Entry]:
        """Those found so far and not put aside."""
        return self._entries

    def feed(self, chunk: bytes | memoryview) -> None:
        """The tar's next bytes. Integrity if it is no tar, Unsupported for an entry that no index can
        describe.
        """
        base, size, pending = self._base, len(chunk), self._pending
        self._base += size
        while self._end < 0:
            start = self._next + len(pending) - base
            stop = self._next + self._want - base
            if stop > size:
                if start < size:
                    pending += chunk[start:]
                return
            block = chunk
            if pending:
                block, start = bytes(pending) + chunk[start:stop], 0
                pending.clear()
            self._next += self._want
            try:
                if self._special:
                    self._take_special(bytes(block[start : start + self._special_size]))
                # What has a name is no zero block, and its header is the most frequent case by far.
                elif (block[start] and not self._zero) or not self._take_zero(block, start):
                    self._take_header(block, start)
            except Integrity as e:
                raise Integrity(f"tar: at byte {stop + base - BLOCK}{self._whereabouts()}: {e}") from None

    def finish(self) -> tuple[list[Entry], int]:
        """The entries, and how many bytes were read until the end was recognised. Integrity if the tar is
        cut off.

        The end is two zero blocks, or one at the end of the file, or the end of the file.
        """
        if self._end < 0:
            if self._base < self._data_end or self._special or self._pending:
                raise Integrity(f"tar: cut off after {self._base} bytes{self._whereabouts()}")
            self._end = self._base
        return self._entries, self._end

    def _whereabouts(self) -> str:
        return f", after entry {self._last!r:.120}" if self._count else ""

    def _take_special(self, data: bytes) -> None:
        if self._special == _PAX:
            self._records = parse_records(data)
        elif self._special == _LONG_NAME:
            self._long_name = _until_nul(data)
        else:
            self._long_link = _until_nul(data)
        self._special, self._want = b"", BLOCK

    def _take_zero(self, block: bytes | memoryview, at: int) -> bool:
        """Whether it is a zero block, of which the second is the tar's end."""
        if block[at : at + BLOCK] != _ZERO:
            if self._zero:
                raise Integrity("a zero block is followed by something else")
            return False
        if self._zero:
            self._end = self._next
        self._zero = True
        return True

    def _take_header(self, block: bytes | memoryview, at: int) -> None:
        name, owner, size, mtime, checksum, flag, link, magic, extension, *prefixes = _HEADER(block, at)
        # Adler-32's low half is 1 + the sum modulo 65521, which 256 bytes cannot reach: ten times faster than
        # sum().
        middle, total = at + 256, self._sums.get(checksum) or self._sum(checksum)
        low = (adler32(block[at:middle]) & 0xFFFF) + (adler32(block[middle : at + BLOCK]) & 0xFFFF)
        if low != total:
            _check_signed(bytes(block[at : at + BLOCK]), checksum)
        length = parse_number(size, "size")
        if flag in _SPECIAL:
            if not 0 <= length <= MAX_SPECIAL:
                raise Integrity(f"a PAX header or long name of {length} bytes, not within 0..{MAX_SPECIAL}")
            self._special, self._special_size, self._want = flag, length, (length + BLOCK - 1) & -BLOCK
            return
        name = name[:end] if (end := name.find(0)) >= 0 else name
        mode, uid, gid = self._owners.get(owner) or self._owner(owner)
        user = group = b""
        major = minor = 0
        if magic == b"ustar  \0" or magic.startswith(b"ustar\0"):
            user, group, major, minor = self._extensions.get(extension) or self._extension(extension)
            if prefixes[0][0] and (prefix := _prefix(magic, *prefixes)):
                name = prefix + b"/" + name
        when = self._times.get(mtime)
        seconds = 0 if when else parse_number(mtime, "mtime")  # refused here even if a record overrides it
        link = _until_nul(link) if link[0] else b""
        records: tuple[tuple[bytes, bytes], ...] = ()
        if self._records:
            get = self._records.get
            records = tuple(
                sorted(self._records.items()) if len(self._records) > 1 else self._records.items()
            )
            self._records = {}
            name, link = get(b"path") or name, get(b"linkpath") or link
            user, group = get(b"uname") or user, get(b"gname") or group
            uid = _int64(text, "uid") & 0xFFFFFFFF if (text := get(b"uid")) else uid
            gid = _int64(text, "gid") & 0xFFFFFFFF if (text := get(b"gid")) else gid
            length = _int64(text, "size") if (text := get(b"size")) else length
            if text := get(b"mtime"):
                key = b"the PAX record " + text  # longer than a header's field
                when = self._times.get(key) or self._time(key, parse_time(text))
        if when is None:
            when = self._time(mtime, seconds * 1_000_000_000)
        if self._long_name or self._long_link:
            name, link = self._long_name or name, self._long_link or link
            self._long_name = self._long_link = b""
        kind = _TYPES.get(flag) or _unusual(flag, name)
        row = (name, kind, self._next, length, link, mode, uid, gid, user, group, when, major, minor, records)
        self._append(tuple.__new__(Entry, row))

    def _sum(self, field: bytes) -> int:
        """What the low halves of a header's two Adler-32 add up to when `field` is its checksum: the sum of
        its bytes, this field taken as spaces, and twice 1.
        """
        value = parse_number(field, "checksum") + sum(field) - len(field) * 32 + 2
        return _remember(self._sums, field, value)

    def _owner(self, field: bytes) -> tuple[int, int, int]:
        uid, gid = parse_number(field[8:16], "uid"), parse_number(field[16:], "gid")
        value = parse_number(field[:8], "mode"), uid & 0xFFFFFFFF, gid & 0xFFFFFFFF
        return _remember(self._owners, field, value)

    def _extension(self, field: bytes) -> tuple[bytes, bytes, int, int]:
        major, minor = parse_number(field[64:72], "devmajor"), parse_number(field[72:], "devminor")
        value = _until_nul(field[:32]), _until_nul(field[32:64]), major, minor
        return _remember(self._extensions, field, value)

    def _time(self, field: bytes, nanoseconds: int) -> str:
        return _remember(self._times, field, format_time(nanoseconds))

    def _append(self, entry: Entry) -> None:
        if entry.size < 0:
            raise Integrity(f"entry {entry.name!r:.120}: size is {entry.size}")
        for key, _ in entry.records:
            if key.startswith(b"GNU.sparse."):
                name = (
                    dict(entry.records).get(b"GNU.sparse.name") or entry.name
                )  # the header has a made-up one
                raise Unsupported(
                    f"tar: entry {name!r:.120} is a PAX sparse file, which no index can describe"
                )
        if self._count >= MAX_ENTRIES:
            raise Unsupported(f"tar: more than {MAX_ENTRIES} entries")
        self._data_end = self._next + (entry.size if entry.type == "reg" else 0)
        if self._data_end > MAX_ARCHIVE_SIZE:
            raise Unsupported(
                f"tar: entry {entry.name!r:.120} of {entry.size} bytes ends beyond {MAX_ARCHIVE_SIZE}, which no"
                " reader of an index could serve"
            )
        self._next = (self._data_end + BLOCK - 1) & -BLOCK
        self._count += 1
        self._last = entry.name
        self._entries.append(entry)
        if self._put_aside and len(self._entries) >= BATCH:
            self._put_aside(self._entries)
            self._entries = []


def _remember(cache: dict[bytes, _V], key: bytes, value: _V) -> _V:
    if len(cache) >= _MAX_CACHE:
        cache.clear()
    cache[key] = value
    return value


def _until_nul(field: bytes) -> bytes:
    end = field.find(0)
    return field if end < 0 else field[:end]


def _prefix(magic: bytes, short: bytes, more: bytes, trailer: bytes) -> bytes:
    """What stands before the name. In GNU's format two times are there, but Go before 1.8 wrote a prefix: it is
    one if it is ASCII and no times, as later Go reads it.
    """
    if not magic[5]:
        return _until_nul(short if trailer == b"tar\0" else short + more)
    try:
        parse_number(short[:12], "atime")
        parse_number(short[12:24], "ctime")
    except Integrity:
        prefix = _until_nul(short + more)
        return prefix if prefix.isascii() else b""
    return b""


def _unusual(flag: bytes, name: bytes) -> str:
    """The type of an entry whose type is none of _TYPES: before ustar there was only NUL, for files and
    directories.
    """
    if flag == b"\0":
        return "dir" if name.endswith(b"/") else "reg"
    what = _KNOWN_ODD.get(flag) or f"of the type {flag!r}"
    raise Unsupported(f"tar: entry {name!r:.120} is {what}, which no index can describe")


def _check_signed(block: bytes, checksum: bytes) -> None:
    """A header whose bytes do not add up: some old writers summed signed ones."""
    expected = parse_number(checksum, "checksum")
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * 32
    if total - 256 * sum(byte > 127 for byte in rest) != expected:
        raise Integrity(f"the header's checksum is {expected}, but its bytes make {total}")


def parse_number(field: bytes, name: str) -> int:
    """A header's number: base 256 if the top bit is set (then bit 6 is the sign), else octal; empty is 0."""
    digits = field[:-1]
    if not field[-1] and digits.isdigit():  # as nearly everyone writes it
        try:
            return int(digits, 8)
        except ValueError:  # to be refused below
            pass
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        if not -_MAX_INT64 - 1 <= value <= _MAX_INT64:
            raise Integrity(f"{name} does not fit into 64 bits")
        return value
    digits = _until_nul(field.strip(b" \0"))
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:  # 8 or 9
            pass
    if digits:
        raise Integrity(f"{name} is {digits!r}, not octal")
    return 0


def _int64(text: bytes, name: str) -> int:
    if not _INTEGER.fullmatch(text) or len(text) > 64 or abs(value := int(text)) > _MAX_INT64:
        raise Integrity(f"the PAX record {name} is {text!r:.80}, not an integer of 64 bits")
    return value


def parse_records(data: bytes) -> dict[bytes, bytes]:
    """A PAX header's records, "<length> <key>=<value>\\n" each; the last of a key counts. Integrity if
    malformed.
    """
    records = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        length = data[at:space]
        if space < 0 or not length.isdigit():
            raise Integrity(f"PAX header: a record without its length, {data[at : at + 40]!r}")
        end = at + int(length)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space + 1 or not equals or not key or data[end - 1] != 10:
            raise Integrity(f"PAX header: a malformed record, {data[at : at + 40]!r}")
        if b"\0" in (value if key in (b"path", b"linkpath", b"uname", b"gname") else key):
            raise Integrity(f"PAX header: a NUL in {key[:80]!r}")
        records[key] = value
        at = end
    return records


def parse_time(text: bytes) -> int:
    """A PAX time as nanoseconds since 1970: at most nine digits of fraction count; it has the sign of the
    seconds.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise Integrity(f"the PAX record mtime is {text!r:.80}, not a time")
    seconds = int(match[1]) if len(match[1]) < 19 else _int64(match[1], "mtime")
    fraction = int((match[2] or b"0")[:9].ljust(9, b"0"))
    return seconds * 1_000_000_000 + (-fraction if text.startswith(b"-") else fraction)


def format_time(nanoseconds: int) -> str:
    """RFC 3339 in UTC, fraction without trailing zeros; empty for a year outside 0000..9999."""
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    if not _YEAR_0 <= seconds < _YEAR_10000:
        return ""
    if seconds < _YEAR_1:
        text = "0000" + format_time((seconds + _400_YEARS) * 1_000_000_000)[4:-1]
    else:
        text = (_EPOCH + timedelta(seconds=seconds)).isoformat()
    return text + (f".{fraction:09}".rstrip("0") if fraction else "") + "Z"
