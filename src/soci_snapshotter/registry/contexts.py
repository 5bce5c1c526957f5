"""TLS contexts by what they were made of, and made anew when a certificate's file has changed."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable

from soci_snapshotter.errors import Config
from soci_snapshotter.formats.hosts import Tls

# Certificates are renewed days before they end; to look this often costs nothing.
_FRESH = 10.0

_Stamps = tuple[tuple[int, int, int] | None, ...]


class Contexts:
    """Thread safe. Reads files outside its lock."""

    def __init__(self, make: Callable[[Tls], ssl.SSLContext]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._known: dict[Tls, tuple[float, _Stamps, ssl.SSLContext]] = {}

    def get(self, tls: Tls) -> ssl.SSLContext:
        """The context; the same object until a file changes. Config naming the file that cannot be used."""
        now = time.monotonic()
        with self._lock:
            known = self._known.get(tls)
        if known is not None and now - known[0] < _FRESH:
            return known[2]
        stamps = _stamps(tls)
        if known is not None and known[1] == stamps:
            context = known[2]
        else:
            try:
                context = self._make(tls)
            except Config:
                if known is None:
                    raise
                stamps, context = known[
                    1:
                ]  # half written, say: what worked goes on working, and is tried again
        with self._lock:
            other = self._known.get(tls)
            if other is not None and other is not known and other[1] == stamps:
                return other[2]  # another thread was faster
            self._known[tls] = now, stamps, context
        return context


def _stamps(tls: Tls) -> _Stamps:
    return tuple(_stamp(path) for path in (*tls.ca, *(each for pair in tls.client for each in pair if each)))


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
