"""A small HTTP server for what the daemon says of itself: read only, on TCP or a unix socket.

Each connection has a thread and serves one request. Clients that are slow hold up nobody: a connection has a bounded
life, and when there are too many of them the oldest goes.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import BaseServer, ThreadingMixIn
from types import TracebackType
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from soci_snapshotter.errors import Config, Invalid

_log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
"""A scraper, another one in case, somebody who looks, and room."""
IDLE_SECONDS = 10.0
"""A client that neither sends nor takes anything for so long is gone."""
LIFE_SECONDS = 90.0
"""The whole of a connection: the longest profile, and half a minute to take it."""
_POLL_SECONDS = 0.5


class Page(NamedTuple):
    """An answer."""

    content_type: str
    body: bytes


Pages = Mapping[str, Callable[[Mapping[str, str]], Page]]
"""Path -> what makes the page from the query. Runs on a connection's thread; Invalid becomes 400."""


class PageServer:
    """Serves `pages` while it is entered. Bound when it is made, so that a bad address refuses to start."""

    def __init__(self, listener: socket.socket, pages: Pages, name: str) -> None:
        """`listener` is closed when this is left; `name` is the thread's."""
        self._server = _Server(listener, pages)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name=name, daemon=True
        )

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def listen_tcp(address: str, key: str) -> socket.socket:
    """Listen on `host:port`, as Go writes it (no host: everywhere; [::1]:80). Raises Config naming `key`."""
    host, separator, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not (port.isascii() and port.isdecimal()) or int(port) > 0xFFFF:
        raise Config(f"{key} = {address}: want host:port")
    try:
        if not host and socket.has_dualstack_ipv6():
            return socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
        family, *_, where = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM)[0]
        return socket.create_server(where[:2], family=family)
    except OSError as error:
        number = error.errno or 0
        reason = os.strerror(number) if number > 0 else error  # getaddrinfo's are negative
        raise Config(f"{key} = {address}: cannot listen: {reason}") from None


def listen_unix(path: Path, key: str) -> socket.socket:
    """Listen on a unix socket that only this user may use; one left by a dead daemon is replaced.

    Raises Config naming `key`.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise Config(f"{key} = {path}: is there, and is no socket")
            path.unlink()
        listener.bind(os.fsencode(path))
        path.chmod(0o600)  # nobody can connect before listen()
        listener.listen()
    except OSError as error:
        listener.close()
        raise Config(f"{key} = {path}: cannot listen: {error.strerror or error}") from None
    except BaseException:
        listener.close()
        raise
    return listener


class _Server(ThreadingMixIn, BaseServer):
    """socketserver's loop and threads over a socket that is bound already."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, pages: Pages) -> None:
        super().__init__(listener.getsockname(), _Handler)
        self.pages = pages
        self._listener = listener
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # when each was accepted, oldest first

    def fileno(self) -> int:
        """For the selector of serve_forever."""
        return self._listener.fileno()

    def server_close(self) -> None:
        """Stop listening, and end the connections."""
        self._listener.close()
        with self._lock:
            left = list(self._open)
        for connection in left:
            _end(connection)

    def get_request(self) -> tuple[socket.socket, object]:
        """Accept."""
        connection, address = self._listener.accept()
        with self._lock:
            self._open[connection] = time.monotonic()
            oldest = next(iter(self._open)) if len(self._open) > MAX_CONNECTIONS else None
        if oldest is not None:
            _end(oldest)
        return connection, address

    def service_actions(self) -> None:
        """Every half second, and after each accept: end what lives too long."""
        now = time.monotonic()
        with self._lock:
            old = [connection for connection, since in self._open.items() if now - since > LIFE_SECONDS]
        for connection in old:
            _end(connection)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """The connection's thread is done."""
        _end(request)
        with self._lock:
            self._open.pop(request, None)
        request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or a bug in a page: neither is the daemon's end."""
        del request, client_address
        _log.debug("a request for a page failed", exc_info=True)


def _end(connection: socket.socket) -> None:
    """Make every wait on it return, whichever thread waits."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # ended already
        pass


class _Handler(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that the connection ends with it."""

    timeout = IDLE_SECONDS
    server: _Server
    server_version = "soci-snapshotter"
    sys_version = ""

    def do_GET(self) -> None:
        """Make the page and send it."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """The same without the page."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        wanted = urlsplit(self.path)
        make = self.server.pages.get(wanted.path)
        if make is None:
            self.send_error(404)
            return
        try:
            page = make(dict(parse_qsl(wanted.query)))
        except Invalid as error:
            self.send_error(400, explain=str(error))
            return
        except Exception:
            _log.exception("a page could not be made", extra={"path": wanted.path})
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        if with_body:
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes come every few seconds: they are not logged."""

    def address_string(self) -> str:
        """Not asked for anywhere; a unix socket's client has no address to make one of."""
        return ""
