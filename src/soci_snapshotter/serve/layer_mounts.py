"""The mounts of layers below one directory, made in the way that the probe found or the configuration says."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from soci_snapshotter.linux import mounts
from soci_snapshotter.serve.classic_mounts import ClassicMounts
from soci_snapshotter.serve.erofs_mounts import mount_layer, mount_loop
from soci_snapshotter.serve.flatfiles import FuseServer

_log = logging.getLogger(__name__)

Method = Literal["file", "loop", "classic"]
METHODS: tuple[Method, ...] = ("file", "loop", "classic")  # the best first


@dataclass(frozen=True, slots=True)
class Stack:
    """How layers are mounted; `directio`: whether EROFS reads files past their page cache."""

    method: Method
    directio: bool

    @property
    def text(self) -> str:
        """For people."""
        words = {
            "file": "EROFS from files",
            "loop": "EROFS through loop devices",
            "classic": "the FUSE filesystem without EROFS",
        }[self.method]
        return f"{words}{', direct I/O' if self.directio else ''}"


class LayerMounts:
    """Mounts below the directory `below`, made the way `stack` says; adopts and unmounts those of every way.

    `run` is a directory that lives as long as the FUSE connection, for records of the classic way.
    """

    def __init__(self, stack: Stack, below: Path, server: FuseServer, run: Path) -> None:
        self._stack = stack
        self._below = below
        self._classic = ClassicMounts(server, run, below.parent / "fuse")

    def load(self, *, fresh: bool) -> None:
        """Take over what an earlier process served; before the server is entered."""
        self._classic.load(fresh=fresh)
        if fresh:
            self._classic.detach()
        elif self._stack.method != "classic" and self._classic.targets():
            # The kernel was told that OPEN is not needed, so it tells of no RELEASE.
            _log.warning(
                "mount_method was classic: files of layers removed from now on stay until the daemon is stopped "
                "with SIGINT, or the node restarts"
            )
        adopted = self._classic.targets()
        for path in self._found(b"fuse") - adopted:
            _log.warning(
                "a mount outlived its FUSE connection: containers that use it must be restarted",
                extra={"path": str(path)},
            )
            mounts.unmount(os.fsencode(path), mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)

    def mount(self, meta: Path, device: bytes, target: Path) -> None:
        """Mount `meta` over `device` at the directory `target`. Raises OSError."""
        if self._stack.method == "classic":
            self._classic.mount(meta, device, target)
        elif self._stack.method == "loop":
            mount_loop(os.fsencode(meta), device, os.fsencode(target))
        else:
            mount_layer(os.fsencode(meta), device, os.fsencode(target), self._stack.directio)

    def unmount(self, target: Path) -> None:
        """Take a mount out of this mount table; overlays that use it keep it alive. Raises OSError."""
        mounts.unmount(os.fsencode(target), mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
        if self._classic.owns(target):
            self._classic.unmounted(target)

    def mounted(self) -> set[Path]:
        """Where layers are mounted below the directory now: what a restarted daemon adopts."""
        self._classic.sweep()
        return self._found(b"erofs") | self._found(b"fuse") & self._classic.targets()

    def detach(self) -> None:
        """After the last unmount, when the FUSE connection is to end too."""
        self._classic.detach()

    def _found(self, kind: bytes) -> set[Path]:
        prefix = os.fsencode(self._below.resolve()) + b"/"
        return {
            self._below / os.fsdecode(entry.target[len(prefix) :])
            for entry in mounts.mountinfo()
            if entry.fstype == kind and entry.target.startswith(prefix)
        }
