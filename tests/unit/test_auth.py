"""Grants: who is asked for a token when, with which login, and where no request goes."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Config, Remote
from soci_snapshotter.formats.dockerconfig import Login
from soci_snapshotter.registry import auth, failures, tokens
from soci_snapshotter.registry.auth import Authenticator, Scope
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.keychains import Keychain
from soci_snapshotter.registry.tokens import TokenRequest

HOST = "registry.test"
URL = f"https://{HOST}/v2/a/b/blobs/x"
REALM = "https://tokens.test/token"
BEARER = f'Bearer realm="{REALM}",service="s",scope="repository:a/b:pull"'
SCOPE = Scope(HOST, "a/b", "pull")
ME, OTHER = Login("me", "pw"), Login("other", "pw2")


class Service:
    """A token service: gives numbered tokens to the logins it believes, and remembers what it was asked."""

    def __init__(self, believed: set[str] | None = None, expires: float = 300.0) -> None:
        self.believed = believed
        self.expires = expires
        self.asked: list[TokenRequest] = []
        self.fail: Exception | None = None

    def __call__(self, request: TokenRequest) -> bytes:
        self.asked.append(request)
        if self.fail is not None:
            raise self.fail
        if self.believed is not None and self.user(request) not in self.believed:
            raise failures.refused(request.subject, 401)
        return json.dumps({"token": f"t{len(self.asked)}", "expires_in": self.expires}).encode()

    @staticmethod
    def user(request: TokenRequest) -> str:
        if request.form is not None:
            return "refresh " + parse_qs(request.form.decode())["refresh_token"][0]
        if request.basic is None:
            return ""
        return base64.b64decode(request.basic.removeprefix("Basic ")).decode().partition(":")[0]

    @property
    def users(self) -> list[str]:
        return [self.user(each) for each in self.asked]


class Source:
    """Logins that a test may change."""

    def __init__(self, *answers: Login, error: Config | None = None) -> None:
        self.answers, self.error = list(answers), error
        self.fresh: list[bool] = []

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        self.fresh.append(fresh)
        if self.error is not None:
            raise self.error
        yield from self.answers if host == HOST else ()


class Clock:
    """time.monotonic for the module, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(auth, "time", made)
    return made


def made(service: Service, *sources: Source, **how: object) -> Authenticator:
    return Authenticator(Keychain(sources, **how), service)  # type: ignore[arg-type]


def challenged(
    one: Authenticator, rejected: str | None = None, field: str = BEARER, scope: Scope = SCOPE
) -> str | None:
    return one.answer(scope, URL, field, rejected)


def until(done: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 10
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


# --- exchanges ------------------------------------------------------------------------------------------------


def test_one_exchange_however_many_ask() -> None:
    """32 threads that are challenged at once get one token; what comes later begins with it."""
    service = Service()
    gate = threading.Event()

    def slow(request: TokenRequest) -> bytes:
        gate.wait(10)
        return service(request)

    one = Authenticator(Keychain([Source(ME)]), slow)
    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(challenged(one))) for _ in range(32)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join()
    assert found == ["Bearer t1"] * 32
    assert one.header(SCOPE) == "Bearer t1"
    assert len(service.asked) == 1


def test_a_token_is_renewed_before_it_expires_and_without_a_401(clock: Clock) -> None:
    """In the last part of its life one request renews it; when that fails the old one serves until it ends."""
    service = Service(expires=300)
    one = made(service, Source(ME))
    challenged(one)
    clock.now += 200
    assert one.header(SCOPE) == "Bearer t1"
    assert len(service.asked) == 1
    clock.now += 80
    assert one.header(SCOPE) == "Bearer t1"  # good for a while: nobody waits
    until(lambda: one.header(SCOPE) == "Bearer t2")
    clock.now += 280
    service.fail = Transient(Remote("away"))
    assert one.header(SCOPE) == "Bearer t2"
    until(lambda: len(service.asked) == 3)
    assert one.header(SCOPE) == "Bearer t2"
    assert len(service.asked) == 3  # not tried again at once
    clock.now += 20
    with pytest.raises(Transient):
        one.header(SCOPE)
    service.fail = None
    assert one.header(SCOPE) == "Bearer t5"


