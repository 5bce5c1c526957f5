"""Mounting, unmounting and reading the mount table. Paths are bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from soci_snapshotter.linux import syscalls

# include/uapi/linux/mount.h, include/linux/fs.h
MS_RDONLY = 1
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4
MOUNT_ATTR_NOEXEC = 8
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6

_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of /proc/<pid>/mountinfo (proc_pid_mountinfo(5)), its octal escapes undone."""

    mount_id: int
    parent_id: int
    device: str  # major:minor, the st_dev of files below
    root: bytes
    target: bytes
    options: bytes
    fstype: bytes
    source: bytes
    super_options: bytes


def _unescape(field: bytes) -> bytes:
    if b"\\" not in field:
        return field
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field)


def parse_mountinfo(data: bytes) -> Iterator[MountInfo]:
    """The mounts in `data`, in the kernel's order. Lines without the fields of the format are skipped."""
    for line in data.split(b"\n"):
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)
            mount_id, parent_id = int(fields[0]), int(fields[1])
            fstype, source, super_options = fields[dash + 1 : dash + 4]
        except ValueError:
            continue
        yield MountInfo(
            mount_id,
            parent_id,
            fields[2].decode(),
            _unescape(fields[3]),
            _unescape(fields[4]),
            fields[5],
            fstype,
            _unescape(source),
            super_options,
        )


def mountinfo() -> list[MountInfo]:
    """The mounts this process sees now."""
    with open("/proc/self/mountinfo", "rb") as table:
        return list(parse_mountinfo(table.read()))


def mount(source: bytes, target: bytes, fstype: bytes, flags: int = 0, options: bytes = b"") -> None:
    """mount(2), never mount(8), which puts a loop device under a file. Raises OSError naming the target."""
    syscalls.mount(source, target, fstype, flags, options)


def unmount(target: bytes, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2). Raises OSError naming the target (EBUSY while files of it are open)."""
    syscalls.umount2(target, flags)


def detached_mount(fstype: bytes, settings: dict[bytes, bytes | None], attributes: int) -> int:
    """A mount in no mount table; it lives as long as the returned descriptor (or a mount made over its
    files).

    `settings` are the filesystem's options (None for a flag), `attributes` MOUNT_ATTR_* bits. Raises OSError.
    """
    context = syscalls.fsopen(fstype)
    try:
        for key, value in settings.items():
            command = FSCONFIG_SET_FLAG if value is None else FSCONFIG_SET_STRING
            syscalls.fsconfig(context, command, key, value)
        syscalls.fsconfig(context, FSCONFIG_CMD_CREATE)
        return syscalls.fsmount(context, attributes)
    finally:
        os.close(context)


def clone(mount_fd: int, path: bytes, clear: int) -> int:
    """A mount, in no mount table, of the directory `path` in the mount `mount_fd`, without the bits `clear`
    of its MOUNT_ATTR_*; it lives as long as the returned descriptor, or where attach() puts it.

    Raises OSError: EINVAL where the kernel clones only what is in the mount table (before Linux 6.15).
    """
    descriptor = syscalls.open_tree(mount_fd, path)
    try:
        syscalls.mount_clear(descriptor, clear)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def id_mapped(path: bytes, namespace: int) -> int:
    """A read-only mount, in no mount table, of the directory `path` of a visible mount, whose owners are seen as the
    user namespace (a descriptor) maps them. Raises OSError: EINVAL where filesystem or kernel cannot.
    """
    descriptor = syscalls.open_tree(syscalls.AT_FDCWD, path)
    try:
        syscalls.mount_map_ids(descriptor, MOUNT_ATTR_RDONLY, namespace)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def attach(mount_fd: int, target: bytes) -> None:
    """Put a mount that is in no mount table on the directory `target`. Raises OSError."""
    syscalls.move_mount(mount_fd, target)
