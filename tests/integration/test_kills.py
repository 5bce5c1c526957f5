"""What a container sees while the daemon is killed, replaced, stopped or hung: a pause, and never a wrong byte."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness.daemon import CONFIG
from harness.images import Layout, layer_from_dir, layer_from_tar, shell_rootfs
from harness.lazyrig import Rig, lazy_rig
from harness.proxy import Proxy, parse_link

pytestmark = pytest.mark.root

SOURCE = Path(__file__).parents[2] / "src"
TREE_FILES = 300
ON_DEMAND = "[background_fetch]\ndisable = true\n" + CONFIG
# Reads the big file and the tree again and again, each time past the page cache; one line of JSON a round.
READER = """
import hashlib, json, os, signal, sys, time
signal.alarm(900)
root, expected = sys.argv[1], json.load(open(sys.argv[2]))
worst = 0.0
def timed(call, *arguments):
    global worst
    began = time.monotonic()
    result = call(*arguments)
    worst = max(worst, time.monotonic() - began)
    return result
def read(path):
    total = hashlib.sha256()
    file = timed(os.open, path, os.O_RDONLY)
    while data := timed(os.read, file, 1 << 18):
        total.update(data)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    return total.hexdigest()
while True:
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            timed(os.lstat, path)
            found[os.path.relpath(path, root)] = read(path)
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    print(json.dumps({"wrong": wrong, "files": len(found), "worst": worst}), flush=True)
"""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One node for the module; each test has a repository of its own."""
    with lazy_rig() as found:
        yield found


def image(rig: Rig, repository: str, megabytes: int) -> tuple[Layout, dict[str, str]]:
    """Publish a big file and a tree of small ones, none of which can be compressed; with the sha256 of each."""
    sums, stream = {}, io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(TREE_FILES + 1):
            small = number < TREE_FILES
            member = tarfile.TarInfo(f"tree/d{number % 20}/f{number}" if small else "big")
            data = random.Random(f"{repository}/{number}").randbytes(3000 if small else megabytes << 20)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            sums[member.name] = hashlib.sha256(data).hexdigest()
    return rig.publish(repository, [layer_from_tar(stream.getvalue())]), sums


class Reader:
    """A process that reads the image all the time."""

    def __init__(self, root: Path, sums: dict[str, str], base: Path) -> None:
        expected = base / f"{root.name}.json"
        expected.write_text(json.dumps(sums))
        self.files = len(sums)
        self.worst = 0.0
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(root), str(expected)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rounds(self, count: int) -> None:
        """Wait for so many whole rounds; each must have found every file, with the right content."""
        for _ in range(count):
            assert self.process.stdout is not None and self.process.stderr is not None
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()[-2000:]
            said = json.loads(line)
            assert (said["wrong"], said["files"]) == ([], self.files)
            self.worst = said["worst"]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def build(rig: Rig, version: str) -> Iterator[None]:
    """While it lasts the daemon is started from another build, with another version string."""
    other = rig.base / f"build-{version}"
    shutil.copytree(SOURCE, other, ignore=shutil.ignore_patterns("__pycache__"))
    file = other / "soci_snapshotter/__init__.py"
    file.write_text(re.sub(r'__version__ = "[^"]+"', f'__version__ = "{version}"', file.read_text()))
    rig.daemon.source = other
    try:
        yield
    finally:
        rig.daemon.source = SOURCE


def killed_under_readers(rig: Rig, repository: str, *, megabytes: int, kills: int, rate: str) -> float:
    """Kill the daemon under a reader; go on with another build, and without a registry. The longest stall, seconds."""
    layout, sums = image(rig, repository, megabytes)
    moments = random.Random(repository)
    with Proxy(rig.registry.address, link=parse_link(rate)) as far:
        node = replace(rig, proxy=far)
        node.pull(repository)
        with rig.rootfs(layout, "soci") as root, Reader(root, sums, rig.base) as reader:
            for _ in range(kills):
                time.sleep(moments.uniform(0.05, 1.0))
                rig.daemon.kill()
                time.sleep(moments.uniform(0, 0.3))
                rig.daemon.start()
            reader.rounds(1)
            with build(rig, "9.9.9"):
                rig.daemon.kill()
                rig.daemon.start()
                assert '"version": "9.9.9"' in rig.daemon.log
                reader.rounds(2)
            far.stall()  # all is here: nobody is asked any more
            rig.daemon.kill()
            rig.daemon.start()
            reader.rounds(2)
            worst = reader.worst
    said = [json.loads(line) for line in rig.daemon.log.splitlines() if line.startswith("{")]
    fresh = [line["fresh"] for line in said if line["msg"] == "FUSE connection"]
    assert fresh == [True] + [False] * (len(fresh) - 1)
    return worst


