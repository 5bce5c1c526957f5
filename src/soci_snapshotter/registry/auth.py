"""Authorization for registries: HTTP Basic, and the token challenge of the distribution spec (Bearer).

A registry is first asked without credentials; its 401 says how it wants to be asked (registry.tokens says where
credentials may go). What it granted is kept per (host, repository, actions) until it expires, shared by everybody who
holds this object, and a token is renewed before it expires. One thread asks for a grant while the others that need
the same one wait for its answer.

A 401 or 403 for a grant means that it has expired or was revoked (403 is ECR's way): the sources of credentials are
asked again, and a login that was rejected is not used again for a while. So whichever source has a newer one gives it.
A login that did work here may not be good for one object (a referrers API that is closed, say): it is passed over for
that request only, and for the next one it is the last choice until it works again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from soci_snapshotter.errors import Integrity, Remote, SociError
from soci_snapshotter.formats.dockerconfig import Login
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.formats.httpfields import parse_challenges
from soci_snapshotter.registry import tokens
from soci_snapshotter.registry.credentials import CredentialProvider
from soci_snapshotter.registry.failures import Refused, Subject, Transient
from soci_snapshotter.registry.keychains import keychain
from soci_snapshotter.registry.tokens import TOKEN_ANSWER_LIMIT, Asked, Scope, TokenFetcher, TokenRequest

__all__ = [
    "MAX_ANSWERS",
    "TOKEN_ANSWER_LIMIT",
    "Authenticator",
    "Scope",
    "TokenFetcher",
    "TokenRequest",
    "Use",
    "believed",
]

_log = logging.getLogger(__name__)

# Refusals of one request that are answered: two tokens by a login of each of the three sources.
MAX_ANSWERS = 6
# Logins tried for one grant: a cluster may hold many secrets for one registry, most of them of no use.
_MOST_LOGINS = 8
# A token is renewed when this part of its life, or this many seconds, are left, whichever is less: for the way it has
# to travel, and so that who waits for a span does not wait for a token too.
_RENEW_PART = 0.2
_RENEW_SECONDS = 30.0
_LEEWAY = 5.0
# A renewal ahead of time that failed is tried again after this.
_RENEW_AGAIN = 10.0
# One token may have been revoked; when two by the same login are rejected within this, the login is not good enough.
_TWICE = 10.0
# How long a rejected login is not tried again; the same one may be good again when an account was mended.
_REFUSED_FOR = 30.0
# Rejections in a row of a login that used to work: more than one image's objects that it may not read, so it is over.
_MOST_REJECTIONS = 16
# A waiter's bound on another thread's token request, above that request's own timeouts.
_WAIT = 60.0
# Beyond this many scopes those without a living grant are forgotten.
_KEPT = 1024
# By which a token service says that it does not believe a login; 400 is OAuth 2's for a refresh token (RFC 6749, 5.2).
_NOT_BELIEVED = frozenset({400, 401, 403})


@dataclass(frozen=True, slots=True)
class _Grant:
    """Times are time.monotonic()."""

    header: str = field(repr=False)
    renew: float
    expires: float
    login: Login | None
    wanted: str
    """The scope that the registry asked for: a login may be good for one, and not for another."""
    good: bool = False
    """It was believed."""


# A login, None for anonymous, and the scope that was asked for.
Use: TypeAlias = tuple[Login | None, str]


_NO_USES: frozenset[Use] = frozenset()
# What one thread gets for all that want it: a grant by anything else than these uses.
_Wish: TypeAlias = tuple[Scope, frozenset[Use]]


@dataclass(slots=True)
class _Worked:
    """A use that was believed once: how often it was rejected since, and its grant of then, the last choice now."""

    rejections: int = 0
    doubted: _Grant | None = None


@dataclass(slots=True)
class _State:
    """What is known of one scope."""

    asked: Asked | None = None
    grant: _Grant | None = None
    rejected: tuple[Use, float] | None = None  # whose grant the registry rejected last, and when
    refused: dict[Use, float] = field(default_factory=dict)  # until when
    worked: dict[Use, _Worked] = field(default_factory=dict)

    def refuses(self, use: Use, now: float) -> bool:
        return self.refused.get(use, 0.0) > now

    def refuse(self, use: Use, now: float) -> None:
        for old in [each for each, until in self.refused.items() if until <= now]:
            del self.refused[old]
        self.refused[use] = now + _REFUSED_FOR

    def good(self, use: Use) -> None:
        """It was believed just now."""
        self.rejected = None
        self.worked.pop(use, None)
        self.worked[use] = _Worked()
        if len(self.worked) > _MOST_LOGINS:  # passwords that are renewed twice a day
            del self.worked[next(iter(self.worked))]

    def doubt(self, use: Use, grant: _Grant) -> bool:
        """It was rejected, by all that it can give; False when it never worked, or not for long."""
        known = self.worked.get(use)
        if known is None:
            return False
        known.rejections += 1
        known.doubted = replace(grant, good=False)
        if known.rejections > _MOST_REJECTIONS:
            del self.worked[use]
            return False
        return True


class Authenticator:
    """Grants by scope. Thread safe; does no I/O under its lock."""

    def __init__(self, credentials: CredentialProvider | None, fetch: TokenFetcher) -> None:
        """`credentials` may be a keychains.Keychain, or any credentials.Source."""
        self._keychain = keychain(credentials)
        self._fetch = fetch
        self._lock = threading.Lock()
        self._scopes: dict[Scope, _State] = {}
        self._hosts: dict[str, Asked] = {}  # how a host wants to be asked, if that is shared
        self._asking: dict[_Wish, Future[str | None]] = {}

    def header(self, scope: Scope, deadline: float | None = None) -> str | None:
        """The Authorization header to send at first: what the registry granted, renewed when that is due.

        Raises Remote or Transient when a grant has expired and no new one is to be had by `deadline`
        (time.monotonic()).
        """
        now = time.monotonic()
        with self._lock:
            state = self._scopes.get(scope)
            grant = state.grant if state is not None else None
            asked = (state.asked if state is not None else None) or self._hosts.get(scope.host)
            if asked is None or not scope.repository:
                return None
            alive = grant is not None and now < grant.expires
            if grant is not None and alive:
                due = now >= grant.renew and (scope, _NO_USES) not in self._asking
                # One thread is enough, and if it fails there is time for another try.
                if due and state is not None:
                    state.grant = replace(grant, renew=now + _RENEW_AGAIN)
        if grant is None or not alive:
            return self._obtain(scope, asked, fresh=False, deadline=deadline)
        if due:
            # Beside, because whoever asks may have a reader waiting, and what it has is good.
            with contextlib.suppress(RuntimeError):  # the interpreter is ending
                threading.Thread(target=self._renew, args=(scope, asked), name="token", daemon=True).start()
        return grant.header

    def _renew(self, scope: Scope, asked: Asked) -> None:
        try:
            self._obtain(scope, asked, fresh=False)
        except (SociError, Transient) as error:
            _log.debug("token not renewed ahead of time", extra={"reason": str(error)})

    def worked(self, scope: Scope, header: str) -> None:
        """An answer to this header shows that it was `believed`."""
        state = self._scopes.get(scope)
        grant = state.grant if state is not None else None
        if state is None or grant is None or grant.good or grant.header != header:
            return  # mostly, and without the lock
        with self._lock:
            if state.grant is grant:
                state.grant = replace(grant, good=True)
                state.good((grant.login, grant.wanted))

    def _forget(self, scope: Scope, rejected: str, over: set[Use]) -> None:
        """Drop the grant with this header, if it is still the current one, and remember whose it was.

        `over` gets what was believed before and has no more to give for this request.
        """
        now = time.monotonic()
        with self._lock:
            state = self._scopes.get(scope)
            if state is None or state.grant is None or state.grant.header != rejected:
                return
            grant, state.grant = state.grant, None
            login, use = grant.login, (grant.login, grant.wanted)
            itself = not rejected.startswith("Bearer ") or (login is not None and login.registry_token)
            before, state.rejected = state.rejected, (use, now)
            if itself or (before is not None and before[0] == use and now - before[1] < _TWICE):
                if state.doubt(use, grant):
                    over.add(use)
                else:
                    state.refuse(use, now)

    def drop(self, login: Login, repository: str) -> None:
        """Its source has given the login up for a repository: what was granted for it there is not used any more."""
        with self._lock:
            for scope, state in self._scopes.items():
                if scope.repository != repository:
                    continue
                if state.grant is not None and state.grant.login == login:
                    state.grant = None
                state.worked = {use: known for use, known in state.worked.items() if use[0] != login}

    def answer(
        self,
        scope: Scope,
        url: str,
        field_value: str,
        rejected: str | None,
        endpoint: Endpoint | None = None,
        over: set[Use] | None = None,
        deadline: float | None = None,
    ) -> str | None:
        """The header that answers a 401 or 403 of `url` with this WWW-Authenticate field; None when there is none.

        `rejected` is the header that was refused; `endpoint` the one whose TLS settings the token service shares.
        `over` is the request's own, an empty set at first: what is not to be tried for it again. A 403 without a
        challenge is answered as the last one was. Raises Remote, or Transient, when no token is to be had (by
        `deadline`, time.monotonic()), and Config when a source of credentials that is needed cannot be asked.
        """
        if not scope.repository:
            return None  # another host than the registry's, an upload sent elsewhere: it gets no credentials
        over = set() if over is None else over
        if rejected is not None:
            self._forget(scope, rejected, over)
        subject = _subject(scope)
        asked = _asked(url, field_value, endpoint, subject)
        with self._lock:
            state = self._state(scope)
            if asked is None and not field_value:
                asked = state.asked
            grant = state.grant
            if asked is None:
                return None
            state.asked = asked
            if self._keychain.shared:
                self._hosts[scope.host] = replace(asked, scope="")
        if grant is not None and (grant.login, grant.wanted) not in over:
            return grant.header  # another thread was faster
        return self._obtain(scope, asked, fresh=rejected is not None, over=frozenset(over), deadline=deadline)

    def _state(self, scope: Scope) -> _State:
        """Under the lock."""
        if scope not in self._scopes and len(self._scopes) >= _KEPT:
            now = time.monotonic()
            self._scopes = {
                each: state
                for each, state in self._scopes.items()
                if state.grant is not None and now < state.grant.expires
            }
            self._hosts.clear()
        return self._scopes.setdefault(scope, _State())

    def _obtain(
        self,
        scope: Scope,
        asked: Asked,
        *,
        fresh: bool,
        over: frozenset[Use] = _NO_USES,
        deadline: float | None = None,
    ) -> str | None:
        """A new grant's header, by this thread or by the one that is at it; None when nothing is left to try.

        With a deadline by a thread of its own: helpers, names and services have their own patience, and whoever
        comes later has use for the answer.
        """
        mine: Future[str | None] = Future()
        with self._lock:
            asking = self._asking.setdefault((scope, over), mine)
        left = _WAIT
        if asking is mine:
            if deadline is None:
                self._ask(mine, scope, asked, fresh, over)
            else:
                self._ask_beside(mine, scope, asked, fresh, over)
        if deadline is not None:
            left = max(min(left, deadline - time.monotonic()), 0.0)
        try:
            return asking.result(left)
        except TimeoutError:
            raise Remote(
                f"{_subject(scope)}: no token within {left:.0f} s; check the token service"
            ) from None

    def _ask_beside(
        self, mine: Future[str | None], scope: Scope, asked: Asked, fresh: bool, over: frozenset[Use]
    ) -> None:
        def run() -> None:
            with contextlib.suppress(SociError, Transient):  # whoever waits is told
                self._ask(mine, scope, asked, fresh, over)

        try:
            threading.Thread(target=run, name="token", daemon=True).start()
        except RuntimeError:  # no more threads: better late than never
            self._ask(mine, scope, asked, fresh, over)

    def _ask(
        self, mine: Future[str | None], scope: Scope, asked: Asked, fresh: bool, over: frozenset[Use]
    ) -> None:
        """Get a grant, keep it, and tell all who wait; an error is raised too."""
        subject = _subject(scope)
        try:
            grant = self._grant(scope, asked, subject, fresh=fresh, over=over)
            if grant is not None:
                with self._lock:
                    state = self._state(scope)
                    state.asked, state.grant = asked, grant
            mine.set_result(None if grant is None else grant.header)
        except BaseException as error:
            mine.set_exception(_shareable(error, subject))
            raise
        finally:
            with self._lock:
                del self._asking[scope, over]

    def _grant(
        self, scope: Scope, asked: Asked, subject: Subject, *, fresh: bool, over: frozenset[Use]
    ) -> _Grant | None:
        known = not asked.realm or tokens.may_know_credentials(asked.url, asked.realm, subject)
        refusal: Refused | None = None
        problem: SociError | None = None
        tried = False
        doubted = self._doubted(scope)
        if known:
            try:
                for login in _last(self._logins(scope, fresh=fresh), doubted, asked.scope):
                    tried = True
                    use = login, asked.scope
                    if use in over or self._refuses(scope, use):
                        continue
                    try:
                        grant = doubted.get(use) or self._by(scope, asked, login, subject)
                    except Refused as error:
                        if error.status not in _NOT_BELIEVED:
                            raise
                        refusal = error
                        self._refuse(scope, use)
                        continue
                    if grant is not None:
                        return grant
            except SociError as error:
                if tried:
                    raise
                problem = error  # the sources' own; perhaps it can be had without a login
        nobody: Use = None, asked.scope
        if asked.realm and not tried and nobody not in over and not self._refuses(scope, nobody):
            return doubted.get(nobody) or self._by(scope, asked, None, subject)
        if over:
            return None  # what worked until now is not for this: the registry's own words say it best
        if refusal is not None:
            raise refusal
        if problem is not None:
            raise problem
        return None

    def _doubted(self, scope: Scope) -> dict[Use, _Grant]:
        """Grants that are the last choice, as long as they live."""
        now = time.monotonic()
        with self._lock:
            state = self._scopes.get(scope)
            worked = {} if state is None else state.worked
            return {
                use: known.doubted
                for use, known in worked.items()
                if known.doubted is not None and now < known.doubted.expires
            }

    def _logins(self, scope: Scope, *, fresh: bool) -> Iterator[Login]:
        for number, login in enumerate(self._keychain.logins(scope.host, scope.repository, fresh=fresh)):
            if number == _MOST_LOGINS:
                return
            yield login

    def _by(self, scope: Scope, asked: Asked, login: Login | None, subject: Subject) -> _Grant | None:
        """A grant by this login; None when it is of no use for how the registry asks."""
        now, most = time.monotonic(), self._keychain.life
        if login is not None and login.registry_token:
            header, life = tokens.bearer(login.secret), most
        elif asked.realm:
            header, life = tokens.fetch(self._fetch, scope, asked, login, subject)
            now = time.monotonic()
            life = min(life - _LEEWAY, most)
            renew = now + life - min(life * _RENEW_PART, _RENEW_SECONDS)
            return _Grant(header, renew, now + life, login, asked.scope)
        elif login is not None and login.user:
            header, life = tokens.basic(login), most
        else:
            return None  # an identity token is for token services
        return None if header is None else _Grant(header, now + life, now + life, login, asked.scope)

    def _refuses(self, scope: Scope, use: Use) -> bool:
        with self._lock:
            state = self._scopes.get(scope)
            return state is not None and state.refuses(use, time.monotonic())

    def _refuse(self, scope: Scope, use: Use) -> None:
        with self._lock:
            self._state(scope).refuse(use, time.monotonic())


def believed(status: int) -> bool:
    """An answer with this HTTP status shows that the registry took the header it came for."""
    return status < 400 or status == 404  # others come from whoever is before it, too


def _last(logins: Iterator[Login], doubted: Mapping[Use, _Grant], wanted: str) -> Iterator[Login]:
    """The doubted ones after all others."""
    later: list[Login] = []
    for login in logins:
        if (login, wanted) in doubted:
            later.append(login)
        else:
            yield login
    yield from later


def _subject(scope: Scope) -> Subject:
    return Subject(scope.host, scope.repository, "authorization")


def _asked(url: str, field_value: str, endpoint: Endpoint | None, subject: Subject) -> Asked | None:
    """What a WWW-Authenticate field asks for; None when it is nothing that is known."""
    try:
        challenges = {each.scheme: each for each in reversed(parse_challenges(field_value))}
    except Integrity as error:
        raise Remote(f"{subject}: {error}; check the registry or the proxy before it") from None
    if "bearer" in challenges:
        given = challenges["bearer"].params
        realm = given.get("realm", "")
        tokens.may_know_credentials(
            url, realm, subject
        )  # an empty or odd realm is told before anything is asked
        return Asked(url, realm, given.get("service", ""), given.get("scope", ""), endpoint)
    return Asked(url, endpoint=endpoint) if "basic" in challenges else None


def _shareable(error: BaseException, subject: Subject) -> BaseException:
    """What threads that wait for the same token are told; not our own KeyboardInterrupt."""
    if isinstance(error, SociError | Transient):
        return error
    return Remote(f"{subject}: the token request ended early; try again")
