"""The directory m: one EROFS mount per number, numbers never used twice while anybody may know them.

A mount is never replaced under a path that was handed out: what is shown next gets the next number.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Protocol

_log = logging.getLogger(__name__)

_DIGITS = 19  # sqlite's integers have 18 whole ones
_NOT_MOUNTED = (errno.ENOENT, errno.EINVAL)  # umount2(2)


class Mounter(Protocol):
    """Who mounts EROFS (serve.erofs_mounts)."""

    def mount(self, meta: Path, device: bytes, target: Path) -> None: ...
    def unmount(self, target: Path) -> None: ...
    def mounted(self) -> set[Path]: ...


class MountPoints:
    """<root>/m. Thread safe; the same number is nobody's at the same time."""

    def __init__(self, root: Path, mounter: Mounter) -> None:
        self._top = root / "m"
        self._prefix = os.fsencode(self._top) + b"/"
        self._mounter = mounter
        self._lock = threading.Lock()
        self._top.mkdir(mode=0o700, exist_ok=True)
        self._last = max((int(name) for name in os.listdir(self._top) if _is_number(name)), default=0)

    def path(self, number: int) -> Path:
        """Where mount `number` is, or would be."""
        return self._top / str(number)

    def name(self, number: int) -> bytes:
        """The same as bytes: what is handed out."""
        return self._prefix + b"%d" % number

    def number_of(self, path: bytes) -> int | None:
        """The number of a path that was handed out, None for any other path."""
        head, name = os.path.split(path)
        return int(name) if head == os.fsencode(self._top) and name.isdigit() else None

    def seen(self, number: int) -> None:
        """`number` is taken: later ones are higher."""
        with self._lock:
            self._last = max(self._last, number)

    def next(self) -> int:
        """A new number."""
        with self._lock:
            self._last += 1
            return self._last

    def mount(self, number: int, meta: Path, device: bytes) -> None:
        """Mount `meta` over `device` as m/<number>. Raises OSError; then nothing is left."""
        target = self.path(number)
        target.mkdir(mode=0o700, exist_ok=True)
        try:
            self._mounter.mount(meta, device, target)
        except BaseException:
            target.rmdir()
            raise

    def unmount(self, number: int) -> None:
        """Take m/<number> away; what cannot be is logged."""
        path = self.path(number)
        try:
            self._mounter.unmount(path)
        except OSError as error:
            if error.errno not in _NOT_MOUNTED:
                _log.warning("cannot unmount a layer", extra={"path": str(path), "error": str(error)})
                return
        try:
            path.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            _log.warning("cannot remove a mount point", extra={"path": str(path), "error": str(error)})

    def mounted(self) -> set[int]:
        """What is mounted now."""
        return {int(path.name) for path in self._mounter.mounted() if _is_number(path.name)}

    def sweep(self) -> None:
        """Remove mount points on which nothing is mounted: of a reboot, and of calls that were killed."""
        mounted = self.mounted()
        for name in os.listdir(self._top):
            if _is_number(name) and int(name) not in mounted:
                try:
                    self.path(int(name)).rmdir()
                except OSError as error:
                    _log.debug("not a mount point", extra={"name": name, "error": str(error)})


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and name[0] != "0" and len(name) < _DIGITS