def test_three_kills_an_upgrade_and_no_registry(rig: Rig) -> None:
    """A reader of a cold file and a tree sees no error and no wrong byte while the daemon is killed three times,
    replaced by another version, and killed again without a registry.
    """
    worst = killed_under_readers(rig, "kills", megabytes=12, kills=3, rate="40mbit")
    print(f"longest stall {worst:.2f} s")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills(rig: Rig) -> None:
    """The same with a cold file of 200 MB and twenty kills at random moments; the longest stall is printed."""
    worst = killed_under_readers(rig, "twenty", megabytes=200, kills=20, rate="60mbit")
    print(f"longest stall {worst:.2f} s")


IMPATIENT = """
import soci_snapshotter.daemon.main as main
from soci_snapshotter.daemon.survival import Survival
main.Survival = lambda *a, **k: Survival(*a, deadline={seconds}, **k)
main.main()
"""


@contextlib.contextmanager
def impatient(seconds: float) -> Iterator[Rig]:
    """A node whose keeper waits so many seconds."""
    with lazy_rig(ON_DEMAND) as found:
        found.daemon.stop()
        found.daemon.program = ("-c", IMPATIENT.format(seconds=seconds))
        found.daemon.start()
        found.reconnected()
        yield found


@pytest.mark.slow
def test_a_daemon_that_hangs() -> None:
    """The daemon is stopped (SIGSTOP): a container that waits for bytes is killed and removed, df and sync return, and
    after the keeper's deadline other readers get an error; let go on, the daemon says so and ends, and the next serves.
    """
    with impatient(8) as rig:
        left_alone(rig, hang=True, patience=40)


@pytest.mark.slow
def test_a_daemon_that_is_gone() -> None:
    """The same with a daemon that was killed and has no successor before the deadline."""
    with impatient(8) as rig:
        left_alone(rig, hang=False, patience=40)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_without_a_daemon() -> None:
    """The same with the keeper's own deadline, two minutes, and df for ten."""
    with lazy_rig(ON_DEMAND) as rig:
        left_alone(rig, hang=True, patience=180, longer=600)


def left_alone(rig: Rig, *, hang: bool, patience: float, longer: float = 0) -> None:
    """See the tests. `patience`: seconds until readers have an error; `longer`: how long df is tried at least."""
    layout, sums = image(rig, "alone", 8)
    directory = shell_rootfs(rig.base / "box-rootfs")
    (directory / "cold").write_bytes(os.urandom(16 << 20))
    rig.publish("box", [layer_from_dir(directory)])
    rig.pull("alone")
    rig.pull("box")
    ctr = rig.containerd.ctr
    rig.containerd.run(
        rig.name("box"), "/bin/sh", "-c", "cat /bin/sh /bin/cat >/dev/null", snapshotter="soci"
    )
    with rig.rootfs(layout, "soci") as root:
        rig.proxy.stall()
        reader = subprocess.Popen(
            [sys.executable, "-c", f"open({str(root / 'big')!r}, 'rb').read()"],
            stderr=subprocess.PIPE,
            text=True,
        )
        ctr("run", "--detach", "--snapshotter", "soci", rig.name("box"), "box", "/bin/cat", "/cold")
        time.sleep(0.5)  # both wait now
        if hang:
            rig.daemon.process.send_signal(signal.SIGSTOP)
        else:
            rig.daemon.kill()
        began = time.monotonic()
        try:
            ctr("tasks", "kill", "--signal", "SIGKILL", "box", timeout=20)
            while "RUNNING" in ctr("tasks", "ls", timeout=20).stdout:
                time.sleep(0.1)
            ctr("tasks", "rm", "--force", "box", timeout=20, check=False)
            ctr("containers", "rm", "box", timeout=20)
            assert reader.poll() is None  # nothing of this waited for the deadline
            returns("df")
            returns("df", str(root))
            returns("sync")
            _, said = reader.communicate(timeout=patience)
            assert "OSError" in said, said
            while time.monotonic() - began < longer:
                returns("df")
                time.sleep(5)
        finally:
            rig.proxy.resume()
            reader.kill()
            reader.wait()
            if hang:
                rig.daemon.process.send_signal(signal.SIGCONT)
    if hang:
        assert rig.daemon.process.wait(20) == 1
        assert "the FUSE connection was aborted" in rig.daemon.log
    rig.daemon.start()
    rig.reconnected()
    assert "a mount outlived its FUSE connection" in rig.daemon.log
    with rig.rootfs(layout, "soci") as root:
        assert hashlib.sha256((root / "big").read_bytes()).hexdigest() == sums["big"]


def returns(*command: str) -> None:
    """Run it; that some other test's file system gives an error is not what is asked."""
    subprocess.run(command, check=False, timeout=20, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
