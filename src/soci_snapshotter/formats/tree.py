"""From a table of contents to the directory tree that unpacking the layer would leave.

The rules are those of containerd's unpack into an overlayfs snapshot, found by experiment with containerd
1.6: what it would refuse, or what a ztoc may not say, is Integrity; what it does but EROFS or this module
does not is Unsupported. Either way the layer falls back to that unpack.

- Of entries with one path the last wins; a directory over a directory keeps children and earlier xattrs.
- Entries for the root itself are ignored: the root's attributes come from the snapshot.
- A hard link is one more name of the inode its target has at that moment, and gives it its own owner, mode,
time and
  xattrs; changing the owner takes file capabilities away (chown(2)).
- A whiteout hides what is in lower layers only. One that follows an entry of the same path is refused by
containerd,
  or removes the entry in a bottom layer: Unsupported here.
- Times outside 1970 to 2262-04-11 (64 bits of nanoseconds) become the epoch.
- user.* xattrs stay on files and directories only, security.* on everything, unknown classes vanish.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.toc import Entry

BLOCK = 512
MAX_DATA = 2**32 * BLOCK  # EROFS block addresses are u32, and tar's offsets are multiples of 512: 2 TiB
MAX_PATH = 4095  # PATH_MAX without its NUL: no ordinary unpack makes longer ones
MAX_NAME = 255  # NAME_MAX, in ext4, overlayfs and EROFS alike
MAX_XATTR_VALUE = 65535  # EROFS's value_size is u16; XATTR_SIZE_MAX is one more
# Parents that no entry names are the one thing that can outgrow the ztoc: a path of 4 KiB has 2,000 of them.
MAX_IMPLICIT_BYTES = 64 << 20

WHITEOUT = -1
"""A child that is a whiteout instead of an inode."""

_LAST = (9_223_372_036, 854_775_807)  # what 63 bits of nanoseconds reach, in seconds and nanoseconds
_EPOCH = (0, 0)
_EPOCH_DAY = date(1970, 1, 1).toordinal()
_ODD_NAMES = frozenset({b"", b".", b".."})
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_XATTR_CLASSES = frozenset({b"user.", b"security.", b"system."})
_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_KINDS = frozenset({"reg", "dir", "symlink", "hardlink", "char", "block", "fifo"})
_DAY = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})")
_MINUTE = re.compile(r"T([01][0-9]|2[0-3]):([0-5][0-9])")
_REST = re.compile(r":([0-5][0-9])(?:\.([0-9]{1,9}))?(?:Z|([+-])([01][0-9]|2[0-3]):([0-5][0-9]))")
_RAW = re.compile(rb"(-?)(\d{1,18})(?:\.(\d*))?")


@dataclass(slots=True, eq=False)
class Directory:
    """A directory: children by name (an inode's index, WHITEOUT, or a Directory).

    `inode` is the index of its last entry, -1 when it has none; `implicit` its path if it first appeared
    without an entry of its own, and so inherits.
    """

    children: dict[bytes, int | Directory] = field(default_factory=dict)
    inode: int = -1
    implicit: bytes | None = None
    opaque: bool = False


@dataclass(slots=True)
class Tree:
    """A checked tree. Indexes are those of the entries; hard links share their target's.

    `linked` are indexes that hard links were made to; `times` are (seconds, nanoseconds) since the epoch;
    `xattrs` holds only the inodes that have some, names with their prefix; `data_end` is the end of the last
    entry's data in bytes, padded to 512.
    """

    root: Directory
    inodes: list[Entry]
    times: list[tuple[int, int]]
    xattrs: dict[int, dict[bytes, bytes]]
    linked: set[int]
    data_end: int


def build_tree(entries: Sequence[Entry]) -> Tree:
    """Replay `entries`. Integrity or Unsupported name the entry and the field at fault."""
    return _Builder(entries).build()


def implicit_directories(tree: Tree) -> list[bytes]:
    """Paths of the directories that inherit from the layers below; b"" first, the root always does."""
    found = []
    stack = [tree.root]
    while stack:
        directory = stack.pop()
        if directory.implicit is not None:
            found.append(directory.implicit)
        stack.extend(child for child in directory.children.values() if isinstance(child, Directory))
    return sorted(found)


class _Builder:
    def __init__(self, entries: Sequence[Entry]) -> None:
        self.root = Directory(implicit=b"")
        self.inodes = list(entries)
        self.times: list[tuple[int, int]] = []
        self.xattrs: dict[int, dict[bytes, bytes]] = {}
        self.linked: set[int] = set()
        # The directory a name's part before its last slash means, as spelled; emptied when a directory goes.
        self.heads: dict[bytes, Directory] = {b"": self.root}
        self.implicit_bytes = 0
        self.clock = Clock()

    def build(self) -> Tree:
        end = 0
        heads, times, now = self.heads, self.times, self.clock.known
        for index, entry in enumerate(self.inodes):
            name, kind, offset, size, _, _, _, _, _, _, mod_time, _, _, records = entry
            if offset < end + BLOCK or offset % BLOCK:
                raise Unsupported(
                    f"{_say(index, entry)}: offset {offset} overlaps the entry before, or no block"
                )
            end = offset
            if kind == "reg":
                if size < 0:
                    raise Integrity(f"{_say(index, entry)}: size {size}")
                end += (size + 511) & ~511
            time = now.get(mod_time)
            times.append(self.clock.read(index, entry) if time is None else time)
            if records:
                self._records(index, entry)
            head, _, base = name.rpartition(b"/")
            directory = heads.get(head)
            if directory is None or base in _ODD_NAMES or len(base) > MAX_NAME or b"\0" in base:
                place = self._place(index, entry)
                if place is None:
                    continue
                directory, base = place
            children = directory.children
            if base[:4] == b".wh.":
                self._whiteout(index, entry, directory, base)
            elif kind == "reg" and base not in children:
                children[base] = index
            else:
                self._put(index, entry, directory, base)
        if end > MAX_DATA:
            raise Unsupported(f"data up to byte {end}: EROFS reaches {MAX_DATA}")
        return Tree(self.root, self.inodes, times, self.xattrs, self.linked, end)

    def _put(self, index: int, entry: Entry, directory: Directory, base: bytes) -> None:
        """Everything but a plain new file."""
        kind = entry.type
        children = directory.children
        old = children.get(base)
        if kind == "dir":
            if isinstance(old, Directory):
                if old.inode >= 0 and old.inode in self.xattrs:
                    self.xattrs[index] = self.xattrs[old.inode] | self.xattrs.get(index, {})
                old.inode = index
            else:
                children[base] = Directory(inode=index)
            return
        if isinstance(old, Directory):
            self.heads.clear()
            self.heads[b""] = self.root
        if kind == "hardlink":
            children.pop(base, None)  # first: a link to its own name, or into what it replaces, has no target
            children[base] = self._link(index, entry)
            return
        if kind == "symlink":
            _check_target(index, entry)
        elif kind not in _KINDS:
            raise Integrity(f"{_say(index, entry)}: type {kind!r}")
        children[base] = index

    def _whiteout(self, index: int, entry: Entry, directory: Directory, base: bytes) -> None:
        hidden = base[4:]
        if base == b".wh..wh..opq":
            directory.opaque = True
        elif hidden in _ODD_NAMES:
            raise Integrity(f"{_say(index, entry)}: name is a whiteout of nothing")
        elif directory.children.setdefault(hidden, WHITEOUT) != WHITEOUT:
            raise Unsupported(
                f"{_say(index, entry)}: name is a whiteout of an entry before it in the same layer"
            )

    def _link(self, index: int, entry: Entry) -> int:
        """The index a hard link's target has now; the link's attributes go to it."""
        target = self._find(index, entry)
        self.linked.add(target)
        inode = self.inodes[target]
        mode = inode.mode if inode.type == "symlink" else entry.mode
        if (inode.mode, inode.uid, inode.gid) != (mode, entry.uid, entry.gid):
            self.inodes[target] = inode._replace(mode=mode, uid=entry.uid, gid=entry.gid)
        self.times[target] = self.times[index]
        added = self.xattrs.pop(index, {})
        if inode.type != "reg":
            added = {name: value for name, value in added.items() if not name.startswith(b"user.")}
        kept = self.xattrs.pop(target, {})
        kept.pop(b"security.capability", None)
        if kept or added:
            self.xattrs[target] = kept | added
        return target

    def _find(self, index: int, entry: Entry) -> int:
        parts = _components(index, entry, entry.linkname, "linkname")
        where: int | Directory | None = self.root
        for part in parts:
            if not isinstance(where, Directory):
                if where is not None and where >= 0 and self.inodes[where].type == "symlink":
                    raise Unsupported(f"{_say(index, entry)}: linkname leads through a symbolic link")
                where = None
                break
            where = where.children.get(part)
        if where is None or where == WHITEOUT:
            raise Integrity(f"{_say(index, entry)}: linkname {entry.linkname[:200]!r} is no earlier entry")
        if isinstance(where, Directory):
            raise Integrity(f"{_say(index, entry)}: linkname {entry.linkname[:200]!r} is a directory")
        return where

    def _place(self, index: int, entry: Entry) -> tuple[Directory, bytes] | None:
        """The directory and last component of an oddly spelled name; None for the root."""
        parts = _components(index, entry, entry.name, "name")
        if not parts:
            return None
        base = parts.pop()
        directory = self.root
        for depth, part in enumerate(parts, 1):
            child = directory.children.get(part)
            if child == WHITEOUT:
                raise Unsupported(f"{_say(index, entry)}: name needs a parent that the same layer whites out")
            if child is None:
                path = b"/".join(parts[:depth])
                self.implicit_bytes += len(path)
                if self.implicit_bytes > MAX_IMPLICIT_BYTES:
                    raise Unsupported(f"{_say(index, entry)}: name has too many parents without entries")
                child = Directory(implicit=path)
                directory.children[part] = child
            elif not isinstance(child, Directory):
                if self.inodes[child].type == "symlink":
                    raise Unsupported(f"{_say(index, entry)}: name leads through a symbolic link")
                raise Integrity(f"{_say(index, entry)}: name uses a file as a directory")
            directory = child
        head, _, last = entry.name.rstrip(b"/").rpartition(b"/")
        if last == base:
            self.heads[head] = directory
        return directory, base

    def _records(self, index: int, entry: Entry) -> None:
        xattrs = {}
        for key, value in entry.records:
            if key[:13] == _XATTR:
                name = key[13:]
                if _keep(index, entry, name, value):
                    xattrs[name] = value
            elif key[:11] == _SPARSE:
                raise Unsupported(f"{_say(index, entry)}: records say it is a sparse file")
        if xattrs:
            self.xattrs[index] = xattrs


def _keep(index: int, entry: Entry, name: bytes, value: bytes) -> bool:
    """Whether unpacking as root on an ordinary filesystem leaves this xattr on the entry."""
    if name.startswith(b"trusted."):
        raise Integrity(f"{_say(index, entry)}: records forge xattr {name!r}")
    if not name or name in _XATTR_CLASSES or len(name) > MAX_NAME or b"\0" in name:
        raise Integrity(f"{_say(index, entry)}: records hold an xattr named {name[:64]!r}")
    if len(value) > MAX_XATTR_VALUE:
        raise Unsupported(f"{_say(index, entry)}: xattr {name!r} has {len(value)} bytes")
    if name.startswith(b"user."):
        return entry.type in {"reg", "dir", "hardlink"}
    if name in _ACLS:
        if entry.type == "symlink":
            return False
        # Version 2, then 8 bytes an entry (linux/posix_acl_xattr.h). A default one is a directory's.
        fits = name == _ACLS[0] or entry.type == "dir"
        if not fits or len(value) % 8 != 4 or value[:4] != b"\2\0\0\0":
            raise Integrity(f"{_say(index, entry)}: xattr {name!r} is no ACL for a {entry.type}")
        return True
    return name.startswith(b"security.")


def _components(index: int, entry: Entry, path: bytes, field_name: str) -> list[bytes]:
    """The components of a path: leading and trailing slashes and every `.` dropped."""
    if len(path) > MAX_PATH or b"\0" in path:
        raise Integrity(f"{_say(index, entry)}: {field_name} has {len(path)} bytes, or a NUL")
    parts = [part for part in path.strip(b"/").split(b"/") if part != b"."]
    if parts == [b""]:
        return []
    for part in parts:
        if not part or part == b"..":
            raise Integrity(f"{_say(index, entry)}: {field_name} has an empty component or `..`")
        if len(part) > MAX_NAME:
            raise Integrity(f"{_say(index, entry)}: {field_name} has a component of {len(part)} bytes")
    return parts


def _check_target(index: int, entry: Entry) -> None:
    link = entry.linkname
    if not link or len(link) > MAX_PATH or b"\0" in link:
        raise Integrity(f"{_say(index, entry)}: linkname of a symbolic link has {len(link)} bytes, or a NUL")


def _say(index: int, entry: Entry) -> str:
    return f"entry {index} {entry.name[:200]!r}"


class Clock:
    """The time an entry's inode shows, as (seconds, nanoseconds). Many share a time, and all share a few
    minutes.
    """

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, int]] = {}
        self._days: dict[str, int] = {}
        self._minutes: dict[str, int] = {}
        self._rests: dict[str, tuple[int, int]] = {}

    def read(self, index: int, entry: Entry) -> tuple[int, int]:
        """The time of an entry whose mod_time is not in `known` yet. Integrity when it is no time."""
        text = entry.mod_time
        if not text:
            return _raw_time(index, entry)
        try:
            day = self._days.get(text[:10])
            if day is None:
                day = self._days[text[:10]] = _day(text[:10])
            minute = self._minutes.get(text[10:16])
            if minute is None:
                minute = self._minutes[text[10:16]] = _minute(text[10:16])
            rest = self._rests.get(text[16:])
            if rest is None:
                rest = self._rests[text[16:]] = _rest(text[16:])
        except ValueError:
            raise Integrity(f"{_say(index, entry)}: mod_time {text[:64]!r} is no RFC 3339 time") from None
        time = self.known[text] = _bounded(day + minute + rest[0], rest[1])
        return time


def _day(text: str) -> int:
    """YYYY-MM-DD to seconds since the epoch."""
    match = _DAY.fullmatch(text)
    if match is None:
        raise ValueError(text)
    year, month, day = map(int, match.groups())
    if year == 0:  # datetime begins with year 1; both are long before the epoch
        return -(10**11)
    return (date(year, month, day).toordinal() - _EPOCH_DAY) * 86400


def _minute(text: str) -> int:
    """Thh:mm to seconds."""
    match = _MINUTE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return int(match[1]) * 3600 + int(match[2]) * 60


def _rest(text: str) -> tuple[int, int]:
    """:ss, a fraction, a zone: seconds to add, nanoseconds."""
    match = _REST.fullmatch(text)
    if match is None:
        raise ValueError(text)
    second, fraction, sign, hours, minutes = match.groups()
    offset = (int(hours) * 3600 + int(minutes) * 60) if sign else 0
    return int(second) + (offset if sign == "-" else -offset), int((fraction or "").ljust(9, "0"))


def _raw_time(index: int, entry: Entry) -> tuple[int, int]:
    """The PAX record mtime: what is left of a time whose year RFC 3339 cannot say."""
    value = dict(entry.records).get(b"mtime")
    if value is None:
        return _EPOCH
    match = _RAW.fullmatch(value)
    if match is None:
        raise Integrity(f"{_say(index, entry)}: mod_time is empty and record mtime {value[:64]!r} is no time")
    sign, seconds, fraction = match.groups()
    if sign:
        return _EPOCH
    return _bounded(int(seconds), int((fraction or b"")[:9].ljust(9, b"0")))


def _bounded(seconds: int, nanoseconds: int) -> tuple[int, int]:
    if seconds < 0 or (seconds, nanoseconds) > _LAST:
        return _EPOCH
    return seconds, nanoseconds
