"""Write meta.erofs: names, inodes and xattrs of a layer, pointing into its tar (linux fs/erofs/erofs_fs.h).

Blocks have 512 bytes, so that a tar's own offsets are block addresses on device 1. Every inode is the
extended one (64 bytes) at byte 32 * nid of the image. A regular file's data is one chunk as large as the
file: with plain inodes on an extra device the kernel sends one request per page. Directories and symbolic
links are whole blocks in the image itself and a tail behind the inode, which must not cross a block.

The kernel reads what it needs of the image page by page, each with a request of its own. So the root comes first
(its nid has 16 bits), then all that is no directory, then the directories, each followed by its own blocks, in
depth-first order both, as `find` reads them: whoever only lists names touches a third of the pages.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import MAX_DATA, WHITEOUT, Directory, Tree

BLOCK = 512
_BLOCK_BITS = 9
_MAGIC = 0xE0F5E1E2
_SUPER_OFFSET = 1024
_COMPAT_MTIME = 0x2  # inode times are modification times
_INCOMPAT = 0x4 | 0x8  # CHUNKED_FILE, DEVICE_TABLE
_DEVICE_SLOT = 128  # bytes of one; the table begins right behind the superblock
_FIRST_INODE = 1536  # the block after both; so no nid is 0, an inode number that readdir(3) skips
_DATA_DEVICE = 1

_SUPER = Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24x")
_DEVICE = Struct("<64sII56x")
_INODE = Struct("<HHHHQIIIIqII16x")
_FILE = Struct("<HHHHQIIIIqII16xHHI24x")  # with its chunk index, padded to the next nid
_CHUNK = Struct("<HHI")
_XATTR_ENTRY = Struct("<BBH")
_DIRENT = 12
_DIRENTS = [Struct("<" + "QHBB" * count) for count in range(BLOCK // (_DIRENT + 1) + 1)]
_NLINK_OFFSET = 44
_NLINK = Struct("<I")

# i_format: bit 0 extended, then the layout
_PLAIN, _INLINE, _CHUNKED = 1 | 0 << 1, 1 | 2 << 1, 1 | 4 << 1
_CHUNK_INDEXES = 0x20
_CHUNK_BITS_MAX = 31  # 5 bits of chunk format; bigger files take several indexes
_ONE_CHUNK = BLOCK << _CHUNK_BITS_MAX  # 1 TiB
_U32 = 2**32 - 1

# file types of directory entries and st_mode
_TYPES = {
    "reg": (1, stat.S_IFREG),
    "dir": (2, stat.S_IFDIR),
    "char": (3, stat.S_IFCHR),
    "block": (4, stat.S_IFBLK),
    "fifo": (5, stat.S_IFIFO),
    "symlink": (7, stat.S_IFLNK),
}
_DIR, _CHAR = 2, 3
_XATTR_PREFIXES = (  # name indexes; the longest match first
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)
_XATTR_HEADER = bytes(12)  # name filter and shared count: neither is used
_MAX_XATTR_BYTES = (2**16 - 2) * 4 + 12  # i_xattr_icount is u16
_OPAQUE = (b"trusted.overlay.opaque", b"y")


@dataclass(frozen=True, slots=True)
class Inherited:
    """What a directory without an entry takes from the layers below. xattrs: (whole name, value) pairs."""

    mode: int
    uid: int
    gid: int
    mtime_s: int
    mtime_ns: int
    xattrs: tuple[tuple[bytes, bytes], ...]


_NOTHING_BELOW = Inherited(0o755, 0, 0, 0, 0, ())


def build_meta(
    tree: Tree, *, data_size: int, uuid: bytes, inherited: Mapping[bytes, Inherited], bottom: bool
) -> bytes:
    """The image whose device 1 is the layer's tar of `data_size` bytes, a multiple of 512.

    `inherited` maps the paths of implicit_directories(); one missing becomes 0755 of root at the epoch. In a
    `bottom` layer whiteouts and opaque marks are left out. The same arguments give the same bytes. Integrity
    when data lies beyond data_size, Unsupported for what EROFS cannot hold.
    """
    if tree.data_end > data_size:
        raise Integrity(f"data up to byte {tree.data_end} of a tar of {data_size}")
    if data_size > MAX_DATA - BLOCK or data_size % BLOCK:
        raise Unsupported(f"a tar of {data_size} bytes: EROFS reaches {MAX_DATA - BLOCK}, in blocks of 512")
    if len(uuid) != 16:
        raise ValueError("a UUID has 16 bytes")
    writer = _Writer(tree, inherited, bottom)
    image = writer.write()
    image.extend(bytes(-len(image) % BLOCK))
    _SUPER.pack_into(
        image,
        _SUPER_OFFSET,
        _MAGIC,
        0,  # no checksum
        _COMPAT_MTIME,
        _BLOCK_BITS,
        0,
        writer.root_nid,
        writer.inodes,
        0,  # build time
        0,
        len(image) // BLOCK,
        0,  # nids count from the image's first byte
        0,  # no shared xattrs
        uuid,
        b"",
        _INCOMPAT,
        0,
        1,  # extra devices
        (_SUPER_OFFSET + _SUPER.size) // _DEVICE_SLOT,
        0,  # directory blocks are blocks
        0,
        0,
        0,
    )
    _DEVICE.pack_into(image, _SUPER_OFFSET + _SUPER.size, b"", data_size // BLOCK, 0)
    return bytes(image)


class _Plan:
    """A directory whose inode is reserved: where, and how its entries fall into blocks."""

    __slots__ = (
        *("counts", "directory", "inode_at", "names", "nid", "parent", "size", "xattrs"),
        *("below", "nids", "places", "types"),
    )

    def __init__(self, directory: Directory, names: list[bytes], xattrs: bytes) -> None:
        self.directory = directory
        self.names = names
        self.xattrs = xattrs
        self.counts, self.size = _split(names)
        self.inode_at = self.nid = self.parent = 0
        self.nids: list[int] = []  # of the names, in their order; 0 for a directory, until it is reserved
        self.types: list[int] = []
        self.places: list[int] = []  # where among them directories are
        self.below: list[_Plan] = []  # in the order of their names


def _split(names: list[bytes]) -> tuple[list[int], int]:
    """Entries per block, and the directory's size in bytes."""
    total = _DIRENT * len(names) + len(b"".join(names))
    if total <= BLOCK:
        return [len(names)], total
    counts = []
    used = count = 0
    for name in names:
        need = _DIRENT + len(name)
        if used + need > BLOCK:
            counts.append(count)
            used = count = 0
        used += need
        count += 1
    counts.append(count)
    return counts, (len(counts) - 1) * BLOCK + used


