"""The keeper: a killed daemon's readers wait a moment and get the right bytes."""

import contextlib
import hashlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from soci_snapshotter.errors import Precondition, SociError
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree
from soci_snapshotter.linux import cgroups, fusedev, mounts
from soci_snapshotter.linux.fusedev import Connection
from soci_snapshotter.serve import keeper, keeper_client, keeper_place

pytestmark = pytest.mark.root

FILES, FILE_SIZE = 300, 20_000
SERVE = """
import os, sys, time
from soci_snapshotter.serve import keeper_client
from soci_snapshotter.serve.erofs_mounts import mount_layer
from soci_snapshotter.serve.flatfiles import FuseServer
class Slow:
    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size
    def read(self, unique, offset, size):
        time.sleep(0.002)
        return os.pread(self.fd, size, offset)
run, data, meta, target = map(os.fsencode, sys.argv[1:])
connection = keeper_client.acquire(os.fsdecode(run), deadline=20)
server = FuseServer(connection)
server.add(16, Slow(data))
server.__enter__()
if connection.fresh:
    mount_layer(meta, server.path_of(16), target, True)
print("fresh" if connection.fresh else "taken over", flush=True)
time.sleep(600)
"""
READ_ALL = """
import hashlib, os, sys
for turn in range(int(sys.argv[2])):
    for name in sorted(os.listdir(sys.argv[1])):
        data = open(os.path.join(sys.argv[1], name), "rb").read()
        assert hashlib.sha256(data).hexdigest() == name, name
    os.posix_fadvise(os.open(sys.argv[1], os.O_RDONLY), 0, 0, 4)
print("good")
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose keeper is stopped at the end."""
    directory = Path(f"/tmp/keep-{os.getpid()}-{time.monotonic_ns()}")
    try:
        yield directory
    finally:
        keeper_client.stop(directory)
        for path in directory.glob("*"):
            path.unlink()
        if directory.exists():
            directory.rmdir()