def test_a_short_life_is_a_minute(clock: Clock) -> None:
    """expires_in of 0, or none: 60 s, as the specification says."""
    service = Service(expires=0)
    one = made(service, Source(ME))
    challenged(one)
    clock.now += 40
    assert one.header(SCOPE) == "Bearer t1"
    clock.now += 20
    assert one.header(SCOPE) == "Bearer t2"
    assert len(service.asked) == 2


def test_grants_end_with_the_time_that_is_configured(clock: Clock) -> None:
    """auth_client_ttl_sec: after it the sources are asked again, whatever the token says; negative is for ever."""
    source = Source(ME)
    one = made(Service(expires=1e9), source, life=100.0)
    challenged(one)
    clock.now += 101
    source.answers = [OTHER]
    assert one.header(SCOPE) == "Bearer t2"
    basic = made(Service(), Source(ME), life=-1)
    header = challenged(basic, field='Basic realm="x"')
    clock.now += 1e7
    assert basic.header(SCOPE) == header


# --- logins ---------------------------------------------------------------------------------------------------


def test_a_login_that_is_not_believed_gives_way_to_the_next() -> None:
    """The first non-empty answer is tried first; refused, the next source's; the refused one is not tried again."""
    service = Service(believed={"other"})
    one = made(service, Source(ME), Source(OTHER))
    assert challenged(one) == "Bearer t2"
    assert challenged(one, rejected="Bearer t2") == "Bearer t3"
    assert service.users == ["me", "other", "other"]


def test_nobody_is_believed() -> None:
    """The token service's refusal is the error, with what to check; nothing is asked again for a while."""
    service = Service(believed=set())
    one = made(service, Source(ME, OTHER))
    with pytest.raises(Remote, match="password"):
        challenged(one)
    assert challenged(one) is None
    assert service.users == ["me", "other"]


def test_a_rejected_token_is_renewed_once_and_then_another_login_is_tried() -> None:
    """A revoked token is replaced by the same login; two in a row mean that the login is not enough."""
    service = Service()
    one = made(service, Source(ME), Source(OTHER))
    first = challenged(one)
    second = challenged(one, first)
    third = challenged(one, second)
    fourth = challenged(one, third)
    assert service.users == ["me", "me", "other", "other"]
    assert challenged(one, fourth) is None


BASIC = 'Basic realm="x"'


@pytest.mark.parametrize("field", [BASIC, BEARER], ids=["basic", "bearer"])
def test_a_login_that_works_is_kept_when_one_object_is_refused(field: str) -> None:
    """It was believed, and then one request is refused with all it has: that request gets no more, the next one
    begins with it again, and after that it still answers for a token that was revoked."""
    service = Service()
    one = made(service, Source(ME))
    for _ in range(5):
        header = one.header(SCOPE) or challenged(one, field=field)
        assert header is not None
        one.worked(SCOPE, header)
        over: set[auth.Use] = set()
        again: str | None = header
        count = 0
        while again is not None:
            again = one.answer(SCOPE, URL, field, again, None, over)
            count += 1
        assert count == (1 if field == BASIC else 2)
    kept = one.header(SCOPE)
    assert kept is not None
    one.worked(SCOPE, kept)
    renewed = challenged(one, kept)
    assert renewed == f"Bearer t{len(service.asked)}"


def test_the_next_login_is_tried_before_one_that_stopped_working() -> None:
    """One login of two was believed and is rejected: the other answers, without a word to the first; rejected too, it
    is refused, and the first is the last choice."""
    one = made(Service(), Source(ME, OTHER))
    first = challenged(one, field=BASIC)
    assert first == tokens.basic(ME)
    one.worked(SCOPE, first)
    over: set[auth.Use] = set()
    second = one.answer(SCOPE, URL, BASIC, first, None, over)
    assert second == one.header(SCOPE) == tokens.basic(OTHER)
    assert one.answer(SCOPE, URL, BASIC, second, None, over) is None
    assert one.header(SCOPE) == first
    one.drop(ME, SCOPE.repository)
    assert one.header(SCOPE) == first  # its source has it still
    assert one.answer(SCOPE, URL, BASIC, first) is None  # but that it worked is forgotten
    assert one.header(SCOPE) is None


