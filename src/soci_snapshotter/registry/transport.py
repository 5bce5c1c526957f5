"""One HTTP session with registries over urllib3: authorization, redirects by hand, retries by policy.

`open` returns as soon as a head with an expected status is there; `request` also reads the body, bounded. Both
raise NotFound or Remote whose one line says who was asked for what. urllib3 itself neither retries nor redirects.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, SSLError

from soci_snapshotter.errors import Remote
from soci_snapshotter.formats.hosts import Endpoint, Tls
from soci_snapshotter.formats.httpfields import parse_retry_after
from soci_snapshotter.policy.retry import Retry, is_transient
from soci_snapshotter.registry import failures, urls
from soci_snapshotter.registry.auth import (
    MAX_ANSWERS,
    TOKEN_ANSWER_LIMIT,
    Authenticator,
    Scope,
    TokenRequest,
    Use,
    believed,
)
from soci_snapshotter.registry.contexts import Contexts
from soci_snapshotter.registry.credentials import CredentialProvider
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.patience import patient
from soci_snapshotter.registry.proxies import Proxy
from soci_snapshotter.registry.urls import Origin
from soci_snapshotter.registry.wire import Wire

_log = logging.getLogger(__name__)

T = TypeVar("T")
Response: TypeAlias = urllib3.BaseHTTPResponse

# Of an answer that is not wanted, as much is read as an error body may have, so that its connection can be kept.
_ERROR_BODY = 64 << 10
_ERROR_SECONDS = 2.0  # and a piece's timeout
_PIECE = 256 << 10
# Connections kept per host: as many layers and spans as are fetched at once.
_POOL = 16
# TLS that ended before its time: whoever was on the other side died, and may be back.
_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


@dataclass(frozen=True, slots=True)
class Call:
    """One request. `body` makes the body anew for each try; its length is `size` bytes.

    `endpoint` says with which certificates, headers and patience; the headers go to no other host.
    """

    method: str
    url: str
    scope: Scope
    subject: Subject
    expected: frozenset[int]
    headers: Mapping[str, str]
    body: Callable[[], bytes | Iterable[bytes]] | None = None
    size: int = 0
    timeout: float | None = None
    endpoint: Endpoint | None = None
    retry: Retry | None = None
    private: bool = False
    """The body is a secret: it follows no redirect to another host."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names are looked up in any case."""

    status: int
    headers: Mapping[str, str]
    data: bytes


