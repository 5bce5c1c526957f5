"""Authorization for registries: HTTP Basic and the token challenge of the distribution spec (Bearer).

Where credentials may go:

- Basic: to the registry that asked, and nowhere else.
- Bearer: to the realm that the registry's challenge names, if that is the registry's own host; or, on another host
  (Docker Hub's tokens come from auth.docker.io), if both the registry and the realm are https, so that the
  challenge is the registry's word and the answer is read by nobody else; or if both are on loopback.
- A realm on plain http elsewhere gets nothing, not even an anonymous request. Challenges of redirect targets are
  not answered at all (the callers see to that).

A user name that is empty stands for an identity token (Docker's word; OAuth 2 calls it a refresh token): it is sent
by POST to a realm that may know credentials, and never as Basic.

Tokens are kept per (host, repository, actions) until they expire and shared by everybody who holds this object.
One thread asks for a token while the others that need the same one wait for its answer.
"""

from __future__ import annotations

import base64
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeAlias
from urllib.parse import urlencode, urlsplit

from msgspec import Struct

from soci_snapshotter.errors import Integrity, Remote, SociError
from soci_snapshotter.formats import jsonfmt
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.formats.httpfields import Challenge, parse_challenges
from soci_snapshotter.registry.credentials import CredentialProvider
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.urls import is_loopback, split

# Real tokens are 1 to 8 KiB; a request's header lines must stay below the 64 KiB at which servers give up.
TOKEN_ANSWER_LIMIT = 128 << 10
_TOKEN_LIMIT = 48 << 10
_TOKEN = re.compile(r"[\x21-\x7e]+", re.ASCII)
# distribution-spec: a token without expires_in lives 60 s, and none lives shorter. Renewed early, for the way
# it has to travel.
_DEFAULT_LIFE = 60.0
_LEEWAY = 5.0
# A waiter's bound on another thread's token request, above that request's own timeouts.
_WAIT = 60.0

# What the OAuth 2 flavour of token services wants to know of the asker (distribution, "Docker Registry v2
# authentication using OAuth2"): any name will do.
_CLIENT = "soci-snapshotter"


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """GET `url` with the Authorization header `basic`, or POST it `form`; reached as `endpoint` is."""

    url: str
    subject: Subject
    basic: str | None = field(default=None, repr=False)
    form: bytes | None = field(default=None, repr=False)
    endpoint: Endpoint | None = None


# Returns the body, at most TOKEN_ANSWER_LIMIT bytes.
TokenFetcher: TypeAlias = Callable[[TokenRequest], bytes]


@dataclass(frozen=True, slots=True)
class Scope:
    """What a grant is for. `actions` is `pull` or `pull,push`."""

    host: str
    repository: str
    actions: str

    def __str__(self) -> str:
        return f"repository:{self.repository}:{self.actions}"


@dataclass(frozen=True, slots=True)
class _Grant:
    header: str = field(repr=False)
    expires: float  # time.monotonic()


