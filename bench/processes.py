"""Which processes a daemon has, and what they hold together."""

from collections.abc import Iterable
from pathlib import Path


def pss_mb(roots: Iterable[int], marks: Iterable[Path]) -> dict[str, float]:
    """Megabytes of PSS by process: `roots`, whoever names a path below `marks` in its arguments, and all their
    descendants. containerd, which names sockets too, does not count.
    """
    words_wanted = [str(mark).encode() for mark in marks]
    parents: dict[int, int] = {}
    found = set(roots)
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if any(mark in word for mark in words_wanted for word in words) and b"containerd" not in words[0]:
            found.add(int(entry.name))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return {f"{_name(pid)} {pid}": _pss(pid) for pid in sorted(found)}


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _pss(pid: int) -> float:
    """Pss of smaps_rollup (proc(5)) is in kB of 1024 bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"process {pid} has no Pss")
