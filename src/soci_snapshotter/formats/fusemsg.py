"""FUSE messages, protocol 7.40 (include/uapi/linux/fuse.h): what a server of read-only files needs.

Integers are in the machine's byte order. Requests: a 40-byte header, then the operation's own structure.
Replies: a 16-byte header with the request's `unique` (echoed whole: resent requests carry a mark in bit 63),
then the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import NamedTuple

from soci_snapshotter.errors import Integrity, Unsupported

MAJOR = 7
MINOR = 40  # the protocol described here; the kernel uses the lower of its minor and ours
ROOT_ID = 1
# fuse_notify_code
NOTIFY_INVAL_INODE = 2
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7  # since 7.40 (Linux 6.9)
# Below FUSE_MIN_READ_BUFFER (8192) read(2) of /dev/fuse fails; with max_write 4096 no request is longer.
MAX_WRITE = 4096
READ_BUFFER = 16384
# 256 pages of 4 KiB: 1 MiB in a READ, the kernel's own default bound (fs.fuse.max_pages_limit).
MAX_PAGES = 256
# EROFS reads with directio are background requests and the limit is per connection, that is for every layer
# of the node: one cold layer's misses must not hold up another's reads. The kernel's default is 12, the
# field's end 65,535.
MAX_BACKGROUND = 16384
FOREVER = 2**63 - 1  # seconds an entry or attribute stays valid: nothing ever changes

_IN_HEADER = Struct("=IIQQIIIHH")
# The loop's one look at a request: length, opcode, unique, node and, if it is a READ, offset and size in
# bytes.
PEEK = Struct("=IIQQ16x8xQI")
_UID = Struct("=24xI")
OUT_HEADER = Struct("=IiQ")
_INIT_IN = Struct("=IIIII")
_OLD_INIT_IN = 16  # bytes, before Linux 5.17: without the second word of capabilities
_INIT_OUT = Struct("=IIIIHHIIHHI28x")
_ATTR = "QQQQQQIIIIIIIIII"
_ENTRY_OUT = Struct("=QQQQII" + _ATTR)
_ATTR_OUT = Struct("=QII" + _ATTR)
_OPEN_OUT = Struct("=QIi")
_READ_IN = Struct("=QQIIQII")
_RELEASE_IN = Struct("=QIIQ")
_INVAL_ENTRY = Struct("=QII")
_INVAL_INODE = Struct("=Qqq")
_STATFS_OUT = Struct("=QQQQQIIII24x")

IN_HEADER_SIZE = _IN_HEADER.size
OUT_HEADER_SIZE = OUT_HEADER.size


class Opcode(IntEnum):
    """enum fuse_opcode, those with a meaning here; every other is answered ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    FLUSH = 25
    INIT = 26
    READDIR = 28
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


class Init(IntFlag):
    """Capabilities of FUSE_INIT, both words together."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


WANTED = (
    Init.ASYNC_READ
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.ASYNC_DIO
    | Init.NO_OPEN_SUPPORT
    | Init.PARALLEL_DIROPS
    | Init.POSIX_ACL
    | Init.MAX_PAGES
    | Init.CACHE_SYMLINKS
    | Init.NO_OPENDIR_SUPPORT
    | Init.INIT_EXT
    | Init.HAS_RESEND
)

FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5


class Request(NamedTuple):
    """The header of a request: total length in bytes, operation, id for the reply, node it is about."""

    length: int
    opcode: int
    unique: int
    node: int
    uid: int
    gid: int
    pid: int
    extensions: int
    padding: int


@dataclass(frozen=True, slots=True)
class InitRequest:
    """FUSE_INIT: the kernel's protocol minor, its read-ahead limit in bytes, its capabilities."""

    major: int
    minor: int
    max_readahead: int
    flags: Init


def request(buffer: bytes | bytearray | memoryview, length: int) -> Request:
    """The header of the `length` bytes read from /dev/fuse. Integrity when they are not one whole request."""
    if length < IN_HEADER_SIZE:
        raise Integrity(f"FUSE request of {length} bytes is shorter than its header")
    header = Request._make(_IN_HEADER.unpack_from(buffer))
    if header.length != length:
        raise Integrity(f"FUSE request of {length} bytes says it has {header.length}")
    return header


