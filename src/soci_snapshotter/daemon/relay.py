"""gRPC behind a socket that systemd listens on (`--address fd://`).

grpcio cannot be given a descriptor. Binding the socket's path once more would leave who connected before us (which is
what started us) on a socket that nobody reads, and the unit's socket deaf after the daemon stops. So connections
are accepted here and their bytes passed to gRPC's own socket and back: containerd has one or two, of small messages.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_log = logging.getLogger(__name__)

_PIECE = 65536  # bytes in one go
_MAX_CONNECTIONS = 256  # two threads each
_PAUSE = 0.2  # seconds until the next try, out of descriptors
_DRAIN = 2.0  # seconds for last answers to be passed on: they are here, and small


class Relay:
    """Passes what connects to `listener` on to the socket `target`, in accepting(); what is connected then stays so
    until the relay is left, which is when the server behind it has stopped. Whatever that said last is passed on.

    The listener is left open, systemd has it too.
    """

    def __init__(self, listener: socket.socket, target: Path) -> None:
        self._listener = listener
        self._target = str(target)
        self._changed = threading.Condition()  # guards the two below
        self._open: dict[socket.socket, socket.socket] = {}  # clients, and what each is connected with
        self._ending = False
        self._stopped = False
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        self._thread = threading.Thread(target=self._accept, name="relay", daemon=True)

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._ending = True
            for client in self._open:
                _shut(client, socket.SHUT_RD)  # of the two ways only that to the server is cut
            self._changed.wait_for(lambda: not self._open, _DRAIN)
            for pair in self._open.items():  # a client that does not read, or a server that lives
                for channel in pair:
                    _shut(channel, socket.SHUT_RDWR)
        os.close(self._end)

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Connections are accepted while the block lasts."""
        self._listener.setblocking(False)
        self._thread.start()
        try:
            yield
        finally:
            self._stopped = True
            os.eventfd_write(self._end, 1)
            self._thread.join()

    def _accept(self) -> None:
        poll = select.poll()  # shutdown(2) of the listener would end systemd's end as well
        poll.register(self._listener, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while not self._stopped:
            if not self._free.acquire(timeout=_PAUSE):
                continue
            poll.poll()
            try:
                channel, _ = self._listener.accept()
            except OSError as problem:
                self._free.release()
                if not isinstance(problem, BlockingIOError):
                    _log.warning("a connection was not accepted", extra={"error": str(problem)})
                    time.sleep(_PAUSE)
                continue
            channel.setblocking(True)
            threading.Thread(target=self._pass, args=(channel,), name="relay", daemon=True).start()

    def _pass(self, client: socket.socket) -> None:
        try:
            with client, socket.socket(socket.AF_UNIX) as server:
                server.connect(self._target)
                with self._changed:
                    if self._ending:
                        return
                    self._open[client] = server
                try:
                    back = threading.Thread(target=_copy, args=(server, client), name="relay", daemon=True)
                    back.start()
                    _copy(client, server)
                    back.join()
                finally:
                    with self._changed:
                        del self._open[client]
                        self._changed.notify_all()
        except OSError as problem:
            _log.warning("a connection was not passed on", extra={"error": str(problem)})
        finally:
            self._free.release()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Until either end is gone; then the other's other half is closed."""
    try:
        while data := source.recv(_PIECE):
            target.sendall(data)
    except OSError as problem:
        if problem.errno not in {errno.EPIPE, errno.ECONNRESET, errno.EBADF}:
            _log.debug("relay", extra={"error": str(problem)})
        _shut(source, socket.SHUT_RD)
    _shut(target, socket.SHUT_WR)


def _shut(channel: socket.socket, how: int) -> None:
    try:
        channel.shutdown(how)
    except OSError:  # the other end was faster
        pass
