"""Sockets that are read with a bound on the whole answer's head, not only on each piece: a server that drips is left."""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Callable
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection


class Timed(io.RawIOBase):
    """A socket's reader that sets the socket's timeout anew for each piece."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, patience: Callable[[], float | None]) -> None:
        """`patience`: seconds for the next piece, None to leave the timeout as it is; it may raise TimeoutError."""
        self._raw = raw
        self._sock = sock
        self._patience = patience

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int | None:  # noqa: ANN401 - whatever takes bytes
        """One recv."""
        seconds = self._patience()
        if seconds is not None:
            self._sock.settimeout(seconds)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        """Close the reader, and the socket if it is the last to use it."""
        self._raw.close()
        super().close()


class Answer(http.client.HTTPResponse):
    """An answer that is read by a Timed."""

    def __init__(
        self, patience: Callable[[], float | None], sock: socket.socket, *, method: str | None = None
    ) -> None:
        super().__init__(sock, method=method)
        self.fp = io.BufferedReader(Timed(self.fp.detach(), sock, patience))


class _Head:
    """Mixed into urllib3's connections: their timeout bounds the whole head. The body is the caller's to bound."""

    timeout: Any
    _until: float | None = None

    def response_class(self, sock: socket.socket, *, method: str | None = None) -> Answer:
        """What http.client reads answers with."""
        return Answer(self._patience, sock, method=method)

    def getresponse(self) -> Any:  # noqa: ANN401 - urllib3's
        """The head of the answer."""
        seconds = self.timeout  # urllib3 has put the one for reading there
        self._until = time.monotonic() + seconds if isinstance(seconds, int | float) else None
        try:
            return super().getresponse()  # type: ignore[misc]
        finally:
            self._until = None

    def _patience(self) -> float | None:
        if self._until is None:
            return None
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the head did not come in time")
        return left


class Plain(_Head, HTTPConnection):  # type: ignore[misc]
    """By http."""


class Secure(_Head, HTTPSConnection):  # type: ignore[misc]
    """By https."""


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = Plain


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = Secure


def patient(manager: urllib3.PoolManager) -> urllib3.PoolManager:
    """`manager`, whose connections will be these."""
    manager.pool_classes_by_scheme = {"http": _PlainPool, "https": _SecurePool}
    return manager
