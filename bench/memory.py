"""idle-memory: what all our processes hold together, ten seconds after the last work."""

import time
from collections.abc import Iterator
from pathlib import Path

from bench.environment import Environment, small_files
from bench.result import Result, smaller_is_better

NAMES = ("idle-memory",)

TARGET_MB = 80.0

_IDLE_S = 10


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """PSS with one image pulled, mounted and read in full; the peer is the limit itself."""
    with small_files(24_000) as environment:
        environment.fill()
        runs = []
        for _ in range(1 if smoke else 3):
            time.sleep(_IDLE_S)
            runs.append({"ours": sum(_pss_mb(environment).values()), "peer": TARGET_MB})
        yield smaller_is_better(
            names[0],
            "PSS of daemon, keeper and workers together, idle, with one lazily pulled image of 24,000 files",
            "MB",
            runs,
            target=1.0,
            notes={name: round(value, 1) for name, value in _pss_mb(environment).items()},
        )


def _pss_mb(environment: Environment) -> dict[str, float]:
    """Megabytes by process: the daemon, its descendants, and whoever else names its directory or socket."""
    marks = [str(environment.scratch / "d").encode(), str(environment.scratch / "soci.sock").encode()]
    parents: dict[int, int] = {}
    ours = {environment.daemon.pid}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if any(mark in word for mark in marks for word in words) and b"containerd" not in words[0]:
            ours.add(int(entry.name))
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in ours} - ours
        ours |= more
        grown = bool(more)
    return {f"{_name(pid)} {pid}": _pss(pid) for pid in sorted(ours)}


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _pss(pid: int) -> float:
    """Pss of smaps_rollup (proc(5)) is in kB of 1024 bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"process {pid} has no Pss")
