"""Compares two root filesystems entry by entry, as any process in a container could see them.

Paths, names, link targets and xattr values are bytes. What cannot be read counts as seen too: the errno's
name stands in the field, so a file that gives EIO on one side only is a difference, not a crash. Sizes of
directories are left out: they tell how a filesystem stores them, not what is in them. Access and change
times are left out: no image records them.
"""

import dataclasses
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_READ_BYTES = 1 << 20

_TYPES = {
    stat.S_IFREG: "reg",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True)
class Entry:
    """One path. A field that its type does not have is None; "ENOENT", "EIO", ... where reading it failed.

    type is lstat's, listed_type what the directory listing says without lstat (d_type).
    hard_link is the first path, in walking order, of those that are the same inode; None with one link only.
    """

    type: str
    listed_type: str | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None
    size: int | None = None
    links: int | None = None
    rdev: tuple[int, int] | None = None
    xattrs: dict[str, bytes] | str | None = None
    target: bytes | str | None = None
    content: str | None = None
    hard_link: bytes | None = None


@dataclass(frozen=True)
class Difference:
    """`field` of the entry at `path` (relative, b"" is the root) is `left` in one and `right` in the other.

    The field "presence" has the two types, None where the path does not exist.
    """

    path: bytes
    field: str
    left: object
    right: object

    def __str__(self) -> str:
        return f"{self.path!r}: {self.field}: {self.left!r} != {self.right!r}"


def differences(left: bytes, right: bytes, *, content: bool = True) -> Iterator[Difference]:
    """Every field of every entry in which the trees at `left` and `right` differ, in order of paths.

    Without `content` no file is opened. Nothing that is mounted below either root is entered.
    """
    ours, theirs = dict(walk(left, content=content)), dict(walk(right, content=content))
    names = [field.name for field in dataclasses.fields(Entry)]
    for path in sorted(ours.keys() | theirs.keys()):
        one, two = ours.get(path), theirs.get(path)
        if one is None or two is None:
            yield Difference(path, "presence", one and one.type, two and two.type)
            continue
        for name in names:
            if (a := getattr(one, name)) != (b := getattr(two, name)):
                yield Difference(path, name, a, b)


def walk(root: bytes, *, content: bool = True) -> Iterator[tuple[bytes, Entry]]:
    """Each path below `root` with its entry, the root first, then depth first in order of names."""
    first_paths: dict[tuple[int, int], bytes] = {}
    device: int | None = None
    pending: list[tuple[bytes, str | None]] = [(b"", None)]
    while pending:
        path, listed_type = pending.pop()
        full = os.path.join(root, path) if path else root
        try:
            status = os.lstat(full)
        except OSError as error:
            yield path, Entry(_name(error), listed_type)
            continue
        device = status.st_dev if device is None else device
        yield path, _entry(full, path, listed_type, status, first_paths, content=content)
        if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
            pending += [(os.path.join(path, name), kind) for name, kind in _listing(full)]


def _listing(directory: bytes) -> list[tuple[bytes, str]]:
    """Names and listed types, last name first: the walk takes from the end."""
    with os.scandir(directory) as found:
        entries = [(each.name, _listed_type(each)) for each in found]
    return sorted(entries, reverse=True)


def _listed_type(entry: os.DirEntry[bytes]) -> str:
    if entry.is_symlink():
        return "symlink"
    if entry.is_dir(follow_symlinks=False):
        return "dir"
    return "reg" if entry.is_file(follow_symlinks=False) else "other"


def _entry(
    full: bytes,
    path: bytes,
    listed_type: str | None,
    status: os.stat_result,
    first_paths: dict[tuple[int, int], bytes],
    *,
    content: bool,
) -> Entry:
    kind = _TYPES[stat.S_IFMT(status.st_mode)]
    hard_link = None
    if kind != "dir" and status.st_nlink > 1:
        hard_link = first_paths.setdefault((status.st_dev, status.st_ino), path)
    return Entry(
        type=kind,
        listed_type=listed_type,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=status.st_size if kind in ("reg", "symlink") else None,
        links=status.st_nlink,
        rdev=_rdev(kind, status),
        xattrs=_xattrs(full),
        target=_target(full) if kind == "symlink" else None,
        content=_sha256(full) if content and kind == "reg" else None,
        hard_link=hard_link,
    )


def _rdev(kind: str, status: os.stat_result) -> tuple[int, int] | None:
    return (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in ("char", "block") else None


def _xattrs(full: bytes) -> dict[str, bytes] | str:
    """All of them by name; Python gives names as str, with surrogates for odd bytes."""
    try:
        names = os.listxattr(full, follow_symlinks=False)
        return {name: os.getxattr(full, name, follow_symlinks=False) for name in names}
    except OSError as error:
        return _name(error)


def _target(full: bytes) -> bytes | str:
    try:
        return os.readlink(full)
    except OSError as error:
        return _name(error)


def _sha256(full: bytes) -> str:
    """Of the whole file as read(2) gives it; the errno's name if it does not."""
    digest = hashlib.sha256()
    buffer = bytearray(_READ_BYTES)
    view = memoryview(buffer)
    try:
        with open(full, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(view[:size])
    except OSError as error:
        return _name(error)
    return digest.hexdigest()


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))


def main(arguments: list[str]) -> Literal[0, 1]:
    """`python -m harness.rootfs_walk LEFT RIGHT`: prints the differences; 1 if there are any."""
    left, right = arguments
    found = 0
    for each in differences(os.fsencode(left), os.fsencode(right)):
        print(each)
        found += 1
    print(f"{found} differences")
    return 1 if found else 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
