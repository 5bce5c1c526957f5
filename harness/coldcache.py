"""Cold caches, so that two runs of the same thing start from the same place: the disk."""

import os
from pathlib import Path

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def drop_caches() -> None:
    """Writes everything out, then drops clean pages, dentries and inodes (proc_sys_vm(5): 3). Needs root.

    Twice: inodes freed by the first round let go of pages that it found in use.
    """
    os.sync()
    for _ in range(2):
        _DROP_CACHES.write_text("3\n")


def filesystem_type(path: Path) -> str:
    """The type of the filesystem that holds `path`, from mountinfo (proc(5))."""
    best, found = "", ""
    target = os.path.realpath(path)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode().decode("unicode_escape")
        inside = target == point or target.startswith(point.rstrip("/") + "/")
        # A later line with the same mount point covers the earlier one.
        if inside and len(point) >= len(best):
            best, found = point, right.split(" ")[0]
    return found
