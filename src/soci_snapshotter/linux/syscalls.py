"""System calls that Python 3.11 lacks, called through libc by ctypes.

Numbers above 424 are the same on every architecture (Linux 5.x unified them); glibc only got wrappers in
2.36, so these go through syscall(2). Every call releases the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# include/uapi/asm-generic/unistd.h
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_FSOPEN = 430
SYS_FSCONFIG = 431
SYS_FSMOUNT = 432
SYS_OPENAT2 = 437
SYS_MOUNT_SETATTR = 442

AT_FDCWD = -100  # include/uapi/linux/fcntl.h
_AT_EMPTY_PATH = 0x1000


def failure(call: str, path: bytes | str | None = None) -> OSError:
    """The OSError for the errno that the last call through libc left; `call` opens its message."""
    code = ctypes.get_errno() or errno.EIO
    name = os.fsdecode(path) if path is not None else None
    return OSError(code, f"{call}: {os.strerror(code)}", name)


def syscall(name: str, number: int, *arguments: int | bytes | None) -> int:
    """syscall(2); integers are passed as longs, bytes as NUL-terminated strings, None as NULL. Raises
    OSError.
    """
    converted = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise failure(name)
    return result


def mount(source: bytes, target: bytes, fstype: bytes, flags: int, options: bytes) -> None:
    """mount(2). Raises OSError naming the target."""
    if _libc.mount(source, target, fstype, ctypes.c_ulong(flags), options) != 0:
        raise failure(f"mount {fstype.decode()}", target)


def umount2(target: bytes, flags: int) -> None:
    """umount2(2). Raises OSError naming the target."""
    if _libc.umount2(target, ctypes.c_int(flags)) != 0:
        raise failure("umount", target)


def fsopen(fstype: bytes) -> int:
    """fsopen(2): a close-on-exec descriptor of a filesystem being configured."""
    fsopen_cloexec = 1
    return syscall("fsopen", SYS_FSOPEN, fstype, fsopen_cloexec)


def fsconfig(fd: int, command: int, key: bytes | None = None, value: bytes | None = None) -> None:
    """fsconfig(2): one parameter, or a command, for a descriptor of fsopen."""
    syscall("fsconfig", SYS_FSCONFIG, fd, command, key, value, 0)


def fsmount(fd: int, attributes: int) -> int:
    """fsmount(2): a close-on-exec descriptor of a mount that is in no mount table."""
    fsmount_cloexec = 1
    return syscall("fsmount", SYS_FSMOUNT, fd, fsmount_cloexec, attributes)


def device_of(fd: int) -> int:
    """st_dev of an open file, without asking a filesystem in user space for it (statx(2), AT_STATX_DONT_SYNC)."""
    dont_sync = 0x4000
    found = (
        ctypes.c_uint32 * 64
    )()  # struct statx, 256 bytes; stx_dev_major and stx_dev_minor are words 34 and 35
    if (
        _libc.statx(ctypes.c_int(fd), b"", ctypes.c_int(_AT_EMPTY_PATH | dont_sync), ctypes.c_uint(0), found)
        != 0
    ):
        raise failure("statx")
    return os.makedev(found[34], found[35])


def open_tree(directory: int, path: bytes) -> int:
    """open_tree(2): a close-on-exec descriptor of a new mount, in no mount table, of `path` below `directory`."""
    clone, cloexec = 1, os.O_CLOEXEC
    return syscall("open_tree", SYS_OPEN_TREE, directory, path, clone | cloexec)


def move_mount(fd: int, target: bytes) -> None:
    """move_mount(2): put the mount `fd` on the directory `target`."""
    empty_source = 4
    syscall("move_mount", SYS_MOVE_MOUNT, fd, b"", AT_FDCWD, target, empty_source)


def mount_clear(fd: int, attributes: int) -> None:
    """mount_setattr(2) (Linux 5.12): take the MOUNT_ATTR_* bits `attributes` off the mount `fd`."""
    _mount_setattr(fd, _MountAttr(0, attributes, 0, 0))


def mount_map_ids(fd: int, attributes: int, namespace: int) -> None:
    """mount_setattr(2): have the detached mount `fd` map ids as the user namespace does, and set MOUNT_ATTR_* bits."""
    idmap = 0x00100000
    _mount_setattr(fd, _MountAttr(idmap | attributes, 0, 0, namespace))


def _mount_setattr(fd: int, attr: _MountAttr) -> None:
    result: int = _libc.syscall(
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_long(fd),
        ctypes.c_char_p(b""),
        ctypes.c_long(_AT_EMPTY_PATH),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    if result < 0:
        raise failure("mount_setattr")


class _MountAttr(ctypes.Structure):
    """struct mount_attr (linux/mount.h)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _OpenHow(ctypes.Structure):
    """struct open_how (linux/openat2.h)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_in_root(root: bytes, path: bytes, flags: int) -> int:
    """A close-on-exec descriptor of `path` below directory `root`; no link or `..` leads out of it
    (openat2(2)).

    Raises OSError: ENOENT, ENOTDIR, ELOOP as open(2) does.
    """
    resolve_in_root = 0x10
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve_in_root)
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        result: int = _libc.syscall(
            ctypes.c_long(SYS_OPENAT2),
            ctypes.c_long(directory),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if result < 0:
            raise failure("openat2", path)
        return result
    finally:
        os.close(directory)
