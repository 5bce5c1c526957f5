"""Answers about the files of a meta.erofs in FUSE's form (include/uapi/linux/fuse.h), valid for ever.

A file's node id has bit 63, which no flat file's has; then 31 bits that number the tree, then the inode's nid.
Its inode number is the same without bit 63, so that overlayfs has room for its own bits above.
"""

from __future__ import annotations

import stat
from struct import Struct

from soci_snapshotter.formats.erofsread import Inode, MetaImage
from soci_snapshotter.formats.fusemsg import FOREVER

TREE_BIT = 1 << 63
NID_BITS = 32
NID_MASK = (1 << NID_BITS) - 1
_INO_MASK = TREE_BIT - 1

_BLOCK_SIZE = 4096  # st_blksize: what is good to read at once, as the flat files say
# ino, size, blocks, three times, their ns, mode, nlink, uid, gid, rdev, blksize, flags
_ATTR = "QQQqqqIIIIIIIIII"
_ATTR_OUT = Struct("=QII" + _ATTR)
_ENTRY_OUT = Struct("=QQQQII" + _ATTR)
_DIRENT = Struct("=QQII")  # ino, offset of the next, length of the name, type
_PLUS = Struct("=QQQQII" + _ATTR + "QQII")
_READ_IN = Struct("=8xQI")  # the handle passed over; cookie, most bytes of the answer
_XATTR_IN = Struct("=I4x")
_XATTR_OUT = Struct("=I4x")
_OVERLAY, _OPAQUE = b"trusted.overlay.", b"trusted.overlay.opaque\0"  # the one that formats.erofs writes
_NO_ENTRY = bytes(_ENTRY_OUT.size)

# file types of EROFS to those of getdents(2)
_KINDS = (0, 8, 4, 2, 6, 1, 12, 10)


def node_of(tree: int, nid: int) -> int:
    """The node id of inode `nid` of tree `tree`."""
    return TREE_BIT | tree << NID_BITS | nid


def _attributes(node: int, inode: Inode) -> tuple[int, ...]:
    _, _, mode, size, union, uid, gid, seconds, nanoseconds, links = inode
    rdev = union if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
    return (
        node & _INO_MASK, size, (size + 511) >> 9, seconds, seconds, seconds, nanoseconds, nanoseconds,
        nanoseconds, mode, links, uid, gid, rdev, _BLOCK_SIZE, 0,
    )  # fmt: skip


def entry(node: int, inode: Inode) -> bytes:
    """Answer to LOOKUP."""
    return _ENTRY_OUT.pack(node, 0, FOREVER, FOREVER, 0, 0, *_attributes(node, inode))


def no_entry() -> bytes:
    """Answer to LOOKUP of a name that is not there and never will be: the kernel remembers that too."""
    return _ENTRY_OUT.pack(0, 0, FOREVER, *(0,) * 19)


def attributes(node: int, inode: Inode) -> bytes:
    """Answer to GETATTR."""
    return _ATTR_OUT.pack(FOREVER, 0, 0, *_attributes(node, inode))


def listing(image: MetaImage, node: int, directory: Inode, body: bytes, *, plus: bool) -> bytes:
    """Answer to READDIR, or to READDIRPLUS: with what LOOKUP would say of each name.

    `body` is the request's.
    """
    cookie, room = _READ_IN.unpack_from(body)
    nid = node & NID_MASK
    tree, inos = node & ~NID_MASK, node & _INO_MASK & ~NID_MASK
    answer = bytearray()
    used, pack, kinds = 0, _PLUS.pack, _KINDS
    for name, child, kind, behind in image.entries(nid, directory, cookie):
        length = len(name)
        padding = -length & 7
        used += length + padding + (_PLUS.size if plus else _DIRENT.size)
        if used > room:
            break
        if not plus:
            answer += _DIRENT.pack(inos | child, behind, length, kinds[kind & 7])
        elif name in {b".", b".."}:  # no inode is asked for there, and a node of 0 says so
            answer += _NO_ENTRY + _DIRENT.pack(inos | child, behind, length, kinds[kind & 7])
        else:
            attributes = _attributes(tree | child, image.inode(child))
            answer += pack(
                tree | child, 0, FOREVER, FOREVER, 0, 0, *attributes,
                inos | child, behind, length, kinds[kind & 7],
            )  # fmt: skip
        answer += name
        if padding:
            answer += bytes(padding)
    return bytes(answer)


def may_have(body: bytes) -> bool:
    """Whether any file could have the xattr of a GETXATTR: overlayfs asks for its own, of each file, in vain."""
    return not body.startswith(_OVERLAY, _XATTR_IN.size) or body.startswith(_OPAQUE, _XATTR_IN.size)


def xattr_asked(body: bytes) -> tuple[int, bytes]:
    """(most bytes of the answer, name) of GETXATTR; the name is empty in LISTXATTR."""
    return _XATTR_IN.unpack_from(body)[0], body[_XATTR_IN.size :].split(b"\0", 1)[0]


def xattr_size(size: int) -> bytes:
    """Answer to GETXATTR or LISTXATTR with room for 0 bytes: how many there are."""
    return _XATTR_OUT.pack(size)
