"""`make soak`: a node at work for an hour, in random order, short of memory; nothing of it may grow.

    pull     an image is pulled lazily            run      a container hashes files, and its sums are compared
    read     files of a root are read at random   remove   an image goes
    kill     the daemon is killed with -9 and started again
    cold     the kernel's caches are dropped

Every few steps all images are removed, and what the node holds then is noted: memory, descriptors, mounts, directories
and disk. At the end the last third of those notes is held against the first: what grew is named, and the exit code is 1.

SOAK_SECONDS (3600) is how long, SOAK_SEED which random order, SOAK_MEMORY_MB (192) what the daemon may use, its page
cache counted, where the kernel has memory cgroups.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from harness.coldcache import drop_caches
from harness.directnode import data_layer
from harness.images import Layer, Layout, layer_from_dir, shell_rootfs
from harness.lazyrig import Rig, lazy_rig
from soci_snapshotter.linux import mounts

IMAGES = 4
STEPS = 12  # between two rests
CONFIG = "[pull_modes.soci_v1]\nenable = true\n[background_fetch]\nsilence_period_msec = 500\n"
ROOM = {
    "daemon_kb": (0.15, 8 << 10),
    "keeper_kb": (0.0, 512),
    "disk_kb": (0.0, 4 << 10),
    "daemon_fds": (0.0, 12),
}
"""What may be more at the end: a part of what was there, and an amount. Of all else nothing. The daemon's descriptors
are some 20, and up to 10 connections to the registry that are kept for a while.
"""


@dataclass(frozen=True)
class Note:
    """What the node holds at rest: no image, no container."""

    daemon_kb: int
    keeper_kb: int
    daemon_fds: int
    keeper_fds: int
    mounts: int
    layers: int
    snapshots: int
    disk_kb: int


@dataclass
class Image:
    """An image that is to be had, and the sums of its files."""

    name: str
    layout: Layout
    sums: dict[str, str]


@dataclass
class Soak:
    """The node, its images and what was done with them."""

    rig: Rig
    images: list[Image]
    random: random.Random
    limit: Callable[[int], None]
    pulled: set[str] = field(default_factory=set)
    done: Counter[str] = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)

    def step(self) -> None:
        """One thing, whichever."""
        name, weight = zip(
            *{"pull": 4, "run": 3, "read": 3, "remove": 2, "kill": 1, "cold": 1}.items(), strict=True
        )
        [chosen] = self.random.choices(name, weight)
        getattr(self, chosen)()
        self.done[chosen] += 1

    def pull(self) -> None:
        """Pull an image, again if it is here."""
        image = self.random.choice(self.images)
        self.rig.pull(image.name)
        self.pulled.add(image.name)

    def run(self) -> None:
        """A container reads some files."""
        image = self._some()
        chosen = self.random.sample(sorted(image.sums), 3)
        out = self.rig.containerd.run(
            self.rig.name(image.name), "/bin/sha256sum", *chosen, snapshotter="soci"
        )
        found = [line.split()[0] for line in out.splitlines()]
        assert found == [image.sums[name] for name in chosen], (image.name, out)

    def read(self) -> None:
        """Files of a root, as no container reads them: pieces, in any order."""
        image = self._some()
        with self.rig.rootfs(image.layout, "soci") as root:
            for name in self.random.sample(sorted(image.sums), 4):
                size = (root / name[1:]).stat().st_size
                with open(root / name[1:], "rb") as file:
                    for _ in range(8):
                        at = self.random.randrange(size)
                        assert len(os.pread(file.fileno(), 4096, at)) == min(4096, size - at)

    def remove(self) -> None:
        """An image goes."""
        if self.pulled:
            name = self.random.choice(sorted(self.pulled))
            self.rig.containerd.ctr("images", "rm", "--sync", self.rig.name(name))
            self.pulled.discard(name)

    def kill(self) -> None:
        """The daemon dies and comes back, with an image's background fetch under way, say."""
        self.rig.daemon.kill()
        self.rig.daemon.start()
        self.limit(self.rig.daemon.pid)
        self.rig.reconnected()

    def cold(self) -> None:
        """What the kernel had cached is gone."""
        drop_caches()

    def rest(self) -> None:
        """Remove everything, wait until it is gone, note what is left."""
        while self.pulled:
            self.remove()
        root = self.rig.daemon.root
        end = time.monotonic() + 60
        while any((root / "layers").iterdir()) and time.monotonic() < end:
            time.sleep(0.1)
        self.rig.containerd.garbage_collect()  # it has the snapshotter clean up, too
        time.sleep(
            2
        )  # workers that were started for a layer end by themselves; descriptors close behind FUSE RELEASE
        self.notes.append(self._note(root))

    def _note(self, root: Path) -> Note:
        keeper = keeper_of(self.rig.daemon.address.parent)
        below = os.fsencode(self.rig.base) + b"/"
        disk = subprocess.run(["du", "-skx", str(root)], capture_output=True, text=True, check=True).stdout
        return Note(
            daemon_kb=resident(self.rig.daemon.pid),
            keeper_kb=resident(keeper),
            daemon_fds=len(os.listdir(f"/proc/{self.rig.daemon.pid}/fd")),
            keeper_fds=len(os.listdir(f"/proc/{keeper}/fd")),
            mounts=sum(1 for entry in mounts.mountinfo() if entry.target.startswith(below)),
            layers=len(list((root / "layers").iterdir())),
            snapshots=len(list((root / "snapshotter" / "snapshots").iterdir())),
            disk_kb=int(disk.split()[0]),
        )

    def _some(self) -> Image:
        if not self.pulled:
            self.pull()
        name = self.random.choice(sorted(self.pulled))
        return next(image for image in self.images if image.name == name)


