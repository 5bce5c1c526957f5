"""Which of a registry's endpoints is asked, and which after it: mirrors in their order, the registry itself last.

A mirror that failed is for a while asked behind the registry only (registry.breaker), so that a dead one does not slow
every request, and a live one still helps when the registry is away. Where an endpoint's scheme is a guess, a handshake
finds it out once.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, TypeVar
from urllib.parse import quote

from soci_snapshotter.errors import Config, NotFound, SociError
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.hosts import Capability, Endpoint, Tls
from soci_snapshotter.registry import failures, urls
from soci_snapshotter.registry.auth import Scope
from soci_snapshotter.registry.breaker import Breaker
from soci_snapshotter.registry.failures import Subject
from soci_snapshotter.registry.transport import Call, Session
from soci_snapshotter.registry.urls import Repo

_log = logging.getLogger(__name__)

T = TypeVar("T")
# Asked with a registry's `host[:port]`; at least one endpoint.
Hosts: TypeAlias = Callable[[str], Sequence[Endpoint]]

_OK = frozenset({200})
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
    """It is the registry, or what its hosts.toml puts there: what it says counts."""

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
        self.hosts: Hosts = hosts or lru_cache(64)(lambda host: (session.options.endpoint(host),))
        self.breaker = Breaker()
        self._lock = threading.Lock()
        self._schemes: dict[str, str] = {}

    def routes(self, repo: Repo, capability: Capability, blob: Digest | None = None) -> list[Route]:
        """Never empty, best first; Config when no endpoint has the capability.

        Behind the last, which is the registry, come mirrors that failed a moment ago, and those of which one had other
        bytes for `blob`.
        """
        able = self._able(repo, capability)
        mirrors = [self._route(each, repo, last=False) for each in able[:-1]]
        last = self._route(able[-1], repo, last=True)
        if not mirrors:
            return [last]
        failing = self.breaker.failing({each.endpoint.host for each in mirrors} - {last.endpoint.host})
        if blob is not None and self.breaker.doubted(blob):
            return [last, *mirrors]
        good = [each for each in mirrors if each.endpoint.host not in failing]
        return [*good, last, *(each for each in mirrors if each.endpoint.host in failing)]

    def pushing(self, repo: Repo) -> Route:
        """The one place that takes uploads: as in containerd, the first with the capability."""
        return self._route(self._able(repo, Capability.PUSH)[0], repo, last=True)

    def over(self, repo: Repo, capability: Capability, attempt: Callable[[Route], T]) -> T:
        """What `attempt` returns for the first route for which it raises nothing; else what the last one raises."""
        refusal: SociError | None = None
        for route in self.routes(repo, capability):
            try:
                result = attempt(route)
            except Config:
                raise  # a certificate that cannot be read is for the user to mend, not to step over
            except SociError as error:
                if route.last:
                    if isinstance(error, NotFound):
                        raise  # no mirror has what the registry says is not there
                    refusal = error
                self.blame(route, error)
                continue
            self.praise(route)
            return result
        assert refusal is not None  # noqa: S101 - the last is among the routes
        raise refusal

    def blame(self, route: Route, error: SociError) -> None:
        """Pass the route's host over for a while, unless it is the last, or just did not have something."""
        if route.last:
            return
        _log.debug("mirror gave nothing, the next is asked", extra={"reason": str(error)})
        if not isinstance(error, NotFound) and self.breaker.failed(route.endpoint.host):
            _log.warning("mirror is passed over for a while", extra={"reason": str(error)})

    def praise(self, route: Route) -> None:
        """The route's host did what it should."""
        if not route.last and self.breaker.worked(route.endpoint.host):
            _log.info("mirror is back", extra={"mirror": route.endpoint.host})

    def _able(self, repo: Repo, capability: Capability) -> list[Endpoint]:
        able = [each for each in self.hosts(repo.host) if capability in each.capabilities]
        if not able:
            raise Config(
                f"{repo.host}: no host of its hosts.toml has the capability {capability.value}; correct the file"
            )
        return able

    def _route(self, endpoint: Endpoint, repo: Repo, *, last: bool) -> Route:
        return Route(self._session, self._settled(endpoint), repo.repository, last)

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