def keepers(directory: Path) -> list[int]:
    """Pids of keepers of this run directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if os.fsencode(directory) in words and any(word.endswith(b"keeper.py") for word in words):
            found.append(int(entry.parent.name))
    return found


def test_readers_survive_five_kills(run_dir: Path, tmp_path: Path) -> None:
    """The serving process is killed -9 again and again under four readers: no error, no wrong byte."""
    entries, data, offset = [], bytearray(), 512
    for _ in range(FILES):
        content = os.urandom(FILE_SIZE)
        name = hashlib.sha256(content).hexdigest().encode()
        entries.append(Entry(name, "reg", offset, FILE_SIZE, b"", 0o644, 0, 0, b"", b"", "", 0, 0, ()))
        data += bytes(offset - len(data)) + content
        offset += 512 + -(-FILE_SIZE // 512) * 512
    data += bytes(-len(data) % 512)
    target = tmp_path / "m"
    target.mkdir()
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "meta").write_bytes(
        build_meta(build_tree(entries), data_size=len(data), uuid=b"k" * 16, inherited={}, bottom=True)
    )
    serve = [sys.executable, "-c", SERVE, *map(str, (run_dir, tmp_path / "data", tmp_path / "meta", target))]
    server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
    readers: list[subprocess.Popen[str]] = []
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "fresh\n"
        for turn in range(5):
            Path("/proc/sys/vm/drop_caches").write_text("3")
            readers = [
                subprocess.Popen(
                    [sys.executable, "-c", READ_ALL, str(target), "1"], stdout=subprocess.PIPE, text=True
                )
                for _ in range(4)
            ]
            time.sleep(0.15 + 0.05 * turn)
            server.send_signal(signal.SIGKILL)
            server.wait()
            server.stdout.close()
            time.sleep(0.1)
            server = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True)
            assert server.stdout is not None
            assert server.stdout.readline() == "taken over\n"
            for reader in readers:
                assert reader.communicate(timeout=60)[0] == "good\n"
    finally:
        server.kill()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
        keeper_client.stop(run_dir)
        for reader in readers:
            reader.kill()
            reader.wait()
        if os.path.ismount(target):
            mounts.unmount(os.fsencode(target), mounts.MNT_DETACH)


def test_the_deadline_ends_everything(run_dir: Path) -> None:
    """Without a daemon the keeper ends after its deadline; the next start is a fresh one."""
    with (
        keeper_client.acquire(run_dir, deadline=3) as connection,
        keeper_client.Watch(run_dir, connection, 3),
    ):
        assert connection.fresh
        time.sleep(5)  # longer than the deadline
        assert len(keepers(run_dir)) == 1
    wait_until(lambda: not keepers(run_dir))
    with keeper_client.acquire(run_dir) as connection:
        assert connection.fresh


def test_a_second_daemon_is_refused(run_dir: Path) -> None:
    """While one holds the connection another is told so; afterwards it takes over the same connection."""
    with keeper_client.acquire(run_dir), pytest.raises(Precondition):
        keeper_client.acquire(run_dir)
    with keeper_client.acquire(run_dir) as connection:
        assert not connection.fresh
        assert connection.can_resend
        assert not os.get_inheritable(connection.fuse_fd) and not os.get_inheritable(connection.mount_fd)


def test_stop_and_small(run_dir: Path) -> None:
    """The keeper takes under 10 MB, its socket is private, and `stop` ends it."""
    with keeper_client.acquire(run_dir):
        (pid,) = keepers(run_dir)
        assert int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 < 10_000_000
        assert run_dir.stat().st_mode & 0o777 == 0o700
        assert (run_dir / keeper_client.SOCKET_NAME).stat().st_mode & 0o777 == 0o600
        keeper_client.stop(run_dir)
        for _ in range(100):
            if not keepers(run_dir):
                break
            time.sleep(0.02)
        assert keepers(run_dir) == []


@contextlib.contextmanager
def impostor(directory: Path, answer: bytes | None, kind: int = socket.SOCK_SEQPACKET) -> Iterator[None]:
    """Somebody else listens on the keeper's socket: says `answer`, with a descriptor; None hangs."""
    directory.mkdir(mode=0o700)
    path = directory / keeper_client.SOCKET_NAME
    with socket.socket(socket.AF_UNIX, kind) as listener, open("/dev/null", "rb") as spare:
        listener.bind(str(path))
        listener.listen(4)
        listener.settimeout(1)
        clients = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                clients.append(client)
                client.recv(4096)
                if answer is not None:
                    socket.send_fds(client, [answer], [spare.fileno()] * 2)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in clients:
                client.close()
            path.unlink()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"\1N", "another protocol"),
        (b"\x7fgarbage" * 100, "another protocol"),
        (keeper.VERSION + b"Hshort", "FUSE_INIT answer of 5 bytes"),
        (keeper.VERSION + b"?", "another protocol"),
        (b"", "another protocol"),
        (None, "does not answer"),
    ],
)
def test_what_is_no_keeper(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, says: str
) -> None:
    """Another version, garbage or silence on the keeper's socket: one line that names it, no descriptor kept, and its
    socket is left alone.
    """
    monkeypatch.setattr(keeper_client, "_TIMEOUT", 0.5)
    with impostor(run_dir, answer):
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(SociError, match=says) as caught:
            keeper_client.acquire(run_dir)
        assert "\n" not in str(caught.value) and str(run_dir) in str(caught.value)
        # The client's end that impostor() still holds is one more.
        assert len(os.listdir("/proc/self/fd")) <= before + 1
        assert (run_dir / keeper_client.SOCKET_NAME).exists()


def test_a_socket_of_another_kind(run_dir: Path) -> None:
    """A stream socket in the keeper's place is named, and left alone."""
    with impostor(run_dir, b"", socket.SOCK_STREAM):
        with pytest.raises(SociError, match="no keeper"):
            keeper_client.acquire(run_dir)
        assert (run_dir / keeper_client.SOCKET_NAME).exists()


def test_a_silent_daemon_is_given_up(run_dir: Path) -> None:
    """A holder that says nothing loses the connection at the deadline, though it has the descriptors; the next start is
    a fresh one.
    """
    with keeper_client.acquire(run_dir, deadline=0.5) as connection:
        assert connection.alive
        wait_until(lambda: not connection.alive)
        wait_until(lambda: not keepers(run_dir))
    with keeper_client.acquire(run_dir) as connection:
        assert connection.fresh


def test_a_killed_keeper_is_replaced(run_dir: Path) -> None:
    """The keeper is killed while the daemon lives: another one gets the same connection, and the next daemon has it."""
    with keeper_client.acquire(run_dir) as connection, keeper_client.Watch(run_dir, connection):
        [first] = keepers(run_dir)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: keepers(run_dir) not in ([], [first]))
        wait_until(lambda: connection.held is not None)
        device = connection.device
    with keeper_client.acquire(run_dir) as connection:
        assert (connection.fresh, connection.device) == (False, device)


def test_both_killed(run_dir: Path) -> None:
    """Without daemon and keeper nothing is held: the next start is a fresh one, with another keeper."""
    with keeper_client.acquire(run_dir) as connection:
        os.kill(keepers(run_dir)[0], signal.SIGKILL)
        wait_until(lambda: not keepers(run_dir))
    with keeper_client.acquire(run_dir) as connection:
        assert connection.fresh


