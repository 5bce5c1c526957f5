"""Mounting trees of the classic filesystem, and knowing when the kernel has let go of one.

A tree is a directory of the detached FUSE mount; its own mount is a clone of that directory, put on m/<n>. Before
Linux 6.15 only what is in the mount table can be cloned: there the FUSE mount is put on <root>/fuse first.

Which tree has which number must survive this process, as the kernel knows its files by it: one small file each in
the run directory, which lives as long as the FUSE connection.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import msgspec

from soci_snapshotter.errors import SociError
from soci_snapshotter.linux import mounts
from soci_snapshotter.serve.classicfs import Trees
from soci_snapshotter.serve.erofs_mounts import set_read_ahead
from soci_snapshotter.serve.flatfiles import FuseServer

_log = logging.getLogger(__name__)

# What the FUSE mount itself has and a layer must not: the container's own mount decides.
_CLEARED = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV | mounts.MOUNT_ATTR_NOEXEC


class _Record(msgspec.Struct, frozen=True):
    """A tree, as the run directory has it."""

    target: str
    meta: str
    node: int | None
    path: str | None


class ClassicMounts:
    """The trees of `server` and their mounts. Thread safe.

    `run` keeps the records, `visible` is where the FUSE mount goes if it must.
    """

    def __init__(self, server: FuseServer, run: Path, visible: Path) -> None:
        self._server = server
        self._run = run
        self._visible = visible
        self._lock = threading.Lock()  # guards the tables
        self._attach_turn = threading.Lock()
        self._mounted: dict[Path, int] = {}  # target -> tree
        self._leaving: set[int] = set()  # not mounted any more, but still used
        self._nodes: dict[int, int] = {}  # tree -> the flat file that it reads
        self._read_ahead = False

    def load(self, *, fresh: bool) -> None:
        """Serve the trees of an earlier process again; before the server is entered, for requests in flight.

        On a `fresh` connection there are none, and what is mounted of an older one answers nothing any more.
        """
        self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
        table = {Path(os.fsdecode(entry.target)) for entry in mounts.mountinfo() if entry.fstype == b"fuse"}
        for file in sorted(self._run.iterdir()):
            if fresh or not file.name.isdigit():
                file.unlink()
                continue
            try:
                record = msgspec.json.decode(file.read_bytes(), type=_Record)
                device = os.fsencode(record.path) if record.node is None else record.node  # type: ignore[arg-type]
                number = self._server.trees.add(Path(record.meta), device, int(file.name))
            except (OSError, SociError, msgspec.MsgspecError, TypeError) as problem:
                _log.error("a layer's tree is lost", extra={"record": str(file), "error": str(problem)})
                file.unlink()
                continue
            if record.node is not None:
                self._nodes[number] = record.node
            target = Path(record.target)
            if target.resolve() in table:
                self._mounted[target] = number
            else:
                self._leaving.add(number)

    def mount(self, meta: Path, device: bytes, target: Path) -> None:
        """Serve `meta` over `device` (a path_of() of the server's, or a local file) and mount it at `target`."""
        node = self._server.node_of(device)
        number = self._server.trees.add(meta, device if node is None else node)
        record = self._run / str(number)
        try:
            path = None if node is not None else os.fsdecode(device)
            self._write(record, _Record(str(target), str(meta), node, path))
            descriptor = self._clone(Trees.name_of(number))
            try:
                mounts.attach(descriptor, os.fsencode(target))
            finally:
                os.close(descriptor)
        except BaseException:
            with self._lock:
                self._leaving.add(number)
            self.sweep()
            raise
        with self._lock:
            self._mounted[target] = number
            if node is not None:
                self._nodes[number] = node
        if node is not None:
            self._server.opened(node)

    def owns(self, target: Path) -> bool:
        """Whether a tree is mounted there."""
        with self._lock:
            return target in self._mounted

    def targets(self) -> set[Path]:
        """Where trees are mounted."""
        with self._lock:
            return set(self._mounted)

    def unmounted(self, target: Path) -> None:
        """The mount at `target` is gone: its tree goes when the kernel uses it no more."""
        with self._lock:
            self._leaving.add(self._mounted.pop(target))
        self.sweep()

    def sweep(self) -> None:
        """Let go of trees that nobody uses; others are tried again with the next one that goes, and at start."""
        with self._lock:
            leaving, self._leaving = self._leaving, set()
        for number in leaving:
            try:
                gone = self._server.forget_tree(number)
            except (OSError, SociError) as problem:
                _log.error("a layer's tree stays", extra={"tree": number, "error": str(problem)})
                gone = False
            with self._lock:
                if not gone:
                    self._leaving.add(number)
                    continue
                node = self._nodes.pop(number, None)
            self._server.trees.remove(number)
            (self._run / str(number)).unlink(missing_ok=True)
            if node is not None:
                self._server.closed(node)

    def detach(self) -> None:
        """Take the FUSE mount out of the mount table, if it had to be there."""
        try:
            mounts.unmount(os.fsencode(self._visible), mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
            self._visible.rmdir()
        except OSError as problem:
            if problem.errno not in {errno.ENOENT, errno.EINVAL}:
                _log.warning(
                    "the FUSE mount stays", extra={"path": str(self._visible), "error": str(problem)}
                )

    def _clone(self, name: bytes) -> int:
        descriptor = self._server.mount_fd
        if not self._read_ahead:
            self._read_ahead = True
            device = os.fstat(descriptor).st_dev
            set_read_ahead(f"{os.major(device)}:{os.minor(device)}")
        try:
            return mounts.clone(descriptor, name, _CLEARED)
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
        with self._attach_turn:
            if not self._attached():
                self._visible.mkdir(mode=0o700, exist_ok=True)
                mounts.attach(descriptor, os.fsencode(self._visible))
        return mounts.clone(descriptor, name, _CLEARED)

    def _attached(self) -> bool:
        path = os.fsencode(self._visible.parent.resolve() / self._visible.name)
        return any(entry.target == path for entry in mounts.mountinfo())

    def _write(self, path: Path, record: _Record) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.rename(path)
