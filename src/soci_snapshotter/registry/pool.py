"""Kept-alive http.client connections for span ranges: a third of urllib3's CPU (DATA-PLANE.md, "HTTP").

At most so many to one host at once; who finds none free waits, until its deadline. The newest idle one goes first, so
that no more are kept open than are needed. A host's TLS session is remembered: the next connection's handshake is short.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

from urllib3.util.ssltransport import SSLTransport

from soci_snapshotter.formats.hosts import Tls
from soci_snapshotter.registry.contexts import Contexts
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.patience import Answer
from soci_snapshotter.registry.proxies import Proxy
from soci_snapshotter.registry.urls import Origin

# Servers close idle connections after 60 s and more; below that a kept one is mostly alive.
_IDLE = 50.0
# Who waits for a connection looks this often whether it is still wanted.
_LOOK = 0.5
# Sessions kept: signed URLs lead to a handful of hosts, and a session is a few KB.
_SESSIONS = 64


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom a connection is made to, and with which certificates."""

    origin: Origin
    tls: Tls


class Connection(http.client.HTTPConnection):
    """One connection, through a proxy where there is one. Methods raise OSError and http.client.HTTPException."""

    def __init__(
        self,
        peer: Peer,
        timeout: float,
        *,
        context: ssl.SSLContext | None,
        session: ssl.SSLSession | None = None,
        proxy: Proxy | None = None,
        proxy_context: ssl.SSLContext | None = None,
    ) -> None:
        """`timeout` in seconds bounds each step of `connect`; `context` for https."""
        super().__init__(peer.origin.host, peer.origin.port, timeout=timeout)
        self.response_class = partial(Answer, self.patience)  # type: ignore[assignment]
        self.peer = peer
        self.step = timeout
        """Seconds between two pieces of an answer."""
        self.until = float("inf")
        """When the answer must be over (time.monotonic())."""
        self.context = context
        self.secured: ssl.SSLSocket | None = None
        """By TLS, and its session was not kept yet."""
        self._session = session
        self._proxy = proxy
        self._proxy_context = proxy_context
        if context is not None:
            self.default_port = http.client.HTTPS_PORT

    @property
    def place(self) -> str:
        """Whom the socket leads to, for people."""
        return self.peer.origin.place if self._proxy is None else f"the proxy {self._proxy}"

    def patience(self) -> float:
        """Seconds to wait for the next piece. TimeoutError when the request's time is over."""
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request's time is over")
        return min(self.step, left)

    def connect(self) -> None:
        """Connect, through CONNECT and TLS as the peer needs it."""
        proxy, context = self._proxy, self.context
        address = (self.host, self.port) if proxy is None else (proxy.host, proxy.port)
        sock: Any = socket.create_connection(address, self.timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if proxy is not None and self._proxy_context is not None:
                sock = self._proxy_context.wrap_socket(sock, server_hostname=proxy.host)
            if proxy is not None and context is not None:
                self._ask_through(proxy, sock)
            if context is not None:
                sock = self._secured(context, sock)
        except BaseException:
            sock.close()
            raise
        self.sock = sock
        self.secured = sock if isinstance(sock, ssl.SSLSocket) else None

    def ask(self, target: str, headers: dict[str, str]) -> None:
        """Send a GET for `target` (path and query)."""
        proxy = self._proxy
        if proxy is not None and self.context is None:
            origin = self.peer.origin
            target = f"{origin.scheme}://{origin.place}{target}"
            if proxy.authorization is not None:
                headers = {**headers, "Proxy-Authorization": proxy.authorization}
        self.request("GET", target, headers=headers)

    def _ask_through(self, proxy: Proxy, sock: socket.socket) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"CONNECT {host}:{self.port} HTTP/1.1", f"Host: {host}:{self.port}"]
        if proxy.authorization is not None:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = Answer(self.patience, sock, method="CONNECT")
        try:
            answer.begin()
            if answer.status != 200:
                raise OSError(f"Tunnel connection failed: {answer.status:03}")
        finally:
            answer.close()  # the reader of the head; not the socket

    def _secured(self, context: ssl.SSLContext, sock: socket.socket) -> Any:  # noqa: ANN401 - a kind of socket
        if self._proxy_context is not None:  # TLS within TLS, which the ssl module has no sockets for
            return SSLTransport(sock, context, server_hostname=self.host)
        return context.wrap_socket(sock, server_hostname=self.host, session=self._session)


@dataclass(slots=True)
class _Held:
    """Connections to one peer."""

    busy: int = 0
    idle: list[tuple[float, Connection]] = field(default_factory=list)


