"""A scratch directory on ext4 and on a disk, whatever the machine's own filesystems are."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

from harness.coldcache import filesystem_type
from harness.containerd import unmount_below

PARENT = Path("/var/tmp")
"""A disk: /tmp is tmpfs on newer Debian, where caches are never cold."""

_IMAGE_BYTES = 48 << 30  # sparse; what benches write at most, twice


@contextlib.contextmanager
def ext4_scratch(prefix: str) -> Iterator[Path]:
    """A directory that goes with everything mounted in it: of /var/tmp if that is ext4, else of a loop image there."""
    holder = Path(tempfile.mkdtemp(prefix=prefix, dir=PARENT))
    try:
        if filesystem_type(holder) == "ext4":
            yield holder
            return
        image, inside = holder / "image", holder / "m"
        inside.mkdir()
        with open(image, "wb") as file:
            os.truncate(file.fileno(), _IMAGE_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,nodiscard", str(image)], check=True)
        # Direct I/O below the loop: otherwise everything is cached twice and never cold.
        loop = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
        device = subprocess.run(loop, check=True, capture_output=True, text=True).stdout.strip()
        try:
            subprocess.run(["mount", device, str(inside)], check=True)
            yield inside
        finally:
            unmount_below(inside)
            subprocess.run(["losetup", "--detach", device], check=False)
    finally:
        unmount_below(holder)
        rmtree(holder)
