"""A TCP proxy between a client and a registry that counts bytes and, if asked, makes the link long or narrow.

Unshaped it moves bytes with splice(2) and costs next to nothing. Shaped, every connection shares one link, and
all that have something to send take turns: a chunk leaves when its turn has come and the link's rate lets it, and
arrives half a round trip later; a connection's first bytes wait one round trip more, for the handshake that
loopback did at once. For faults it can stall (keep connections
open, pass nothing) and cut (close them all).
"""

import collections
import contextlib
import errno
import fcntl
import os
import queue
import re
import socket
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_PIPE_BYTES = 1 << 20
"""F_SETPIPE_SZ's unprivileged limit (/proc/sys/fs/pipe-max-size), the most one splice moves."""

_CHUNK_BYTES = 32 << 10
"""What a shaped link sends at once: small enough that connections share it evenly."""

_QUEUE_BYTES = 1 << 20
"""Bytes in flight per connection and direction, as a receive window bounds them; at least two round trips' worth."""

_AHEAD_S = 0.002
"""How long before its departure a chunk takes its place in the link: as little as sleeping threads allow, since
nobody can overtake it there."""

_LATE_S = 0.05
"""How late a thread may wake without the link losing that time."""

_RATES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class Link:
    """Round trip time in seconds and rate in bytes per second; None is unlimited."""

    round_trip: float = 0.0
    rate: float | None = None


