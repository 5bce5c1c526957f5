"""The daemon under a service manager: the control group killed whole, descriptors stored, sockets given; and what it
refuses at its start.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.images import Layout, layer_from_dir, shell_rootfs
from harness.lazyrig import Rig, lazy_rig
from tests.integration.test_complete import until

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.linux import cgroups, mounts

pytestmark = pytest.mark.root

FILES = 16
SOURCE = Path(__file__).parents[2] / "src"
# What systemd does between fork and exec: the descriptors it has go to 3 and up, with their names.
LAUNCH = """
import fcntl, os, socket, sys
with socket.socket(socket.AF_UNIX) as manager:
    manager.connect({path!r})
    names, given, _, _ = socket.recv_fds(manager, 4096, 16)
high = [fcntl.fcntl(one, fcntl.F_DUPFD, 100) for one in given]
for one in given:
    os.close(one)
for number, one in enumerate(high, 3):
    os.dup2(one, number)
    os.close(one)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)), LISTEN_FDNAMES=names.decode())
{address}
from soci_snapshotter.daemon.main import main
main()
"""
# What systemd does to have a service in a control group.
GROUPED = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
for path in {procs!r}:
    with open(path, "w") as file:
        file.write("0")
from soci_snapshotter.daemon.main import main
main()
"""
# A call that waits until it may go on.
SLOW = """
import pathlib, time
from soci_snapshotter.daemon.snapshots_service import SnapshotsService
stat, place = SnapshotsService.Stat, pathlib.Path({place!r})
def slow(self, request, context):
    if request.key == "slow":
        (place / "came").touch()
        while not (place / "go").exists():
            time.sleep(0.02)
    return stat(self, request, context)
SnapshotsService.Stat = slow
"""


