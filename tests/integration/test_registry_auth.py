"""Logins against real servers: expiry in the middle of a layer's life, wrong hosts, helpers, tokens shared by all."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from harness.badserver import Asked, BadServer, bad_server, reply
from harness.proxy import Proxy
from harness.registries import RunningRegistry
from harness.tokenserver import TokenService, start_token_registry

from soci_snapshotter.errors import Config, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.credentials import DockerConfig
from soci_snapshotter.registry.credhelpers import Helpers
from soci_snapshotter.registry.keychains import Keychain, Provided
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.ranges import BlobReader

BLOB = bytes(range(256)) * 400
DIGEST = digests.sha256(BLOB)
FAST = Options(retry=Retry(attempts=1, min_wait=0.01, patience=1.0), span_timeout=5, read_timeout=5)
LOGIN = ("tester", "MARKED-SECRET")


def piece(asked: Asked) -> bytes:
    """What a good server answers, to a range request or another."""
    if "range" not in asked.headers:
        return reply("200 OK", BLOB)
    start, end = (int(part) for part in asked.headers["range"].removeprefix("bytes=").split("-"))
    data = BLOB[start : end + 1]
    return reply(
        "206 Partial Content", data, Content_Range=f"bytes {start}-{start + len(data) - 1}/{len(BLOB)}"
    )


def basic(user: str, password: str) -> str:
    """The header."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Reading:
    """A blob of one server, read again and again through one client."""

    def __init__(self, client: RegistryClient, pool: ConnectionPool, host: str) -> None:
        self.client = client
        self.reference = references.parse(f"{host}/r:1")
        self.reader = BlobReader(client, pool, self.reference, DIGEST, len(BLOB))

    def __call__(self, start: int = 100, end: int = 5000) -> None:
        assert self.reader.read(start, end, time.monotonic() + 20) == BLOB[start:end]


@pytest.fixture
def reading() -> Iterator[Callable[[BadServer | RunningRegistry | Proxy, Keychain], Reading]]:
    """Opens readings, and closes them."""
    opened: list[RegistryClient | ConnectionPool] = []

    def make(server: BadServer | RunningRegistry | Proxy, keychain: Keychain) -> Reading:
        client = RegistryClient(FAST, keychain)
        pool = ConnectionPool(FAST)
        opened.extend((pool, client))
        return Reading(client, pool, server.host)

    yield make
    for each in opened:
        each.close()


Open = Callable[[BadServer | RunningRegistry | Proxy, Keychain], Reading]


class Passwords:
    """A registry with Basic, whose password changes; blobs come from another host, as ECR's do."""

    def __init__(self, store: BadServer, status: int) -> None:
        self.store, self.status, self.right = store, status, "one"

    def __call__(self, asked: Asked) -> bytes:
        given = asked.headers.get("authorization")
        if given is None:
            return reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"')
        if given != basic("AWS", self.right):
            more = {"WWW_Authenticate": 'Basic realm="x"'} if self.status == 401 else {}
            return reply(f"{self.status} Denied", b'{"errors":[{"code":"DENIED"}]}', **more)
        return reply("307 Temporary Redirect", Location=f"http://{self.store.host}/signed?n={asked.number}")


