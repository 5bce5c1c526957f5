"""The service manager's side of a restart: notifications, sockets it listens on for us, descriptors it stores for us.

sd_notify(3) and sd_listen_fds(3), spoken without a library: one datagram to $NOTIFY_SOCKET, and descriptors from 3 on.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass

from soci_snapshotter.errors import SociError
from soci_snapshotter.linux.fusedev import Connection

_log = logging.getLogger(__name__)

_FIRST = 3  # SD_LISTEN_FDS_START
_FUSE, _MOUNT, _STATE = _STORED = ("soci-fuse", "soci-mount", "soci-state")
_STATE_VERSION = b"\1"  # of what the memory file `soci-state` has: this, then the INIT answer
_STATE_LIMIT = 4096


def notify(state: str, descriptor: int | None = None) -> None:
    """Tell the service manager; silent without one. `descriptor` goes with FDSTORE=1."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(channel, [state.encode()], [] if descriptor is None else [descriptor])
        except OSError as error:
            _log.warning("systemd was not notified", extra={"error": str(error)})


@dataclass(frozen=True, slots=True)
class Inherited:
    """What the service manager gave: sockets that listen, and a FUSE connection that an earlier daemon stored."""

    listeners: tuple[socket.socket, ...] = ()
    stored: Connection | None = None


def inherited() -> Inherited:
    """Take what was given, once, and have no child inherit it. Descriptors of other names are left alone."""
    environment = {name: os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    count = environment["LISTEN_FDS"]
    if environment["LISTEN_PID"] != str(os.getpid()) or not count.isdigit():
        return Inherited()
    numbers = range(_FIRST, _FIRST + int(count))
    names = environment["LISTEN_FDNAMES"].split(":")
    names += [""] * (len(numbers) - len(names))
    listeners: list[socket.socket] = []
    stored: dict[str, int] = {}
    for number, name in zip(numbers, names, strict=False):
        os.set_inheritable(number, False)
        if name in _STORED:
            stored[name] = number
        elif (listener := _listener(number)) is not None:
            listeners.append(listener)
    return Inherited(tuple(listeners), _connection(stored))


def _listener(number: int) -> socket.socket | None:
    try:
        channel = socket.socket(fileno=number)
    except OSError:  # no socket: named in OpenFile=, say
        return None
    stream = channel.family == socket.AF_UNIX and channel.type == socket.SOCK_STREAM
    if stream and channel.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return channel
    channel.detach()
    return None


def _connection(stored: dict[str, int]) -> Connection | None:
    if not stored:
        return None
    state = b""
    if _STATE in stored:
        state = os.pread(stored[_STATE], _STATE_LIMIT, 0)
        os.close(stored[_STATE])
    fuse, mount = stored.get(_FUSE, -1), stored.get(_MOUNT, -1)
    connection = Connection(fuse, mount, state[1:], fresh=False)
    try:
        usable = min(fuse, mount) >= 0 and state[:1] == _STATE_VERSION
        if usable and connection.alive and connection.can_resend and connection.device:
            return connection
        problem = "it has ended" if usable else "another version wrote it, or it is not whole"
    except (OSError, SociError) as error:
        problem = str(error)
    _log.warning("the FUSE connection in systemd's descriptor store is of no use", extra={"error": problem})
    connection.close()
    return None


class DescriptorStore:
    """The unit's descriptor store, if it has one: a second place for what the keeper has.

    systemd says so by $FDSTORE since version 254; for older ones our unit sets it.
    """

    def __init__(self, found: Inherited) -> None:
        size = os.environ.get("FDSTORE", "")
        self._on = "NOTIFY_SOCKET" in os.environ and size.isdigit() and int(size) >= len(_STORED)
        self._has = found.stored.device if found.stored is not None else None

    def keep(self, connection: Connection) -> None:
        """Store the connection, instead of any other."""
        if not self._on or self._has == connection.device:
            return
        self.forget()
        state = os.memfd_create(_STATE, os.MFD_CLOEXEC)
        try:
            os.write(state, _STATE_VERSION + connection.init_reply)
            for name, descriptor in zip(
                _STORED, (connection.fuse_fd, connection.mount_fd, state), strict=True
            ):
                # Without FDPOLL=0 an aborted connection would leave the store while its mount stays there.
                notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", descriptor)
        finally:
            os.close(state)
        self._has = connection.device
        _log.info("the FUSE connection is in systemd's descriptor store, too")

    def forget(self) -> None:
        """Have nothing stored."""
        if self._on:
            for name in _STORED:
                notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
            self._has = None