def init_request(body: bytes | memoryview) -> InitRequest:
    """The body of FUSE_INIT. Integrity when it is too short, Unsupported when the kernel speaks no protocol
    7.
    """
    if len(body) < _OLD_INIT_IN:
        raise Integrity(f"FUSE_INIT of {len(body)} bytes is shorter than any kernel's")
    whole = bytes(body[: _INIT_IN.size]) + bytes(max(_INIT_IN.size - len(body), 0))
    major, minor, max_readahead, flags, flags2 = _INIT_IN.unpack(whole)
    if major != MAJOR:
        raise Unsupported(f"the kernel speaks FUSE protocol {major}.{minor}; this program speaks {MAJOR}")
    if flags & Init.INIT_EXT:
        flags |= flags2 << 32
    return InitRequest(major, minor, max_readahead, Init(flags))


def init_reply(wanted: InitRequest) -> bytes:
    """The body of the answer: of WANTED what the kernel offers."""
    flags = int(WANTED & wanted.flags)
    return _INIT_OUT.pack(
        MAJOR,
        MINOR,
        wanted.max_readahead,
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND,  # congestion threshold: never reported as congested
        MAX_WRITE,
        1,  # time granularity in ns
        MAX_PAGES,
        0,
        flags >> 32,
    )


def init_reply_flags(body: bytes) -> Init:
    """The capabilities agreed on in an answer that init_reply made. Integrity when it is no such answer."""
    if len(body) != _INIT_OUT.size:
        raise Integrity(f"FUSE_INIT answer of {len(body)} bytes instead of {_INIT_OUT.size}")
    fields = _INIT_OUT.unpack(body)
    return Init(fields[3] | fields[10] << 32)


def reply(unique: int, body: bytes) -> bytes:
    """A whole successful reply."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), 0, unique) + body


def error_reply(unique: int, errno: int) -> bytes:
    """A whole reply that makes the call fail with `errno`, a positive number."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -errno, unique)


def notification(code: int) -> bytes:
    """A message of the server's own without a body, such as NOTIFY_RESEND."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, code, 0)


def invalidate_entry(parent: int, name: bytes) -> bytes:
    """A message that makes the kernel drop a name and what is below it and not in use (fuse_notify_inval_entry_out).

    Writing it fails with ENOENT when the kernel knows no such name.
    """
    body = _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def invalidate_attributes(node: int) -> bytes:
    """A message that makes the kernel ask for a node's attributes again (fuse_notify_inval_inode_out).

    Writing it fails with ENOENT when the kernel has no inode for the node: which is how to find out.
    """
    body = _INVAL_INODE.pack(node, -1, 0)
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), NOTIFY_INVAL_INODE, 0) + body


def _attributes(node: int, mode: int, size: int) -> tuple[int, ...]:
    links = 2 if node == ROOT_ID else 1
    # ino, size, blocks, three times, their ns, mode, nlink, uid, gid, rdev, blksize, flags
    return node, size, (size + 511) // 512, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, 4096, 0


def entry_out(node: int, mode: int, size: int) -> bytes:
    """Answer to LOOKUP: node id, st_mode, size in bytes; owner root, time 0, valid for ever."""
    return _ENTRY_OUT.pack(node, 0, FOREVER, FOREVER, 0, 0, *_attributes(node, mode, size))


def attr_out(node: int, mode: int, size: int) -> bytes:
    """Answer to GETATTR."""
    return _ATTR_OUT.pack(FOREVER, 0, 0, *_attributes(node, mode, size))


def open_out(handle: int) -> bytes:
    """Answer to OPEN: the kernel keeps its cached pages and sends no FLUSH."""
    return _OPEN_OUT.pack(handle, FOPEN_KEEP_CACHE | FOPEN_NOFLUSH, 0)


def statfs_out() -> bytes:
    """Answer to STATFS: an empty, full, read-only filesystem with names of up to 255 bytes."""
    return _STATFS_OUT.pack(0, 0, 0, 0, 0, 512, 255, 512, 0)


def read_in(buffer: bytes | bytearray | memoryview) -> tuple[int, int]:
    """(offset, size) of the READ request whose header opens `buffer`."""
    fields = _READ_IN.unpack_from(buffer, IN_HEADER_SIZE)
    return fields[1], fields[2]


def read_request(node: int, unique: int, offset: int, size: int) -> bytes:
    """A READ as the kernel writes it: tests feed it to request() and read_in()."""
    length = IN_HEADER_SIZE + _READ_IN.size
    header = _IN_HEADER.pack(length, Opcode.READ, unique, node, 0, 0, 0, 0, 0)
    return header + _READ_IN.pack(node, offset, size, 0, 0, 0, 0)


def uid_in(buffer: bytes | bytearray | memoryview) -> int:
    """The user that the request which opens `buffer` is for."""
    uid: int = _UID.unpack_from(buffer)[0]
    return uid


def name_in(body: bytes | memoryview) -> bytes:
    """The name that LOOKUP carries, NUL-terminated."""
    return bytes(body).split(b"\0", 1)[0]