@pytest.mark.parametrize("status", [401, 403])
def test_an_expired_password_is_got_anew_from_its_helper(tmp_path: Path, reading: Open, status: int) -> None:
    """ECR: 12 hours later the registry says 403 (others 401) without a challenge: the helper is run again, the read
    goes on, and the object store sees no Authorization."""
    word = tmp_path / "password"
    word.write_text("one")
    program = tmp_path / "docker-credential-cloud"
    program.write_text(
        f"""#!/bin/sh\necho "{{\\"Username\\":\\"AWS\\",\\"Secret\\":\\"$(cat {word})\\"}}"\n"""
    )
    program.chmod(0o755)
    helpers = Helpers({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    stale = [True]

    def signed(asked: Asked) -> bytes:
        return reply("403 Expired") if stale[0] and asked.number else piece(asked)

    with bad_server(signed) as store:
        registry = Passwords(store, status)
        with bad_server(registry) as home:
            config = tmp_path / "config.json"
            config.write_text(json.dumps({"credHelpers": {home.host: "cloud"}}))
            read = reading(home, Keychain([DockerConfig(config, helpers)]))
            read()
            registry.right = "two"
            word.write_text("two")
            time.sleep(2.1)  # so that the helper's answer is not a moment old
            read()
            assert [asked.headers.get("authorization") for asked in home.asked] == [
                None,
                basic("AWS", "one"),
                basic("AWS", "one"),
                basic("AWS", "two"),
            ]
    assert all("authorization" not in asked.headers for asked in store.asked)


@pytest.mark.parametrize("status", [401, 403])
def test_whichever_source_has_a_newer_one_gives_it(tmp_path: Path, reading: Open, status: int) -> None:
    """The first source keeps its old password: the second's is used from then on, without asking with the old one."""
    with bad_server(piece) as store:
        registry = Passwords(store, status)
        with bad_server(registry) as home:
            config = tmp_path / "config.json"
            config.write_text(json.dumps({"auths": {home.host: {"username": "AWS", "password": "one"}}}))
            other: dict[str, tuple[str, str]] = {}
            read = reading(home, Keychain([DockerConfig(config), Provided(other.get)]))
            read()
            registry.right = "two"
            with pytest.raises(Remote, match="expired" if status == 403 else "password"):
                read.client.fetch(read.reference, _described(), len(BLOB))
            other[home.host] = ("AWS", "two")
            for _ in range(3):
                read.client.fetch(read.reference, _described(), len(BLOB))
            seen = [asked.headers.get("authorization") for asked in home.asked]
            assert seen[-3:] == [basic("AWS", "two")] * 3
            assert seen.count(basic("AWS", "one")) == 2


def _described() -> Descriptor:
    return Descriptor("application/octet-stream", DIGEST, len(BLOB))


def test_a_config_that_changes_is_enough(tmp_path: Path, reading: Open) -> None:
    """docker login on the node: the next request after the refusal has the new password."""
    with bad_server(piece) as store:
        registry = Passwords(store, 401)
        with bad_server(registry) as home:
            config = tmp_path / "config.json"

            def login(password: str) -> None:
                config.write_text(
                    json.dumps({"auths": {home.host: {"username": "AWS", "password": password}}})
                )

            login("wrong")
            read = reading(home, Keychain([DockerConfig(config)]))
            with pytest.raises(Remote, match="password"):
                read()
            login("one")
            read()


def test_a_broken_config_is_named_and_the_others_are_asked(
    tmp_path: Path, reading: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """Broken JSON: one line in the log; another source's login works; with no other the error names the file."""
    config = tmp_path / "config.json"
    config.write_text('{"auths": "MARKED-SECRET"')
    with bad_server(piece) as store, bad_server(Passwords(store, 401)) as home:
        right = Provided(lambda host: ("AWS", "one") if host == home.host else None)
        with caplog.at_level(logging.DEBUG):
            reading(home, Keychain([DockerConfig(config), right]))()
        assert [str(config) in str(each.__dict__.get("reason")) for each in caplog.records].count(True) == 1
        with pytest.raises(Config, match=str(config)):
            reading(home, Keychain([DockerConfig(config)]))()
    assert "MARKED-SECRET" not in str([each.__dict__ for each in caplog.records])


def test_one_hosts_credentials_are_never_given_to_another(tmp_path: Path, reading: Open) -> None:
    """A has a login, B asks for it: by Basic, by a challenge with A's realm, by a redirect to A and back. B sees no
    Authorization, and A none on B's account."""
    mode = ["basic"]
    with bad_server(lambda _: reply("401 No", WWW_Authenticate='Basic realm="a"')) as one:

        def hostile(asked: Asked) -> bytes:
            if mode[0] == "basic":
                return reply("401 No", WWW_Authenticate='Basic realm="a"')
            if mode[0] == "realm":
                realm = (
                    f'Bearer realm="http://{one.host}/token",service="{one.host}",scope="repository:r:pull"'
                )
                return reply("401 No", WWW_Authenticate=realm)
            return reply("307 Go", Location=f"http://{one.host}/v2/r/blobs/{DIGEST}")

        config = tmp_path / "config.json"
        config.write_text(json.dumps({"auths": {one.host: {"username": LOGIN[0], "password": LOGIN[1]}}}))
        with bad_server(hostile) as other:
            for mode[0] in ("basic", "realm", "redirect"):
                with pytest.raises(Remote, match=f"({one.host}|{other.host})/r"):
                    reading(other, Keychain([DockerConfig(config)]))()
            assert len(other.asked) >= 3
            assert all("authorization" not in asked.headers for asked in other.asked)
        assert any(asked.path.startswith("/token") for asked in one.asked)
        assert all("authorization" not in asked.headers for asked in one.asked)


def test_a_token_service_that_redirects_gets_no_further(reading: Open) -> None:
    """The realm answers by a redirect to another host: neither password nor identity token goes there."""
    with bad_server(lambda _: reply("200 OK", b'{"token": "stolen"}')) as elsewhere:

        def registry(asked: Asked) -> bytes:
            if asked.path.startswith("/token"):
                return reply("307 Go", Location=f"http://{elsewhere.host}/token")
            return reply("401 No", WWW_Authenticate=f'Bearer realm="http://{asked.headers["host"]}/token"')

        with bad_server(registry) as home:
            for login in (LOGIN, ("", "MARKED-SECRET")):
                with pytest.raises(Remote) as caught:
                    reading(home, Keychain([Provided(lambda _, login=login: login)]))()  # type: ignore[misc]
                assert "MARKED-SECRET" not in str(caught.value)
        assert all("authorization" not in asked.headers for asked in elsewhere.asked)
        assert all(asked.method == "GET" for asked in elsewhere.asked)


@pytest.mark.parametrize("answer", ["401 No", "403 No", "429 Slow", "500 Broken", "200 OK"])
def test_a_token_service_that_refuses_is_named(reading: Open, answer: str) -> None:
    """Whatever it says instead of a token: an error in bounded time that names registry or service, and no secret."""

    def registry(asked: Asked) -> bytes:
        if asked.path.startswith("/token"):
            return reply(answer, b'{"details": "MARKED-SECRET"}')
        return reply("401 No", WWW_Authenticate=f'Bearer realm="http://{asked.headers["host"]}/token"')

    with bad_server(registry) as home, pytest.raises(Remote, match=home.host) as caught:
        reading(home, Keychain([Provided(lambda _: LOGIN)]))()
    assert "MARKED-SECRET" not in str(caught.value)
    assert len(home.asked) < 20


# --- docker-registry with a token service ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningRegistry, TokenService]]:
    with start_token_registry(tmp_path_factory.mktemp("tokens"), LOGIN, "MARKED-REFRESH") as found:
        registry, _ = found
        with RegistryClient(FAST, lambda _: LOGIN) as client:
            client.push_blob(references.parse(f"{registry.host}/r:1"), _described(), lambda: (BLOB,))
        yield found


@pytest.mark.parametrize(
    ("login", "count"),
    [
        pytest.param(LOGIN, 25, id="password"),
        pytest.param(("", "MARKED-REFRESH"), 25, id="identity"),
        pytest.param(LOGIN, 125, id="1000", marks=pytest.mark.slow),
    ],
)
def test_many_reads_are_one_exchange(
    tokens: tuple[RunningRegistry, TokenService], reading: Open, login: tuple[str, str], count: int
) -> None:
    """8 threads, 4 layers, 200 (or 1,000) ranges begun at once: the token service is asked once, and there are no more
    connections than are configured."""
    registry, service = tokens
    before = len(service.asked)
    few = replace(FAST, connections=3)
    with Proxy(registry.address) as proxy:
        first = reading(proxy, Keychain([Provided(lambda _: login)]))
        pool = ConnectionPool(few)
        readers = [BlobReader(first.client, pool, first.reference, DIGEST, len(BLOB)) for _ in range(4)]
        wrong: list[BaseException] = []
        most = [0]

        def some(reader: BlobReader) -> None:
            try:
                for start in range(0, count * 100, 100):
                    assert reader.read(start, start + 50, time.monotonic() + 60) == BLOB[start : start + 50]
                    most[0] = max(most[0], proxy.connections)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=some, args=(readers[number % 4],)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pool.close()
    assert wrong == []
    assert len(service.asked) - before == 1
    assert 1 <= most[0] <= 3


def test_a_login_that_the_service_does_not_believe_gives_way(
    tokens: tuple[RunningRegistry, TokenService], reading: Open
) -> None:
    """A wrong password in the first source, the right one in the second: the layer is read, and the wrong one is not
    shown to the service again."""
    registry, service = tokens
    before = len(service.asked)
    wrong, right = Provided(lambda _: ("tester", "wrong")), Provided(lambda _: LOGIN)
    read = reading(registry, Keychain([wrong, right]))
    for _ in range(5):
        read()
    assert service.asked[before:] == ["GET basic repository:r:pull"] * 2


def test_no_login_is_enough(tokens: tuple[RunningRegistry, TokenService], reading: Open) -> None:
    """Anonymous, and wrong passwords only: the registry's or the service's refusal, with what to check, and the
    service is asked a bounded number of times however many reads fail."""
    registry, service = tokens
    for keychain in (Keychain([]), Keychain([Provided(lambda _: ("tester", "wrong"))])):
        before = len(service.asked)
        read = reading(registry, keychain)
        for _ in range(5):
            with pytest.raises(Remote, match="password"):
                read()
        assert len(service.asked) - before <= 4