class Manager:
    """A descriptor store and a listener, as process 1 has them for a unit."""

    def __init__(self, base: Path) -> None:
        self.stored: dict[str, int] = {}
        self.listener: socket.socket | None = None
        self.notify = base / "notify"
        self.start = base / "start"
        self._said = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._said.bind(str(self.notify))
        self._starts = socket.socket(socket.AF_UNIX)
        self._starts.bind(str(self.start))
        self._starts.listen(4)
        self._said.settimeout(0.2)
        self._starts.settimeout(0.2)
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=one) for one in (self._hear, self._give)]

    def _hear(self) -> None:
        while not self._ending.is_set():
            try:
                data, given, _, _ = socket.recv_fds(self._said, 4096, 16)
            except TimeoutError:
                continue
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTOREREMOVE" in words and words["FDNAME"] in self.stored:
                os.close(self.stored.pop(words["FDNAME"]))
            if "FDSTORE" in words and words.get("FDPOLL") == "0":
                [self.stored[words["FDNAME"]]] = given

    def _give(self) -> None:
        while not self._ending.is_set():
            try:
                client, _ = self._starts.accept()
            except TimeoutError:
                continue
            given = dict(self.stored)
            if self.listener is not None:
                given["soci.socket"] = self.listener.fileno()
            with client:
                socket.send_fds(client, [":".join(given).encode()], list(given.values()))

    def __enter__(self) -> Manager:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        for one in (self._said, self._starts, self.listener):
            if one is not None:
                one.close()
        for descriptor in self.stored.values():
            os.close(descriptor)
        for path in (self.notify, self.start):
            path.unlink()


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One node for the module, with one image that is never all here."""
    with lazy_rig("[background_fetch]\ndisable = true\n[pull_modes.soci_v1]\nenable = true\n") as found:
        yield found


@pytest.fixture
def daemon_as_it_was(rig: Rig) -> Iterator[None]:
    """The next test finds the daemon as this one did."""
    yield
    rig.daemon.program = ("-m", "soci_snapshotter.daemon.main")
    if rig.daemon.process.poll() is None:
        rig.daemon.stop()
    rig.daemon.start()
    rig.reconnected()


@pytest.fixture(scope="module")
def layout(rig: Rig) -> Layout:
    """An image of files that fill spans of their own, pulled."""
    directory = shell_rootfs(rig.base / "box")
    for number in range(FILES):
        (directory / f"file{number}").write_bytes(os.urandom(3 << 20))
    found = rig.publish("box", [layer_from_dir(directory)])
    rig.pull("box")
    return found


@contextlib.contextmanager
def reading(rig: Rig, root: Path) -> Iterator[None]:
    """A cold file is waited for when the block begins, and has been read when it ends: every byte of it."""
    script = "import sys; f = open(sys.argv[1], 'rb'); print('open', file=sys.stderr, flush=True)\n"
    script += "sys.stdout.buffer.write(f.read())"
    rig.proxy.stall()
    for number in range(FILES):  # some are here, read before or ahead
        name = f"file{number}"
        reader = subprocess.Popen(
            [sys.executable, "-c", script, str(root / name)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            assert reader.stderr is not None and reader.stderr.readline() == b"open\n"
            waits = not select.select([reader.stdout], [], [], 1)[0]
            if waits:
                rig.proxy.resume()
                yield
            data, _ = reader.communicate(timeout=60)
            assert data == (rig.base / "box" / name).read_bytes()
            assert reader.returncode == 0
            if waits:
                return
        finally:
            reader.kill()
            reader.communicate()
            rig.proxy.resume()
        rig.proxy.stall()
    raise AssertionError("all files are here already")


def fresh(rig: Rig) -> list[bool]:
    """Of each start of the daemon until now: whether its FUSE connection was a new one."""
    return [
        '"fresh": true' in line for line in rig.daemon.log.splitlines() if '"msg": "FUSE connection"' in line
    ]


def keeper_of(rig: Rig) -> int:
    """Its pid."""
    from tests.integration.test_keeper import keepers

    [pid] = keepers(rig.daemon.address.parent)
    return pid


def kill_group(procs: list[Path]) -> set[int]:
    """KillMode=control-group at its end: SIGKILL to whoever is in it, until nobody is."""
    killed: set[int] = set()
    while found := {int(line) for path in procs for line in path.read_text().split()}:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
        time.sleep(0.02)
    return killed


def test_the_keeper_is_not_in_the_units_group(rig: Rig, layout: Layout, daemon_as_it_was: None) -> None:
    """The daemon's control group is killed whole, as a restart does with the Go daemon's unit: the keeper is elsewhere,
    and a reader waits, then has every byte. The daemon takes as many descriptors as it may.
    """
    tops = cgroups.tops(mounts.mountinfo())
    groups = [top for top in tops if cgroups.make_group(top, b"soci-test-unit")]
    assert groups, "no control groups that can be written to"
    procs = [Path(os.fsdecode(top), "soci-test-unit/cgroup.procs") for top in groups]
    try:
        rig.daemon.stop()  # its keeper, too
        rig.daemon.program = ("-c", GROUPED.format(procs=[str(path) for path in procs]))
        rig.daemon.start()
        rig.reconnected()
        keeper = keeper_of(rig)
        assert fresh(rig)[-1]
        limits = Path(f"/proc/{rig.daemon.pid}/limits").read_text()
        [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
        assert line.split()[3] == line.split()[4]
        with rig.rootfs(layout, "soci") as root:
            with reading(rig, root):
                killed = kill_group(procs)
                assert rig.daemon.pid in killed and keeper not in killed
                rig.daemon.process.wait()
                rig.daemon.start()
            assert keeper_of(rig) == keeper
        assert not fresh(rig)[-1]
        assert "runs in the control group" not in rig.daemon.log
    finally:
        kill_group(procs)
        for path in procs:
            path.parent.rmdir()


def test_the_descriptor_store(
    rig: Rig, layout: Layout, monkeypatch: pytest.MonkeyPatch, daemon_as_it_was: None
) -> None:
    """With a descriptor store even a keeper that is killed with the daemon costs no reader; SIGINT empties the store;
    what is stored of a connection that has ended is thrown away.
    """
    with Manager(rig.base) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", str(manager.notify))
        monkeypatch.setenv("FDSTORE", "8")
        rig.daemon.stop(signal.SIGTERM)
        rig.daemon.program = ("-c", LAUNCH.format(path=str(manager.start), address=""))
        rig.daemon.start()
        rig.reconnected()
        assert set(manager.stored) == {"soci-fuse", "soci-mount", "soci-state"}
        with rig.rootfs(layout, "soci") as root, reading(rig, root):
            keeper = keeper_of(rig)
            rig.daemon.kill()
            os.kill(keeper, signal.SIGKILL)
            rig.daemon.start()
        rig.reconnected()
        assert not fresh(rig)[-1]
        assert "comes from systemd's descriptor store" in rig.daemon.log
        assert keeper_of(rig) != keeper
        device = os.minor(os.stat(f"/proc/{rig.daemon.pid}/fd/{mount_of(rig.daemon.pid)}").st_dev)
        abort_all(device)
        assert rig.daemon.process.wait(20) == 1
        rig.daemon.start()
        rig.reconnected()
        assert fresh(rig)[-1]
        assert "descriptor store is of no use" in rig.daemon.log
        with rig.rootfs(layout, "soci") as root:
            assert (root / "file2").read_bytes() == (rig.base / "box/file2").read_bytes()
        rig.daemon.stop(signal.SIGINT)
        until(lambda: manager.stored == {}, "the store was not emptied")


def mount_of(pid: int) -> int:
    """The descriptor of the FUSE mount's root in a daemon."""
    for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
        if os.readlink(f"/proc/{pid}/fd/{entry.name}") == "/" and "mnt_id" in entry.read_text():
            return int(entry.name)
    raise AssertionError("no FUSE mount")