def test_a_login_that_does_not_work_any_more_is_refused_in_the_end() -> None:
    """Rejected by one request after the other: a password that was changed is not sent without end."""
    one = made(Service(), Source(ME))
    header = challenged(one, field=BASIC)
    assert header is not None
    one.worked(SCOPE, header)
    sent = 0
    for _ in range(100):
        given = one.header(SCOPE) or challenged(one, field=BASIC)
        if given is not None:
            sent += 1
            assert challenged(one, given, field=BASIC) is None
    assert sent == 17


def test_an_answer_to_an_older_header_says_nothing_of_the_newer() -> None:
    """The first token worked, its successor never did: two in a row, and the login is refused as ever."""
    service = Service()
    one = made(service, Source(ME), Source(OTHER))
    first = challenged(one)
    assert first is not None
    second = challenged(one, first)
    one.worked(SCOPE, first)
    challenged(one, second)
    assert service.users == ["me", "me", "other"]


@pytest.mark.parametrize(
    ("status", "is_believed"),
    [(200, True), (307, True), (404, True), (401, False), (403, False), (503, False)],
)
def test_what_shows_that_a_login_was_believed(status: int, is_believed: bool) -> None:
    """Success, a redirect, an object that is not there; not what a proxy may say that never looked at it."""
    assert auth.believed(status) is is_believed


def test_a_403_without_a_challenge_is_answered_as_the_last_was() -> None:
    """ECR's way: the login is asked for anew, and the newer one is used."""
    source = Source(ME)
    one = made(Service(), source)
    first = challenged(one, field='Basic realm="x"')
    source.answers = [OTHER]
    second = challenged(one, first, field="")
    assert first == tokens.basic(ME)
    assert second == tokens.basic(OTHER)
    assert source.fresh == [False, True]
    assert challenged(one, second, field="") is None  # the same again: it is not believed
    assert made(Service(), source).answer(SCOPE, URL, "", None) is None


def test_a_refused_login_is_tried_again_after_a_while(clock: Clock) -> None:
    """An account may be mended."""
    service = Service(believed=set())
    one = made(service, Source(ME))
    with pytest.raises(Remote):
        challenged(one)
    service.believed = {"me"}
    assert challenged(one) is None
    clock.now += 31
    assert challenged(one) == "Bearer t2"


def test_identity_and_registry_tokens() -> None:
    """An identity token is posted, and never sent as Basic; a registry token is itself the answer."""
    service = Service()
    assert challenged(made(service, Source(Login("", "idt")))) == "Bearer t1"
    assert service.users == ["refresh idt"]
    assert service.asked[0].basic is None
    assert "idt" not in service.asked[0].url
    assert challenged(made(service, Source(Login("", "idt"))), field='Basic realm="x"') is None
    assert challenged(made(service, Source(Login("", "rt", registry_token=True)))) == "Bearer rt"
    assert challenged(made(service, Source(Login("", "a b\r\nX: y", registry_token=True), ME))) == "Bearer t2"


def test_without_a_login_it_is_anonymous() -> None:
    """No credentials: a token all the same, for public images; for Basic there is nothing."""
    service = Service()
    assert challenged(made(service)) == "Bearer t1"
    assert service.users == [""]
    assert challenged(made(service), field='Basic realm="x"') is None


def test_a_broken_source_is_named_when_its_login_was_needed() -> None:
    """Public images work with a broken Docker config; where it would have helped, the refusal names it."""
    broken = Source(error=Config("config.json: broken"))
    one = made(Service(), broken)
    first = challenged(one)
    assert first == "Bearer t1"
    second = challenged(one, first)
    with pytest.raises(Config, match=r"config\.json"):
        challenged(one, second)
    with pytest.raises(Config, match=r"config\.json"):
        challenged(made(Service(), broken), field='Basic realm="x"')
    assert challenged(made(Service(), broken, Source(ME)), field='Basic realm="x"') == tokens.basic(ME)


