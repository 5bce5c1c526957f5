"""What --http-dump and --http-trace show: heads of requests and answers, and connections, without any secret.

Shown is what is on a list, everything else is named and left out: field values (an Authorization, a cookie, a field
that hosts.toml adds), values in queries (signatures, upload states), bodies (tokens). A list of what to hide would
miss the next registry's own idea of a credential.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.connection import HTTPConnection

from soci_snapshotter.registry import failures, patience

_HIDDEN = "(hidden)"
_SHOWN = """
    accept accept-encoding accept-ranges age allow cache-control connection content-encoding content-length
    content-range content-type date docker-content-digest docker-distribution-api-version docker-upload-uuid etag
    expires keep-alive last-modified link location oci-chunk-min-length oci-filters-applied oci-subject range
    ratelimit-limit ratelimit-remaining retry-after server strict-transport-security transfer-encoding user-agent
    vary via warning www-authenticate x-content-type-options x-request-id
"""
_FIELDS = frozenset(_SHOWN.split())
_QUERY = frozenset({"artifactType", "digest", "from", "last", "mount", "n", "ns", "scope", "service"})
_LIMIT = 2048  # of one value: a dump is for reading
_IN_TEXT = re.compile(r"https?://[^\s\"'<>,]+|(?<=<)/[^\s<>]*", re.ASCII)
_CONTROL = re.compile(r"[^\x20-\x7e]")

Tell = Callable[[str], None]


def shown_url(url: str) -> str:
    """The URL with the values of its query left out but for those known to be no secret; no user, no fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return _HIDDEN
    netloc = parts.netloc.rpartition("@")[2]
    query = "&".join(_shown_pair(pair) for pair in parts.query.split("&") if pair)
    base = f"{parts.scheme}://{netloc}{parts.path}" if parts.netloc else parts.path
    return _printable(base + ("?" + query if query else ""))


def _shown_pair(pair: str) -> str:
    key, equals, value = pair.partition("=")
    if not equals:
        return _HIDDEN  # perhaps all value and no key
    return f"{key[:80]}={unquote(value) if key in _QUERY else _HIDDEN}"


def shown_field(name: str, value: str) -> str:
    """A header field's value, or a note that it was left out."""
    lower = name.lower()
    if lower not in _FIELDS:
        return _HIDDEN
    if lower == "location":
        return shown_url(value)
    return _printable(_IN_TEXT.sub(lambda found: shown_url(found[0]), value))


class Wire:
    """Tells `dump` and `trace`, when they are there, one line at a time. Thread safe: lines of one head stay together."""

    def __init__(self, dump: Tell | None, trace: Tell | None) -> None:
        self._dump = dump
        self._trace = trace
        self._lock = threading.Lock()

    def attach(self, manager: urllib3.PoolManager) -> urllib3.PoolManager:
        """Trace the connections that this manager will make."""
        if self._trace is not None:
            manager.pool_classes_by_scheme = _traced_pools(self._trace)
        return manager

    def sending(self, method: str, url: str, headers: Mapping[str, str]) -> float:
        """Tell of a request; returns the time to give to `answered` or `failed`."""
        if self._dump is not None:
            self._head("> ", f"{method} {shown_url(url)}", headers)
        return time.monotonic()

    def answered(self, method: str, url: str, response: urllib3.BaseHTTPResponse, started: float) -> None:
        """Tell of an answer's head."""
        if self._dump is not None:
            self._head("< ", f"{response.status} {_printable(response.reason or '')}", response.headers)
        if self._trace is not None:
            took = (time.monotonic() - started) * 1000
            self._trace(f"{method} {shown_url(url)}: {response.status} after {took:.1f} ms")

    def failed(self, method: str, url: str, error: BaseException, started: float) -> None:
        """Tell of a request that got no answer."""
        took = (time.monotonic() - started) * 1000
        text = f"{method} {shown_url(url)}: {failures.reason(error)} after {took:.1f} ms"
        for tell in {self._dump, self._trace} - {None}:
            if tell is not None:
                tell(text)

    def _head(self, mark: str, first: str, headers: Mapping[str, str]) -> None:
        lines = [
            first,
            *(f"{_printable(name)}: {shown_field(name, value)}" for name, value in headers.items()),
        ]
        with self._lock:
            for line in lines:
                if self._dump is not None:
                    self._dump(mark + line)


def _traced_pools(tell: Tell) -> dict[str, Any]:
    """urllib3's pools with connections that say how they came about."""

    class TracedPlain(patience.Plain):
        def connect(self) -> None:
            started = time.monotonic()
            super().connect()
            tell(_connected(self, started))

    class TracedSecure(patience.Secure):
        def connect(self) -> None:
            started = time.monotonic()
            super().connect()
            tell(_connected(self, started))

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = TracedPlain

    class SecurePool(urllib3.HTTPSConnectionPool):
        ConnectionCls = TracedSecure

    return {"http": PlainPool, "https": SecurePool}


def _connected(connection: HTTPConnection, started: float) -> str:
    took = (time.monotonic() - started) * 1000
    sock: Any = connection.sock
    address = sock.getpeername()[0] if sock is not None else "?"
    text = f"connected to {connection.host}:{connection.port} ({address}) after {took:.1f} ms"
    version = getattr(sock, "version", None)
    if version is not None:
        text += f", {version()}" + (
            ", certificate verified" if connection.is_verified else ", certificate NOT verified"
        )
    return text


def _printable(text: str) -> str:
    return _CONTROL.sub("?", text if len(text) <= _LIMIT else text[:_LIMIT] + "...")
