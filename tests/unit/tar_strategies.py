"""Random tars that an ordinary unpack accepts, written by hand in every format there is.

A member may be written as v7, ustar, star, GNU or PAX, its numbers in octal or base 256, its names in the
header, a prefix, a long-name block or a record, and where a record beats the header, the header lies. The
sequence makes sense as a layer: parents are directories, link targets exist, whiteouts hide nothing of the
layer's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Final

from hypothesis import strategies as st

BLOCK: Final = 512
SPILL: Final = 100
"""Bytes of a header's name and link name."""

STYLES: Final = ("v7", "ustar", "star", "gnu", "pax")
FLAGS: Final = {
    "reg": b"0",
    "hardlink": b"1",
    "symlink": b"2",
    "char": b"3",
    "block": b"4",
    "dir": b"5",
    "fifo": b"6",
}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. `mtime` in nanoseconds; `name` and `link` as the tar spells them.

    `loud`: written with base 256, long-name blocks or records even where the plain fields would do.
    """

    name: bytes
    kind: str
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    content: bytes = b""
    link: bytes = b""
    major: int = 0
    minor: int = 0
    uname: bytes = b""
    gname: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    others: tuple[tuple[bytes, bytes], ...] = ()
    style: str = "pax"
    loud: bool = False


def seal(block: bytes | bytearray, *, signed: bool = False) -> bytes:
    """The header with its checksum."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record; its length counts its own digits."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


def encode(member: Member) -> bytes:
    """Header, what must stand before it, and data."""
    return _Writer(member).write()


class _Writer:
    def __init__(self, member: Member) -> None:
        self.member = member
        self.style = self._possible_style()
        self.records: list[tuple[bytes, bytes]] = []
        self.before: list[bytes] = []

    def _possible_style(self) -> str:
        """The wanted one, or the one that can say what this member has."""
        m = self.member
        if m.xattrs or m.others or m.mtime % 10**9:
            return "pax"
        plain = (
            0 <= m.mtime < 8**11 * 10**9
            and max(m.uid, m.gid) < 8**7
            and len(m.name) <= SPILL
            and len(m.link) <= SPILL
        )
        old = plain and m.kind in ("reg", "hardlink", "symlink", "dir") and not (m.uname or m.gname)
        if m.style == "v7" and not (old and (m.kind != "dir" or m.name.endswith(b"/"))):
            return "gnu"
        return m.style

    def write(self) -> bytes:
        m = self.member
        block = bytearray(BLOCK)
        self._names(block)
        fields = (
            (b"", 100, 8, m.mode),
            (b"uid", 108, 8, m.uid),
            (b"gid", 116, 8, m.gid),
            (b"size", 124, 12, len(m.content)),
        )
        for key, at, width, value in fields:
            block[at : at + width] = self._number(key, value, width)
        block[136:148] = self._time(m.mtime)
        block[156:157] = self._flag()
        if self.style != "v7":
            block[257:265] = b"ustar  \0" if self.style == "gnu" else b"ustar\x0000"
            self._owner_names(block)
            if m.kind in ("char", "block"):
                block[329:337], block[337:345] = b"%07o\0" % m.major, b"%07o\0" % m.minor
        if self.style == "star":
            block[476:488] = block[488:500] = b"%011o " % 1
            block[508:512] = b"tar\0"
        self.records += [(b"SCHILY.xattr." + key, value) for key, value in m.xattrs]
        self.records += m.others
        if self.records:
            data = b"".join(record(*each) for each in self.records)
            self.before.insert(0, _special(b"x", b"PaxHeaders/x", data))
        return b"".join(self.before) + seal(block) + (padded(m.content) if m.kind == "reg" else b"")

    def _flag(self) -> bytes:
        """v7 knew NUL for files, and directories by their slash."""
        m = self.member
        if self.style == "v7" and m.kind in ("reg", "dir"):
            return b"\0"
        return FLAGS[m.kind]

    def _names(self, block: bytearray) -> None:
        m = self.member
        loud = m.loud and self.style in ("gnu", "pax")
        name, link = m.name, m.link
        if link and (loud or len(link) > SPILL):
            self._long(b"K", b"linkpath", link)
            link = b"not/this" if loud else link[:SPILL]
        prefix, short = (b"", name) if len(name) <= SPILL else self._split(name)
        if loud or len(short) > SPILL:
            self._long(b"L", b"path", name)
            prefix, short = b"", (b"nor-this" if loud else name[:SPILL])
        block[: len(short)] = short
        block[157 : 157 + len(link)] = link
        block[345 : 345 + len(prefix)] = prefix

    def _split(self, name: bytes) -> tuple[bytes, bytes]:
        """ustar's prefix and name; the whole as name when there is no such cut."""
        room = {"ustar": 155, "star": 130, "pax": 155}.get(self.style, 0)
        at = name.rfind(b"/", 1, room + 1)
        if at > 0 and 0 < len(name) - at - 1 <= SPILL:
            return name[:at], name[at + 1 :]
        return b"", name

    def _long(self, flag: bytes, key: bytes, value: bytes) -> None:
        if self.style == "gnu":
            self.before.append(_special(flag, b"././@LongLink", value + b"\0"))
        else:
            self.records.append((key, value))

    def _number(self, key: bytes, value: int, width: int) -> bytes:
        digits = width - 1
        fits = 0 <= value < 8**digits
        if self.style == "gnu" and (self.member.loud or not fits):
            return (value + (1 << (8 * width)) | 0x80 << (8 * width - 8)).to_bytes(width + 1, "big")[1:]
        if key and (not fits or (self.style == "pax" and self.member.loud)):
            self.records.append((key, b"%d" % value))
            value = 0
        return b"%0*o\0" % (digits, value)

    def _time(self, nanoseconds: int) -> bytes:
        seconds, fraction = divmod(nanoseconds, 10**9)
        if not fraction:
            return self._number(b"mtime", seconds, 12)
        sign = b""
        if nanoseconds < 0:
            sign, (seconds, fraction) = b"-", divmod(-nanoseconds, 10**9)
        self.records.append((b"mtime", sign + b"%d.%s" % (seconds, (b"%09d" % fraction).rstrip(b"0"))))
        return b"%011o\0" % 1

    def _owner_names(self, block: bytearray) -> None:
        m = self.member
        for key, at, value in ((b"uname", 265, m.uname), (b"gname", 297, m.gname)):
            short = value[:31]
            if value and self.style == "pax" and (m.loud or short != value):
                self.records.append((key, value))
            block[at : at + len(short)] = short


