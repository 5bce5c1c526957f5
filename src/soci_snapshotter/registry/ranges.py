"""Byte ranges of one blob, on the path of a reader who waits for a span.

Where the registry redirects to is remembered and asked directly until it refuses (signed URLs expire); then the
registry is asked again. A connection that was kept alive and turns out dead is replaced at once. What breaks off
goes on from the byte it broke at. All waits end at the caller's deadline.
"""

from __future__ import annotations

import http.client
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from soci_snapshotter.errors import Integrity, Remote, SociError
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.httpfields import Range, parse_content_range, parse_retry_after
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.policy.retry import is_transient
from soci_snapshotter.registry import failures, urls
from soci_snapshotter.registry.auth import MAX_ANSWERS, Scope
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.urls import Origin, Repo

_log = logging.getLogger(__name__)

# One piece handed to the sink: big enough to cost nothing, small enough that who may be held up in between stops soon
# (4 ms at 500 Mbit/s).
_PIECE = 256 << 10
# Connections that wait for a blob's first readers: a start misses some spans at once, and runs ahead of them.
_WARM = 4
# A server that ignores Range sends the blob from its start: this much is thrown away to reach the range, no more.
_SKIP = 64 << 20
_ERROR_BODY = 64 << 10
# What a forgotten signature looks like: S3 and CloudFront 403, others 400, 401, 404 or 410.
_EXPIRED = frozenset({400, 401, 403, 404, 410})

Sink = Callable[[memoryview], None]


class NoRanges(Remote):
    """The server gives blobs only whole, and the range is far from the start."""


@dataclass(slots=True)
class _Exchange:
    """An answer whose body is still to be read, and the connection it comes by."""

    url: str
    origin: Origin
    connection: http.client.HTTPConnection
    sock: socket.socket
    response: http.client.HTTPResponse


