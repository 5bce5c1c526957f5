"""The daemon's side of the keeper: take over its FUSE connection, or make one and hand it over, and stay in touch."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

from soci_snapshotter.errors import Precondition, SociError
from soci_snapshotter.linux import fusedev
from soci_snapshotter.linux.fusedev import Connection
from soci_snapshotter.serve import keeper, keeper_place

_log = logging.getLogger(__name__)

SOCKET_NAME = "keeper.sock"
CONNECTION = b"layers"  # the name of the one connection that a daemon of today has
_TIMEOUT = 10.0  # seconds for an answer of the keeper: it does nothing that takes time
_MAX_ADDRESS = 107  # bytes of a unix socket's path (unix(7)), without the NUL
_MAX_MESSAGE = 4096
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_WORDS = 6  # times that a daemon says that it lives within one deadline
_HOW = "once no container uses lazy layers any more, or to give them up, end it, then start again"


def acquire(
    run_dir: Path | str, *, deadline: float = keeper.DEADLINE, stored: Connection | None = None
) -> Connection:
    """The connection that a keeper in `run_dir` holds; else `stored`, one that a service manager kept; else a fresh
    one. The latter two are given to a keeper, which is started if need be.

    `deadline` is how many seconds a keeper waits for the next daemon, or for a daemon that says nothing (see Watch);
    on kernels without RESEND it does not wait for the next. The keeper counts this process as the holder until the
    connection is closed. Precondition when another daemon lives; SociError naming a keeper that does not answer as it
    should: it keeps what it has.
    """
    directory = Path(run_dir)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _turn(directory):
        channel = _connect(directory) or _start(directory)
        try:
            held = _take_over(directory, channel)
            if held is not None and held.alive:
                return held
            if held is not None:  # somebody aborted it
                held.close()
                stop(directory)
                channel = _start(directory)
            connection = stored if stored is not None and stored.alive else fusedev.connect()
            try:
                _hand_over(directory, channel, connection, deadline)
            except BaseException:
                connection.close()
                raise
            connection.held = channel
            return connection
        except BaseException:
            channel.close()
            raise


def stop(run_dir: Path | str) -> None:
    """End the keeper, if there is one: its connection is aborted unless this process holds it too."""
    directory = Path(run_dir)
    channel = _connect(directory)
    if channel is None:
        return
    with channel, _speaking(directory, channel):
        channel.send(keeper.VERSION + b"S")
        channel.recv(16)


class Watch:
    """Tells the keeper that this process lives, and starts another one when the keeper is gone."""

    def __init__(self, run_dir: Path, connection: Connection, deadline: float = keeper.DEADLINE) -> None:
        self._directory = run_dir
        self._connection = connection
        self._deadline = deadline
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say nothing more. The keeper holds the connection on."""
        if self._end >= 0:
            os.eventfd_write(self._end, 1)
            self._thread.join()
            os.close(self._end)
            self._end = -1

    def _run(self) -> None:
        pause = self._deadline / _WORDS
        while self._connection.alive:
            if not self._said():
                self._again()
            channel = self._connection.held
            poll = select.poll()
            poll.register(self._end, select.POLLIN)
            if channel is not None:
                poll.register(channel.fileno(), select.POLLIN)  # only its end comes this way
            if any(number == self._end for number, _ in poll.poll(pause * 1000)):
                return

    def _said(self) -> bool:
        channel = self._connection.held
        if channel is None:
            return False
        channel.setblocking(False)
        try:
            if channel.recv(16) == b"":
                return False
        except BlockingIOError:
            pass
        except OSError:
            return False
        try:
            channel.send(keeper.VERSION + b"A")
        except BlockingIOError:  # it does not read: not dead either
            return True
        except OSError:
            return False
        return True

    def _again(self) -> None:
        if not self._connection.alive:  # the keeper waited long enough for this process
            return
        old, self._connection.held = self._connection.held, None
        if old is not None:
            old.close()
        try:
            with _turn(self._directory):
                channel = _start(self._directory)
                try:
                    _hand_over(self._directory, channel, self._connection, self._deadline)
                except BaseException:
                    channel.close()
                    raise
        except (OSError, SociError) as problem:
            _log.error(
                "the keeper is gone and cannot be replaced: if the daemon dies, readers of lazy layers get errors",
                extra={"error": str(problem)},
            )
            return
        self._connection.held = channel
        _log.warning("the keeper was gone; another one holds the FUSE connection now")


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Two daemons that start at once must not start two keepers."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


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
    """A channel to the keeper; None when there is none (any more)."""
    channel = _channel()
    try:
        channel.connect(_address(directory))
    except (FileNotFoundError, ConnectionRefusedError):
        channel.close()
        return None
    except OSError as problem:
        channel.close()
        if problem.errno == errno.EPROTOTYPE or isinstance(problem, TimeoutError):
            raise SociError(
                f"{_address(directory)}: what listens there is no keeper that answers ({problem}); {_HOW}"
            ) from None
        raise
    except BaseException:
        channel.close()
        raise
    return channel


