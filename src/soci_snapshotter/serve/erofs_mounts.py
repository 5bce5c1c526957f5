"""Mounting layers with EROFS, and proving at start that this kernel and this disk can do it.

mount(2) of type erofs from a file, the layer's data as device 1. With directio the data is not cached a
second time below EROFS; on disks with 4 KiB sectors that gives EIO for 512-byte blocks, hence the probe.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from soci_snapshotter.errors import Config, Unsupported
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree
from soci_snapshotter.linux import fusedev, mounts

_log = logging.getLogger(__name__)

READ_AHEAD_KB = 1024  # 1 MiB requests with directio, 7 times fewer than with the default 128; 4096 was slower
_BDI = Path("/sys/class/bdi")
_mount_turn = threading.Lock()  # a new bdi is found by comparing names before and after


@dataclass(frozen=True, slots=True)
class Stack:
    """What the probe found to work: file-backed EROFS under overlayfs, with or without directio."""

    directio: bool


def mount_layer(meta_path: bytes, device_path: bytes, target: bytes, directio: bool) -> None:
    """Mount an EROFS image whose device 1 is `device_path` (no comma in it). Raises OSError naming the
    target.
    """
    options = b"device=" + device_path + (b",directio" if directio else b"")
    with _mount_turn:
        before = _bdis()
        # Neither nosuid nor nodev: the container's own mount decides.
        mounts.mount(meta_path, target, b"erofs", mounts.MS_RDONLY, options)
        for name in _bdis() - before:
            try:
                (_BDI / name / "read_ahead_kb").write_text(str(READ_AHEAD_KB))
            except OSError as problem:
                _log.warning("read-ahead stays small", extra={"bdi": name, "errno": problem.errno})


def _bdis() -> set[str]:
    # The name's number is a counter of the kernel's; nothing in /sys or mountinfo links it to a mount.
    return {name for name in os.listdir(_BDI) if name.startswith("erofs")} if _BDI.is_dir() else set()


class ErofsMounts:
    """The EROFS mounts below one directory, made the way `stack` says."""

    def __init__(self, stack: Stack, below: Path) -> None:
        self._stack = stack
        self._below = below

    def mount(self, meta: Path, device: bytes, target: Path) -> None:
        """Mount `meta` over `device` at the directory `target`. Raises OSError."""
        mount_layer(os.fsencode(meta), device, os.fsencode(target), self._stack.directio)

    def unmount(self, target: Path) -> None:
        """Take a mount out of this mount table; overlays that use it keep it alive. Raises OSError."""
        mounts.unmount(os.fsencode(target), mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)

    def mounted(self) -> set[Path]:
        """Where EROFS is mounted below the directory now: what a restarted daemon adopts."""
        prefix = os.fsencode(self._below.resolve()) + b"/"
        return {
            self._below / os.fsdecode(entry.target[len(prefix) :])
            for entry in mounts.mountinfo()
            if entry.fstype == b"erofs" and entry.target.startswith(prefix)
        }


def probe(root: Path | str) -> Stack:
    """Prove the whole stack on the root's own filesystem: EROFS from a file, overlayfs above, an odd block
    read.

    Config when not root, Unsupported otherwise, each in one line with what to do. Leaves nothing behind.
    """
    if os.geteuid() != 0:
        raise Config("root is needed to mount filesystems: run as root")
    os.close(fusedev.open_device())
    directory = Path(tempfile.mkdtemp(prefix="probe-", dir=root))
    try:
        failures = []
        for directio in (True, False):
            problem = _try(directory, directio)
            if problem is None:
                return Stack(directio)
            failures.append(problem)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    raise Unsupported(f"{root}: {failures[-1]}")


def _try(directory: Path, directio: bool) -> str | None:
    """One attempt; what failed and what to do, or None."""
    content = b"".join(b"%07d\n" % number for number in range(64)) * 3  # 3 blocks of 512 bytes
    size = 512 + len(content)
    entry = Entry(b"probe", "reg", 512, len(content), b"", 0o644, 0, 0, b"", b"", "", 0, 0, ())
    image = build_meta(build_tree([entry]), data_size=size, uuid=os.urandom(16), inherited={}, bottom=True)
    base = Path(tempfile.mkdtemp(dir=directory))
    names = meta, data, lower, upper, work, merged = [
        base / name for name in ("meta", "data", "lower", "upper", "work", "merged")
    ]
    for path in names[2:]:
        path.mkdir()
    for path, value in ((meta, image), (data, bytes(512) + content)):
        with open(path, "wb") as file:
            file.write(value)
            file.flush()
            os.fsync(file.fileno())
    done: list[Path] = []
    try:
        try:
            mount_layer(os.fsencode(meta), os.fsencode(data), os.fsencode(lower), directio)
            done.append(lower)
        except OSError as problem:
            return _erofs_failure(problem)
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        try:
            mounts.mount(b"overlay", os.fsencode(merged), b"overlay", 0, os.fsencode(options))
            done.append(merged)
        except OSError as problem:
            return f"overlayfs does not mount over EROFS ({problem.strerror}): use ext4 or xfs for the root"
        try:
            with open(merged / "probe", "rb") as file:
                read = os.pread(file.fileno(), 700, 512) + os.pread(file.fileno(), 512, 0)
        except OSError as problem:
            return f"file-backed EROFS cannot read 512-byte blocks ({problem.strerror}): use another disk"
        if read != content[512:1212] + content[:512]:
            return "file-backed EROFS gives wrong bytes: use another kernel"
        return None
    finally:
        for target in reversed(done):
            mounts.unmount(os.fsencode(target), mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)


def _erofs_failure(problem: OSError) -> str:
    if problem.errno == errno.ENODEV:
        return "this kernel has no EROFS: `modprobe erofs`, or a kernel with CONFIG_EROFS_FS"
    if problem.errno == errno.EPERM:
        return "mounting is not permitted: CAP_SYS_ADMIN in the initial user namespace is needed"
    return (
        f"EROFS cannot be mounted from a file with 512-byte blocks ({problem.strerror}): Linux 6.12 or "
        "newer with CONFIG_EROFS_FS_BACKED_BY_FILE is needed, and a root on a disk filesystem (not tmpfs)"
    )
