"""Kept-alive http.client connections for span ranges: a third of urllib3's CPU (DATA-PLANE.md, "HTTP")."""

from __future__ import annotations

import http.client
import ssl
import threading
import time

from soci_snapshotter.registry.urls import Origin

# As many flights as may be under way at once; more are closed when they come back.
_KEPT = 32
# Servers close idle connections after 60 s and more; below that a kept one is mostly alive.
_IDLE = 50.0


class ConnectionPool:
    """Idle connections by origin. Thread safe; opens and closes sockets outside its lock."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[tuple[float, http.client.HTTPConnection]]] = {}
        self._closed = False

    def borrow(self, origin: Origin, timeout: float) -> tuple[http.client.HTTPConnection, bool]:
        """A connection (not yet connected if new), and whether it was used before."""
        with self._lock:
            idle = self._idle.get(origin, [])
            since, connection = idle.pop() if idle else (0.0, None)
        if connection is not None:
            if time.monotonic() - since < _IDLE:
                return connection, True
            connection.close()
        return self.fresh(origin, timeout), False

    def fresh(self, origin: Origin, timeout: float) -> http.client.HTTPConnection:
        """A new connection; `timeout` in seconds bounds its connect."""
        if origin.scheme == "https":
            return http.client.HTTPSConnection(
                origin.host, origin.port, timeout=timeout, context=self._context
            )
        return http.client.HTTPConnection(origin.host, origin.port, timeout=timeout)

    def warm(self, origin: Origin, count: int, timeout: float) -> None:
        """Have `count` idle connections to `origin`, the missing ones opened now. Raises OSError."""
        while True:
            with self._lock:
                now = time.monotonic()
                idle = sum(now - since < _IDLE for since, _ in self._idle.get(origin, ()))
                if self._closed or idle >= count:
                    return
            connection = self.fresh(origin, timeout)
            connection.connect()
            self.give_back(origin, connection)

    def give_back(self, origin: Origin, connection: http.client.HTTPConnection) -> None:
        """Keep a connection whose last answer was read to its end."""
        with self._lock:
            idle = self._idle.setdefault(origin, [])
            keep = not self._closed and len(idle) < _KEPT and connection.sock is not None
            if keep:
                idle.append((time.monotonic(), connection))
        if not keep:
            connection.close()

    def close(self) -> None:
        """Close idle connections; those given back later are closed then."""
        with self._lock:
            self._closed = True
            everything = [entry for idle in self._idle.values() for entry in idle]
            self._idle.clear()
        for _, connection in everything:
            connection.close()
