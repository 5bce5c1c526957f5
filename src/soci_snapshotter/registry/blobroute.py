"""Ranges of one blob from one of the places that have it: one request at a time, with what it takes to get its answer.

Where the place redirects to is remembered and asked directly until it refuses (signed URLs expire); then the place is
asked again. A connection that was kept alive and turns out dead is replaced at once.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from soci_snapshotter.errors import Integrity, Remote, SociError
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.hosts import Tls
from soci_snapshotter.formats.httpfields import Range, parse_content_range, parse_retry_after
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.policy.retry import is_transient
from soci_snapshotter.registry import failures, urls
from soci_snapshotter.registry.auth import MAX_ANSWERS, Scope, Use, believed
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.pool import Connection, ConnectionPool, Peer
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.transport import broken, tls_for

# One piece handed to the sink: big enough to cost nothing, small enough that who may be held up in between stops soon
# (4 ms at 500 Mbit/s).
_PIECE = 256 << 10
# A server that ignores Range sends the blob from its start: this much is thrown away to reach the range, no more.
_SKIP = 64 << 20
_ERROR_BODY = 64 << 10
_ERROR_SECONDS = 2.0  # to read it; a connection that may be kept for that is not worth more
# What a forgotten signature looks like: S3 and CloudFront 403, others 400, 401, 404 or 410.
_EXPIRED = frozenset({400, 401, 403, 404, 410})
_NO_TLS = Tls()


class NoRanges(Remote):
    """The server gives blobs only whole, and the range is far from the start."""


class Sockets:
    """The sockets that requests under way read from, to be shut when nobody wants the answers. Thread safe."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def stop(self) -> None:
        """End what is under way; no request starts any more."""
        self.stopped.set()
        with self._lock:
            left = list(self._open)
        for sock in left:
            try:
                # Not SSLSocket's own, which would have its reader go on in plain text.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except (
                OSError,
                TypeError,
            ):  # gone already; TypeError: TLS within TLS is no socket, and ends by its timeout
                continue

    def add(self, sock: socket.socket) -> None:
        """A request goes out by `sock`. ConnectionAbortedError when it had better not."""
        with self._lock:
            self._open.add(sock)
        if self.stopped.is_set():
            raise ConnectionAbortedError("not wanted any more")

    def remove(self, sock: socket.socket | None) -> None:
        """The request is over."""
        with self._lock:
            self._open.discard(sock)


@dataclass(slots=True)
class _Exchange:
    """An answer whose body is still to be read, and the connection it comes by."""

    url: str
    connection: Connection
    sock: socket.socket
    response: http.client.HTTPResponse


