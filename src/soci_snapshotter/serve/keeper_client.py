"""The daemon's side of the keeper: take over its FUSE connection, or make one and hand it over."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

from soci_snapshotter.errors import Precondition, SociError
from soci_snapshotter.linux import fusedev
from soci_snapshotter.linux.fusedev import Connection
from soci_snapshotter.serve import keeper

SOCKET_NAME = "keeper.sock"
_TIMEOUT = 10.0  # seconds for an answer of the keeper: it does nothing that takes time
_MAX_ADDRESS = 107  # bytes of a unix socket's path (unix(7)), without the NUL


def acquire(run_dir: Path | str, *, deadline: float = keeper.DEADLINE) -> Connection:
    """The connection that a keeper in `run_dir` holds, else a fresh one, given to a keeper that is started
    for it.

    `deadline` is how many seconds a keeper waits for the next daemon; on kernels without RESEND it does not
    wait. The keeper counts this process as the holder until the connection is closed. Precondition when
    another daemon lives.
    """
    directory = Path(run_dir)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two daemons that start at once must not start two keepers
        channel = _connect(directory) or _start(directory)
        try:
            return _take_over(directory, channel) or _hand_over(channel, deadline)
        except BaseException:
            channel.close()
            raise
    finally:
        os.close(lock)


def stop(run_dir: Path | str) -> None:
    """End the keeper, if there is one: its connection is aborted unless this process holds it too."""
    channel = _connect(Path(run_dir))
    if channel is None:
        return
    with channel:
        channel.send(keeper.VERSION + b"S")
        channel.recv(16)


def _address(directory: Path) -> str:
    address = os.fsencode(directory / SOCKET_NAME)
    if len(address) <= _MAX_ADDRESS:
        return os.fsdecode(address)
    raise SociError(f"{directory}: too long a path for a socket in it; choose a shorter run directory")


def _channel() -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(_TIMEOUT)
    return channel


def _connect(directory: Path) -> socket.socket | None:
    channel = _channel()
    try:
        channel.connect(_address(directory))
    except (FileNotFoundError, ConnectionRefusedError):
        channel.close()
        return None
    except BaseException:
        channel.close()
        raise
    return channel


def _start(directory: Path) -> socket.socket:
    """Start a keeper on a socket that listens already, so that there is nothing to wait for."""
    address = _address(directory)
    Path(address).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(address)
        finally:
            os.umask(before)
        listener.listen(16)
        number = listener.fileno()
        command = [sys.executable, "-I", "-S", keeper.__file__, str(number), str(directory)]
        subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=True,
            pass_fds=[number],
            start_new_session=True,
            timeout=_TIMEOUT,
        )
    channel = _connect(directory)
    if channel is None:
        raise SociError(f"{address}: the keeper process did not start")
    return channel


def _take_over(directory: Path, channel: socket.socket) -> Connection | None:
    channel.send(keeper.VERSION + b"G")
    data, descriptors = _receive(channel)
    verb = data[1:2]
    if verb == b"H" and len(descriptors) == 2:
        return Connection(descriptors[0], descriptors[1], data[2:], fresh=False, held=channel)
    for descriptor in descriptors:
        os.close(descriptor)
    if verb == b"N":
        return None
    if verb == b"B":
        raise Precondition(f"{directory}: another daemon runs with this run directory; stop it first")
    raise SociError(
        f"{directory}: the keeper there speaks another protocol; end its process, then start again"
    )


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, close-on-exec. (socket.recv_fds of Python 3.11 drops the flags.)"""
    size = struct.calcsize("2i")
    data, ancillary, _, _ = channel.recvmsg(4096, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
    return data, [
        descriptor
        for level, kind, content in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (descriptor,) in struct.iter_unpack("i", content[: len(content) // 4 * 4])
    ]


def _hand_over(channel: socket.socket, deadline: float) -> Connection:
    connection = fusedev.connect()
    try:
        seconds = deadline if connection.can_resend else 0.0
        message = keeper.VERSION + b"P" + struct.pack("<d", seconds) + connection.init_reply
        socket.send_fds(channel, [message], [connection.fuse_fd, connection.mount_fd])
        if channel.recv(16)[1:2] != b"K":
            raise SociError("the keeper did not take the FUSE connection")
    except BaseException:
        connection.close()
        raise
    connection.held = channel
    return connection
