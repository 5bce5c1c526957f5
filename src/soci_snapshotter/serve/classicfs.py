"""The classic FUSE filesystem: a layer's tree served from its meta.erofs, for kernels that cannot mount it.

Trees are directories `m<number>` of the one FUSE mount. Names, attributes and links are answered from the
image's bytes, READs by the layer's flat file at the tar's own offsets (and parked there, if need be). Nothing
is kept per file, and the kernel keeps what it was told for ever: it asks once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from soci_snapshotter.formats import fusemsg, fusetree
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.formats.erofsread import DIRECTORY, Chunks, MetaImage
from soci_snapshotter.formats.fusemsg import Opcode
from soci_snapshotter.formats.fusetree import NID_BITS, NID_MASK, TREE_BIT

_CACHE = 16 << 20  # bytes of metadata kept in memory, of all layers: 150,000 inodes
_NUMBER_BYTES = 3  # of a tree's number: inode numbers stay below 2^56, overlayfs's own bits above are free
_TRUSTED = b"trusted."
# Plain integers: an enumeration's members cost as much as what is done with them.
_LOOKUP = int(Opcode.LOOKUP)
_GETATTR = int(Opcode.GETATTR)
_READDIR = int(Opcode.READDIR)
_READDIRPLUS = int(Opcode.READDIRPLUS)
_READLINK = int(Opcode.READLINK)
_GETXATTR = int(Opcode.GETXATTR)
_LISTXATTR = int(Opcode.LISTXATTR)
_STATFS = int(Opcode.STATFS)
_OPEN = int(Opcode.OPEN)
_RELEASE = int(Opcode.RELEASE)

Read = Callable[[int, int, int], Buffer | None]
"""read(unique, offset, size) of a flat file: the bytes of the tar, or None when the request was parked."""


class _Local:
    """The bytes of a complete layer, from its file."""

    def __init__(self, path: bytes) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, _unique: int, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)


class _Tree:
    """One layer's tree: its image, and whose bytes its files have."""

    def __init__(self, number: int, meta: Path, device: bytes | int, chunks: Chunks) -> None:
        self.device = device
        self.local = _Local(device) if isinstance(device, bytes) else None
        try:
            self.descriptor = os.open(meta, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # The kernel fetches it while nobody waits.
                os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                size = os.fstat(self.descriptor).st_size
                self.image = MetaImage(self._pread, size, chunks, number)
            except BaseException:
                os.close(self.descriptor)
                raise
        except BaseException:
            if self.local is not None:
                os.close(self.local.descriptor)
            raise

    def _pread(self, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)

    def close(self) -> None:
        os.close(self.descriptor)
        if self.local is not None:
            os.close(self.local.descriptor)


class Trees:
    """The trees of one FUSE server, by number. Thread safe.

    `reader_of` gives the flat file's read for a node id, None for one that is not served.
    """

    def __init__(self, reader_of: Callable[[int], Read | None]) -> None:
        self._reader_of = reader_of
        self._chunks = Chunks(_CACHE)
        self._trees: dict[int, _Tree] = {}

    @staticmethod
    def name_of(number: int) -> bytes:
        """The directory of a tree in the FUSE mount."""
        return b"m%d" % number

    def add(self, meta: Path, device: bytes | int, number: int = 0) -> int:
        """Serve `meta`, its data from the flat file of a node id or from a local file; the tree's number.

        `number` is the one it had before a takeover, else a new one is drawn. OSError, or Integrity for a file
        that is no meta.erofs.
        """
        while True:
            drawn = number or int.from_bytes(os.urandom(_NUMBER_BYTES), "big")
            tree = _Tree(drawn, meta, device, self._chunks)
            if drawn and self._trees.setdefault(drawn, tree) is tree:
                return drawn
            tree.close()
            if number:
                raise ValueError(f"tree {number} is there already")

    def root_of(self, number: int) -> int:
        """The node id of a tree's root."""
        return fusetree.node_of(number, self._trees[number].image.root)

    def names(self, node: int) -> list[tuple[bytes, int, bool]]:
        """What is in a directory: names, node ids, and whether they are directories too."""
        image, nid = self._tree(node).image, node & NID_MASK
        return [
            (entry.name, node & ~NID_MASK | entry.nid, entry.kind == DIRECTORY)
            for entry in image.entries(nid, image.inode(nid), 0)
            if entry.name not in {b".", b".."}
        ]

    def remove(self, number: int) -> None:
        """Forget a tree of which the kernel has no inode any more."""
        self._trees.pop(number).close()
        self._chunks.drop(number)

    def lookup(self, name: bytes) -> bytes | None:
        """Answer to LOOKUP in the FUSE mount's root, or None."""
        tree = self._trees.get(int(name[1:])) if name[:1] == b"m" and name[1:9].isdigit() else None
        if tree is None or len(name) > 9:
            return None
        root = tree.image.root
        return fusetree.entry(fusetree.node_of(int(name[1:]), root), tree.image.inode(root))

    def read(self, unique: int, node: int, offset: int, size: int) -> Buffer | None:
        """The answer to READ, or None when the flat file parked it. OSError or SociError as the reader's errno."""
        tree = self._tree(node)
        nid = node & NID_MASK
        inode = tree.image.inode(nid)
        size = min(size, inode.size - offset)
        if size <= 0:
            return b""
        if isinstance(tree.device, int):
            read = self._reader_of(tree.device)
            if read is None:
                raise OSError(errno.EIO, "the layer is not served")
        else:
            read = tree.local.read  # type: ignore[union-attr]
        return read(unique, tree.image.data_at(nid, inode) + offset, size)

    def answer(self, opcode: int, node: int, body: bytes, *, uid: int, opens: bool) -> bytes | int:
        """The answer to anything but READ, or an errno. OSError or SociError as the caller's errno.

        `uid` is who asks; `opens` is whether OPEN must be answered: else the kernel is told to do without.
        """
        if opcode == _GETXATTR and not fusetree.may_have(body):
            return errno.ENODATA
        tree = self._tree(node)
        image, nid = tree.image, node & NID_MASK
        inode = image.inode(nid)
        if opcode == _LOOKUP:
            child = image.lookup(nid, inode, fusemsg.name_in(body))
            if not child:
                return fusetree.no_entry()
            return fusetree.entry(node & ~NID_MASK | child, image.inode(child))
        if opcode == _GETATTR:
            return fusetree.attributes(node, inode)
        if opcode in {_READDIR, _READDIRPLUS}:
            return fusetree.listing(image, node, inode, body, plus=opcode == _READDIRPLUS)
        if opcode == _READLINK:
            return image.target(nid, inode)
        if opcode in {_GETXATTR, _LISTXATTR}:
            return _xattr(image.xattrs(nid, inode), opcode, body, uid)
        if opcode == _STATFS:
            return fusemsg.statfs_out()
        if opcode == _OPEN and opens:
            return fusemsg.open_out(node)
        if opcode == _RELEASE:
            return b""
        return errno.ENOSYS

    def _tree(self, node: int) -> _Tree:
        tree = self._trees.get((node & ~TREE_BIT) >> NID_BITS)
        if tree is None:
            raise OSError(errno.ESTALE, "the layer is not mounted any more")
        return tree


def _xattr(xattrs: dict[bytes, bytes], opcode: int, body: bytes, uid: int) -> bytes | int:
    room, name = fusetree.xattr_asked(body)
    if opcode == _GETXATTR:
        value = xattrs.get(name)
        if value is None:
            return errno.ENODATA
    else:
        # As the kernel's own filesystems: only root is shown these.
        value = b"".join(key + b"\0" for key in sorted(xattrs) if not uid or not key.startswith(_TRUSTED))
    if not room:
        return fusetree.xattr_size(len(value))
    return value if len(value) <= room else errno.ERANGE