class _Token(Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: float = _DEFAULT_LIFE


class Authenticator:
    """Grants by scope. Thread safe; does no I/O under its lock."""

    def __init__(self, credentials: CredentialProvider | None, fetch: TokenFetcher) -> None:
        self._credentials = credentials
        self._fetch = fetch
        self._lock = threading.Lock()
        self._grants: dict[Scope, _Grant] = {}
        self._asking: dict[Scope, Future[str]] = {}

    def header(self, scope: Scope) -> str | None:
        """The Authorization header to send at first: one that the registry granted and that has not expired."""
        with self._lock:
            grant = self._grants.get(scope)
            if grant is not None and grant.expires <= time.monotonic():
                del self._grants[scope]
                grant = None
        return None if grant is None else grant.header

    def forget(self, scope: Scope, rejected: str) -> None:
        """Drop the grant with this header, if it is still the current one."""
        with self._lock:
            grant = self._grants.get(scope)
            if grant is not None and grant.header == rejected:
                del self._grants[scope]

    def answer(
        self,
        scope: Scope,
        url: str,
        field_value: str,
        rejected: str | None,
        endpoint: Endpoint | None = None,
    ) -> str | None:
        """The header that answers a 401 of `url` with this WWW-Authenticate field; None when there is none.

        `rejected` is the header that the 401 rejected; `endpoint` the one whose TLS settings the token service
        shares. Raises Remote, or Transient, when no token is to be had.
        """
        if not scope.repository:
            return None  # another host than the registry's, an upload sent elsewhere: it gets no credentials
        if rejected is not None:
            self.forget(scope, rejected)
        if (renewed := self.header(scope)) is not None:
            return renewed  # another thread was faster
        subject = Subject(scope.host, scope.repository, "authorization")
        try:
            challenges = {each.scheme: each for each in reversed(parse_challenges(field_value))}
        except Integrity as error:
            raise Remote(f"{subject}: {error}; check the registry or the proxy before it") from None
        if "bearer" in challenges:
            return self._token(scope, url, challenges["bearer"], subject, endpoint)
        if "basic" in challenges:
            return self._basic(scope, rejected)
        return None

    def _basic(self, scope: Scope, rejected: str | None) -> str | None:
        header = self._basic_header(scope.host)
        if header is None or header == rejected:
            return None
        with self._lock:
            self._grants[scope] = _Grant(header, float("inf"))
        return header

    def _basic_header(self, host: str) -> str | None:
        pair = self._credentials(host) if self._credentials else None
        if pair is None or not pair[0]:
            return None
        return "Basic " + base64.b64encode(f"{pair[0]}:{pair[1]}".encode()).decode()

    def _token(
        self, scope: Scope, url: str, challenge: Challenge, subject: Subject, endpoint: Endpoint | None
    ) -> str:
        mine: Future[str] = Future()
        with self._lock:
            others = self._asking.setdefault(scope, mine)
        if others is not mine:
            try:
                return others.result(_WAIT)
            except TimeoutError:
                raise Remote(f"{subject}: no token within {_WAIT:.0f} s; check the token service") from None
        try:
            header, life = self._request_token(scope, url, challenge, subject, endpoint)
            with self._lock:
                self._grants[scope] = _Grant(header, time.monotonic() + life)
            mine.set_result(header)
            return header
        except BaseException as error:
            mine.set_exception(_shareable(error, subject))
            raise
        finally:
            with self._lock:
                del self._asking[scope]

    def _request_token(
        self, scope: Scope, url: str, challenge: Challenge, subject: Subject, endpoint: Endpoint | None
    ) -> tuple[str, float]:
        realm = challenge.params.get("realm", "")
        known = _may_know_credentials(url, realm, subject)
        service = urlsplit(realm).netloc
        wanted = {
            "service": challenge.params.get("service", ""),
            "scope": _asked(challenge.params.get("scope", ""), scope),
        }
        asked = Subject(service, scope.repository, "token")
        pair = self._credentials(scope.host) if known and self._credentials else None
        if pair is not None and not pair[0]:
            form = {**wanted, "grant_type": "refresh_token", "client_id": _CLIENT, "refresh_token": pair[1]}
            request = TokenRequest(realm, asked, form=urlencode(form).encode(), endpoint=endpoint)
        else:
            # By GET each scope is a parameter of its own, by POST they are one, separated by spaces.
            query = urlencode(
                [("service", wanted["service"])] * bool(wanted["service"])
                + [("scope", each) for each in wanted["scope"].split()]
            )
            address = realm + ("&" if urlsplit(realm).query else "?") + query
            basic = self._basic_header(scope.host) if known else None
            request = TokenRequest(address, asked, basic=basic, endpoint=endpoint)
        body = self._fetch(request)
        try:
            answer = jsonfmt.decode(body, _Token, "token", TOKEN_ANSWER_LIMIT)
        except Integrity:
            # The decoder's own text may quote the answer, and that is a secret.
            raise Remote(f"{subject}: {service} sent no token; check the token service") from None
        token = answer.token or answer.access_token
        if len(token) > _TOKEN_LIMIT or not _TOKEN.fullmatch(token):
            raise Remote(f"{subject}: {service} sent an unusable token; check the token service")
        return "Bearer " + token, max(answer.expires_in, _DEFAULT_LIFE) - _LEEWAY


def _asked(challenged: str, scope: Scope) -> str:
    """The scope to ask for: the challenge's, but with the actions that the next requests will need anyway."""
    if not challenged or challenged == str(replace(scope, actions="pull")):
        return str(scope)
    return challenged


def _may_know_credentials(url: str, realm: str, subject: Subject) -> bool:
    """The rules at the top of this file. Remote when not even an anonymous request may be made."""
    try:
        registry, _ = split(url)
        target, _ = split(realm)
    except ValueError:
        raise Remote(f"{subject}: the challenge names no usable realm; check the registry") from None
    both_loopback = is_loopback(urlsplit(url).netloc) and is_loopback(urlsplit(realm).netloc)
    if (registry.host, registry.scheme) == (target.host, target.scheme) or both_loopback:
        return True
    if target.scheme != "https":
        raise Remote(
            f"{subject}: the token realm at {target.host} is not https; check the registry's settings"
        )
    return registry.scheme == "https"


def _shareable(error: BaseException, subject: Subject) -> BaseException:
    """What threads that wait for the same token are told; not our own KeyboardInterrupt."""
    if isinstance(error, SociError | Transient):
        return error
    return Remote(f"{subject}: the token request ended early; try again")