def _start(directory: Path) -> socket.socket:
    """Start a keeper and connect to it."""
    address = _address(directory)
    keeper_place.start(partial(_bound, address), directory)
    channel = _connect(directory)
    if channel is None:
        raise SociError(f"{address}: the keeper process did not start")
    if not keeper_place.escaped(_pid(channel)):
        _log.warning(
            "the keeper runs in the control group of the daemon: a service manager that ends the group ends both, and "
            "readers of lazy layers get errors; give the unit KillMode=process or FileDescriptorStoreMax=8",
            extra={"keeper": _pid(channel)},
        )
    return channel


@contextmanager
def _bound(address: str) -> Iterator[int]:
    """The descriptor of a socket for a keeper to listen on."""
    Path(address).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(address)
        finally:
            os.umask(before)
        yield listener.fileno()


def _pid(channel: socket.socket) -> int:
    """Of the process at the other end."""
    data = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(data)[0]
    return pid


@contextmanager
def _speaking(directory: Path, channel: socket.socket) -> Iterator[None]:
    """Names the keeper when it does not answer at all."""
    try:
        yield
    except TimeoutError:
        raise SociError(
            f"{directory}: the keeper there (process {_pid(channel)}) does not answer; {_HOW}"
        ) from None
    except OSError as problem:
        raise SociError(
            f"{directory}: the keeper there (process {_pid(channel)}) is gone ({problem}); start again"
        ) from None


def _take_over(directory: Path, channel: socket.socket) -> Connection | None:
    with _speaking(directory, channel):
        channel.send(keeper.VERSION + b"G" + _name())
        data, descriptors = _receive(channel)
    version, verb = data[:1], data[1:2]
    if version == keeper.VERSION and verb == b"H" and len(descriptors) == 2:
        connection = Connection(descriptors[0], descriptors[1], data[2:], fresh=False, held=channel)
        try:
            _ = connection.flags
        except SociError as problem:
            connection.close()
            raise SociError(f"{directory}: the keeper there: {problem}; {_HOW}") from None
        return connection
    for descriptor in descriptors:
        os.close(descriptor)
    if version == keeper.VERSION and verb == b"N":
        return None
    if version == keeper.VERSION and verb == b"B":
        raise Precondition(f"{directory}: another daemon runs with this run directory; stop it first")
    raise SociError(
        f"{directory}: the keeper there (process {_pid(channel)}) speaks another protocol than version "
        f"{keeper.VERSION[0]}; {_HOW}"
    )


def _name() -> bytes:
    return bytes([len(CONNECTION)]) + CONNECTION


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    """One message and its descriptors, close-on-exec. (socket.recv_fds of Python 3.11 drops the flags.)"""
    size = struct.calcsize("3i")
    data, ancillary, _, _ = channel.recvmsg(_MAX_MESSAGE, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
    return data, [
        descriptor
        for level, kind, content in ancillary
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (descriptor,) in struct.iter_unpack("i", content[: len(content) // 4 * 4])
    ]


def _hand_over(directory: Path, channel: socket.socket, connection: Connection, deadline: float) -> None:
    gone = deadline if connection.can_resend else 0.0
    place = struct.pack("<dd", gone, deadline) + _name()
    abort = fusedev.abort_file(connection.mount_fd)
    try:
        descriptors = [connection.fuse_fd, connection.mount_fd, *([] if abort is None else [abort])]
        with _speaking(directory, channel):
            socket.send_fds(channel, [keeper.VERSION + b"P" + place + connection.init_reply], descriptors)
            answer = channel.recv(16)
    finally:
        if abort is not None:
            os.close(abort)
    if answer != keeper.VERSION + b"K":
        raise SociError(
            f"{directory}: the keeper there (process {_pid(channel)}) does not take the FUSE connection; {_HOW}"
        )