class Session:
    """A connection pool with authorization. A context manager; thread safe."""

    def __init__(self, options: Options, credentials: CredentialProvider | None) -> None:
        self.options = options
        self.authenticator = Authenticator(credentials, self._fetch_token)
        # At DEBUG urllib3 logs whole request targets, and a signed query is a secret.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
        self._wire = Wire(options.dump, options.trace)
        self._lock = threading.Lock()
        self._contexts = Contexts(options.ssl_context)
        self._pools: dict[tuple[Tls, Proxy | None], tuple[ssl.SSLContext, urllib3.PoolManager]] = {}
        self._contexts.get(options.tls)  # certificates that cannot be used are named before anything is asked
        self._closed = threading.Event()

    def close(self) -> None:
        """Close idle connections and end the waits of whoever is about to try again."""
        self._closed.set()
        with self._lock:
            pools = list(self._pools.values())
        for _, pool in pools:
            pool.clear()

    def request(self, call: Call, limit: int) -> Answer:
        """The whole answer, its body at most `limit` bytes; Remote when there is more."""

        def attempt() -> Answer:
            deadline = time.monotonic() + self._request_timeout(call)
            response = self._exchange(call)
            with closing(response):
                headers = response.headers
                if call.method == "HEAD":
                    return Answer(response.status, headers, b"")
                data = b"".join(read_pieces(response, limit, call.subject, deadline))
            return Answer(response.status, headers, data)

        return self.retrying(attempt, call.retry or self.options.retry)

    @contextlib.contextmanager
    def open(self, call: Call) -> Iterator[Response]:
        """An answer whose body the caller reads (read_pieces)."""
        response = self.retrying(lambda: self._exchange(call), call.retry or self.options.retry)
        with closing(response):
            yield response

    @contextlib.contextmanager
    def open_once(self, call: Call) -> Iterator[Response]:
        """Like open, but a failure is raised as Transient at once: the caller has more to start over."""
        response = self._exchange(call)
        with closing(response):
            yield response

    def retrying(self, attempt: Callable[[], T], retry: Retry) -> T:
        """Run `attempt` until it does not raise Transient or no try is left."""
        while True:
            try:
                return attempt()
            except Transient as transient:
                # random: jitter, not a secret
                after = retry.after_failure(random.random(), transient.retry_after)  # noqa: S311
                if after is None:
                    raise transient.error from None
                wait, retry = after
                _log.debug(
                    "registry request will be tried again", extra={"reason": str(transient), "wait": wait}
                )
                if self._closed.wait(wait):
                    raise transient.error from None

    def _exchange(self, call: Call) -> Response:
        """One try: the head of an answer with an expected status. Raises Transient, Remote or NotFound."""
        authorization = self.authenticator.header(call.scope)
        answers = 0
        over: set[Use] = set()
        while True:
            response, at_home = self._follow(call, authorization)
            if authorization is not None and (not at_home or believed(response.status)):
                self.authenticator.worked(call.scope, authorization)
            if response.status in call.expected:
                return response
            body = discard(response)
            status = response.status
            # ECR says 403, not 401, when a token has expired.
            refused = status == 401 or (status == 403 and authorization is not None)
            if at_home and refused and answers < MAX_ANSWERS:
                answers += 1
                field = response.headers.get("WWW-Authenticate", "")
                authorization = self.authenticator.answer(
                    call.scope, call.url, field, authorization, call.endpoint, over
                )
                if authorization is not None:
                    continue
            error = failures.refused(call.subject, status, body)
            if is_transient(status):
                raise Transient(
                    error, parse_retry_after(response.headers.get("Retry-After", ""), time.time())
                )
            raise error

    def _follow(self, call: Call, authorization: str | None) -> tuple[Response, bool]:
        """Send, follow redirects; the last answer, and whether the registry itself gave it."""
        home, _ = urls.split(call.url)
        allowed = urls.REDIRECTS if call.body is None else urls.BODY_REDIRECTS
        url, at_home = call.url, True
        for _ in range(urls.MAX_REDIRECTS + 1):
            headers = dict(call.headers)
            if at_home and call.endpoint is not None and home == urls.origin(call.endpoint):
                headers.update(call.endpoint.headers)
            if authorization is not None and at_home:
                headers["Authorization"] = authorization
            response = self._send(call, url, headers)
            location = response.headers.get("Location")
            if location is None or response.status not in allowed or response.status in call.expected:
                return response, at_home
            discard(response)
            url = urls.follow(url, location, call.subject)
            # Once away it stays away: what another host names on the registry is not asked with credentials.
            at_home = at_home and urls.split(url)[0] == home
            if call.private and not at_home:
                raise Remote(f"{call.subject}: redirected to another host; check the token service")
        raise Remote(f"{call.subject}: more than {urls.MAX_REDIRECTS} redirects; check the registry")

    def _request_timeout(self, call: Call) -> float:
        own = None if call.endpoint is None else call.endpoint.request_timeout
        return self.options.request_timeout if own is None else own

    def _send(self, call: Call, url: str, headers: dict[str, str]) -> Response:
        options = self.options
        head = call.timeout or options.head_timeout or options.read_timeout
        head = min(head, self._request_timeout(call))
        connect = call.endpoint.dial_timeout if call.endpoint is not None else None
        body: bytes | Iterable[bytes] | None = None
        if call.body is not None:
            body = call.body()
            headers["Content-Length"] = str(call.size)
        headers = {"User-Agent": options.user_agent, "Accept-Encoding": "identity", **headers}
        origin, _ = urls.split(url)
        proxy = options.proxies.of(origin)
        started = self._wire.sending(call.method, url, headers)
        try:
            response = self._pool(self._tls(call, url), proxy).urlopen(
                call.method,
                url,
                body=body,
                headers=headers,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=False,
                pool_timeout=options.request_timeout,
                timeout=urllib3.Timeout(connect=connect or options.connect_timeout, read=head),
            )
        except (HTTPError, OSError) as error:
            self._wire.failed(call.method, url, error, started)
            place = f"the proxy {proxy}" if proxy else origin.place
            raise broken(call.subject, error, place, origin.place) from None
        self._wire.answered(call.method, url, response, started)
        _set_patience(response, options.read_timeout)
        return response

    def _tls(self, call: Call, url: str) -> Tls:
        """The endpoint's certificates; a client certificate is shown to the endpoint's own host name only."""
        if call.endpoint is None:
            return self.options.tls.without_client()
        return tls_for(call.endpoint, urls.split(url)[0])

    def _pool(self, tls: Tls, proxy: Proxy | None) -> urllib3.PoolManager:
        context = self._contexts.get(tls)
        own = self._contexts.get(self.options.tls.without_client()) if proxy is not None else None
        with self._lock:
            known = self._pools.get((tls, proxy))
            if known is not None and known[0] is context:
                return known[1]
            if tls.skip_verify:
                urllib3.disable_warnings(InsecureRequestWarning)  # the user asked for it; once is enough
            pool = self._wire.attach(patient(self._new_pool(context, proxy, own)))
            self._pools[tls, proxy] = context, pool
        if known is not None:
            known[1].clear()
        return pool

    def _new_pool(
        self, context: ssl.SSLContext, proxy: Proxy | None, proxy_context: ssl.SSLContext | None
    ) -> urllib3.PoolManager:
        most = self.options.connections
        settings: dict[str, Any] = {
            "num_pools": _POOL,
            "maxsize": _POOL if most is None else min(_POOL, most),
            "block": most is not None,
            "retries": False,
            "ssl_context": context,
            "headers": {"User-Agent": self.options.user_agent},
        }
        if proxy is None:
            return urllib3.PoolManager(**settings)
        return urllib3.ProxyManager(
            proxy.url,
            proxy_headers={"Proxy-Authorization": proxy.authorization} if proxy.authorization else None,
            proxy_ssl_context=proxy_context,
            **settings,
        )

    def _fetch_token(self, request: TokenRequest) -> bytes:
        """Ask for a token once; the request that needs it is what is tried again."""
        subject, form = request.subject, request.form
        call = Call(
            "GET" if form is None else "POST",
            request.url,
            Scope(subject.host, subject.repository, ""),
            subject,
            frozenset({200}),
            {} if form is None else {"Content-Type": "application/x-www-form-urlencoded"},
            None if form is None else lambda: form,
            len(form or b""),
            endpoint=request.endpoint,
            private=form is not None,
        )
        response, _ = self._follow(call, request.basic)
        with closing(response):
            if response.status != 200:
                error = failures.refused(subject, response.status, discard(response))
                if is_transient(response.status):
                    raise Transient(error)
                raise error
            deadline = time.monotonic() + self.options.read_timeout
            return b"".join(read_pieces(response, TOKEN_ANSWER_LIMIT, subject, deadline))