class BlobReader:
    """Ranges of one blob of `size` bytes. Thread safe; `bytes_fetched` counts body bytes received."""

    def __init__(
        self,
        client: RegistryClient,
        pool: ConnectionPool,
        repo: Repo,
        digest: Digest,
        size: int,
        counters: LayerCounters | None = None,
    ) -> None:
        options = client.options
        self._options = options
        self._auth = client.session.authenticator
        self._pool = pool
        self._counters = LayerCounters() if counters is None else counters
        self._size = size
        self._scope = Scope(repo.host, repo.repository, "pull")
        self._subject = Subject(repo.host, repo.repository, f"blob {digest}")
        self._home = f"{options.scheme(repo.host)}://{repo.host}/v2/{repo.repository}/blobs/{digest}"
        self._home_origin, _ = urls.split(self._home)
        self._lock = threading.Lock()
        self._target: str | None = None
        self._closed = threading.Event()
        self.bytes_fetched = 0

    @property
    def group(self) -> str:
        """The registry: its blobs are slow or gone together."""
        return self._scope.host

    def warm(self) -> None:
        """Learn where the blob is served from, and have connections open to there before somebody waits.

        Whatever goes wrong shows again, and is said, when bytes are needed.
        """
        deadline = time.monotonic() + self._options.span_timeout
        try:
            for _ in self._pieces(Range(0, 1), deadline):
                pass
            origin, _ = urls.split(self._target or self._home)
            self._pool.warm(origin, _WARM, self._timeout(self._options.connect_timeout, deadline))
        except (Transient, SociError, OSError) as error:
            _log.debug(
                "no connections ahead", extra={"blob": str(self._subject), "error": type(error).__name__}
            )

    def close(self) -> None:
        """End the waits between tries; the pool is its owner's to close."""
        self._closed.set()

    def read(self, start: int, end: int, deadline: float) -> bytearray:
        """Bytes [start, end) in one piece; see read_range."""
        data = bytearray()
        self.read_range(start, end, data.extend, deadline)
        return data

    def read_range(self, start: int, end: int, sink: Sink, deadline: float) -> None:
        """Feed bytes [start, end) to `sink` in order, each view valid during the call only.

        `deadline` is time.monotonic(). Raises Remote or NotFound; what the sink got until then is a prefix.
        """
        if end > self._size:
            raise Remote(f"{self._subject}: bytes up to {end} asked of {self._size}; check the index")
        position = start
        retry = self._options.retry
        while position < end:
            before = position
            try:
                for piece in self._pieces(Range(position, end), deadline):
                    sink(piece)
                    position += len(piece)
            except Transient as transient:
                if position > before:
                    retry = self._options.retry  # it moves: only failures in a row count
                after = retry.after_failure(random.random(), transient.retry_after)  # noqa: S311 - jitter
                if after is None or time.monotonic() + after[0] >= deadline or self._closed.wait(after[0]):
                    raise transient.error from None
                retry = after[1]

    def _pieces(self, wanted: Range, deadline: float) -> Iterator[memoryview]:
        exchange = self._ask(wanted, deadline)
        whole = False
        try:
            skip, exact = self._check(exchange.response, wanted)
            length = wanted.end - wanted.start
            buffer = memoryview(bytearray(min(_PIECE, length)))
            while skip:
                skip -= self._receive(exchange, buffer[: min(skip, len(buffer))], deadline)
            while length:
                filled, most = 0, min(len(buffer), length)
                while filled < most:
                    filled += self._receive(exchange, buffer[filled:most], deadline)
                length -= filled
                whole = exact and length == 0
                yield buffer[:filled]
        except (OSError, http.client.HTTPException) as error:
            self._forget(exchange.url)
            raise Transient(failures.unreachable(self._subject, error)) from None
        finally:
            exchange.response.close()
            if whole:
                self._pool.give_back(exchange.origin, exchange.connection)
            else:
                exchange.connection.close()

    def _receive(self, exchange: _Exchange, view: memoryview, deadline: float) -> int:
        """One recv's worth of body into `view`; never 0."""
        exchange.sock.settimeout(self._timeout(self._options.span_timeout, deadline))
        response = exchange.response
        if response.chunked:
            chunk = response.read1(len(view))
            view[: len(chunk)] = chunk
            count = len(chunk)
        else:
            count = response.fp.readinto1(view)
        if not count:
            raise ConnectionResetError("short body")
        with self._lock:
            self.bytes_fetched += count
        return count

    def _ask(self, wanted: Range, deadline: float) -> _Exchange:
        """The head of a 200 or 206 for this range, after authorization and redirects."""
        authorization = self._auth.header(self._scope)
        answers = 0
        url = self._target or self._home
        at_home = url == self._home
        for _ in range(urls.MAX_REDIRECTS + 2 + MAX_ANSWERS):  # an expired target and renewals beside the hops
            exchange = self._timed_send(url, wanted, authorization if at_home else None, deadline)
            status = exchange.response.status
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
            elif url == self._target and status in _EXPIRED:
                self._forget(url)
                url, at_home = self._home, True
            elif at_home and answers < MAX_ANSWERS and (status == 401 or (status == 403 and authorization)):
                answers += 1
                authorization = self._auth.answer(self._scope, self._home, challenge, authorization)
                if authorization is None:
                    raise failures.refused(self._subject, status, body)
            elif is_transient(status):
                self._forget(url)
                error = failures.refused(self._subject, status, body)
                raise Transient(error, parse_retry_after(later, time.time()))
            else:
                raise failures.refused(self._subject, status, body)
        raise Remote(f"{self._subject}: more than {urls.MAX_REDIRECTS} redirects; check the registry")

    def _timed_send(self, url: str, wanted: Range, authorization: str | None, deadline: float) -> _Exchange:
        """_send, and how long it took until the head of the answer was here, or no answer was to be had."""
        started, operation = time.monotonic(), "remote_registry_get"
        try:
            exchange = self._send(url, wanted, authorization, deadline)
            if exchange.response.status in urls.REDIRECTS:
                operation = "blob_redirect"
            return exchange
        finally:
            self._counters.duration(operation).observe((time.monotonic() - started) * 1000)

    def _send(self, url: str, wanted: Range, authorization: str | None, deadline: float) -> _Exchange:
        origin, target = urls.split(url)
        headers = {
            "Range": str(wanted),
            "Accept-Encoding": "identity",
            "User-Agent": self._options.user_agent,
        }
        if authorization is not None:
            headers["Authorization"] = authorization
        connection, reused = self._pool.borrow(origin, self._timeout(self._options.connect_timeout, deadline))
        while True:
            try:
                if connection.sock is None:
                    connection.connect()
                sock: socket.socket = connection.sock
                sock.settimeout(self._timeout(self._options.span_timeout, deadline))
                connection.request("GET", target, headers=headers)
                return _Exchange(url, origin, connection, sock, connection.getresponse())
            except ssl.SSLCertVerificationError as error:
                connection.close()
                raise failures.untrusted(self._subject, error) from None
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if reused and not isinstance(error, TimeoutError):
                    connection = self._pool.fresh(
                        origin, self._timeout(self._options.connect_timeout, deadline)
                    )
                    reused = False
                    continue
                self._forget(url)
                raise Transient(failures.unreachable(self._subject, error)) from None

    def _check(self, response: http.client.HTTPResponse, wanted: Range) -> tuple[int, bool]:
        """How many bytes come before the range, and whether the body ends with it. Remote for a wrong answer."""
        headers = response.headers
        if headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise Remote(f"{self._subject}: range is encoded unasked; check the proxy before the registry")
        length = response.length
        if response.status == 200:
            if length is not None and length != self._size:
                raise Remote(
                    f"{self._subject}: {length} bytes, not {self._size}; check the registry's storage"
                )
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
        right = (got.start, got.end) == (wanted.start, wanted.end) and got.total in (None, self._size)
        if not right or length not in (None, wanted.end - wanted.start):
            raise Remote(f"{self._subject}: answered with another range, {got}, to {wanted}; check the proxy")
        return 0, length is not None

    def _timeout(self, most: float, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise failures.unreachable(self._subject, TimeoutError())
        return min(most, left)

    def _forget(self, url: str) -> None:
        with self._lock:
            if self._target == url:
                self._target = None

    def _discard(self, exchange: _Exchange) -> bytes:
        try:
            body = exchange.response.read(_ERROR_BODY)
        except (OSError, http.client.HTTPException):
            body = b""
        if exchange.response.isclosed():
            self._pool.give_back(exchange.origin, exchange.connection)
        else:
            exchange.response.close()
            exchange.connection.close()
        return body
