"""Which control group this process is in, as service managers see it: cgroup 2, and the hierarchy `name=systemd` of
cgroup 1 (cgroups(7)). Controllers of cgroup 1 account, but nobody ends processes by them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from soci_snapshotter.linux.mounts import MountInfo

_NAMED = b"name=systemd"


def groups(data: bytes) -> dict[bytes, bytes]:
    """The paths in the text of a /proc/<pid>/cgroup: `b""` for cgroup 2, `b"name=systemd"`; others are left out."""
    found = {}
    for line in data.splitlines():
        fields = line.split(b":", 2)
        if len(fields) == 3 and fields[1] in {b"", _NAMED}:
            found[fields[1]] = fields[2]
    return found


def groups_of(pid: int | str) -> dict[bytes, bytes]:
    """groups() of a process; none when it is gone, or there are no control groups."""
    try:
        return groups(Path(f"/proc/{pid}/cgroup").read_bytes())
    except OSError:
        return {}


def tops(table: Iterable[MountInfo]) -> list[bytes]:
    """Where the tops of those two hierarchies are mounted."""
    return [
        entry.target
        for entry in table
        if entry.fstype == b"cgroup2"
        or (entry.fstype == b"cgroup" and _NAMED in entry.super_options.split(b","))
    ]


def make_group(top: bytes, name: bytes) -> bytes | None:
    """The cgroup.procs of a group `name` below `top`, made if need be; None where that may not be."""
    directory = os.path.join(top, name)
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
    except OSError:
        return None
    procs = os.path.join(directory, b"cgroup.procs")
    return procs if os.access(procs, os.W_OK) else None