class BlobRoute:
    """Thread safe. What goes wrong is Transient where another try may help, else Remote or NotFound."""

    def __init__(
        self,
        route: Route,
        pool: ConnectionPool,
        digest: Digest,
        size: int,
        counters: LayerCounters,
        sockets: Sockets,
    ) -> None:
        """`size` is the blob's, in bytes."""
        self._route = route
        self._endpoint = route.endpoint
        self._options = route.session.options
        self._auth = route.session.authenticator
        self._pool = pool
        self._counters = counters
        self._sockets = sockets
        self._size = size
        self._scope = Scope(route.endpoint.host, route.repository, "pull")
        self._subject = Subject(route.endpoint.host, route.repository, f"blob {digest}")
        self._home = route.url(f"blobs/{digest}")
        self._home_origin = urls.origin(route.endpoint)
        self._dial = route.endpoint.dial_timeout or self._options.connect_timeout
        own = route.endpoint.request_timeout
        self._whole = self._options.request_timeout if own is None else own
        self._lock = threading.Lock()
        self._target: str | None = None
        self._parted = ("", Peer(self._home_origin, _NO_TLS), "")  # the last URL, and what it comes to

    @property
    def peer(self) -> Peer:
        """Where the bytes come from, as far as is known."""
        return self._parts(self._target or self._home)[0]

    @property
    def dial(self) -> float:
        """Seconds for a connect."""
        return self._dial

    def pieces(self, wanted: Range, deadline: float) -> Iterator[memoryview]:
        """The bytes of the range in order, each piece valid until the next is asked for."""
        exchange = self._ask(wanted, deadline)
        whole = False
        try:
            skip, exact = self._check(exchange.response, wanted)
            length = wanted.end - wanted.start
            buffer = memoryview(bytearray(min(_PIECE, length)))
            while skip:
                skip -= _receive(exchange.response, buffer[: min(skip, len(buffer))])
            while length:
                filled, most = 0, min(len(buffer), length)
                while filled < most:
                    filled += _receive(exchange.response, buffer[filled:most])
                length -= filled
                whole = exact and length == 0
                yield buffer[:filled]
        except (OSError, http.client.HTTPException) as error:
            self._forget(exchange.url)
            raise self._broken(exchange.connection, error) from None
        finally:
            exchange.response.close()
            self._over(exchange.connection, exchange.sock, keep=whole)

    def _ask(self, wanted: Range, deadline: float) -> _Exchange:
        """The head of a 200 or 206 for this range, after authorization and redirects."""
        until = min(deadline, time.monotonic() + self._whole)
        authorization = self._auth.header(self._scope, until)
        answers = 0
        over: set[Use] = set()
        url = self._target or self._home
        at_home = url == self._home
        remembered = None if at_home else url  # another flight may forget it meanwhile
        for _ in range(urls.MAX_REDIRECTS + 2 + MAX_ANSWERS):  # the hops, and an expired target
            exchange = self._timed_send(url, wanted, authorization if at_home else None, until)
            status = exchange.response.status
            if at_home and authorization is not None and believed(status):
                self._auth.worked(self._scope, authorization)
            if status in (200, 206):
                if not at_home:
                    self._target = url
                return exchange
            location = exchange.response.headers.get("Location")
            challenge = ", ".join(exchange.response.headers.get_all("WWW-Authenticate", []))
            later = exchange.response.headers.get("Retry-After", "")
            body = self._discard(exchange)
            if status in urls.REDIRECTS and location is not None:
                url = urls.follow(url, location, self._subject)
                at_home = at_home and urls.split(url)[0] == self._home_origin
            elif url == remembered and status in _EXPIRED:
                self._forget(url)
                url, at_home, remembered = self._home, True, None
            elif at_home and answers < MAX_ANSWERS and (status == 401 or (status == 403 and authorization)):
                # ECR says 403, not 401, when a token has expired.
                answers += 1
                authorization = self._auth.answer(
                    self._scope, self._home, challenge, authorization, self._endpoint, over, until
                )
                if authorization is None:
                    raise failures.refused(self._subject, status, body)
            elif is_transient(status):
                self._forget(url)
                error = failures.refused(self._subject, status, body)
                raise Transient(error, parse_retry_after(later, time.time()))
            else:
                raise failures.refused(self._subject, status, body)
        raise Remote(f"{self._subject}: more than {urls.MAX_REDIRECTS} redirects; check the registry")

    def _timed_send(self, url: str, wanted: Range, authorization: str | None, until: float) -> _Exchange:
        """_send, and how long it took until the head of the answer was here, or no answer was to be had."""
        started, operation = time.monotonic(), "remote_registry_get"
        try:
            exchange = self._send(url, wanted, authorization, until)
            if exchange.response.status in urls.REDIRECTS:
                operation = "blob_redirect"
            return exchange
        finally:
            self._counters.duration(operation).observe((time.monotonic() - started) * 1000)

    def _send(self, url: str, wanted: Range, authorization: str | None, until: float) -> _Exchange:
        peer, target = self._parts(url)
        headers = {
            "Range": str(wanted),
            "Accept-Encoding": "identity",
            "User-Agent": self._options.user_agent,
        }
        if self._endpoint.headers and peer.origin == self._home_origin:
            headers.update(self._endpoint.headers)
        if authorization is not None:
            headers["Authorization"] = authorization
        connection, reused = self._borrow(peer, until)
        patience = self._options.head_timeout or self._options.span_timeout
        while True:
            sock = None
            try:
                connection.step, connection.until = patience, until
                if connection.sock is None:
                    connection.connect()
                sock = connection.sock
                self._sockets.add(sock)
                connection.until = min(until, time.monotonic() + patience)  # for the whole head
                sock.settimeout(connection.patience())
                connection.ask(target, headers)
                response = connection.getresponse()
                connection.step, connection.until = self._options.span_timeout, until
                self._pool.answered(connection)
                return _Exchange(url, connection, sock, response)
            except (OSError, http.client.HTTPException) as error:
                self._sockets.remove(sock)
                stale = reused and not isinstance(error, TimeoutError) and not self._sockets.stopped.is_set()
                if stale:
                    connection, reused = self._renewed(connection, until), False
                    continue
                self._pool.drop(connection)
                self._forget(url)
                raise self._broken(connection, error) from None
            except BaseException:
                self._over(connection, sock, keep=False)
                raise

    def _borrow(self, peer: Peer, until: float) -> tuple[Connection, bool]:
        try:
            return self._pool.borrow(peer, self._dial_until(until), until, self._sockets.stopped)
        except TimeoutError as error:
            raise Transient(failures.unreachable(self._subject, error, peer.origin.place)) from None

    def _dial_until(self, until: float) -> float:
        return max(min(self._dial, until - time.monotonic()), 0.001)

    def _renewed(self, connection: Connection, until: float) -> Connection:
        try:
            return self._pool.renew(connection, self._dial_until(until))
        except BaseException:
            self._pool.drop(connection)
            raise

    def _broken(self, connection: Connection, error: BaseException) -> Exception:
        return broken(self._subject, error, connection.place, connection.peer.origin.place)

    def _parts(self, url: str) -> tuple[Peer, str]:
        """Whom to ask for it, and by which target. Mostly the same one as before."""
        known, peer, target = self._parted
        if known != url:
            origin, target = urls.split(url)
            peer = Peer(origin, tls_for(self._endpoint, origin) if origin.scheme == "https" else _NO_TLS)
            self._parted = url, peer, target
        return peer, target

    def _check(self, response: http.client.HTTPResponse, wanted: Range) -> tuple[int, bool]:
        """How many bytes come before the range, and whether the body ends with it. Remote for a wrong answer."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise Remote(f"{self._subject}: range is encoded unasked; check the proxy before the registry")
        length = response.length
        if response.status == 200:
            if length is not None and length != self._size:
                raise self._other_size(length)
            if wanted.start > _SKIP:
                raise NoRanges(
                    f"{self._subject}: the server ignores Range requests; check the proxy before it"
                )
            return wanted.start, length is not None and wanted.end == self._size
        if headers.get_content_type().startswith("multipart/"):
            raise Remote(
                f"{self._subject}: multipart answer to one range; check the proxy before the registry"
            )
        try:
            got = parse_content_range(headers.get("Content-Range", ""))
        except Integrity as error:
            raise Remote(f"{self._subject}: {error}; check the proxy before the registry") from None
        if got.total not in (None, self._size):
            raise self._other_size(got.total)
        right = (got.start, got.end) == (wanted.start, wanted.end)
        if not right or length not in (None, wanted.end - wanted.start):
            raise Remote(f"{self._subject}: answered with another range, {got}, to {wanted}; check the proxy")
        return 0, length is not None

    def _other_size(self, size: int | None) -> SociError:
        return Remote(
            f"{self._subject}: {size} bytes there, not the {self._size} of its descriptor; check the registry's storage"
        )

    def _forget(self, url: str) -> None:
        with self._lock:
            if self._target == url:
                self._target = None

    def _discard(self, exchange: _Exchange) -> bytes:
        exchange.connection.until = min(exchange.connection.until, time.monotonic() + _ERROR_SECONDS)
        try:
            body = exchange.response.read(_ERROR_BODY)
        except (OSError, http.client.HTTPException):
            body = b""
        over = exchange.response.isclosed()
        exchange.response.close()
        self._over(exchange.connection, exchange.sock, keep=over)
        return body

    def _over(self, connection: Connection, sock: socket.socket | None, *, keep: bool) -> None:
        self._sockets.remove(sock)
        if keep and not self._sockets.stopped.is_set():
            self._pool.give_back(connection)
        else:
            self._pool.drop(connection)


def _receive(response: http.client.HTTPResponse, view: memoryview) -> int:
    """One recv's worth of body into `view`; never 0."""
    if response.chunked:
        chunk = response.read1(len(view))
        view[: len(chunk)] = chunk
        count = len(chunk)
    else:
        count = response.fp.readinto1(view)
    if not count:
        raise ConnectionResetError("short body")
    return count
