"""Mounting a layer with EROFS: from files, or through loop devices where the kernel cannot mount files.

mount(2) of type erofs, the layer's data as device 1. With direct I/O the data is not cached a second time below
EROFS. From files that gives EIO on disks with 4 KiB sectors, hence the probe; a loop device falls back by itself.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from soci_snapshotter.linux import loopdev, mounts

_log = logging.getLogger(__name__)

READ_AHEAD_KB = 1024  # 1 MiB requests with directio, 7 times fewer than with the default 128; 4096 was slower
_BDI = Path("/sys/class/bdi")
_mount_turn = threading.Lock()  # a new bdi is found by comparing names before and after


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
            set_read_ahead(name)


def mount_loop(meta_path: bytes, device_path: bytes, target: bytes) -> bool:
    """The same with a loop device over each file, which go when the mount goes. Whether direct I/O is in use.

    Raises OSError, or Unsupported where there are no loop devices.
    """
    # EROFS reads metadata page by page: the file's own read-ahead is what makes that fast. Its data must not wait
    # for one another, as reads through the page cache of the device's file do.
    with loopdev.attached(meta_path, direct=False) as meta, loopdev.attached(device_path) as device:
        mounts.mount(meta.path, target, b"erofs", mounts.MS_RDONLY, b"device=" + device.path)
        loopdev.set_read_ahead(meta, READ_AHEAD_KB)  # the first device's is the filesystem's
        return device.direct


def set_read_ahead(bdi: str) -> None:
    """1 MiB of read-ahead for the filesystem whose backing device is called `bdi` (names in /sys/class/bdi)."""
    try:
        (_BDI / bdi / "read_ahead_kb").write_text(str(READ_AHEAD_KB))
    except OSError as problem:
        _log.warning("read-ahead stays small", extra={"bdi": bdi, "errno": problem.errno})


def _bdis() -> set[str]:
    # The name's number is a counter of the kernel's; nothing in /sys or mountinfo links it to a mount.
    return {name for name in os.listdir(_BDI) if name.startswith("erofs")} if _BDI.is_dir() else set()
