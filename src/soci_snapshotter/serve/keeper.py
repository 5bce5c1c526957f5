"""The keeper: a tiny process that holds FUSE descriptors, so that a killed daemon leaves readers waiting a moment.

Run as `python -I -S keeper.py <socket> <run directory> [<cgroup.procs> ...]`: the number of a bound descriptor; a word
to be seen in a process list; control groups to move to, those of a service manager that would end it with the daemon.
It imports nothing of this package and as little as it can of the library: it is resident for ever.

Protocol (version 2), one message each way on a unix SEQPACKET socket; the first byte is the version. A name is a byte
of length and that many bytes: a keeper holds as many connections as there are names. The daemon of today has one; names
are the protocol's reserve, for a later daemon that needs a second one beside what older mounts need.

    G <name>                              -> H <INIT answer> with [/dev/fuse, mount], or N (nothing of that name), or B
                                             (a live daemon holds what is here)
    P <gone> <silent> <name> <answer>     with [/dev/fuse, mount] or [/dev/fuse, mount, abort] -> K, or B
                                             f64 seconds: how long to wait when the daemon is gone, or says nothing
    A                                     no answer: the daemon lives
    S                                     -> K; the keeper ends

Whoever got H or K for P is the holder until its socket closes. The keeper waits `gone` seconds for the next one, and
`silent` seconds for a word of the one there is (it may be stopped, or hang). Then it aborts what it holds: readers get
errors instead of waiting for ever. `abort` is the connection's file of that name in fusectl; without it, or at S, a
connection ends when the last descriptor of its /dev/fuse closes, whoever has that.

SIGTERM and SIGINT end the keeper. Nothing is aborted while a daemon lives: when a node shuts down containers may still
have something to read, and a daemon that goes on starts another keeper. Else what is held is aborted.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` would import enum and re
import _socket
import os
import select
import struct
import sys
import time

VERSION = b"\2"
DEADLINE = 120.0  # seconds without a daemon; also for one that starts the keeper and never comes back
_MAX_MESSAGE = 4096
_DESCRIPTORS = 2
_INTS = struct.Struct("3i")
_PLACE = struct.Struct("<ddB")
_BACKLOG = 16
_TICKS = 12  # a deadline is counted in so many parts: a machine that was paused loses one, not all


class Keeper:
    """What is held, by name: descriptors and the INIT answer; and who holds it now."""

    def __init__(self, listener: _socket.socket) -> None:
        listener.setblocking(False)  # who connected may be gone before it is accepted
        self.listener = listener
        self.held: dict[bytes, tuple[tuple[int, ...], bytes]] = {}
        self.gone = self.silent = DEADLINE
        self.clients: dict[int, _socket.socket] = {}
        self.holder = -1  # the file number of its socket
        self.left = _TICKS

    def run(self) -> None:
        """Serve until stopped, or until the deadline passes."""
        poll = select.poll()
        poll.register(self.listener.fileno(), select.POLLIN)
        tick = time.monotonic()
        while True:
            length = (self.gone if self.holder < 0 else self.silent) / _TICKS
            now = time.monotonic()
            if now - tick >= length:
                tick = now
                self.left -= 1
                if self.left <= 0:
                    self._abort()
                    return
            # The listener last: a daemon that died and its successor may be seen at once.
            events = poll.poll(max(tick + length - now, 0) * 1000 + 1)
            for number, _ in sorted(events, key=lambda event: event[0] == self.listener.fileno()):
                if number == self.listener.fileno():
                    try:
                        descriptor, _ = self.listener._accept()  # type: ignore[attr-defined]
                    except BlockingIOError:
                        continue
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
                    self.left, tick = _TICKS, time.monotonic()

    def end(self, number: int, frame: object) -> None:
        """A signal's handler: end the process; what a living daemon holds is left to it."""
        del number, frame
        poll = select.poll()
        if self.holder >= 0:
            poll.register(self.holder, 0)  # POLLHUP comes unasked: its end, not seen by run() yet
        if self.holder < 0 or poll.poll(0):
            self._abort()
        os._exit(0)

    def _abort(self) -> None:
        """End the connections, also those that somebody else has descriptors of."""
        for descriptors, _ in self.held.values():
            for descriptor in descriptors[_DESCRIPTORS:]:
                try:
                    os.write(descriptor, b"1")
                except OSError:  # ended by itself
                    pass

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
        if client.fileno() == self.holder:
            self.left = _TICKS
        if verb == b"A":
            return verb
        rights = (
            [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(passed)}i", *passed))]
            if passed
            else []
        )
        try:
            client.sendmsg([VERSION + answer], rights)
        except OSError:
            return b""
        return verb

    def _answer(
        self, verb: bytes, body: bytes, received: tuple[int, ...], client: int
    ) -> tuple[bytes, tuple[int, ...]]:
        """What to send back, and which descriptors with it; nothing for nonsense."""
        if verb in {b"S", b"A"}:
            return b"K", ()
        foreign = self.holder not in {-1, client}
        if verb == b"G" and body and len(body) == 1 + body[0]:
            if foreign:
                return b"B", ()
            if body[1:] not in self.held:
                return b"N", ()
            descriptors, answer = self.held[body[1:]]
            self.holder = client
            return b"H" + answer, descriptors[:_DESCRIPTORS]
        if verb == b"P" and len(received) >= _DESCRIPTORS and len(body) > _PLACE.size:
            gone, silent, length = _PLACE.unpack_from(body)
            name, answer = (
                body[_PLACE.size : _PLACE.size + length],
                body[_PLACE.size + length :],
            )
            if foreign or name in self.held:
                return b"B", ()
            self.gone, self.silent = gone, silent
            self.held[name] = received, answer
            self.holder = client
            return b"K", ()
        return b"", ()


def main(arguments: list[str]) -> None:
    """Leave the daemon's process tree and control group, and serve."""
    for path in arguments[3:]:
        try:
            with open(path, "wb", 0) as group:
                group.write(b"0")  # the writer itself
        except OSError:  # the daemon looks where the keeper is, and says so
            pass
    ready, said = os.pipe()
    if os.fork():
        os.close(said)
        os.read(ready, 1)
        os._exit(0)  # the daemon waits for this one; the keeper is nobody's child and no zombie of anybody's
    listener = _socket.socket(fileno=int(arguments[1]))
    os.chdir("/")
    listener.listen(_BACKLOG)  # again: whoever connects is told the pid of the process that did it last
    keeper = Keeper(listener)
    for number in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(number, keeper.end)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())  # the daemon blocks these two, and exec(2) keeps that
    os.close(ready)
    os.close(said)
    keeper.run()


if __name__ == "__main__":
    main(sys.argv)
