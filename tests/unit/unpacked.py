"""What a layer unpacks to, by three ways that share no code: GNU tar, an EROFS image, Python's tarfile."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tests.unit.erofs_reader import Image

from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.tree import build_tree, implicit_directories

if TYPE_CHECKING:
    from tests.unit.indexed_layer import IndexedLayer

TYPES = {
    tarfile.REGTYPE: "reg",
    tarfile.AREGTYPE: "reg",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "char",
    tarfile.BLKTYPE: "block",
    tarfile.DIRTYPE: "dir",
    tarfile.FIFOTYPE: "fifo",
}
WHITEOUT = b".wh."


@dataclass(frozen=True)
class Node:
    """One path. `data`: a file's content or a link's target; `same`: the first of the names of its inode."""

    mode: int
    uid: int
    gid: int
    mtime: int | None
    data: bytes = b""
    device: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    same: bytes = b""


FIELDS = tuple(each.name for each in fields(Node))


def by_tar(tar: bytes) -> dict[bytes, Node]:
    """The tree that GNU tar, as root, leaves of it; without the root itself."""
    with tempfile.TemporaryDirectory() as scratch:
        archive, root = Path(scratch, "layer.tar"), Path(scratch, "root")
        archive.write_bytes(tar)
        root.mkdir()
        # Directories get their times last: members of one need not follow each other.
        command = ["tar", "-x", "-p", "--same-owner", "--numeric-owner", "--delay-directory-restore"]
        command += ["--xattrs", "--xattrs-include=*"]
        done = subprocess.run(
            [*command, "-f", str(archive), "-C", str(root)],
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            umask=0o022,
            capture_output=True,
            check=False,
        )
        if not any(tar[:512]):
            return {}  # tar finds that an empty archive looks like none
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return _scan(os.fsencode(root))


def _scan(root: bytes) -> dict[bytes, Node]:
    found: dict[bytes, Node] = {}
    inodes: dict[bytes, int] = {}
    stack = [b""]
    while stack:
        above = stack.pop()
        with os.scandir(os.path.join(root, above)) as inside:
            for item in inside:
                path = above + b"/" + item.name if above else item.name
                status = item.stat(follow_symlinks=False)
                inodes[path] = status.st_ino
                found[path] = _node(item.path, status)
                if stat.S_ISDIR(status.st_mode):
                    stack.append(path)
    return _with_links(found, inodes)


def _node(path: bytes, status: os.stat_result) -> Node:
    data = b""
    if stat.S_ISREG(status.st_mode):
        data = Path(os.fsdecode(path)).read_bytes()
    elif stat.S_ISLNK(status.st_mode):
        data = os.readlink(path)
    names = os.listxattr(path, follow_symlinks=False)
    xattrs = {os.fsencode(name): os.getxattr(path, name, follow_symlinks=False) for name in names}
    return Node(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        max(0, status.st_mtime_ns),  # before 1970 an unpack into a snapshot sets the epoch
        data,
        status.st_rdev,
        tuple(sorted(xattrs.items())),
    )


def _with_links(found: dict[bytes, Node], inodes: dict[bytes, int]) -> dict[bytes, Node]:
    names = defaultdict(list)
    for path, inode in inodes.items():
        names[inode].append(path)
    return {path: replace(node, same=min(names[inodes[path]])) for path, node in found.items()}


def by_index(layer: IndexedLayer, *, bottom: bool = True) -> dict[bytes, Node]:
    """The tree that a node shows: EROFS of the ztoc's entries, file data through spans."""
    tree = build_tree(layer.ztoc.entries)
    size = -(-layer.spans.uncompressed_size // 512) * 512
    image = Image(build_meta(tree, data_size=size, uuid=bytes(16), inherited={}, bottom=bottom))
    implicit = set(implicit_directories(tree))
    found, inodes = {}, {}
    for path, inode in image.walk().items():
        data = inode.data if stat.S_ISLNK(inode.mode) else b""
        if inode.chunks:
            ((device, block),) = inode.chunks
            assert device == 1
            data = layer.read(block * 512, inode.size)
            assert len(data) == inode.size
        seconds, nanoseconds = inode.mtime
        found[path] = Node(
            inode.mode,
            inode.uid,
            inode.gid,
            None if path in implicit and inode.mtime == (0, 0) else seconds * 10**9 + nanoseconds,
            data,
            os.makedev(inode.rdev >> 8 & 0xFFF, inode.rdev & 0xFF | inode.rdev >> 12 & 0xFFF00)
            if stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)
            else 0,
            tuple(sorted(inode.xattrs.items())),
        )
        inodes[path] = inode.nid
        if stat.S_ISCHR(inode.mode) and not inode.rdev:
            inodes[path] = -len(inodes)  # whiteouts may share an inode
    del found[b""], inodes[b""]
    return _with_links(found, inodes)


def without_whiteouts(tree: dict[bytes, Node]) -> dict[bytes, Node]:
    """What a bottom layer shows of it: the marks mean nothing there."""
    return {path: node for path, node in tree.items() if not _base(path).startswith(WHITEOUT)}


def as_overlayfs(tree: dict[bytes, Node]) -> dict[bytes, Node]:
    """What a layer with others below shows: a 0:0 device for each mark, an xattr for an opaque directory."""
    found = without_whiteouts(tree)
    for path in tree.keys() - found.keys():
        above, base = path[: -len(_base(path))], _base(path)
        if base == b".wh..wh..opq":
            if above:
                node = found[above[:-1]]
                xattrs = tuple(sorted((*node.xattrs, (b"trusted.overlay.opaque", b"y"))))
                found[above[:-1]] = replace(node, xattrs=xattrs)
        else:
            hidden = above + base[len(WHITEOUT) :]
            found[hidden] = Node(stat.S_IFCHR, 0, 0, 0, same=hidden)
    return found


def compare(found: dict[bytes, Node], extracted: dict[bytes, Node]) -> None:
    """Equal, but for the times of directories that no entry names: tar takes the clock's."""
    assert found.keys() == extracted.keys()
    for path, node in found.items():
        if node.mtime is None:
            node = replace(node, mtime=extracted[path].mtime)
        there = extracted[path]
        differ = {
            name: (getattr(node, name), getattr(there, name))
            for name in FIELDS
            if getattr(node, name) != getattr(there, name)
        }
        assert not differ, (path, differ)


def _base(path: bytes) -> bytes:
    return path.rpartition(b"/")[2]


def check_files(layer: IndexedLayer, tar: bytes) -> None:
    """Names, types, owners, link targets and content of every member, as Python's tarfile sees them."""
    layer.check(tar)
    entries = layer.ztoc.entries
    if not tar:  # tarfile wants one block at least
        assert entries == []
        return
    with tarfile.open(
        fileobj=io.BytesIO(tar), mode="r:", encoding="utf-8", errors="surrogateescape"
    ) as reader:
        infos = reader.getmembers()
        assert len(infos) == len(entries)
        for info, entry in zip(infos, entries, strict=True):
            # tarfile takes the slash off a directory's name
            assert os.fsencode(info.name).rstrip(b"/") == entry.name.rstrip(b"/")
            assert (TYPES[info.type], os.fsencode(info.linkname)) == (entry.type, entry.linkname)
            assert (info.mode, info.uid, info.gid) == (entry.mode, entry.uid, entry.gid)
            if info.ischr() or info.isblk():
                assert (info.devmajor, info.devminor) == (entry.devmajor, entry.devminor)
            if info.isreg():
                file = reader.extractfile(info)
                assert file is not None
                assert layer.read(entry.offset, entry.size) == file.read()
