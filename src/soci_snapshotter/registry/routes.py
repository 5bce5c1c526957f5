"""Which of a registry's endpoints is asked, and which after it: mirrors in their order, the registry itself last.

An endpoint that failed is passed over for a while, so that one dead mirror does not slow every request; the last
one is always asked. Where an endpoint's scheme is a guess, a handshake finds it out once.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar
from urllib.parse import quote

from soci_snapshotter.errors import Config, NotFound, SociError
from soci_snapshotter.formats.hosts import Capability, Endpoint, Tls
from soci_snapshotter.registry import failures, urls
from soci_snapshotter.registry.auth import Scope
from soci_snapshotter.registry.failures import Subject
from soci_snapshotter.registry.transport import Call, Session
from soci_snapshotter.registry.urls import Repo

_log = logging.getLogger(__name__)

T = TypeVar("T")
# Asked with a registry's `host[:port]`; at least one endpoint.
Hosts: TypeAlias = Callable[[str], Sequence[Endpoint]]

_OK = frozenset({200})
# How long a mirror that failed is passed over: a restart's length. It costs one failed try a minute at most.
_PASSED_OVER = 60.0
# What OpenSSL says when the answer to its greeting is no TLS record: http servers send a 400, or hang up.
_NO_TLS = frozenset(
    {
        "WRONG_VERSION_NUMBER",
        "PACKET_LENGTH_TOO_LONG",
        "RECORD_LAYER_FAILURE",
        "HTTP_REQUEST",
        "UNEXPECTED_EOF_WHILE_READING",
    }
)


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint for one repository."""

    session: Session
    endpoint: Endpoint
    repository: str
    last: bool = True

    def __str__(self) -> str:
        return f"{self.endpoint.host}/{self.repository}"

    def url(self, path: str) -> str:
        """The URL of `path` below the repository."""
        query = ""
        if self.endpoint.namespace:
            query = ("&" if "?" in path else "?") + "ns=" + quote(self.endpoint.namespace, safe="")
        place = f"{self.endpoint.scheme}://{self.endpoint.host}{self.endpoint.path}"
        return f"{place}/{self.repository}/{path}{query}"

    def call(
        self,
        method: str,
        path: str,
        what: str,
        *,
        expected: frozenset[int] = _OK,
        headers: Mapping[str, str] | None = None,
        actions: str = "pull",
        body: bytes | None = None,
        timeout: float | None = None,
    ) -> Call:
        """A request for `path` below the repository, about `what`."""
        return Call(
            method,
            self.url(path),
            Scope(self.endpoint.host, self.repository, actions),
            Subject(self.endpoint.host, self.repository, what),
            expected,
            headers or {},
            None if body is None else lambda: body,
            len(body or b""),
            timeout,
            self.endpoint,
            None if self.last else self.session.options.mirror_retry,
        )


class Router:
    """Routes by repository. Thread safe; what it learns of endpoints holds for its own life."""

    def __init__(self, session: Session, hosts: Hosts | None) -> None:
        self._session = session
        self.hosts: Hosts = hosts or (lambda host: (session.options.endpoint(host),))
        self._lock = threading.Lock()
        self._failed: dict[str, float] = {}  # host -> time.monotonic() until which it is passed over
        self._schemes: dict[str, str] = {}

    def routes(self, repo: Repo, capability: Capability) -> list[Route]:
        """Never empty; Config when no endpoint has the capability."""
        able = [each for each in self.hosts(repo.host) if capability in each.capabilities]
        if not able:
            raise Config(
                f"{repo.host}: no host of its hosts.toml has the capability {capability.value}; correct the file"
            )
        now = time.monotonic()
        with self._lock:
            passed_over = {host for host, until in self._failed.items() if until > now}
        usable = [each for each in able[:-1] if each.host not in passed_over]
        return [
            Route(self._session, self._settled(each), repo.repository, last=each is able[-1])
            for each in (*usable, able[-1])
        ]

    def pushing(self, repo: Repo) -> Route:
        """The one place that takes uploads: as in containerd, the first with the capability."""
        return replace(self.routes(repo, Capability.PUSH)[0], last=True)

    def over(self, repo: Repo, capability: Capability, attempt: Callable[[Route], T]) -> T:
        """What `attempt` returns for the first route for which it raises nothing; else what the last one raises."""
        *mirrors, last = self.routes(repo, capability)
        for route in mirrors:
            try:
                return attempt(route)
            except Config:
                raise  # a certificate that cannot be read is for the user to mend, not to step over
            except SociError as error:
                self.blame(route, error)
        return attempt(last)

    def blame(self, route: Route, error: SociError) -> None:
        """Pass the route's host over for a while, unless it is the last, or just did not have something."""
        if route.last:
            return
        _log.debug("mirror gave nothing, the next is asked", extra={"reason": str(error)})
        if not isinstance(error, NotFound):
            with self._lock:
                self._failed[route.endpoint.host] = time.monotonic() + _PASSED_OVER

    def _settled(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with the scheme that it speaks; https as long as nobody answers."""
        if not endpoint.guessed or endpoint.tls == Tls():
            return endpoint
        with self._lock:
            scheme = self._schemes.get(endpoint.host)
        if scheme is None:
            timeout = endpoint.dial_timeout or self._session.options.connect_timeout
            scheme = _spoken(replace(endpoint, scheme="https"), timeout)
            if scheme is None:
                return replace(endpoint, scheme="https", guessed=False)
            with self._lock:
                self._schemes[endpoint.host] = scheme
        return replace(endpoint, scheme=scheme, guessed=False)


def _spoken(endpoint: Endpoint, timeout: float) -> str | None:
    """`https`, `http`, or None when there is no connection. Nothing is verified and nothing sent but a greeting.

    An http URL without a port means port 80, so a host without one has http there only.
    """
    origin = urls.origin(endpoint)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((origin.host, origin.port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=origin.host),
        ):
            return "https"
    except ssl.SSLError as error:
        return "http" if error.reason in _NO_TLS else "https"
    except ConnectionResetError:
        return "http"
    except OSError as error:
        _log.debug("no connection to find out the scheme", extra={"reason": failures.reason(error)})
        return None if ":" in endpoint.host else "http"