def parse_link(text: str) -> Link:
    """`10ms,500mbit` -> Link(0.01, 62.5e6). Either half may be left out. ValueError names what is wrong."""
    round_trip, rate = 0.0, None
    for part in filter(None, (item.strip().lower() for item in text.split(","))):
        if found := re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", part):
            round_trip = float(found[1]) / (1000 if found[2] == "ms" else 1)
        elif (found := re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", part)) and float(found[1]) > 0:
            rate = float(found[1]) * _RATES[found[2]] / 8
        else:
            raise ValueError(f"link {text!r}: {part!r} is neither a time (10ms) nor a rate (500mbit)")
    return Link(round_trip, rate)


class _Lane:
    """One direction of the link: whoever comes first leaves first, one chunk per turn."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._mutex = threading.Lock()
        self._waiting: collections.deque[threading.Event] = collections.deque()
        self._busy = False
        self._free_at = 0.0

    def due(self, size: int, ready: float) -> float:
        """Waits for a turn; when `size` bytes, ready to leave since `ready`, have all arrived (time.monotonic()).

        On a busy machine threads wake late; the link does not stand still meanwhile, as it would not in life.
        """
        if self._link.rate is None:
            return ready + self._link.round_trip / 2
        self._begin()
        try:
            if (wait := self._free_at - _AHEAD_S - time.monotonic()) > 0:
                time.sleep(wait)
            earliest = max(ready, time.monotonic() - _LATE_S)
            self._free_at = max(earliest, self._free_at) + size / self._link.rate
            return self._free_at + self._link.round_trip / 2
        finally:
            self._end()

    def _begin(self) -> None:
        with self._mutex:
            if not self._busy:
                self._busy = True
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def _end(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().set()  # stays busy: handed on
            else:
                self._busy = False


class Proxy:
    """Listens on a free loopback port and passes every connection to `target`; a context manager.

    `received` counts bytes from the target to clients, `sent` those the other way,
    both just before they are delivered: whoever has an answer finds it counted.
    """

    def __init__(self, target: tuple[str, int], *, link: Link | None = None) -> None:
        self._target = target
        self._link = link or Link()
        self._window = max(_QUEUE_BYTES, int(2 * self._link.round_trip * (self._link.rate or 0)))
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._lock = threading.Lock()
        self._live: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._flowing = threading.Event()
        self._flowing.set()
        self._closing = False
        self._counts = {"received": 0, "sent": 0, "connections": 0}
        self._lanes = {"received": _Lane(self._link), "sent": _Lane(self._link)}

    @property
    def port(self) -> int:
        """The port clients connect to, on 127.0.0.1."""
        return int(self._listener.getsockname()[1])

    @property
    def host(self) -> str:
        """`127.0.0.1:PORT`, as an image reference takes it."""
        return f"127.0.0.1:{self.port}"

    @property
    def received(self) -> int:
        """Bytes passed from the target to clients so far."""
        return self._counts["received"]

    @property
    def sent(self) -> int:
        """Bytes passed from clients to the target so far."""
        return self._counts["sent"]

    @property
    def connections(self) -> int:
        """Connections accepted so far."""
        return self._counts["connections"]

    def stall(self) -> None:
        """Pass nothing from now on, in either direction; connections stay open and new ones are accepted."""
        self._flowing.clear()

    def resume(self) -> None:
        """Undo stall()."""
        self._flowing.set()

    def cut(self) -> None:
        """Close every connection now; new ones are accepted as before."""
        with self._lock:
            live = list(self._live)
        for each in live:
            _hang_up(each)

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        _hang_up(self._listener)
        self._flowing.set()
        self.cut()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _spawn(self, function: object, *arguments: object) -> None:
        assert callable(function)
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        with self._lock:
            self._threads = [each for each in self._threads if each.is_alive()]
            # Started under the lock: a thread that is not alive yet would be forgotten.
            thread.start()
            self._threads.append(thread)

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """One connection: this thread carries requests, a second one answers; both end first."""
        with client, contextlib.ExitStack() as stack:
            try:
                upstream = stack.enter_context(socket.create_connection(self._target, timeout=10))
            except OSError:
                return
            upstream.settimeout(None)
            pair = {client, upstream}
            with self._lock:
                self._live |= pair
                self._counts["connections"] += 1
            for each in pair:
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            carry = self._carry_shaped if self._link != Link() else self._carry
            back = threading.Thread(target=carry, args=(upstream, client, "received"), daemon=True)
            back.start()
            try:
                if not self._closing:
                    carry(client, upstream, "sent")
            finally:
                if self._closing:
                    _hang_up(upstream)
                back.join()
                with self._lock:
                    self._live -= pair

    def _carry(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        read_end, write_end = os.pipe()
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            while moved := os.splice(source.fileno(), write_end, _PIPE_BYTES):
                self._flowing.wait()
                self._count(direction, moved)
                while moved:
                    moved -= os.splice(read_end, target.fileno(), moved)
            _half_close(target)
        except OSError as error:
            _gone(error, source, target)
        finally:
            os.close(read_end)
            os.close(write_end)

    def _carry_shaped(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        """Gives each chunk its time of arrival; a second thread delivers when that time has come."""
        flight: queue.Queue[tuple[float, bytes]] = queue.Queue(self._window // _CHUNK_BYTES)
        arrival = threading.Thread(target=self._arrive, args=(flight, source, target, direction), daemon=True)
        arrival.start()
        lane = self._lanes[direction]
        extra = self._link.round_trip if direction == "sent" else 0.0
        ready = 0.0
        try:
            while True:
                try:  # what is there already has been ready since the chunk before it
                    chunk = source.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    chunk = source.recv(_CHUNK_BYTES)
                    ready = 0.0
                if not chunk:
                    break
                self._flowing.wait()
                ready = ready or time.monotonic()
                item = lane.due(len(chunk), ready) + extra, chunk
                extra = 0.0
                try:
                    flight.put_nowait(item)
                except queue.Full:  # the receiver's window is closed
                    flight.put(item)
                    ready = 0.0
        except OSError as error:
            _gone(error, source, target)
        finally:
            flight.put((time.monotonic() + self._link.round_trip / 2, b""))
            arrival.join()

    def _arrive(
        self,
        flight: queue.Queue[tuple[float, bytes]],
        source: socket.socket,
        target: socket.socket,
        direction: str,
    ) -> None:
        broken = False
        while True:
            due, chunk = flight.get()
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            if not chunk:
                _half_close(target)
                return
            if broken:
                continue
            try:
                self._count(direction, len(chunk))
                target.sendall(chunk)
            except OSError as error:
                # Keeps taking chunks, so that the other thread is never stuck on a full queue.
                broken = True
                _gone(error, source, target)

    def _count(self, direction: str, size: int) -> None:
        with self._lock:
            self._counts[direction] += size


def _half_close(target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _hang_up(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def _gone(error: OSError, *pair: socket.socket) -> None:
    """A side went away: tell the other. Anything but that is a bug of this proxy."""
    if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.EBADF, errno.ETIMEDOUT):
        raise error
    for each in pair:
        _hang_up(each)