def test_another_scope_is_another_grant() -> None:
    """A login that is not enough for one repository or action is for another; no token serves two."""
    service = Service()
    one = made(service, Source(ME))
    push = Scope(HOST, "a/b", "pull,push")
    other = Scope(HOST, "c", "pull")
    headers = {
        challenged(one, scope=scope, field=f'Bearer realm="{REALM}"') for scope in (SCOPE, push, other)
    }
    assert len(headers) == 3
    asked = [parse_qs(urlsplit(each.url).query)["scope"] for each in service.asked]
    assert asked == [["repository:a/b:pull"], ["repository:a/b:pull,push"], ["repository:c:pull"]]


def test_sharing_saves_the_challenge_of_other_repositories() -> None:
    """enable_auth_client_sharing: what a host said of one repository is used for its others, with their own scope and
    login; without it, and for other hosts, nothing is sent unasked."""
    service = Service()
    one = made(service, Source(ME), shared=True)
    challenged(one)
    assert one.header(Scope(HOST, "c", "pull")) == "Bearer t2"
    assert parse_qs(urlsplit(service.asked[1].url).query)["scope"] == ["repository:c:pull"]
    assert one.header(Scope("elsewhere.test", "c", "pull")) is None
    alone = made(service, Source(ME))
    challenged(alone)
    assert alone.header(Scope(HOST, "c", "pull")) is None


def test_the_credentials_of_one_host_are_not_given_to_another() -> None:
    """A challenge of host B with host A's realm: A's login is not looked up, let alone sent."""
    service = Service()
    one = made(service, Source(ME))
    answer = one.answer(Scope("evil.test", "a/b", "pull"), "https://evil.test/v2/a/b", BEARER, None)
    assert answer == "Bearer t1"
    assert service.users == [""]
    basic = one.answer(Scope("evil.test", "c", "pull"), "https://evil.test/v2/c", 'Basic realm="x"', None)
    assert basic is None


# --- realms ---------------------------------------------------------------------------------------------------

NOWHERE = [
    "https://169.254.169.254/latest/api/token",
    "https://169.254.1.1/",
    "https://[fe80::1]/",
    "https://[fd00:ec2::254]/",
    "https://[::ffff:169.254.169.254]/",
    "https://2852039166/",
    "https://0xa9fea9fe/",
    "https://0251.0376.0251.0376/",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://0.0.0.0/",
    "https://localhost:8443/",
    "https://x.localhost/",
    "https://metadata.google.internal/",
    "https://METADATA.google.internal./",
    "http://tokens.test/token",
    f"http://{HOST}/token",
    "ftp://tokens.test/",
    "https://user:pw@tokens.test/",
    "file:///etc/passwd",
    "//tokens.test/",
    "/token",
    "",
    "https:// tokens.test/",
]


@pytest.mark.parametrize("realm", NOWHERE)
def test_nothing_goes_to_such_a_realm(realm: str) -> None:
    """A metadata service, this machine, plain http, no URL: an error that names the registry, and no request at all,
    not even without credentials."""
    service = Service()
    with pytest.raises(Remote, match=f"{HOST}/a/b"):
        challenged(made(service, Source(ME)), field=f'Bearer realm="{realm}",service="s"')
    assert service.asked == []


UNROUTED = [st.ip_addresses(network=each) for each in ("169.254.0.0/16", "127.0.0.0/8", "fe80::/10")]


@given(st.one_of(UNROUTED))
def test_no_link_local_or_loopback_address_is_a_realm(address: object) -> None:
    """For any of them, however it is written."""
    text = f"[{address}]" if ":" in str(address) else str(address)
    with pytest.raises(Remote):
        tokens.may_know_credentials(URL, f"https://{text}/token", Subject(HOST, "a", "x"))


