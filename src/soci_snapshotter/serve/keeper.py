"""The keeper: a tiny process that holds the FUSE descriptors, so that a killed daemon leaves readers waiting
a moment.

Run as `python -I -S keeper.py <listening descriptor> <run directory>`; the second argument is there to be
seen in a process list. It imports nothing of this package and as little as it can of the library: it is
resident for ever.

Protocol (version 1), one message each way on a unix SEQPACKET socket; the first byte is the version:

    G                     -> H <INIT answer> with [/dev/fuse, mount], or N (nothing held), or B (held by a
    live daemon) P <seconds> <answer>  with [/dev/fuse, mount] -> K      seconds: f64, how long to wait for
    the next daemon S                     -> K; the keeper ends: the connection is aborted and readers get
    errors

Whoever got H or K for P holds the connection until its socket closes. Then the deadline runs; when nobody
comes, the keeper ends as well. Closing the last descriptor of /dev/fuse is what aborts a connection, and then
it has the last.
"""

from __future__ import annotations

import _socket
import os
import select
import struct
import sys
import time

VERSION = b"\1"
DEADLINE = 120.0  # seconds without a daemon; also for one that starts the keeper and never comes back
_MAX_MESSAGE = 4096
_DESCRIPTORS = 2
_INTS = struct.Struct(f"{_DESCRIPTORS}i")
_SECONDS = struct.Struct("<d")


class Keeper:
    """What is held: descriptors, the INIT answer, who holds the connection now."""

    def __init__(self, listener: _socket.socket) -> None:
        self.listener = listener
        self.descriptors: tuple[int, ...] = ()
        self.init_answer = b""
        self.seconds = DEADLINE
        self.clients: dict[int, _socket.socket] = {}
        self.holder = -1  # the file number of its socket

    def run(self) -> None:
        """Serve until stopped, or until the deadline passes without a daemon."""
        poll = select.poll()
        poll.register(self.listener.fileno(), select.POLLIN)
        deadline = time.monotonic() + self.seconds
        while True:
            left = None if self.holder >= 0 else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            events = poll.poll(None if left is None else int(left * 1000) + 1)
            # The listener last: a daemon that died and its successor may be seen at once.
            for number, _ in sorted(events, key=lambda event: event[0] == self.listener.fileno()):
                if number == self.listener.fileno():
                    descriptor, _ = self.listener._accept()  # type: ignore[attr-defined]
                    client = _socket.socket(fileno=descriptor)
                    self.clients[descriptor] = client
                    poll.register(descriptor, select.POLLIN)
                    continue
                answer = self._message(self.clients[number])
                if answer == b"S":
                    return
                if answer:
                    continue
                poll.unregister(number)
                self.clients.pop(number).close()
                if number == self.holder:
                    self.holder = -1
                    deadline = time.monotonic() + self.seconds

    def _message(self, client: _socket.socket) -> bytes:
        """Answer one message; its verb, or nothing when the client is gone or talks nonsense."""
        try:
            data, ancillary, _, _ = client.recvmsg(
                _MAX_MESSAGE, _socket.CMSG_SPACE(_INTS.size), _socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return b""
        received = tuple(
            descriptor
            for level, kind, content in ancillary
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
            for (descriptor,) in struct.iter_unpack("i", content[: len(content) // 4 * 4])
        )
        verb, body = data[1:2], data[2:]
        answer, passed = (
            self._answer(verb, body, received, client.fileno()) if data[:1] == VERSION else (b"", ())
        )
        if verb != b"P" or answer != b"K":
            for descriptor in received:
                os.close(descriptor)
        if not answer:
            return b""
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, _INTS.pack(*passed))] if passed else []
        try:
            client.sendmsg([VERSION + answer], rights)
        except OSError:
            return b""
        return verb

    def _answer(
        self, verb: bytes, body: bytes, received: tuple[int, ...], client: int
    ) -> tuple[bytes, tuple[int, ...]]:
        """What to send back, and which descriptors with it; nothing for nonsense."""
        if verb == b"S":
            return b"K", ()
        if verb == b"G":
            if self.holder >= 0:
                return b"B", ()
            if not self.descriptors:
                return b"N", ()
            self.holder = client
            return b"H" + self.init_answer, self.descriptors
        if verb == b"P" and len(received) == _DESCRIPTORS and len(body) > _SECONDS.size:
            if self.holder >= 0 or self.descriptors:
                return b"B", ()
            (self.seconds,) = _SECONDS.unpack_from(body)
            self.descriptors, self.init_answer, self.holder = received, body[_SECONDS.size :], client
            return b"K", ()
        return b"", ()


def main(arguments: list[str]) -> None:
    """Leave the daemon's process tree and serve."""
    if os.fork():
        os._exit(0)  # the daemon waits for this one; the keeper is nobody's child and no zombie of anybody's
    listener = _socket.socket(fileno=int(arguments[1]))
    os.chdir("/")
    Keeper(listener).run()


if __name__ == "__main__":
    main(sys.argv)
