"""The directories of ordinary snapshots:

    <root>/snapshots/<id>/fs      what the snapshot changes; 0755, owned as its parent's top is
    <root>/snapshots/<id>/work    overlayfs's own; only for active ones

A directory exists before its row is committed and goes after its row is gone: a crash leaves a directory
without a row, never a row without a directory. (An ordered journal writes the earlier mkdir with the row.)
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection

from ..errors import Config
from ..policy.idmaps import IdMap
from ..policy.lazy import Usage

_log = logging.getLogger(__name__)

# st_blocks counts these whatever the filesystem's block size is (stat(2)).
_BLOCK = 512
# lowerdir= separates with ":", options with ",", and "\" escapes: containerd escapes none of them.
_UNUSABLE = ":,\\"


class Directories:
    """Makes, measures and removes snapshot directories under `root`."""

    def __init__(self, root: bytes) -> None:
        try:
            text = os.path.abspath(root).decode("utf-8")
        except UnicodeDecodeError:
            raise Config(f"root {root!r} is not UTF-8: containerd's API cannot carry it") from None
        if any(char in text for char in _UNUSABLE):
            raise Config(
                f'root {text!r}: overlayfs options cannot carry ":", "," or "\\"; choose another root'
            )
        self._top = os.path.join(text, "snapshots")
        os.makedirs(self._top, mode=0o700, exist_ok=True)

    def upper(self, snapshot_id: int) -> str:
        """The directory that holds what the snapshot changes."""
        return os.path.join(self._top, str(snapshot_id), "fs")

    def work(self, snapshot_id: int) -> str:
        """The work directory for overlayfs."""
        return os.path.join(self._top, str(snapshot_id), "work")

    def make(
        self, snapshot_id: int, *, work: bool, like: str | bytes | None, mapping: IdMap | None = None
    ) -> None:
        """Make a snapshot's directories; `like` is the directory whose owner the top takes, as `mapping` maps it.

        Modes are set after mkdir, since the umask is the process's and not ours to change.
        """
        os.mkdir(os.path.join(self._top, str(snapshot_id)), 0o700)
        upper = self.upper(snapshot_id)
        os.mkdir(upper, 0o755)
        os.chmod(upper, 0o755)  # noqa: S103 - a container's / for all its users
        owner = None
        if like is not None:
            status = os.stat(like)
            owner = status.st_uid, status.st_gid
        if mapping is not None:  # overlayfs maps what it reads from lowerdirs, but not the upperdir
            owner = mapping.owner(*(owner or (0, 0)))
        if owner is not None:
            os.chown(upper, *owner, follow_symlinks=False)
        if work:
            os.mkdir(self.work(snapshot_id), 0o711)
            os.chmod(self.work(snapshot_id), 0o711)  # noqa: S103 - containerd's choice

    def remove(self, snapshot_id: int | str) -> None:
        """Remove a snapshot's directories, as far as that goes; what cannot be removed is logged."""

        def failed(_function: object, path: object, info: tuple[object, BaseException, object]) -> None:
            if not isinstance(info[1], FileNotFoundError):
                _log.warning("cannot remove directory", extra={"path": path, "error": str(info[1])})

        shutil.rmtree(os.path.join(self._top, str(snapshot_id)).encode(), onerror=failed)

    def listed(self) -> list[str]:
        """The names of snapshots' directories; what else is there is not ours."""
        return [name for name in os.listdir(self._top) if _is_id(name)]

    def remove_others(self, listed: Collection[str], keep: Collection[int]) -> None:
        """Remove what is in `listed` unless it is the directory of an id in `keep`."""
        kept = {str(snapshot_id) for snapshot_id in keep}
        for name in listed:
            if name not in kept:
                self.remove(name)

    def usage(self, snapshot_id: int) -> Usage:
        """Bytes allocated and inodes under the snapshot's top, itself included, each inode once."""
        seen: set[tuple[int, int]] = set()
        size = 0
        top = self.upper(snapshot_id).encode()
        pending = [top]
        stats = [os.lstat(top)]
        while pending:
            directory = pending.pop()
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        try:
                            stats.append(entry.stat(follow_symlinks=False))
                        except FileNotFoundError:  # a container is at work
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(entry.path)
            except FileNotFoundError:
                pass
            for stat in stats:
                if (stat.st_dev, stat.st_ino) not in seen:
                    size += stat.st_blocks * _BLOCK
                    seen.add((stat.st_dev, stat.st_ino))
            stats.clear()
        return Usage(size, len(seen))


def _is_id(name: str) -> bool:
    """Whether a directory of this name is ours."""
    return name.isascii() and name.isdigit() and name[0] != "0"


def overlay_options() -> tuple[str, ...]:
    """The options that go with every overlay: index=off where the kernel has the index (containerd does so).

    With the index on, a lowerdir cannot be reused by a second mount with another upperdir.
    """
    return ("index=off",) if os.path.exists("/sys/module/overlay/parameters/index") else ()
