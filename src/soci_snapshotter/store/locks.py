"""Keeping several processes that share one directory of blobs apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_NAME = "lock"


@contextlib.contextmanager
def content_lock(root: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold `<root>/lock` (flock(2)) for the length of a `with`; wait for it as long as it takes.

    Exclusive: blobs that nothing names are being removed. Shared: blobs are being written that something will
    name in a moment. The kernel takes the lock from a process that dies. Not to be nested.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(root / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)
