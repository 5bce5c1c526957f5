"""Lowerdirs for containers in a user namespace: each layer once more, as a mount that maps ids. Nothing is copied.

    <root>/i/<snapshot id>/<n>      a clone of the lazy mount m/<n>
    <root>/i/<snapshot id>/s<id>    a clone of snapshots/<id>/fs, read-only

containerd maps ids itself where a snapshotter says uidmap= among a mount's options, but by one clone of the directory
that all lowerdirs have in common, which leaves out what is mounted below it: our layers. So it gets plain options.
A path that was handed out stays until its snapshot goes. Directories here are only ever removed by rmdir: behind a
mount that is still there lies a layer.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Collection, Iterable, Sequence

from ..errors import Invalid, Unsupported
from ..layers.turns import Turns
from ..linux import mounts
from ..linux.userns import user_namespace
from ..policy.idmaps import IdMap, lines

_log = logging.getLogger(__name__)

_NOT_MOUNTED = (errno.ENOENT, errno.EINVAL)  # umount2(2)
_CANNOT_MAP = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # mount_setattr(2)


class MappedMounts:
    """The mounts below <root>/i. Thread safe; steps of one snapshot take turns."""

    def __init__(self, root: bytes) -> None:
        """Adopt what an earlier process mounted."""
        self._top = os.path.join(os.path.abspath(root), b"i")
        os.makedirs(self._top, mode=0o700, exist_ok=True)
        self._turns = Turns()
        self._lock = threading.Lock()
        self._up: dict[int, set[bytes]] = {}
        prefix = os.path.realpath(self._top) + b"/"
        for entry in mounts.mountinfo():
            number, _, name = entry.target.removeprefix(prefix).partition(b"/")
            if entry.target.startswith(prefix) and number.isdigit() and name:
                self._up.setdefault(int(number), set()).add(name)

    def lowerdirs(self, snapshot_id: int, mapping: IdMap, paths: Sequence[bytes]) -> list[bytes]:
        """For each of `paths` (m/<n> or snapshots/<id>/fs) the mapped one, mounted; each path once.

        Raises Invalid for a mapping that the kernel does not take, Unsupported where it cannot map a layer.
        """
        named = {_name(path): path for path in paths}
        with self._turns.turn(snapshot_id):
            with self._lock:
                missing = named.keys() - self._up.get(snapshot_id, set())
            if missing:
                self._mount(snapshot_id, mapping, {name: named[name] for name in missing})
        return [self._path(snapshot_id, name) for name in named]

    def remove(self, snapshot_id: int) -> None:
        """Take down what is mounted for a snapshot; containers that use it keep it alive. Failures are logged."""
        directory = self._path(snapshot_id)
        with self._turns.turn(snapshot_id):
            try:
                names = os.listdir(directory)
            except FileNotFoundError:
                return
            for name in names:
                _unmount(os.path.join(directory, name))
            with self._lock:
                self._up.pop(snapshot_id, None)
            _rmdir(directory)

    def listed(self) -> list[int]:
        """The snapshots that something is mounted for."""
        return [int(name) for name in os.listdir(self._top) if name.isdigit()]

    def remove_others(self, listed: Iterable[int], keep: Collection[int]) -> None:
        """Take down what is of a snapshot in `listed` and not in `keep`, which was read after it."""
        for number in listed:
            if number not in keep:
                self.remove(number)

    def _mount(self, snapshot_id: int, mapping: IdMap, paths: dict[bytes, bytes]) -> None:
        os.makedirs(self._path(snapshot_id), mode=0o700, exist_ok=True)
        try:
            with user_namespace(lines(mapping.users), lines(mapping.groups)) as namespace:
                for name, path in paths.items():
                    target = self._path(snapshot_id, name)
                    os.makedirs(target, mode=0o700, exist_ok=True)
                    _mount_mapped(path, target, namespace)
                    with self._lock:
                        self._up.setdefault(snapshot_id, set()).add(name)
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise Invalid(
                    f"the kernel does not take the id mapping {mapping}: {error.strerror}"
                ) from None
            raise

    def _path(self, snapshot_id: int, name: bytes = b"") -> bytes:
        return os.path.join(self._top, b"%d" % snapshot_id, name).rstrip(b"/")


def _name(path: bytes) -> bytes:
    head, name = os.path.split(path)
    return b"s" + os.path.basename(head) if name == b"fs" else name


def _mount_mapped(path: bytes, target: bytes, namespace: int) -> None:
    try:
        descriptor = mounts.id_mapped(path, namespace)
    except OSError as error:
        if error.errno not in _CANNOT_MAP:
            raise
        raise Unsupported(
            f"{os.fsdecode(path)}: this kernel cannot map ids there ({error.strerror}; EROFS needs Linux 5.19, FUSE "
            'cannot): take "remap-ids" out of capabilities in containerd\'s proxy_plugins, and containerd copies'
        ) from None
    try:
        mounts.attach(descriptor, target)
    finally:
        os.close(descriptor)


def _unmount(path: bytes) -> None:
    try:
        mounts.unmount(path, mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno not in _NOT_MOUNTED:
            _log.warning("cannot unmount a mapped layer", extra={"path": path, "error": str(error)})
            return
    _rmdir(path)


def _rmdir(path: bytes) -> None:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("cannot remove a mount point", extra={"path": path, "error": str(error)})
