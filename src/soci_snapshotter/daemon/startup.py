"""What is checked and claimed before anything is served: descriptors, our own files, the root, the socket."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import soci_snapshotter
from soci_snapshotter.errors import Config, Precondition
from soci_snapshotter.linux import mounts, ownmounts

_log = logging.getLogger(__name__)

_LOCK = "daemon.lock"
_PATIENCE = 2.0  # seconds: a daemon that was killed a moment ago is still being taken apart by the kernel


def raise_descriptor_limit() -> None:
    """A lazy layer takes two descriptors or three, a node has hundreds: take as many as we may (getrlimit(2))."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _log.debug("descriptors", extra={"before": soft, "now": hard})


def refuse_own_mounts(root: Path) -> None:
    """Config when the interpreter, this package or `root` lies on a layer that this program serves: at the next fault
    it would wait for itself.
    """
    table = mounts.mountinfo()
    for what, path in (
        ("the interpreter", sys.executable),
        ("this program", soci_snapshotter.__file__),
        ("--root", str(root)),
    ):
        real = os.path.realpath(path)
        layer = ownmounts.below(os.fsencode(real), table)
        if layer is not None:
            raise Config(
                f"{what} ({real}) lies on a layer that a SOCI snapshotter serves ({os.fsdecode(layer)}): it would wait "
                "for itself; install the daemon, and choose --root, on a disk of the node"
            )


@contextmanager
def owned(root: Path) -> Iterator[None]:
    """The root is this daemon's alone; Precondition when it is another's. The kernel frees it when the owner dies."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Config(f"{root}: {error.strerror}; run as root, or choose --root and --address") from None
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
                    raise Precondition(
                        f"{root}: another daemon (process {owner or 'unknown'}) uses this root; stop it, or choose "
                        "another --root"
                    ) from None
                time.sleep(0.05)
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        except OSError as problem:  # a full disk: the lock holds all the same
            _log.debug("no pid in the lock", extra={"error": str(problem)})
        yield
    finally:
        os.close(descriptor)


def free_socket(address: Path) -> None:
    """Remove the socket that a dead daemon left at `address`. Config or Precondition when something else is there."""
    try:
        mode = os.lstat(address).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Config(f"--address {address}: is there and is no socket; remove it, or choose another address")
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(_PATIENCE)
        try:
            channel.connect(str(address))
        except OSError as problem:
            # A full backlog is somebody's who lives.
            if problem.errno in {errno.ECONNREFUSED, errno.ENOENT}:
                address.unlink(missing_ok=True)
                return
            if problem.errno == errno.EPROTOTYPE:
                raise Config(
                    f"--address {address}: is a socket of another kind; choose another address"
                ) from None
    raise Precondition(
        f"--address {address}: a process serves there already; stop it, or choose another address"
    )
