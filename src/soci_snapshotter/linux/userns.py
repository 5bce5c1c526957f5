"""A descriptor of a user namespace with given id mappings, for mounts that map ids.

Only a new process can enter a new user namespace (a thread of many cannot, unshare(2)), and this one must not fork:
a small program does it and waits until its namespace has been taken.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soci_snapshotter.errors import Unsupported

_CHILD = Path(__file__).with_name("userns_child.py")
_START_SECONDS = 20.0  # an interpreter without site starts in 15 ms; a node that is thrashing takes seconds


@contextmanager
def user_namespace(uid_map: bytes, gid_map: bytes) -> Iterator[int]:
    """A close-on-exec descriptor, open for the block; the maps are texts for /proc/<pid>/{uid,gid}_map.

    Raises Unsupported where the kernel makes no user namespaces, OSError for maps that it does not take (EINVAL).
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        close_fds=True,
    )
    with process:  # closing its input ends it
        try:
            _entered(process)
            for name, text in (("uid_map", uid_map), ("gid_map", gid_map)):
                Path(f"/proc/{process.pid}/{name}").write_bytes(text)
            descriptor = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            process.kill()
            raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _entered(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None  # noqa: S101 - made with a pipe
    poll = select.poll()
    poll.register(process.stdout.fileno(), select.POLLIN)
    if not poll.poll(_START_SECONDS * 1000) or os.read(process.stdout.fileno(), 1) != b"+":
        raise Unsupported(
            "this kernel gives no user namespace: check /proc/sys/user/max_user_namespaces, or run containers without"
        )