def grown(notes: list[Note]) -> list[str]:
    """What the last third of the notes has more of than the first, in words."""
    third = max(len(notes) // 3, 1)
    found = []
    for name in (entry.name for entry in fields(Note)):
        first, last = (
            statistics.median(getattr(n, name) for n in part) for part in (notes[:third], notes[-third:])
        )
        part, amount = ROOM.get(name, (0.0, 0))
        if last > first * (1 + part) + amount:
            found.append(f"{name} grew from {first:g} to {last:g}")
    return found


def resident(pid: int) -> int:
    """KiB of memory that are the process's own: what others would use without it is not counted."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def keeper_of(directory: Path) -> int:
    """The pid of the keeper of this run directory."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(directory) in words and any(word.endswith(b"keeper.py") for word in words):
            return int(entry.parent.name)
    raise RuntimeError(f"no keeper of {directory}")


@contextlib.contextmanager
def memory_limit(megabytes: int) -> Iterator[Callable[[int], None]]:
    """Puts processes under a limit of that much memory; says so and does nothing where there are no memory cgroups."""
    for top, name in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(top) / f"soci-soak-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / name).write_text(str(megabytes << 20))
        except OSError:
            group.rmdir()
            continue
        break
    else:
        print("no memory cgroup here: the daemon is not short of memory", flush=True)
        yield lambda pid: None
        return
    try:

        def limited(pid: int) -> None:
            (group / "cgroup.procs").write_text(str(pid))

        yield limited
    finally:
        end = time.monotonic() + 20
        while True:  # the daemon's last processes end behind it
            try:
                group.rmdir()
                break
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)


def publish(rig: Rig, count: int) -> list[Image]:
    """Images with a shell at the bottom, a layer that two of them share, and one of their own."""
    with tempfile.TemporaryDirectory() as scratch:
        shell = layer_from_dir(shell_rootfs(Path(scratch) / "shell"))
    made = []
    for number in range(count):
        layers: list[Layer] = [shell]
        sums: dict[str, str] = {}
        for seed in (100 + number // 2, number):
            layer, found = data_layer(seed)
            layers.append(layer)
            sums |= {f"/{name}": total for name, total in found.items()}
        made.append(Image(f"soak{number}", rig.publish(f"soak{number}", layers), sums))
    return made


def main() -> int:
    """Soak; 0 when nothing grew."""
    seconds = float(os.environ.get("SOAK_SECONDS", "3600"))
    seed = int(os.environ.get("SOAK_SEED", str(time.time_ns() % 10**6)))
    limit = int(os.environ.get("SOAK_MEMORY_MB", "192"))
    print(f"soak: {seconds:g} s, seed {seed}, {limit} MB for the daemon", flush=True)
    with memory_limit(limit) as limited, lazy_rig(CONFIG) as rig:
        soak = Soak(rig, publish(rig, IMAGES), random.Random(seed), limited)  # noqa: S311 - an order of steps, to be had again
        limited(rig.daemon.pid)
        soak.kill()  # so that every daemon of the soak is one that was started over a root
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(soak.notes) < 3:
            for _ in range(STEPS):
                soak.step()
            soak.rest()
            print(json.dumps({"done": sum(soak.done.values()), **asdict(soak.notes[-1])}), flush=True)
        print(f"done: {dict(soak.done)}")
        found = grown(soak.notes)
    print("\n".join(found) if found else "soak: nothing grew")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
