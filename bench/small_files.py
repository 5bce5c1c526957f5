"""walk, stat and read-all: our layer with all spans present against the same tree unpacked.

Both lie under overlayfs, with cold caches before every run. The programs are find and cat, so that the
filesystem is measured, not the language of the bench. Nothing comes from the registry meanwhile, or it
fails.
"""

import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from harness.coldcache import drop_caches

from bench.environment import Environment, file_list, read_all, small_files
from bench.result import Result, interleaved, smaller_is_better

NAMES = ("walk", "stat", "read-all")

FILES = 24_000

_WHAT = {
    "walk": "find over the tree, names only",
    "stat": "find over the tree with lstat of every entry",
    "read-all": "cat of every file in order of names, two at a time",
}

_TARGET = {"walk": 1.0, "stat": 1.0, "read-all": 0.9}


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """The benches of `names`, over one tree; `smoke` makes one run each instead of seven."""
    with small_files(FILES) as environment:
        environment.fill()
        for name in names:
            yield _bench(environment, name, 1 if smoke else 7)


def _bench(environment: Environment, name: str, runs: int) -> Result:
    before = environment.proxy.received
    action = _ACTIONS[name](environment)
    measured = interleaved(
        partial(_cold, action, environment.ours), partial(_cold, action, environment.peer), runs
    )
    if environment.proxy.received != before:
        raise RuntimeError(f"bench {name}: bytes came from the registry: not all spans were present")
    tree = environment.tree
    notes: dict[str, float | str] = {
        "files": tree.files,
        "directories": tree.directories,
        "bytes": tree.size,
        "filesystem": environment.filesystem,
    }
    if name == "read-all":
        notes |= _read_all_notes(environment, max(1, runs // 2))
    return smaller_is_better(name, _WHAT[name], "s", measured, target=_TARGET[name], notes=notes)


def _cold(action: Callable[[Path], float], root: Path) -> float:
    drop_caches()
    return action(root)


def _read_all_notes(environment: Environment, runs: int) -> dict[str, float | str]:
    """One reader instead of two, and the layer as a container gets it that starts after completion."""
    single = _reader(environment, 1)
    one = interleaved(
        partial(_cold, single, environment.ours), partial(_cold, single, environment.peer), runs
    )
    notes: dict[str, float | str] = {
        "one_reader_ratio": smaller_is_better("", "", "s", one, target=0).ratio,
    }
    complete = environment.scratch / "complete"
    environment.mount("soci", complete)
    if _lower(complete) != _lower(environment.ours):
        two = _reader(environment, 2)
        local = interleaved(partial(_cold, two, complete), partial(_cold, two, environment.peer), runs)
        notes["complete_layer_ratio"] = smaller_is_better("", "", "s", local, target=0).ratio
    return notes


def _lower(mount: Path) -> str:
    """The lowerdir of an overlayfs mount."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, _, options, *_ = line.split()
        if point == str(mount):
            return next(each for each in options.split(",") if each.startswith("lowerdir="))
    raise RuntimeError(f"{mount} is not mounted")


def _find(*arguments: str) -> Callable[[Path], float]:
    def run(root: Path) -> float:
        started = time.monotonic()
        subprocess.run(["find", str(root), "-xdev", *arguments], stdout=subprocess.DEVNULL, check=True)
        return time.monotonic() - started

    return run


def _reader(environment: Environment, processes: int) -> Callable[[Path], float]:
    names = file_list(environment.peer)
    prefix = str(environment.peer).encode()

    def run(root: Path) -> float:
        return read_all(names.replace(prefix, str(root).encode()), processes)

    return run


_ACTIONS: dict[str, Callable[[Environment], Callable[[Path], float]]] = {
    "walk": lambda _: _find(),
    # Time and size are in no directory listing: find must lstat.
    "stat": lambda _: _find("-printf", "%T@ %s %p\\n"),
    "read-all": lambda environment: _reader(environment, 2),
}