class ConnectionPool:
    """Connections by peer. A context manager; thread safe; opens and closes sockets outside its lock."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._contexts = Contexts(options.ssl_context)
        self._limit = options.connections
        self._changed = threading.Condition()
        self._held: dict[Peer, _Held] = {}
        self._sessions: OrderedDict[Peer, tuple[ssl.SSLContext, ssl.SSLSession]] = OrderedDict()
        self._swept = time.monotonic()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def borrow(
        self, peer: Peer, dial: float, deadline: float, stopped: threading.Event
    ) -> tuple[Connection, bool]:
        """A connection (not yet connected if new), and whether it was used before.

        `dial`: seconds for its connect. TimeoutError when none is free by `deadline` (time.monotonic()), or when the
        caller is `stopped`. It goes back by `give_back` or `drop`.
        """
        found, stale = self._take(peer, deadline, stopped)
        for connection in stale:
            connection.close()
        if found is not None:
            return found, True
        try:
            return self._new(peer, dial), False
        except BaseException:
            self._free(peer)
            raise

    def renew(self, connection: Connection, dial: float) -> Connection:
        """A new connection in place of a borrowed one that turned out dead."""
        connection.close()
        return self._new(connection.peer, dial)

    def warm(self, peer: Peer, count: int, dial: float) -> None:
        """Have `count` idle connections to `peer`, the missing ones opened now, as far as the limit allows.

        Raises OSError.
        """
        while True:
            now = time.monotonic()
            with self._changed:
                held = self._held.setdefault(peer, _Held())
                idle = sum(now - since < _IDLE for since, _ in held.idle)
                full = self._limit is not None and held.busy + len(held.idle) >= self._limit
                if self._closed or idle >= count or full:
                    return
                held.busy += 1
            connection = None
            try:
                connection = self._new(peer, dial)
                connection.connect()
            finally:
                if connection is None or connection.sock is None:
                    self._free(peer)
            self.give_back(connection)

    def give_back(self, connection: Connection) -> None:
        """Keep a borrowed connection whose last answer was read to its end."""
        now = time.monotonic()
        with self._changed:
            held = self._held[connection.peer]
            held.busy -= 1
            keep = not self._closed and connection.sock is not None
            if keep:
                held.idle.append((now, connection))
            stale = self._sweep(now)
            self._changed.notify_all()
        for each in stale if keep else (*stale, connection):
            each.close()

    def answered(self, connection: Connection) -> None:
        """The head of an answer came: with TLS 1.3 the session, which the next connection takes up, comes before it."""
        sock, context = connection.secured, connection.context
        if sock is None or context is None:
            return
        connection.secured = None
        session = sock.session
        if session is None or not session.has_ticket:
            return
        with self._changed:
            self._sessions[connection.peer] = context, session
            self._sessions.move_to_end(connection.peer)
            while len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)

    def drop(self, connection: Connection) -> None:
        """Close a borrowed connection."""
        self._free(connection.peer)
        connection.close()

    def close(self) -> None:
        """Close idle connections; those given back later are closed then."""
        with self._changed:
            self._closed = True
            everything = [entry for held in self._held.values() for entry in held.idle]
            for held in self._held.values():
                held.idle.clear()
            self._changed.notify_all()
        for _, connection in everything:
            connection.close()

    def _take(
        self, peer: Peer, deadline: float, stopped: threading.Event
    ) -> tuple[Connection | None, list[Connection]]:
        """An idle connection, or the right to make one; and those that were found too old."""
        with self._changed:
            while True:
                now = time.monotonic()
                held = self._held.setdefault(peer, _Held())
                if held.idle:
                    since, connection = held.idle.pop()
                    held.busy += 1
                    if now - since < _IDLE:
                        return connection, []
                    stale = [connection, *(each for _, each in held.idle)]  # the others are older
                    held.idle.clear()
                    return None, stale
                if self._limit is None or held.busy < self._limit:
                    held.busy += 1
                    return None, []
                if now >= deadline or self._closed or stopped.is_set():
                    raise TimeoutError("no connection became free")
                self._changed.wait(min(deadline - now, _LOOK))

    def _free(self, peer: Peer) -> None:
        with self._changed:
            self._held[peer].busy -= 1
            self._changed.notify_all()

    def _sweep(self, now: float) -> list[Connection]:
        """Idle connections of any peer that nobody used for too long, at times. Under the lock."""
        stale: list[Connection] = []
        if now - self._swept < _IDLE / 4:
            return stale
        self._swept = now
        for peer, held in list(self._held.items()):
            stale += [connection for since, connection in held.idle if now - since >= _IDLE]
            held.idle = [entry for entry in held.idle if now - entry[0] < _IDLE]
            if not held.idle and not held.busy:
                del self._held[peer]
        return stale

    def _new(self, peer: Peer, dial: float) -> Connection:
        context = self._contexts.get(peer.tls) if peer.origin.scheme == "https" else None
        proxy = self._options.proxies.of(peer.origin)
        by_tls = proxy is not None and proxy.scheme == "https"
        with self._changed:
            known = self._sessions.get(peer)
        return Connection(
            peer,
            dial,
            context=context,
            session=known[1] if known is not None and known[0] is context else None,
            proxy=proxy,
            proxy_context=self._contexts.get(self._options.tls.without_client()) if by_tls else None,
        )
