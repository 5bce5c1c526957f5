"""Read meta.erofs as formats.erofs writes it: inodes, directories, links and xattrs, straight from the bytes.

There are no objects per file: an inode is found by its number (32 bytes each), a name by binary search over
the 512-byte blocks of its directory. Nothing is believed of the image: what lies outside it is Integrity.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple

from soci_snapshotter.errors import Integrity

BLOCK = 512
CHUNK = 1 << 16  # bytes read at once: some 600 inodes of what is listed or opened together
_OVERLAP = BLOCK  # an inode may cross the end of a chunk
_SUPER_OFFSET = 1024
_SUPER = Struct("<I8xBxHQ")
_MAGIC = 0xE0F5E1E2
_SLOT = 32  # bytes per nid
_INODE = Struct("<HHH2xQI4xIIqII16x")
INODE_SIZE = _INODE.size
_CHUNK_INDEX = Struct("<HHI")
_CHUNK_BLOCKS = 0x1F
_XATTR_HEADER = 12
_XATTR_ENTRY = Struct("<BBH")
_PREFIXES = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}
_DIRENT = 12
_DIRENTS = [Struct("<" + "QHBB" * count) for count in range(BLOCK // (_DIRENT + 1) + 1)]
_INLINE, _CHUNKED = 2, 4
DIRECTORY = 2  # the kind of a Dirent that is one
_MAX_NAME = 255
_MAX_TARGET = 4096  # PATH_MAX: no symbolic link is longer

Read = Callable[[int, int], bytes]
"""Read(offset, size): up to `size` bytes of the image at `offset`, fewer at its end."""


class Inode(NamedTuple):
    """An inode's fields, in the order it has them on disk; `form` is 1 | layout << 1."""

    form: int
    xattr_count: int
    mode: int
    size: int
    union: int
    """First block, device number or chunk format, as mode and layout have it."""
    uid: int
    gid: int
    seconds: int
    nanoseconds: int
    links: int

    @property
    def rdev(self) -> int:
        """The device number as Linux encodes it in 32 bits; 0 for what is no device."""
        return self.union if stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode) else 0


class Dirent(NamedTuple):
    """One name in a directory; `next` is the cookie of what follows it."""

    name: bytes
    nid: int
    kind: int
    next: int


