"""A second opinion on meta.erofs: a small reader that shares no code with the writer (linux
fs/erofs/erofs_fs.h).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

PREFIX = {
    1: b"user.",
    2: b"system.posix_acl_access",
    3: b"system.posix_acl_default",
    4: b"trusted.",
    6: b"security.",
}


@dataclass
class Inode:
    """What an inode says; `chunks` are (device, block) pairs, `data` the bytes in the image itself."""

    nid: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime: tuple[int, int]
    nlink: int
    rdev: int
    xattrs: dict[bytes, bytes]
    chunks: list[tuple[int, int]]
    data: bytes


class Image:
    """An image in memory."""

    def __init__(self, image: bytes) -> None:
        self.image = image
        magic, _, _, bits, _, self.root, self.inos = struct.unpack_from("<IIIBBHQ", image, 1024)
        assert (magic, bits, len(image) % 512) == (0xE0F5E1E2, 9, 0)
        assert struct.unpack_from("<I", image, 1024 + 36)[0] == len(image) // 512
        self.device_blocks = struct.unpack_from("<I", image, 1152 + 64)[0]

    def inode(self, nid: int) -> Inode:
        at = nid * 32
        form, icount, mode, _, size, union, _, uid, gid, sec, ns, nlink = struct.unpack_from(
            "<HHHHQIIIIqII", self.image, at
        )
        assert form & 1, "extended"
        layout = form >> 1
        area = (icount - 1) * 4 + 12 if icount else 0
        xattrs = self._xattrs(self.image[at + 64 : at + 64 + area]) if area else {}
        after = at + 64 + area
        chunks, data, rdev = [], b"", 0
        if layout == 4:
            assert union & 0x20
            chunk = 512 << (union & 31)
            after = (after + 7) // 8 * 8
            chunks = [
                struct.unpack_from("<xxHI", self.image, after + 8 * n) for n in range(-(-size // chunk))
            ]
        elif mode & 0o170000 in {0o040000, 0o120000}:
            whole = size // 512 if layout == 2 else -(-size // 512)
            data = self.image[union * 512 : (union + whole) * 512]
            if layout == 2:
                tail = size % 512
                assert tail == 0 or after // 512 == (after + tail - 1) // 512, "tail crosses a block"
                data += self.image[after : after + tail]
            data = data[:size]
        else:
            rdev = union
        return Inode(nid, mode, uid, gid, size, (sec, ns), nlink, rdev, xattrs, chunks, data)

    @staticmethod
    def _xattrs(area: bytes) -> dict[bytes, bytes]:
        found, at = {}, 12
        while at < len(area):
            length, index, size = struct.unpack_from("<BBH", area, at)
            name = PREFIX[index] + area[at + 4 : at + 4 + length]
            found[name] = area[at + 4 + length : at + 4 + length + size]
            at = (at + 4 + length + size + 3) // 4 * 4
        return found

    def entries(self, directory: Inode) -> dict[bytes, int]:
        """Names to nids, `.` and `..` among them; asserts the order that the kernel searches by."""
        found: dict[bytes, int] = {}
        names: list[bytes] = []
        for start in range(0, len(directory.data), 512):
            block = directory.data[start : start + 512]
            count = struct.unpack_from("<H", block, 8)[0] // 12
            heads = [struct.unpack_from("<QHBB", block, 12 * n) for n in range(count)]
            ends = [head[1] for head in heads[1:]] + [len(block)]
            for (nid, offset, _, _), end in zip(heads, ends, strict=True):
                name = block[offset:end].rstrip(b"\0")
                names.append(name)
                found[name] = nid
        assert names == sorted(set(names))
        return found

    def walk(self) -> dict[bytes, Inode]:
        """Every path below the root, and the root as b""."""
        found = {b"": self.inode(self.root)}
        stack = [b""]
        while stack:
            path = stack.pop()
            inside = self.entries(found[path])
            assert inside.pop(b".") == found[path].nid
            assert inside.pop(b"..") == found[path.rpartition(b"/")[0]].nid
            for name, nid in inside.items():
                below = path + b"/" + name if path else name
                found[below] = self.inode(nid)
                if found[below].mode & 0o170000 == 0o040000:
                    stack.append(below)
        return found
