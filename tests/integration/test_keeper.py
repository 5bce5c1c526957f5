"""The keeper: a killed daemon's readers wait a moment and get the right bytes."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from soci_snapshotter.errors import Precondition
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree
from soci_snapshotter.linux import mounts
from soci_snapshotter.serve import keeper_client

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
        keeper_client.acquire(run_dir, deadline=0.5) as connection,
        keeper_client.Watch(run_dir, connection, 0.5),
    ):
        assert connection.fresh
        time.sleep(1)
        assert len(keepers(run_dir)) == 1
    time.sleep(1.5)
    assert keepers(run_dir) == []
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
