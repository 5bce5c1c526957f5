"""Loop devices that go by themselves: read-only block devices over files (include/uapi/linux/loop.h)."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct

from soci_snapshotter.errors import Unsupported

_log = logging.getLogger(__name__)

CONTROL = "/dev/loop-control"
BLOCK = 512  # of EROFS here, and the smallest a device has
_CTL_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A  # Linux 5.8: one step, so that no half-made device is ever seen
_GET_STATUS = 0x4C05
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
# struct loop_config: fd, block size, a struct loop_info64 (232 bytes) of which only lo_flags counts, reserved
_CONFIG = Struct("=II52xI176x64x")
_INFO = Struct("=52xI176x")
_TRIES = 64  # another program may take the free device before us; each try means that one did


@dataclass(frozen=True, slots=True)
class Loop:
    """An attached device. `direct` is whether reads pass the file's page cache by."""

    path: bytes
    direct: bool


@contextmanager
def attached(path: bytes, *, direct: bool = True) -> Iterator[Loop]:
    """A read-only device over the file `path` for the time of the block, and as long as something mounted has
    it open: then the kernel takes it down, whatever becomes of this process.

    With `direct` the file's page cache is passed by, unless its disk has larger sectors than 512 bytes. Raises
    OSError, or Unsupported where the node has no loop devices.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        device, name = _configure(file, direct)
    finally:
        os.close(file)
    try:
        status = fcntl.ioctl(device, _GET_STATUS, bytes(_INFO.size))
        yield Loop(name, bool(_INFO.unpack(status)[0] & _DIRECT_IO))
    finally:
        os.close(device)


def set_read_ahead(loop: Loop, kilobytes: int) -> None:
    """How far ahead the kernel reads in what is mounted from the device."""
    path = Path("/sys/block", os.fsdecode(os.path.basename(loop.path)), "queue/read_ahead_kb")
    try:
        path.write_text(str(kilobytes))
    except OSError as problem:
        _log.warning("read-ahead stays small", extra={"path": str(path), "errno": problem.errno})


def _configure(file: int, direct: bool) -> tuple[int, bytes]:
    """A descriptor of a device over the descriptor `file`, and its path."""
    flags = _READ_ONLY | _AUTOCLEAR | (_DIRECT_IO if direct else 0)
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Unsupported(f"{CONTROL} does not exist: load the module with `modprobe loop`") from None
    try:
        for _ in range(_TRIES):
            name = b"/dev/loop%d" % fcntl.ioctl(control, _CTL_GET_FREE)
            device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
            try:
                config = _CONFIG.pack(file, BLOCK, flags)
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as problem:
                os.close(device)
                if problem.errno != errno.EBUSY:
                    raise OSError(problem.errno, f"LOOP_CONFIGURE: {problem.strerror}", name) from None
            else:
                return device, name
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "every free loop device was taken by somebody else", CONTROL)