def _special(flag: bytes, name: bytes, data: bytes) -> bytes:
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = block[108:116] = block[116:124] = b"0000000\0"
    block[124:136], block[136:148] = b"%011o\0" % len(data), b"%011o\0" % 0
    block[156:157] = flag
    block[257:265] = b"ustar\x0000" if flag == b"x" else b"ustar  \0"
    return seal(block) + padded(data)


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Content that compresses well, a little or not at all; some of it only by looking 30 KB back."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    unit = rng.randbytes(draw(st.sampled_from([1, 30, 3000, 30_000])))
    sizes = [0, 1, 511, 512, 513, 1024, 5000, 40_000, 100_000, 300_000]
    size = draw(st.sampled_from(sizes)) + draw(st.integers(0, 1000))
    return (unit * (size // len(unit) + 1))[:size]


_CHARACTERS = st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/")
COMPONENTS = st.one_of(
    st.sampled_from([b"a", b"b", b"usr", b"lib", b"n" * 99, b"n" * 101, b"n" * 255, b"d" * 130, b"caf\xe9"]),
    st.text(_CHARACTERS, min_size=1, max_size=12).map(lambda text: text.encode()),
    st.binary(min_size=1, max_size=8).map(lambda raw: raw.replace(b"\0", b"_").replace(b"/", b"-")),
).filter(lambda name: name not in (b".", b"..") and not name.startswith(b".wh.") and len(name) <= 255)
TARGETS = st.one_of(
    st.sampled_from([b"a", b"t" * 101, b"t/" * 150, b"x" * 1000, b"caf\xe9", b"../a", b"/usr/lib"]),
    st.binary(min_size=1, max_size=20).map(lambda raw: raw.replace(b"\0", b"_")),
)
_VALUES = st.one_of(st.sampled_from([b"", b"\0", b"a=b\n"]), st.binary(max_size=300))
_KEYS = st.sampled_from([b"a", b"b.c", b"some thing", b"caf\xc3\xa9", b"x" * 60])


@st.composite
def attributes(draw: st.DrawFn, kind: str) -> dict[str, object]:
    """Mode, owner, time, names of the owner, device, xattrs and other records; and how to write them."""
    owners = st.one_of(st.sampled_from([0, 1000, 8**7 - 1, 8**7, 2**32 - 2]), st.integers(0, 2**32 - 2))
    seconds = st.one_of(st.sampled_from([0, -1, 8**11 - 1]), st.integers(-(2**31), 2**33))
    fractions = st.sampled_from([0] * 12 + [1, 500_000_000, 999_999_999, 120_000_000])
    xattrs = {}
    if draw(st.integers(0, 3)) == 0:
        space = [b"security."] if kind not in ("reg", "dir") else [b"security.", b"user."]
        keys = st.tuples(st.sampled_from(space), _KEYS).map(b"".join)
        xattrs = draw(st.dictionaries(keys, _VALUES, max_size=3))
    others = ()
    if draw(st.integers(0, 5)) == 0:
        others = draw(st.sampled_from([((b"comment", b"\xff\0"),), ((b"atime", b"1.5"), (b"VENDOR.k", b""))]))
    return {
        "mode": draw(st.one_of(st.sampled_from([0o644, 0o755, 0o4755, 0]), st.integers(0, 0o7777))),
        "uid": draw(owners),
        "gid": draw(owners),
        "mtime": draw(seconds) * 10**9 + draw(fractions),
        "uname": draw(st.sampled_from([b"", b"", b"root", b"\xc3\xbcser", b"u" * 40])),
        "gname": draw(st.sampled_from([b"", b"", b"wheel"])),
        "major": draw(st.integers(0, 4095)) if kind in ("char", "block") else 0,
        "minor": draw(st.integers(0, 2**20 - 1)) if kind in ("char", "block") else 0,
        "xattrs": tuple(sorted(xattrs.items())),
        "others": others,
        "style": draw(st.sampled_from(STYLES)),
        "loud": draw(st.booleans()),
    }


@dataclass
class _Layer:
    """What the entries so far have made."""

    members: list[Member] = field(default_factory=list)
    directories: dict[tuple[bytes, ...], Member | None] = field(default_factory=lambda: {(): None})
    files: dict[tuple[bytes, ...], Member] = field(default_factory=dict)
    hidden: set[tuple[bytes, ...]] = field(default_factory=set)

    def free(self, path: tuple[bytes, ...]) -> bool:
        """Whether something may be put there: nothing hides it, and what is above are directories."""
        above = [path[:n] for n in range(1, len(path))]
        return (
            not any(each in self.files or each in self.hidden for each in above) and path not in self.hidden
        )

    def holds(self, path: tuple[bytes, ...]) -> bool:
        """Whether it is a directory with something in it."""
        return any(
            each[: len(path)] == path != each for each in (*self.directories, *self.files, *self.hidden)
        )

    def put(self, path: tuple[bytes, ...], member: Member) -> None:
        """Note a member that `free` allowed."""
        for n in range(1, len(path)):
            self.directories.setdefault(path[:n])
        self.files.pop(path, None)
        self.directories.pop(path, None)
        if member.kind == "dir":
            self.directories[path] = member
        else:
            self.files[path] = member
        self.members.append(member)


def _spell(draw: st.DrawFn, path: tuple[bytes, ...], *, slash: bool = False) -> bytes:
    """A name for a path, as tars have them."""
    return draw(st.sampled_from([b"", b"", b"./", b"/"])) + b"/".join(path) + (b"/" if slash else b"")


@st.composite
def layers(draw: st.DrawFn, *, tame: bool = False) -> list[Member]:
    """Members in an order that can be unpacked: new paths, the same again, links, whiteouts.

    `tame`: without what GNU tar gets wrong. It makes placeholders for symbolic links that lead outside, and
    settles directories last, the first of two entries after the second; either may by then be something else.
    """
    layer = _Layer()
    for _ in range(draw(st.sampled_from([0, 1, 3, 6, 10, 15]))):
        action = draw(st.sampled_from(["new"] * 5 + ["again", "link", "whiteout"]))
        if action == "link" and layer.files:
            _add_link(draw, layer)
        elif action == "whiteout":
            _add_whiteout(draw, layer)
        else:
            _add(draw, layer, again=action == "again", tame=tame)
    return layer.members


def _parent(draw: st.DrawFn, layer: _Layer) -> tuple[bytes, ...]:
    parent = draw(st.sampled_from(list(layer.directories)))
    more = tuple(draw(st.lists(COMPONENTS, max_size=2))) if draw(st.integers(0, 2)) == 0 else ()
    return parent if sum(map(len, (*parent, *more))) > 1500 else (*parent, *more)


def _add(draw: st.DrawFn, layer: _Layer, *, again: bool, tame: bool) -> None:
    known = [path for path in (*layer.directories, *layer.files) if path]
    path = draw(st.sampled_from(known)) if again and known else (*_parent(draw, layer), draw(COMPONENTS))
    kind = draw(st.sampled_from(["reg"] * 6 + ["dir", "dir", "symlink", "symlink", "char", "block", "fifo"]))
    if layer.holds(path):
        kind = "dir"
    old = layer.directories.get(path)
    if not layer.free(path) or (tame and old):
        return
    slash = kind == "dir" and draw(st.integers(0, 3)) > 0
    made = Member(_spell(draw, path, slash=slash), kind, **draw(attributes(kind)))
    if kind == "reg":
        made = replace(made, content=draw(contents()))
    elif kind == "symlink":
        inside = TARGETS.filter(lambda link: link[:1] != b"/" and b".." not in link)
        made = replace(made, link=draw(inside if tame else TARGETS))
    layer.put(path, made)


def _add_link(draw: st.DrawFn, layer: _Layer) -> None:
    """A hard link as tar writes it: with the attributes that its target has."""
    target = draw(st.sampled_from(list(layer.files)))
    path = (*_parent(draw, layer), draw(COMPONENTS))
    if path in layer.directories or path in layer.files or not layer.free(path):
        return
    style, loud = draw(st.sampled_from(STYLES)), draw(st.booleans())
    made = replace(
        layer.files[target], kind="hardlink", name=_spell(draw, path), link=_spell(draw, target),
        content=b"", xattrs=(), style=style, loud=loud, major=0, minor=0,
    )  # fmt: skip
    layer.put(path, made)


def _add_whiteout(draw: st.DrawFn, layer: _Layer) -> None:
    parent, hidden = _parent(draw, layer), draw(COMPONENTS.filter(lambda name: len(name) <= 250))
    path = (*parent, hidden)
    if not layer.free(path) or path in layer.directories or path in layer.files:
        return
    if draw(st.integers(0, 3)) == 0:
        hidden = b".wh..opq"
    layer.hidden.add((*parent, hidden))
    for n in range(1, len(path)):
        layer.directories.setdefault(path[:n])
    name = _spell(draw, (*parent, b".wh." + hidden))
    layer.members.append(Member(name, "reg", style=draw(st.sampled_from(STYLES))))


ENDS: Final = (b"", bytes(512), bytes(1024), bytes(1024), bytes(10240), bytes(1024) + b"junk" * 3000)
"""What may stand at a tar's end: nothing, one zero block, two, padding to a tape's record, something else."""


@st.composite
def tars(draw: st.DrawFn, *, tame: bool = False) -> bytes:
    """A whole tar; `tame` as for layers."""
    return b"".join(map(encode, draw(layers(tame=tame)))) + draw(st.sampled_from(ENDS))


def plain(members: list[Member]) -> bytes:
    """A tar that Go's writers take too: no duplicates, nothing above the root."""
    seen: dict[bytes, Member] = {member.name: member for member in members}
    return b"".join(map(encode, seen.values())) + bytes(1024)
