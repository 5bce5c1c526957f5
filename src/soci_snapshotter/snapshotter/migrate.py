"""A root that the Go daemon used becomes ours: its snapshots are imported, once, before anything else is done there.

    <root>/snapshotter/metadata.db    the Go daemon's; locked (flock(2)) by it, and by us as long as we run; never written
    <root>/snapshotter/snapshots      layers' directories, as ours; a lazy layer's was the mount point of its FUSE mount

What cannot be imported is refused in one line, and nothing is changed. The Go daemon's FUSE mounts whose process is dead
answer nothing: they are taken off (it does the same when it starts). One that answers is in use: refused.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import Config, SociError
from ..linux import mounts
from ..store import gosnapshots
from ..store.gosnapshots import GoSnapshots

_log = logging.getLogger(__name__)

_FILE_LIMIT = 256 << 20  # bytes; bbolt needs about 2 KiB a snapshot, and a node has thousands, not 100,000
_ANSWER_SECONDS = 5.0  # a mount that does not answer in this time is not dead: then it would answer at once
_OURS = (
    "{root}/snapshotter/metadata.sqlite*, {root}/layers and the directories from 1000000 on in "
    "{root}/snapshotter/snapshots"
)
_DRAIN = (
    "remove all that uses it while the Go daemon runs (`crictl rmp -fa; crictl rmi --prune`, or in each "
    "namespace `ctr containers rm` and `ctr images rm`), stop that daemon with SIGINT, and remove {root}"
)


@contextmanager
def go_root(root: Path) -> Iterator[None]:
    """Import what the Go daemon left below `root`, if it did; while it lasts, that daemon cannot start there.

    Raises Config, in one line that says what to do.
    """
    database = root / "snapshotter" / "metadata.db"
    try:
        descriptor = os.open(database, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        _lock(descriptor, database)
        _import(root, database, descriptor)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, database: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Config(
            f"{database} is in use: the Go soci-snapshotter-grpc runs on this root; stop it (`systemctl stop "
            "soci-snapshotter`, or SIGINT), or give --root another directory"
        ) from None


def _import(root: Path, database: Path, descriptor: int) -> None:
    rows = os.fsencode(root / "snapshotter" / "metadata.sqlite")
    drain = _DRAIN.format(root=root)
    before = gosnapshots.imported(rows)
    if before is not None:
        _unchanged(root, database, descriptor, before)
        return
    try:
        found = gosnapshots.decode(_contents(descriptor))
        _nothing_missed(root, rows, found)
        _take_off(_dead_mounts(root))
        gosnapshots.import_into(rows, found)
    except Config:
        raise
    except (SociError, OSError) as error:
        raise Config(
            f"{database}, the Go daemon's snapshots, cannot be imported: {error}; to begin anew, {drain}"
        ) from None
    _report(root, found)


def _unchanged(root: Path, database: Path, descriptor: int, before: int) -> None:
    """It was imported long ago: our rows are what counts, whatever became of that file but for another state of it."""
    try:
        state = gosnapshots.transaction(os.pread(descriptor, gosnapshots.HEAD_BYTES, 0))
    except (SociError, OSError) as error:
        _log.warning(
            "the Go daemon's metadata.db, imported before, cannot be read any more",
            extra={"path": str(database), "error": str(error)},
        )
        return
    if state != before:
        raise Config(
            f"{database} was changed by the Go daemon after it was imported: to import it again, remove the containers "
            f"of images pulled with this daemon, then {_OURS.format(root=root)} (such images must be pulled again); or "
            f"{_DRAIN.format(root=root)}"
        )


def _nothing_missed(root: Path, rows: bytes, found: GoSnapshots) -> None:
    """Our rows are not there: nothing else of ours may be. With the Go daemon's rows alone it would be swept away."""
    first = found.last_id + gosnapshots.ID_GAP
    layers = sum(1 for _ in (root / "layers").glob("*/*/layer.json"))
    snapshots = root / "snapshotter" / "snapshots"
    names = os.listdir(snapshots) if snapshots.is_dir() else []
    own = sum(name.isdecimal() and int(name) >= first for name in names)
    if layers or own:
        raise Config(
            f"{os.fsdecode(rows)} is missing, but there are {layers} layers and {own} snapshots that it knew: restore "
            f"it from a backup; or, once no container uses them, remove {_OURS.format(root=root)}"
        )


def _contents(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    if size > _FILE_LIMIT:
        raise OSError(errno.EFBIG, f"it has {size} bytes, more than {_FILE_LIMIT}")
    with open(descriptor, "rb", closefd=False) as file:
        return file.read(_FILE_LIMIT)


def _dead_mounts(root: Path) -> list[bytes]:
    """What is mounted on snapshots' directories and answers no more, topmost first. Raises Config if one is alive."""
    top = os.path.realpath(os.fsencode(root / "snapshotter" / "snapshots")) + b"/"
    found = [mount for mount in mounts.mountinfo() if mount.target.startswith(top)]
    alive = [
        mount.target for mount in found if not (mount.fstype.startswith(b"fuse") and _dead(mount.target))
    ]
    if alive:
        raise Config(
            f"{len(alive)} mounts below {os.fsdecode(top)} are in use, the first at {os.fsdecode(alive[0])}: stop the "
            "containers on them and the Go daemon with SIGINT, which unmounts them, or umount them; then start again"
        )
    return [mount.target for mount in reversed(found)]


def _dead(target: bytes) -> bool:
    """Whether a FUSE mount's process is gone: asked in a thread, because a process that hangs never answers."""
    answers: list[int] = []

    def ask() -> None:
        try:
            os.stat(target)
            answers.append(0)
        except OSError as error:
            answers.append(error.errno or 0)

    thread = threading.Thread(target=ask, name="is it alive", daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return answers[:1] == [errno.ENOTCONN]


def _take_off(targets: Sequence[bytes]) -> None:
    for target in targets:
        mounts.unmount(target, mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)


def _report(root: Path, found: GoSnapshots) -> None:
    directories = root / "snapshotter" / "snapshots"
    for row in found.rows:
        if not row.lazy and not (directories / str(row.id) / "fs").is_dir():
            _log.warning(
                "a snapshot of the Go daemon's has no directory: what is built on it cannot be mounted; remove its image",
                extra={"snapshot": row.key, "directory": str(directories / str(row.id))},
            )
    _log.info(
        "the Go daemon's snapshots are imported; its metadata.db stays as it is",
        extra={"snapshots": len(found.rows), "lazy": sum(row.lazy for row in found.rows), "root": str(root)},
    )