def read_pieces(response: Response, limit: int, subject: Subject, deadline: float | None) -> Iterator[bytes]:
    """The body as it arrives. Remote when it is longer than `limit`, Transient when it breaks off or drips on."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() not in ("identity", ""):
        raise Remote(f"{subject}: answer is encoded as {encoding[:40]!r} unasked; check the registry's proxy")
    announced = response.headers.get("Content-Length", "")
    # int() takes no more than 4300 digits; 64 bits have 20.
    if announced.isdecimal() and (len(announced) > 20 or int(announced) > limit):
        raise Remote(f"{subject}: {announced[:21]} bytes announced, more than the {limit} allowed")
    received = 0
    try:
        while piece := response.read1(_PIECE):
            received += len(piece)
            if received > limit:
                raise Remote(f"{subject}: more than the {limit} bytes allowed")
            yield piece
            if deadline is not None and time.monotonic() > deadline:
                raise Transient(failures.unreachable(subject, TimeoutError()))
    except (HTTPError, OSError) as error:
        raise broken(subject, error) from None


def discard(response: Response) -> bytes:
    """Read a small body so that the connection can be kept, close it if there is more; return what was read."""
    body = b""
    end = time.monotonic() + _ERROR_SECONDS
    try:
        while piece := response.read1(_ERROR_BODY - len(body)):
            body += piece
            if len(body) == _ERROR_BODY or time.monotonic() > end:
                response.close()
                break
    except (HTTPError, OSError):
        response.close()
    response.release_conn()
    return body


@contextlib.contextmanager
def closing(response: Response) -> Iterator[None]:
    """Give the connection back when its answer was read to the end, close it otherwise."""
    try:
        yield
    except BaseException:
        response.close()
        raise
    finally:
        with contextlib.suppress(HTTPError, OSError, ValueError):
            if not response.closed and response.read1(1):
                response.close()
        response.release_conn()


def tls_for(endpoint: Endpoint, origin: Origin) -> Tls:
    """What a connection to `origin`, the endpoint's own or one that it redirected to, is made with."""
    same = origin.host == urls.origin(endpoint).host
    return endpoint.tls if same else endpoint.tls.without_client()


def broken(subject: Subject, error: BaseException, place: str = "", secure: str = "") -> Transient | Remote:
    """What a connection to `place` that failed means: Transient where another try may help.

    `secure`: with whom TLS is spoken, which is not a proxy on the way there.
    """
    cause = failures.root_cause(error)
    if isinstance(error, SSLError) or (isinstance(cause, ssl.SSLError) and not isinstance(cause, _CUT_OFF)):
        return failures.untrusted(subject, error, secure or place)
    unknown = isinstance(cause, socket.gaierror) and cause.errno == socket.EAI_NONAME
    if unknown or failures.proxy_refused(error):
        return failures.unreachable(subject, error, place)  # a name that does not exist will not in a second
    return Transient(failures.unreachable(subject, error, place))


def _set_patience(response: Response, seconds: float) -> None:
    """The head came with a timeout of its own; from now on `seconds` count, between two pieces of the body."""
    sock = getattr(response.connection, "sock", None)
    if sock is not None:  # None: all is read already
        sock.settimeout(seconds)