class Chunks:
    """Pieces of many images, at most `limit` bytes of them (and one more per thread). Thread safe."""

    def __init__(self, limit: int) -> None:
        self._most = max(limit // CHUNK, 1)
        self._kept: dict[tuple[int, int], bytes] = {}

    def get(self, image: int, number: int) -> bytes | None:
        """Chunk `number` of `image`, if it is here."""
        return self._kept.get((image, number))

    def put(self, image: int, number: int, chunk: bytes) -> None:
        """Keep a chunk; the oldest goes when there are too many."""
        self._kept[image, number] = chunk
        while len(self._kept) > self._most:
            try:
                self._kept.pop(next(iter(self._kept)), None)
            except (RuntimeError, StopIteration):  # another thread is doing the same
                return

    def drop(self, image: int) -> None:
        """Forget an image."""
        for key in list(self._kept):
            if key[0] == image:
                self._kept.pop(key, None)


class MetaImage:
    """One meta.erofs. `number` tells it from the others in `chunks`. Thread safe if `read` is."""

    def __init__(self, read: Read, size: int, chunks: Chunks, number: int) -> None:
        """Integrity when it is no image of ours."""
        self._read = read
        self._size = size
        self._chunks = chunks
        self._number = number
        self._last = (
            0,
            0,
        )  # of a directory of several blocks: its nid, the block where a name was looked up last
        magic, bits, self.root, _ = _SUPER.unpack(self._bytes(_SUPER_OFFSET, _SUPER.size))
        if magic != _MAGIC or 1 << bits != BLOCK:
            raise Integrity("not an EROFS image with blocks of 512 bytes")

    def inode(self, nid: int) -> Inode:
        """The inode `nid`."""
        chunk, at = self._at(nid * _SLOT, INODE_SIZE)
        return Inode._make(_INODE.unpack_from(chunk, at))

    def lookup(self, nid: int, directory: Inode, name: bytes) -> int:
        """The nid that `name` has in the directory, 0 for none (no inode of ours is 0)."""
        low, high = 0, -(-directory.size // BLOCK) - 1
        if high > 0:
            low = self._block_of(nid, directory, name, high)
        elif high < 0:
            return 0
        fields, block, base, end = self._block(nid, directory, low)
        first, last = 0, len(fields) // 4 - 1
        while first <= last:
            index = (first + last) // 2
            found = _name(fields, block, base, end, index)
            if found == name:
                number: int = fields[4 * index]
                return number
            if found < name:
                first = index + 1
            else:
                last = index - 1
        return 0

    def _block_of(self, nid: int, directory: Inode, name: bytes, high: int) -> int:
        """The last block whose first name is not behind `name`, of blocks 0 to `high`; 0 for none."""
        known, low = self._last  # names are often looked up in the order they have
        if known != nid or low > high or self._first_name(nid, directory, low) > name:
            low = 0
        elif low < high and self._first_name(nid, directory, low + 1) > name:
            return low
        elif low + 1 < high and self._first_name(nid, directory, low + 2) > name:
            low, high = low + 1, low + 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._first_name(nid, directory, middle) <= name:
                low = middle
            else:
                high = middle - 1
        self._last = nid, low
        return low

    def _first_name(self, nid: int, directory: Inode, number: int) -> bytes:
        chunk, base, size = self._dirents(nid, directory, number)
        if size < 2 * _DIRENT:  # one entry at most: the whole check
            fields, block, base, end = self._block(nid, directory, number)
            return _name(fields, block, base, end, 0)
        start, stop = chunk[base + 8] | chunk[base + 9] << 8, chunk[base + 20] | chunk[base + 21] << 8
        if start == _DIRENT:  # one entry
            stop = size
        return chunk[base + start : base + min(stop, size)].rstrip(b"\0")

    def entries(self, nid: int, directory: Inode, cookie: int) -> Iterator[Dirent]:
        """The directory's names from `cookie` on (0 or what a Dirent said), in the order of their bytes."""
        number, start = divmod(cookie, BLOCK)
        blocks = -(-directory.size // BLOCK)
        while number < blocks:
            fields, block, base, end = self._block(nid, directory, number)
            count = len(fields) // 4
            for index in range(start, count):
                name = _name(fields, block, base, end, index)
                behind = number * BLOCK + index + 1 if index + 1 < count else (number + 1) * BLOCK
                yield Dirent(name, fields[4 * index], fields[4 * index + 2], behind)
            number, start = number + 1, 0

    def target(self, nid: int, link: Inode) -> bytes:
        """Where a symbolic link leads."""
        if link.size > _MAX_TARGET:
            raise Integrity(f"inode {nid}: a link of {link.size} bytes")
        tail = link.size % BLOCK if link.form >> 1 == _INLINE else 0
        whole = self._bytes(link.union * BLOCK, link.size - tail) if link.size > tail else b""
        return whole + (self._bytes(_behind(nid, link), tail) if tail else b"")

    def data_at(self, nid: int, file: Inode) -> int:
        """Where the file's bytes begin on device 1: in the tar. They are in one piece, however many chunks."""
        if file.form >> 1 != _CHUNKED:
            raise Integrity(f"inode {nid}: no data on the device")
        at = -(-_behind(nid, file) // _CHUNK_INDEX.size) * _CHUNK_INDEX.size
        chunk, base = self._at(at, _CHUNK_INDEX.size)
        block: int = _CHUNK_INDEX.unpack_from(chunk, base)[2]
        return block * BLOCK

    def xattrs(self, nid: int, inode: Inode) -> dict[bytes, bytes]:
        """Whole names and values."""
        found: dict[bytes, bytes] = {}
        if not inode.xattr_count:
            return found
        area = self._bytes(nid * _SLOT + INODE_SIZE, _xattr_size(inode))
        at = _XATTR_HEADER
        while at + _XATTR_ENTRY.size <= len(area):
            length, index, size = _XATTR_ENTRY.unpack_from(area, at)
            at += _XATTR_ENTRY.size
            prefix = _PREFIXES.get(index)
            if prefix is None or at + length + size > len(area):
                raise Integrity(f"inode {nid}: its xattrs are damaged")
            found[prefix + area[at : at + length]] = area[at + length : at + length + size]
            at = (at + length + size + 3) & ~3
        return found

    # -- bytes -----------------------------------------------------------------------------------------------

    def _block(self, nid: int, directory: Inode, number: int) -> tuple[tuple[int, ...], bytes, int, int]:
        """Block `number` of a directory: its dirents' fields flat, the bytes it is in, where it begins and ends."""
        chunk, base, size = self._dirents(nid, directory, number)
        count = (chunk[base + 8] | chunk[base + 9] << 8) // _DIRENT if size > _DIRENT else 0
        if not 0 < count < len(_DIRENTS) or count * _DIRENT > size:
            raise Integrity(f"directory {nid}: block {number} is damaged")
        return _DIRENTS[count].unpack_from(chunk, base), chunk, base, base + size

    def _dirents(self, nid: int, directory: Inode, number: int) -> tuple[bytes, int, int]:
        """Bytes that hold block `number` of a directory, where in them it begins, and its size."""
        size = min(BLOCK, directory.size - number * BLOCK)
        if size < BLOCK and directory.form >> 1 == _INLINE:
            at = _behind(nid, directory)
        else:
            at = (directory.union + number) * BLOCK
        return *self._at(at, size), size

    def _at(self, at: int, size: int) -> tuple[bytes, int]:
        """Bytes that hold `size` of them at offset `at` of the image, and where in them."""
        number, base = divmod(at, CHUNK)
        chunk = self._chunks.get(self._number, number)
        if chunk is None:
            if at + size > self._size:
                raise Integrity(f"offset {at}: behind the image's end")
            chunk = self._read(number * CHUNK, CHUNK + _OVERLAP)
            self._chunks.put(self._number, number, chunk)
        if base + size > len(chunk):
            return self._bytes(at, size), 0
        return chunk, base

    def _bytes(self, at: int, size: int) -> bytes:
        if at + size > self._size or len(data := self._read(at, size)) != size:
            raise Integrity(f"offset {at}: behind the image's end")
        return data


def _name(fields: tuple[int, ...], block: bytes, base: int, end: int, index: int) -> bytes:
    """Name `index` of a directory block; the last one ends at the block's end or its first NUL."""
    start, last = base + fields[4 * index + 1], 4 * index + 5 >= len(fields)
    stop = end if last else base + fields[4 * index + 5]
    if not base <= start < stop <= end:
        raise Integrity("a directory's names are damaged")
    name = block[start:stop]
    if last and name[-1] == 0:
        name = name.rstrip(b"\0")
    if len(name) > _MAX_NAME:
        raise Integrity("a directory's names are damaged")
    return name


def _xattr_size(inode: Inode) -> int:
    return (inode.xattr_count - 1) * 4 + _XATTR_HEADER if inode.xattr_count else 0


def _behind(nid: int, inode: Inode) -> int:
    """Where what follows an inode and its xattrs begins."""
    return nid * _SLOT + INODE_SIZE + _xattr_size(inode)
