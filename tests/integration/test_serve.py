"""Flat files through a real FUSE connection."""

import errno
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from soci_snapshotter.errors import Invalid
from soci_snapshotter.linux import fusedev, mounts
from soci_snapshotter.serve.flatfiles import FuseServer

pytestmark = pytest.mark.root

CONTENT = os.urandom(3 << 20)
READ = "import sys, hashlib; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"


class Memory:
    """A flat file in memory whose reads from `parked_from` on are parked."""

    def __init__(self, parked_from: int = 1 << 60) -> None:
        self.size = len(CONTENT)
        self.parked_from = parked_from
        self.parked: list[tuple[int, int, int]] = []

    def read(self, unique: int, offset: int, size: int) -> bytes | None:
        if offset >= self.parked_from:
            self.parked.append((unique, offset, size))
            return None
        return CONTENT[offset : offset + size]


@pytest.fixture
def connection() -> Iterator[fusedev.Connection]:
    """A connection of the test's own."""
    with fusedev.connect() as made:
        yield made


def reader(connection: fusedev.Connection, node: int) -> subprocess.Popen[str]:
    """Another process that reads a whole flat file."""
    path = f"/proc/{os.getpid()}/fd/{connection.mount_fd}/{node}"
    return subprocess.Popen([sys.executable, "-c", READ, path], stdout=subprocess.PIPE, text=True)


def test_bytes_and_attributes(connection: fusedev.Connection) -> None:
    """Another process reads the file's bytes; it is 0400, in no mount table, and its release is told."""
    released: list[int] = []
    with FuseServer(connection, on_release=released.append) as server:
        server.add(2**61 + 1, Memory())
        status = os.stat(server.path_of(2**61 + 1))
        assert (status.st_mode, status.st_size) == (0o100400, len(CONTENT))
        process = reader(connection, 2**61 + 1)
        assert process.communicate(timeout=20)[0].strip() == hashlib.sha256(CONTENT).hexdigest()
        for _ in range(100):
            if released:
                break
            time.sleep(0.02)
        assert released == [2**61 + 1]
        device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
        assert not any(entry.device == device for entry in mounts.mountinfo())
        with pytest.raises(FileNotFoundError):
            os.stat(server.path_of(17))


def test_parked_reads_hold_up_nobody(connection: fusedev.Connection) -> None:
    """With more reads parked than there are threads another file is served, and replies come later."""
    with FuseServer(connection, threads=2) as server:
        files = [Memory(parked_from=0) for _ in range(8)]
        for node, file in enumerate(files, 16):
            server.add(node, file)
        server.add(99, Memory())
        processes = [reader(connection, node) for node in range(16, 24)]
        while not all(file.parked for file in files):
            time.sleep(0.01)
        assert (
            reader(connection, 99).communicate(timeout=20)[0].strip() == hashlib.sha256(CONTENT).hexdigest()
        )
        for file in files:
            file.parked_from = 1 << 60
            for unique, offset, size in file.parked:
                server.reply(unique, CONTENT[offset : offset + size])
        for process in processes:
            assert process.communicate(timeout=20)[0].strip() == hashlib.sha256(CONTENT).hexdigest()


def test_errors_reach_the_reader(connection: fusedev.Connection) -> None:
    """An OSError's errno, an unexpected exception, a parked read's error and a removed file."""

    class Broken:
        size = 512
        failure: Exception = OSError(errno.ENOSPC, "full")

        def read(self, unique: int, offset: int, size: int) -> bytes | None:
            raise self.failure

    with FuseServer(connection) as server:
        broken, parked = Broken(), Memory(parked_from=0)
        server.add(16, broken)
        server.add(17, parked)
        for failure, code in ((broken.failure, errno.ENOSPC), (ValueError("?"), errno.EIO)):
            broken.failure = failure
            with open(server.path_of(16), "rb", buffering=0) as file, pytest.raises(OSError) as caught:
                file.read(1)
            assert caught.value.errno == code
        caught_codes: list[int] = []

        def read_parked() -> None:
            try:
                with open(server.path_of(17), "rb", buffering=0) as file:
                    file.read(1)
            except OSError as problem:
                caught_codes.append(problem.errno or 0)

        thread = threading.Thread(target=read_parked)
        thread.start()
        answered = 0
        while thread.is_alive():
            for unique, _, _ in parked.parked[answered:]:
                server.reply_error(unique, errno.EIO)
                answered += 1
            time.sleep(0.01)
        assert caught_codes == [errno.EIO]
        server.reply_error(parked.parked[0][0], errno.EIO)  # a second answer is ignored
        with pytest.raises(Invalid):
            server.add(3, broken)


def test_closing_is_prompt_and_leaves_the_connection(connection: fusedev.Connection) -> None:
    """Idle threads end at once, more of them than usual; a second server goes on with the same connection."""
    started = time.monotonic()
    for _ in range(3):
        with FuseServer(connection, threads=5) as server:
            server.add(16, Memory())
            assert (
                reader(connection, 16).communicate(timeout=20)[0].strip()
                == hashlib.sha256(CONTENT).hexdigest()
            )
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("fuse-")]
    assert time.monotonic() - started < 10
