"""Where the keeper runs: not in the control group of the daemon's service, which is killed whole when it restarts.

Under systemd in a scope of its own; else, or if that fails, in a control group beside those of services.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from soci_snapshotter.errors import SociError
from soci_snapshotter.linux import cgroups, mounts
from soci_snapshotter.serve import keeper

_log = logging.getLogger(__name__)

GROUP = b"soci-snapshotter-keeper"
SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
_TIMEOUT = 10.0  # seconds for a process to start


Bound = Callable[[], AbstractContextManager[int]]
"""Binds the keeper's socket, in place of any earlier one; its descriptor while the block lasts."""


def start(bound: Bound, directory: Path) -> None:
    """Start a keeper for the run directory `directory`; it listens when this returns.

    Each try has a socket of its own: what seemed to fail may have left a keeper, which must get no client.
    SociError when it does not start.
    """
    here = cgroups.groups_of("self")
    if set(here.values()) <= {b"/"}:
        _run(bound, directory)
        return
    if SYSTEMD.is_dir() and (scope := shutil.which("systemd-run")):
        unit = f"soci-snapshotter-keeper-{os.urandom(4).hex()}"
        words = (
            "--scope",
            "--quiet",
            "--collect",
            f"--unit={unit}",
            "--description=SOCI snapshotter: keeper",
        )
        try:
            _run(bound, directory, before=(scope, *words, "--"))
            return
        except SociError as problem:
            _log.warning("systemd gives the keeper no scope", extra={"error": str(problem)})
    places = [cgroups.make_group(top, GROUP) for top in cgroups.tops(mounts.mountinfo())]
    _run(bound, directory, groups=[os.fsdecode(place) for place in places if place])


def escaped(pid: int) -> bool:
    """Whether the keeper `pid` is in no control group of this process but the top ones."""
    there = cgroups.groups_of(pid)
    return all(there.get(kind) != path for kind, path in cgroups.groups_of("self").items() if path != b"/")


def _run(bound: Bound, directory: Path, *, before: Sequence[str] = (), groups: Sequence[str] = ()) -> None:
    try:
        with bound() as number:
            subprocess.run(
                [
                    *before,
                    *(sys.executable, "-I", "-S", keeper.__file__, str(number), str(directory)),
                    *groups,
                ],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                close_fds=True,
                pass_fds=[number],
                start_new_session=True,
                timeout=_TIMEOUT,
            )
    except (OSError, subprocess.SubprocessError) as problem:
        raise SociError(f"the keeper process does not start: {problem}") from None