def test_what_was_aborted_is_not_taken(run_dir: Path) -> None:
    """A connection that an administrator aborted is thrown away with its keeper: the next start is a fresh one."""
    with keeper_client.acquire(run_dir) as connection:
        abort = fusedev.abort_file(connection.mount_fd)
        assert abort is not None
        os.write(abort, b"1")
        os.close(abort)
        assert not connection.alive
    with keeper_client.acquire(run_dir) as connection:
        assert connection.fresh and connection.alive
        assert len(keepers(run_dir)) == 1


@pytest.fixture
def blocked() -> Iterator[None]:
    """SIGTERM and SIGINT are blocked, as they are in the daemon."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_a_signal_without_a_daemon(run_dir: Path, blocked: None, number: signal.Signals) -> None:
    """A keeper that a daemon started with these signals blocked gets them all the same. With no daemon it ends, and the
    connection with it, whoever else has its descriptors.
    """
    with keeper_client.acquire(run_dir) as connection:
        [pid] = keepers(run_dir)
        assert "SigBlk:\t0000000000000000\n" in Path(f"/proc/{pid}/status").read_text()
        spare = Connection(
            os.dup(connection.fuse_fd), os.dup(connection.mount_fd), connection.init_reply, fresh=False
        )
    with spare:
        assert spare.alive
        os.kill(pid, number)
        wait_until(lambda: not keepers(run_dir))
        assert not spare.alive
    with keeper_client.acquire(run_dir) as connection:
        assert connection.fresh


def test_a_signal_beside_a_daemon(run_dir: Path, blocked: None) -> None:
    """A keeper that is told to end leaves the connection to the daemon that lives, which starts another one."""
    with keeper_client.acquire(run_dir) as connection, keeper_client.Watch(run_dir, connection):
        [first] = keepers(run_dir)
        os.kill(first, signal.SIGTERM)
        wait_until(lambda: keepers(run_dir) not in ([], [first]))
        wait_until(lambda: connection.held is not None)
        assert connection.alive
        device = connection.device
    with keeper_client.acquire(run_dir) as connection:
        assert (connection.fresh, connection.device) == (False, device)


def test_a_scope_that_fails_late(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd-run fails when it has started a keeper already: the daemon's keeper is another, on another socket."""
    scope = tmp_path / "systemd-run"
    scope.write_text('#!/bin/sh\nuntil [ "$1" = -- ]; do shift; done\nshift\n"$@"\nexit 1\n')
    scope.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(keeper_place, "SYSTEMD", tmp_path)
    here = cgroups.groups_of
    monkeypatch.setattr(cgroups, "groups_of", lambda pid: {b"": b"/a/unit"} if pid == "self" else here(pid))
    with keeper_client.acquire(run_dir) as connection:
        assert connection.fresh and connection.held is not None
        pids = keepers(run_dir)
        try:
            assert len(pids) == 2
            first, second = (
                {os.readlink(one) for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink()}
                for pid in pids
            )
            sockets = {link for link in first & second if link.startswith("socket:")}
            assert not sockets
        finally:
            data = connection.held.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            for pid in set(pids) - {struct.unpack("3i", data)[0]}:
                os.kill(pid, signal.SIGKILL)


def test_several_connections(run_dir: Path) -> None:
    """A keeper holds as many connections as it is given names, for one daemon at a time, and mixes up none."""
    with keeper_client.acquire(run_dir) as connection:
        held = connection.held
        assert held is not None
        with open("/dev/null", "rb") as null, open("/dev/zero", "rb") as zero:
            place = struct.pack("<dd", 60.0, 60.0) + b"\5other"
            socket.send_fds(held, [keeper.VERSION + b"P" + place + b"answer"], [null.fileno(), zero.fileno()])
            assert held.recv(16) == keeper.VERSION + b"K"
    with keeper_client.acquire(run_dir) as connection:
        assert not connection.fresh
        held = connection.held
        assert held is not None
        held.send(keeper.VERSION + b"G\5other")
        data, descriptors, _, _ = socket.recv_fds(held, 4096, 3)
        assert data == keeper.VERSION + b"Hanswer"
        assert [os.readlink(f"/proc/self/fd/{one}") for one in descriptors] == ["/dev/null", "/dev/zero"]
        for one in descriptors:
            os.close(one)
        held.send(keeper.VERSION + b"G\4none")
        assert held.recv(16) == keeper.VERSION + b"N"


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    """Poll for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