@pytest.mark.parametrize(
    ("url", "realm", "known"),
    [
        (URL, f"https://{HOST}/token", True),
        (URL, f"https://{HOST}:8443/token", True),
        (URL, REALM, True),
        ("http://10.0.0.5:5000/v2/", "http://10.0.0.5:5001/token", True),
        ("http://10.0.0.5:5000/v2/", REALM, False),
        ("http://127.0.0.1:5000/v2/", "http://localhost:5001/token", True),
    ],
)
def test_who_may_know_the_credentials(url: str, realm: str, known: bool) -> None:
    """The registry itself; another host if both are https; both on loopback. Else an anonymous request at most."""
    assert tokens.may_know_credentials(url, realm, Subject(HOST, "a", "x")) is known


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{",
        b'{"token": ""}',
        b'{"token": 5, "x": "MARKED-SECRET"}',
        b'{"token": "MARKED-SECRET\\r\\nX: y"}',
        b'{"token": "MARKED SECRET"}',
        b'{"token": "' + b"x" * (50 << 10) + b'"}',
        b'["MARKED-SECRET"]',
    ],
)
def test_an_answer_that_is_no_token(answer: bytes) -> None:
    """Whatever it is: Remote that names the service and quotes nothing."""
    one = Authenticator(Keychain([Source(ME)]), lambda _: answer)
    with pytest.raises(Remote, match=r"tokens\.test") as caught:
        challenged(one)
    assert "SECRET" not in str(caught.value)


def test_an_error_reaches_everyone_who_waits() -> None:
    """The service is away: each of the waiting threads hears of it, and the next asks again."""
    gate = threading.Event()
    count = [0]

    def away(request: TokenRequest) -> bytes:
        count[0] += 1
        gate.wait(10)
        raise Transient(Remote("away"))

    one = Authenticator(Keychain([Source(ME)]), away)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            challenged(one)
        except Transient as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    gate.set()
    for thread in threads:
        thread.join()
    assert len(errors) == 8
    asked = count[0]
    ask()
    assert count[0] == asked + 1


def test_who_has_a_deadline_waits_no_longer() -> None:
    """A token service that hangs: whoever asks, and whoever joins, hears so at their deadline; the token that comes
    after it is there for the next."""
    service, gate = Service(), threading.Event()

    def slow(request: TokenRequest) -> bytes:
        gate.wait(30)
        return service(request)

    one = Authenticator(Keychain([Source(ME)]), slow)
    try:
        for _ in range(2):
            with pytest.raises(Remote, match="no token"):
                one.answer(SCOPE, URL, BEARER, None, deadline=time.monotonic() + 0.05)
            with pytest.raises(Remote, match="no token"):
                one.header(SCOPE, time.monotonic() + 0.05)
        assert not gate.is_set()
    finally:
        gate.set()
    assert one.header(SCOPE, time.monotonic() + 10) == "Bearer t1"
    assert len(service.asked) == 1


def test_many_scopes_are_forgotten_in_the_end(clock: Clock) -> None:
    """A daemon that sees thousands of repositories keeps those whose grant lives."""
    one = made(Service(), Source(ME))
    for number in range(1500):
        challenged(one, scope=Scope(HOST, f"r{number}", "pull"))
        clock.now += 1
    assert len(one._scopes) < 1000


def test_a_login_that_its_source_gave_up_is_not_used_any_more() -> None:
    """Its grant goes, for that repository only; the next request asks the sources."""
    service, source = Service(), Source(ME)
    one = made(service, source)
    other = Scope(HOST, "c", "pull")
    challenged(one)
    challenged(one, scope=other)
    source.answers = []
    one.drop(ME, "a/b")
    assert one.header(SCOPE) == "Bearer t3"
    assert service.users == ["me", "me", ""]
    assert one.header(other) == "Bearer t2"


def test_another_host_in_the_middle_of_an_upload_gets_nothing() -> None:
    """A scope without a repository is a place that the registry sent us to: its challenge is not answered."""
    service, source = Service(), Source(ME)
    one = made(service, source, shared=True)
    challenged(one)
    away = Scope(HOST, "", "")
    assert one.answer(away, URL, BEARER, None) is None
    assert one.answer(away, URL, 'Basic realm="x"', None) is None
    assert one.header(away) is None
    assert len(service.asked) == 1