class _Writer:
    def __init__(self, tree: Tree, inherited: Mapping[bytes, Inherited], bottom: bool) -> None:
        self.tree = tree
        self.inherited = inherited
        self.bottom = bottom
        self.image = bytearray(_FIRST_INODE)
        self.special = {WHITEOUT, *tree.xattrs, *tree.linked}
        self.inodes = 0
        self.root_nid = 0
        self.shared: dict[
            int, int
        ] = {}  # nids of inodes with several names, by index; WHITEOUT is one of them

    def write(self) -> bytearray:
        root = self._plan(self.tree.root)
        self._reserve(root)
        root.parent = self.root_nid = root.nid
        stack = [root]
        while stack:
            stack.extend(reversed(self._files(stack.pop())))
        stack = [root]
        while stack:
            stack.extend(reversed(self._directory(stack.pop())))
        return self.image

    def _plan(self, directory: Directory) -> _Plan:
        children = directory.children
        names = [b".", b"..", *children]
        if self.bottom and WHITEOUT in children.values():
            names = [name for name in names if children.get(name) != WHITEOUT]
        names.sort()
        return _Plan(directory, names, self._directory_xattrs(directory))

    def _directory_xattrs(self, directory: Directory) -> bytes:
        own = self.tree.xattrs.get(directory.inode)
        opaque = directory.opaque and not self.bottom
        if own is None and not opaque and directory.implicit is None:
            return b""
        xattrs: dict[bytes, bytes] = {}
        if directory.implicit is not None:
            xattrs.update(self.inherited.get(directory.implicit, _NOTHING_BELOW).xattrs)
        xattrs.update(own or {})
        if opaque:
            xattrs.update([_OPAQUE])
        return _pack_xattrs(xattrs)

    def _reserve(self, plan: _Plan) -> None:
        """Room for a directory's inode, xattrs and tail."""
        tail = plan.size % BLOCK if _has_tail(plan.size, len(plan.xattrs)) else 0
        plan.inode_at = self._align(len(plan.xattrs), tail)
        plan.nid = plan.inode_at // 32
        self.inodes += 1
        self.image.extend(bytes(_padded(64 + len(plan.xattrs) + tail)))

    def _align(self, xattrs: int, tail: int) -> int:
        """Pad the image so that a tail behind the next inode does not cross a block; the inode's offset."""
        position = len(self.image)
        start = (position + 64 + xattrs) % BLOCK
        if tail and start + tail > BLOCK:
            skip = _padded(BLOCK - start)
            self.image.extend(bytes(skip))
            position += skip
        return position

    def _blocks(self, count: int) -> int:
        """Room for `count` blocks at the image's end; the first one's offset."""
        self.image.extend(bytes(-len(self.image) % BLOCK + count * BLOCK))
        return len(self.image) - count * BLOCK

    def _directory(self, plan: _Plan) -> list[_Plan]:
        """Write a directory: room for the directories in it, then its entries and its own inode. The directories
        in it.
        """
        attributes_size = len(plan.xattrs)
        tail = _has_tail(plan.size, attributes_size)
        whole = len(plan.counts) - tail
        blocks_at = self._blocks(whole) if whole else 0
        below = plan.below
        nids, types = self._numbers(plan), plan.types
        start = 0
        for number, count in enumerate(plan.counts):
            place = blocks_at + number * BLOCK if number < whole else plan.inode_at + 64 + attributes_size
            stop = start + count
            self._dirents(place, plan.names[start:stop], nids[start:stop], types[start:stop])
            start = stop
        directory = plan.directory
        if directory.inode < 0:
            took = self.inherited.get(directory.implicit or b"", _NOTHING_BELOW)
            mode, owner, time = took.mode, (took.uid, took.gid), (took.mtime_s, took.mtime_ns)
        else:
            entry = self.tree.inodes[directory.inode]
            mode, owner, time = entry.mode, (entry.uid, entry.gid), self.tree.times[directory.inode]
        inode = _INODE.pack(
            _INLINE if tail else _PLAIN,
            _xattr_count(plan.xattrs),
            mode & 0o7777 | stat.S_IFDIR,
            0,
            plan.size,
            blocks_at // BLOCK,
            plan.nid & _U32,
            *owner,
            *time,
            2 + len(below),
        )
        self.image[plan.inode_at : plan.inode_at + 64 + attributes_size] = inode + plan.xattrs
        return below

    def _numbers(self, plan: _Plan) -> list[int]:
        """The nids of a directory's names, now that the directories among them get theirs."""
        inner = iter(plan.below)
        for place in plan.places:
            name = plan.names[place]
            if name in {b".", b".."}:
                plan.nids[place] = plan.nid if name == b"." else plan.parent
            else:
                child = next(inner)
                child.parent = plan.nid
                self._reserve(child)
                plan.nids[place] = child.nid
        return plan.nids

    def _files(self, plan: _Plan) -> list[_Plan]:
        """Write the inodes of what is in a directory, except those of directories, which are returned."""
        image, inodes, times, special = self.image, self.tree.inodes, self.tree.times, self.special
        pack, regular = _FILE.pack, stat.S_IFREG
        nids, types = plan.nids, plan.types
        get = plan.directory.children.get
        for name in plan.names:
            child = get(name)
            if isinstance(child, int):
                if child in special:
                    nid, kind = self._special(child)
                else:
                    _, what, offset, size, _, mode, uid, gid, _, _, _, _, _, _ = entry = inodes[child]
                    if what == "reg" and 0 < size <= _ONE_CHUNK:
                        seconds, nanoseconds = times[child]
                        nid, kind = len(image) >> 5, 1
                        chunk = _CHUNK_INDEXES | (((size - 1) >> 9).bit_length())
                        image += pack(
                            _CHUNKED, 0, mode & 0o7777 | regular, 0, size, chunk, nid & _U32, uid, gid,
                            seconds, nanoseconds, 1, 0, _DATA_DEVICE, offset >> 9,
                        )  # fmt: skip
                        self.inodes += 1
                    else:
                        nid, kind = self._file(entry, times[child], b"")
            else:
                nid, kind = 0, _DIR
                plan.places.append(len(nids))
                if child is not None:
                    plan.below.append(self._plan(child))
            nids.append(nid)
            types.append(kind)
        return plan.below

    def _special(self, index: int) -> tuple[int, int]:
        """nid and type of a whiteout, or of a file with xattrs or several names."""
        tree = self.tree
        kind = _CHAR if index == WHITEOUT else _TYPES[tree.inodes[index].type][0]
        nid = self.shared.get(index)
        if nid is not None:
            at = nid * 32 + _NLINK_OFFSET
            _NLINK.pack_into(self.image, at, _NLINK.unpack_from(self.image, at)[0] + 1)
            return nid, kind
        if index == WHITEOUT:
            # overlayfs: a character device 0:0. All are one inode; nothing ever shows it.
            nid = self._inode(_PLAIN, stat.S_IFCHR, 0, 0, (0, 0), (0, 0), b"", 0)
        else:
            nid, kind = self._file(
                tree.inodes[index], tree.times[index], _pack_xattrs(tree.xattrs.get(index, {}))
            )
        if index == WHITEOUT or index in tree.linked:
            self.shared[index] = nid
        return nid, kind

    def _file(self, entry: Entry, time: tuple[int, int], xattrs: bytes) -> tuple[int, int]:
        """Write anything but a directory; nid and type."""
        kind, mode = _TYPES[entry.type]
        owner = entry.uid, entry.gid
        if entry.type == "symlink":
            return self._symlink(entry, time, xattrs), kind
        mode |= entry.mode & 0o7777
        if entry.type == "reg" and entry.size:
            bits = min(((entry.size - 1) >> _BLOCK_BITS).bit_length(), _CHUNK_BITS_MAX)
            nid = self._inode(_CHUNKED, mode, entry.size, _CHUNK_INDEXES | bits, owner, time, xattrs, 0)
            first, step = entry.offset >> _BLOCK_BITS, 1 << bits
            indexes = b"".join(
                _CHUNK.pack(0, _DATA_DEVICE, first + number * step)
                for number in range((entry.size - 1 >> _BLOCK_BITS + bits) + 1)
            )
            # Indexes are 8-byte aligned behind the xattrs.
            self.image.extend(bytes(-len(self.image) % 8) + indexes)
            self.image.extend(bytes(-len(self.image) % 32))
            return nid, kind
        device = _device(entry) if entry.type in {"char", "block"} else 0
        nid = self._inode(_PLAIN, mode, 0, device, owner, time, xattrs, 0)
        self.image.extend(bytes(-len(self.image) % 32))
        return nid, kind

    def _symlink(self, entry: Entry, time: tuple[int, int], xattrs: bytes) -> int:
        target = entry.linkname
        tail = len(target) % BLOCK if _has_tail(len(target), len(xattrs)) else 0
        whole = target[: len(target) - tail]
        first_block = 0
        if whole:
            at = self._blocks(-(-len(whole) // BLOCK))
            self.image[at : at + len(whole)] = whole
            first_block = at // BLOCK
        owner = entry.uid, entry.gid
        layout = _INLINE if tail else _PLAIN
        mode = stat.S_IFLNK | 0o777  # symlink(2) gives every link this mode
        nid = self._inode(layout, mode, len(target), first_block, owner, time, xattrs, tail)
        self.image.extend(target[len(target) - tail :])
        self.image.extend(bytes(-len(self.image) % 32))
        return nid

    def _inode(  # the fields of the inode, in its order
        self,
        layout: int,
        mode: int,
        size: int,
        union: int,
        owner: tuple[int, int],
        time: tuple[int, int],
        xattrs: bytes,
        tail: int,
    ) -> int:
        """Append an inode with one link and its xattrs, placed for a tail of `tail` bytes; its nid."""
        nid = self._align(len(xattrs), tail) // 32
        self.image += _INODE.pack(
            layout, _xattr_count(xattrs), mode, 0, size, union, nid & _U32, *owner, *time, 1
        )
        self.image += xattrs
        self.inodes += 1
        return nid

    def _dirents(self, at: int, names: list[bytes], nids: list[int], types: list[int]) -> None:
        """One block of a directory: fixed-size entries, then the names; the last one ends with the block."""
        offset = _DIRENT * len(names)
        fields: list[int] = []
        for name, nid, kind in zip(names, nids, types, strict=True):
            fields += (nid, offset, kind, 0)
            offset += len(name)
        self.image[at : at + offset] = _DIRENTS[len(names)].pack(*fields) + b"".join(names)


def _padded(size: int) -> int:
    return (size + 31) & ~31


def _has_tail(size: int, xattrs: int) -> bool:
    """Whether what is left after whole blocks can stand behind the inode without crossing a block."""
    return 0 < size % BLOCK <= BLOCK - (64 + xattrs) % 32


def _xattr_count(xattrs: bytes) -> int:
    """i_xattr_icount of a packed xattr area."""
    return (len(xattrs) - len(_XATTR_HEADER)) // 4 + 1 if xattrs else 0


def _pack_xattrs(xattrs: Mapping[bytes, bytes]) -> bytes:
    """An inline xattr area: header, then entries of 4-byte multiples in name order. Empty for none."""
    if not xattrs:
        return b""
    packed = bytearray(_XATTR_HEADER)
    for name, value in sorted(xattrs.items()):
        prefix, index = next((pair for pair in _XATTR_PREFIXES if name.startswith(pair[0])), (b"", 0))
        if not index:
            raise Unsupported(f"xattr {name[:64]!r} is of no class that EROFS knows")
        short = name[len(prefix) :]
        packed += _XATTR_ENTRY.pack(len(short), index, len(value)) + short + value
        packed += bytes(-len(packed) % 4)
    if len(packed) > _MAX_XATTR_BYTES:
        raise Unsupported(f"xattrs of one file take {len(packed)} bytes; EROFS holds {_MAX_XATTR_BYTES}")
    return bytes(packed)


def _device(entry: Entry) -> int:
    """Linux's 32-bit encoding of a device number (new_encode_dev): 12 bits major, 20 minor."""
    major, minor = entry.devmajor, entry.devminor
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise Unsupported(f"device {entry.name[:200]!r}: {major}:{minor} is no device number of Linux")
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