def abort_all(minor: int) -> None:
    """Abort one FUSE connection, as an administrator would."""
    control = mounts.detached_mount(b"fusectl", {}, 0)
    descriptor = os.open(f"{minor}/abort", os.O_WRONLY, dir_fd=control)
    os.write(descriptor, b"1")
    os.close(descriptor)
    os.close(control)


def test_a_socket_from_systemd(rig: Rig, layout: Layout, tmp_path: Path, daemon_as_it_was: None) -> None:
    """`--address fd://`: who connected before the daemon started is answered, containerd pulls and runs through it, a
    call that is under way at SIGTERM has its answer, and the socket stays when the daemon stops.
    """
    rig.daemon.stop(signal.SIGTERM)
    with Manager(rig.base) as manager:
        rig.daemon.address.unlink(missing_ok=True)
        manager.listener = socket.socket(socket.AF_UNIX)
        manager.listener.bind(str(rig.daemon.address))
        manager.listener.listen(64)
        change = 'sys.argv[sys.argv.index("--address") + 1] = "fd://"' + SLOW.format(place=str(tmp_path))
        rig.daemon.program = ("-c", LAUNCH.format(path=str(manager.start), address=change))
        for _ in range(2):
            with ThreadPoolExecutor(1) as early:
                asked = early.submit(answers, rig.daemon.address)
                time.sleep(0.5)
                assert not asked.done()
                rig.daemon.start()
                assert asked.result(60)
            rig.reconnected()
            said = rig.containerd.run(rig.name("box"), "/bin/sh", "-c", "echo hello", snapshotter="soci")
            assert said == "hello\n"
            stopped_under_way(rig, tmp_path)
            assert rig.daemon.address.is_socket()
    rig.daemon.address.unlink()


def stopped_under_way(rig: Rig, place: Path) -> None:
    """SIGTERM while a call waits, see SLOW: it is answered, and the daemon ends."""
    said = rig.daemon.log.count('"msg": "stopping"')
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(answers, rig.daemon.address, "slow")
        until((place / "came").exists, "the call did not come")
        rig.daemon.process.send_signal(signal.SIGTERM)
        until(lambda: rig.daemon.log.count('"msg": "stopping"') > said, "the daemon does not stop")
        time.sleep(0.3)  # for it to hang up, if it would
        (place / "go").touch()
        assert asked.result(60)
    assert rig.daemon.process.wait(60) == 0
    for name in ("came", "go"):
        (place / name).unlink()


def answers(address: Path, key: str = "nothing") -> bool:
    """Whether the snapshots service there says that it knows no such snapshot."""
    with ContainerdClient(str(address)) as client:
        return not client.snapshots("soci").exists(key)


def refused(rig: Rig, *, root: Path, address: str, source: Path = SOURCE) -> str:
    """Start a second daemon, which must end at once with one line; that line."""
    command = [
        sys.executable,
        "-m",
        "soci_snapshotter.daemon.main",
        "--address",
        address,
        "--root",
        str(root),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(source)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode not in {0, 1, -signal.SIGTERM}, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_what_is_refused_at_the_start(rig: Rig, layout: Layout, tmp_path: Path) -> None:
    """A root that another daemon uses, a socket somebody serves on, a file in its place, fd:// without a socket, a root
    or a program on a lazy layer: one line each, and the daemon that runs is not disturbed.
    """
    other = rig.base / "other"
    free = str(rig.base / "other.sock")
    assert f"process {rig.daemon.pid}" in refused(rig, root=rig.daemon.root, address=free)
    assert "a process serves there already" in refused(rig, root=other, address=str(rig.daemon.address))
    plain = rig.base / "plain"
    plain.write_text("mine")
    assert "is no socket" in refused(rig, root=other, address=str(plain))
    assert plain.read_text() == "mine"
    assert "LISTEN_FDS" in refused(rig, root=other, address="fd://")
    assert "absolute path" in refused(rig, root=other, address="relative.sock")
    with rig.rootfs(layout, "soci") as lazy:
        assert "--root" in refused(rig, root=lazy / "root", address=free)
        assert not (lazy / "root").exists()
        shutil.copytree(SOURCE, lazy / "src", ignore=shutil.ignore_patterns("__pycache__"))
        assert "this program" in refused(rig, root=other, address=free, source=lazy / "src")
        assert (lazy / "file3").read_bytes() == (rig.base / "box/file3").read_bytes()
    mount = next((rig.daemon.root / "m").iterdir())
    assert "--root" in refused(rig, root=mount / "root", address=free)
