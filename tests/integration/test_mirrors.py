"""Spans by mirrors, proxies and tokens: who is asked, on how many connections, and never a wrong byte."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from harness.badserver import Answer, Asked, BadServer, Dripped, Stalled, bad_server, reply
from harness.proxy import Proxy
from harness.tokenserver import start_token_registry

from soci_snapshotter.errors import Integrity, NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.breaker import Breaker
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.proxies import from_environment
from soci_snapshotter.registry.ranges import BlobReader
from soci_snapshotter.registry.urls import Repository

BLOB = hashlib.shake_128(b"blob").digest(2 << 20)
DIGEST = digests.sha256(BLOB)
REPO = Repository("registry.invalid", "r")
FAST = Options(retry=Retry(attempts=2, min_wait=0.01, patience=1.0), span_timeout=2, read_timeout=2)
DEAD = Endpoint("http", "127.0.0.1:1", namespace=REPO.host)


def piece(asked: Asked, blob: bytes = BLOB) -> bytes:
    """What a good server answers to a range request."""
    start, end = (int(part) for part in asked.headers["range"].removeprefix("bytes=").split("-"))
    data = blob[start : end + 1]
    return reply("206 Partial", data, Content_Range=f"bytes {start}-{end}/{len(blob)}")


def mirror(server: BadServer) -> Endpoint:
    """The server as a mirror of REPO's registry."""
    return Endpoint("http", server.host, namespace=REPO.host)


@contextmanager
def reading(
    *endpoints: Endpoint, options: Options = FAST, login: tuple[str, str] | None = None
) -> Iterator[tuple[BlobReader, RegistryClient]]:
    """A reader of the blob that finds these endpoints."""
    with (
        RegistryClient(options, lambda _host: login, lambda _host: endpoints) as client,
        ConnectionPool(options) as pool,
    ):
        yield BlobReader(client, pool, REPO, DIGEST, len(BLOB)), client


def get(reader: BlobReader, start: int = 100, end: int = 5000, seconds: float = 10) -> bytes:
    """A range."""
    return bytes(reader.read(start, end, time.monotonic() + seconds))


def starts(server: BadServer) -> list[int]:
    """Where the ranges begin that it was asked for."""
    return [int(each.headers["range"].removeprefix("bytes=").partition("-")[0]) for each in server.asked]


def test_a_span_goes_on_at_the_next_from_the_byte_where_a_mirror_broke() -> None:
    """Half of the body comes from the mirror, the rest, and no byte twice, from the registry."""
    with (
        bad_server(lambda asked: piece(asked)[:-600_000]) as bad,
        bad_server(piece) as home,
        reading(mirror(bad), Endpoint("http", home.host)) as (reader, _),
    ):
        assert get(reader, 0, 1 << 20) == BLOB[: 1 << 20]
    assert starts(bad) == [0]
    assert len(home.asked) == 1
    assert starts(home)[0] >= 256 << 10


@pytest.mark.parametrize(
    "answer",
    [lambda _: reply("500 Broken"), lambda _: None, lambda _: b"no http\r\n\r\n", lambda _: reply("401 No")],
    ids=["500", "silent", "no http", "401"],
)
def test_what_a_span_learns_of_a_mirror_spares_manifests_and_other_spans(answer: Answer) -> None:
    """It is asked once; then other spans, and manifests, go to the registry at once; after a time it is back."""
    broken = threading.Event()
    broken.set()
    now = [0.0]
    with (
        bad_server(lambda asked: answer(asked) if broken.is_set() else piece(asked)) as bad,
        bad_server(lambda asked: piece(asked) if "range" in asked.headers else reply("200 OK", BLOB)) as home,
        reading(mirror(bad), Endpoint("http", home.host)) as (reader, client),
    ):
        client.router.breaker = Breaker(lambda: now[0])
        for start in range(0, 500, 100):
            assert get(reader, start, start + 100) == BLOB[start : start + 100]
        client.fetch(REPO, Descriptor("application/x", DIGEST, len(BLOB)), len(BLOB))
        assert len(bad.asked) == 1
        assert len(home.asked) == 6
        broken.clear()
        now[0] += 61
        for _ in range(3):
            assert get(reader) == BLOB[100:5000]
        assert len(bad.asked) == 4
        assert len(home.asked) == 6


def test_a_mirror_with_other_bytes_costs_one_span_and_is_asked_no_more_for_this_blob() -> None:
    """Whoever checks the digest says so once; from then on the bytes are the registry's."""
    other = bytes(len(BLOB))

    def checked(view: memoryview) -> None:
        if not any(view):
            raise Integrity("span 0: its bytes have another digest")

    with (
        bad_server(lambda asked: piece(asked, other)) as bad,
        bad_server(piece) as home,
        reading(mirror(bad), Endpoint("http", home.host)) as (reader, _),
    ):
        deadline = time.monotonic() + 10
        with pytest.raises(Integrity):
            reader.read_range(0, 1000, checked, deadline)
        for _ in range(3):
            reader.read_range(0, 1000, checked, deadline)
    assert len(bad.asked) == 1
    assert len(home.asked) == 3


def test_mirrors_are_asked_again_when_the_registry_is_away() -> None:
    """The one mirror failed a moment ago, the registry is dead: the span still comes, from the mirror."""
    with (
        bad_server(lambda asked: reply("503 Later") if asked.number == 0 else piece(asked)) as bad,
        reading(mirror(bad), Endpoint("http", "127.0.0.1:1")) as (reader, _),
    ):
        assert get(reader) == BLOB[100:5000]
        assert get(reader) == BLOB[100:5000]


def test_nobody_has_it() -> None:
    """The error is the registry's, and names it and the blob."""
    with (
        bad_server(lambda _: reply("404 Not Found")) as home,
        reading(DEAD, Endpoint("http", home.host)) as (reader, _),
        pytest.raises(NotFound, match=rf"{home.host}/r: blob {DIGEST}"),
    ):
        get(reader)


@pytest.mark.parametrize("answer", [reply("404 Not Found"), reply("200 OK", BLOB)], ids=["404", "whole only"])
def test_a_mirror_without_the_blob_is_asked_once_for_it(answer: bytes) -> None:
    """One that has not got it, or gives it whole only: its next spans come from the registry; manifests as before."""
    far = Descriptor("application/x", DIGEST, len(BLOB))
    with (
        pytest.MonkeyPatch.context() as patch,
        bad_server(lambda _: answer) as bad,
        bad_server(lambda asked: piece(asked) if "range" in asked.headers else reply("200 OK", BLOB)) as home,
        reading(mirror(bad), Endpoint("http", home.host)) as (reader, client),
    ):
        patch.setattr("soci_snapshotter.registry.blobroute._SKIP", 10)
        for _ in range(3):
            assert get(reader) == BLOB[100:5000]
        assert len(bad.asked) == 1
        assert len(home.asked) == 3
        client.fetch(REPO, far, len(BLOB))
        assert len(bad.asked) == 2


def test_failures_leave_no_connection_taken() -> None:
    """One connection allowed, and every way to fail: the request after it still finds it free."""
    answers: list[bytes | None] = [
        b"no http\r\n\r\n",
        reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"'),
        reply("403 Forbidden"),
        reply("302 Found", Location="http://127.0.0.1:1/x"),
        reply("302 Found", Location="ftp://x"),
        reply("206 Partial", b"x", Content_Range="bytes 7-7/9"),
        reply("206 Partial", b"x" * 4900, Content_Range=f"bytes 100-4999/{len(BLOB)}")[:-100],
        reply("503 Later", b"x" * 100_000),
        reply("200 OK", BLOB, Content_Encoding="gzip"),
        None,
        b"",
    ]
    options = Options(retry=Retry(attempts=0), span_timeout=0.3, connections=1)
    with (
        bad_server(
            lambda asked: answers[asked.number] if asked.number < len(answers) else piece(asked)
        ) as home,
        reading(Endpoint("http", home.host), options=options) as (reader, _),
    ):
        for _ in answers:
            with pytest.raises(Remote, match="r: blob sha256:"):
                get(reader)
        with pytest.raises(ZeroDivisionError):
            reader.read_range(0, 10, lambda _: 1 // 0, time.monotonic() + 5)
        assert get(reader, seconds=5) == BLOB[100:5000]


def test_each_place_has_the_namespace_its_header_and_its_own_redirect() -> None:
    """?ns= on every request of a mirror and on none of the registry; hosts.toml's fields stay with their host; where a
    place redirected to is asked directly the next time."""
    with bad_server(piece) as store:

        def go(asked: Asked) -> bytes:
            return reply(
                "307 Temporary Redirect", Location=f"http://{store.host}{asked.path.partition('?')[0]}"
            )

        with bad_server(go) as bad, bad_server(go) as home:
            cache = Endpoint(
                "http", bad.host, path="/proxy/v2", namespace=REPO.host, headers=(("x-k", "MARK"),)
            )
            with reading(cache, Endpoint("http", home.host)) as (reader, client):
                get(reader)
                get(reader)
                client.router.breaker.doubt(DIGEST)
                get(reader)
                get(reader)
    assert [asked.path for asked in bad.asked] == [f"/proxy/v2/r/blobs/{DIGEST}?ns=registry.invalid"]
    assert [asked.path for asked in home.asked] == [f"/v2/r/blobs/{DIGEST}"]
    assert [asked.path.partition("/r/")[0] for asked in store.asked] == [
        "/proxy/v2",
        "/proxy/v2",
        "/v2",
        "/v2",
    ]
    assert [asked.headers.get("x-k") for asked in (*bad.asked, *home.asked, *store.asked)] == [
        "MARK",
        *[None] * 5,
    ]


def test_a_request_that_takes_too_long_is_replaced() -> None:
    """request_timeout bounds one request: what is missing then is asked for by another, from where the first was."""

    def half(asked: Asked) -> bytes:
        whole = piece(asked)
        return Stalled(whole[:-600_000]) if asked.number == 0 else whole

    options = Options(retry=Retry(attempts=8, min_wait=0.01), span_timeout=30, request_timeout=1)
    with bad_server(half) as home, reading(Endpoint("http", home.host), options=options) as (reader, _):
        assert get(reader, 0, 1 << 20) == BLOB[: 1 << 20]
    assert len(home.asked) == 2
    assert starts(home)[1] >= 256 << 10


@pytest.mark.parametrize(
    "answer",
    [
        reply("206 Partial", BLOB[:1000]),
        reply("206 Partial")[:-2] + b"X: " + b"x" * 1000,
        reply("503 No", b"x" * 1000),
    ],
    ids=["body", "head", "error"],
)
def test_who_drips_is_left(answer: bytes) -> None:
    """A byte now and then, in the head, the body or an error's body, is no answer: the request ends in its time."""
    options = Options(retry=Retry(attempts=0), span_timeout=5)
    with bad_server(lambda _: Dripped(answer)) as bad, bad_server(piece) as home:
        slow = replace(mirror(bad), request_timeout=0.4)
        with reading(slow, Endpoint("http", home.host), options=options) as (reader, _):
            assert get(reader, seconds=20) == BLOB[100:5000]
        with (
            reading(Endpoint("http", bad.host), options=options) as (reader, _),
            pytest.raises(Remote, match=f"r: blob {DIGEST}"),
        ):
            get(reader, seconds=0.3)
        with (
            reading(replace(slow, namespace=""), options=options) as (_, client),
            pytest.raises((Remote, Integrity), match=f"r: blob {DIGEST}"),
        ):
            client.fetch(REPO, Descriptor("application/x", DIGEST, 1000), 1000)


def test_a_mirror_s_own_request_timeout() -> None:
    """A mirror that says nothing is left after its request_timeout, which is shorter than everything else."""
    options = Options(retry=FAST.retry, span_timeout=30)
    with bad_server(lambda _: None) as bad, bad_server(piece) as home:
        slow = Endpoint("http", bad.host, request_timeout=0.3)
        with reading(slow, Endpoint("http", home.host), options=options) as (reader, _):
            assert get(reader) == BLOB[100:5000]


def test_what_nobody_wants_any_more_is_cut_off() -> None:
    """close ends a request that waits for bytes, long before any timeout, and blames no mirror for it."""
    asked = threading.Event()

    def silent(_: Asked) -> None:
        asked.set()

    options = Options(retry=FAST.retry, span_timeout=60)
    with bad_server(silent) as bad, reading(mirror(bad), DEAD, options=options) as (reader, client):
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(get, reader, seconds=60)
            assert asked.wait(10)
            started = time.monotonic()
            reader.close()
            with pytest.raises(Remote):
                waiting.result(30)
        assert time.monotonic() - started < 20
        assert client.router.breaker.failing([bad.host]) == set()


def test_no_more_connections_than_configured() -> None:
    """Eight readers, two connections: never a third, and everybody gets his bytes."""
    lock = threading.Lock()
    busy, most = 0, 0

    def counted(asked: Asked) -> bytes:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1
        return piece(asked)

    options = Options(retry=Retry(attempts=0), span_timeout=20, connections=2)
    with (
        bad_server(counted) as home,
        reading(Endpoint("http", home.host), options=options) as (reader, _),
        ThreadPoolExecutor(8) as threads,
    ):
        waiting = [threads.submit(get, reader, seconds=30) for _ in range(24)]
        assert all(each.result(30) == BLOB[100:5000] for each in waiting)
    assert most == 2


def test_waiting_for_a_connection_ends_at_the_deadline() -> None:
    """The only connection is taken by a silent server: Remote naming the host, in time; then it is free again."""
    silent, asked = threading.Event(), threading.Event()

    def answer(request: Asked) -> bytes | None:
        asked.set()
        return piece(request) if silent.is_set() else None

    options = Options(retry=Retry(attempts=0), span_timeout=20, connections=1)
    with (
        bad_server(answer) as home,
        reading(Endpoint("http", home.host), options=options) as (reader, _),
        ThreadPoolExecutor(1) as threads,
    ):
        first = threads.submit(get, reader, seconds=3)
        assert asked.wait(10)
        with pytest.raises(Remote, match=rf"timed out.*{home.host}"):
            get(reader, seconds=0.2)
        with pytest.raises(Remote, match="timed out"):
            first.result(30)
        silent.set()
        assert get(reader) == BLOB[100:5000]


def test_a_thousand_spans_of_an_image_cost_one_token_and_no_more_connections_than_configured(
    tmp_path: Path,
) -> None:
    """Four layers, 32 threads, a registry that wants tokens: one exchange, eight sockets."""
    login = ("user", "s3cret")
    layers = [BLOB[size:] for size in (0, 1, 2, 3)]
    with (
        start_token_registry(tmp_path / "r", login, "refresh") as (registry, tokens),
        Proxy(registry.address) as proxy,
    ):
        repo = Repository(proxy.host, "team/app")
        options = Options(connections=8)
        with RegistryClient(options, lambda host: login if host == proxy.host else None) as client:
            for layer in layers:
                described = Descriptor("application/x", digests.sha256(layer), len(layer))
                client.push_blob(repo, described, lambda layer=layer: (layer,))  # type: ignore[misc]
        before, spent = proxy.connections, len(tokens.asked)
        with (
            RegistryClient(options, lambda host: login if host == proxy.host else None) as client,
            ConnectionPool(options) as pool,
        ):
            readers = [BlobReader(client, pool, repo, digests.sha256(layer), len(layer)) for layer in layers]

            def fetch(number: int) -> bool:
                which, start = number % 4, number * 2000
                return get(readers[which], start, start + 2000, 60) == layers[which][start : start + 2000]

            with ThreadPoolExecutor(32) as threads:
                assert all(threads.map(fetch, range(1000)))
        assert tokens.asked[spent:] == ["GET basic repository:team/app:pull"]
        assert proxy.connections - before <= 8


def test_at_the_deadline_no_other_host_is_asked() -> None:
    """A mirror was silent until then: the error names it, and neither the next mirror nor the registry is asked."""
    options = replace(FAST, span_timeout=20)
    with (
        bad_server(lambda _: None) as silent,
        bad_server(piece) as other,
        bad_server(piece) as home,
        reading(mirror(silent), mirror(other), Endpoint("http", home.host), options=options) as (reader, _),
    ):
        with pytest.raises(Remote, match=f"{silent.host}.*no time was left"):
            get(reader, seconds=0.3)
        assert other.asked == home.asked == []
        assert len(silent.asked) == 1


def test_a_token_service_that_hangs_costs_no_more_than_the_deadline() -> None:
    """Whoever reads a span hears of it at its deadline, not when the service's own time is over; and the token that
    comes late is the next one's."""
    late = threading.Event()

    def registry(asked: Asked) -> bytes:
        if asked.path.startswith("/token"):
            late.wait(30)
            return reply("200 OK", b'{"token": "t"}')
        if asked.headers.get("authorization") != "Bearer t":
            realm = f'Bearer realm="http://{asked.headers["host"]}/token"'
            return reply("401 Unauthorized", WWW_Authenticate=realm)
        return piece(asked)

    options = replace(FAST, read_timeout=30, span_timeout=30)
    with (
        bad_server(registry) as home,
        reading(Endpoint("http", home.host), options=options, login=("me", "pw")) as (reader, _),
    ):
        try:
            for _ in range(2):
                with pytest.raises(Remote, match="no token"):
                    get(reader, seconds=0.3)
        finally:
            late.set()
        assert get(reader) == BLOB[100:5000]
        assert sum(asked.path.startswith("/token") for asked in home.asked) == 1


def test_spans_and_manifests_go_through_the_proxy() -> None:
    """Plain http: the whole URL is asked of the proxy, which alone gets its user and password; NO_PROXY goes around."""
    with bad_server(lambda asked: piece(asked) if "range" in asked.headers else reply("200 OK", BLOB)) as way:
        proxies = from_environment({"HTTP_PROXY": f"http://me:pw@{way.host}"})
        options = Options(retry=FAST.retry, proxies=proxies)
        home = Endpoint("http", REPO.host)
        with reading(home, options=options, login=("u", "p")) as (reader, client):
            assert get(reader) == BLOB[100:5000]
            assert get(reader) == BLOB[100:5000]
            client.fetch(REPO, Descriptor("application/x", DIGEST, len(BLOB)), len(BLOB))
    assert [asked.path for asked in way.asked] == [f"http://{REPO.host}/v2/r/blobs/{DIGEST}"] * 3
    assert [asked.headers["host"] for asked in way.asked] == [REPO.host] * 3
    assert [asked.headers["proxy-authorization"] for asked in way.asked] == ["Basic bWU6cHc="] * 3
    assert not [asked for asked in way.asked if "authorization" in asked.headers]
    around = from_environment({"HTTP_PROXY": f"http://{way.host}", "NO_PROXY": ".invalid"})
    with (
        reading(home, options=Options(retry=FAST.retry, proxies=around)) as (reader, _),
        pytest.raises(Remote, match="host name not found"),
    ):
        get(reader)
    assert len(way.asked) == 3


@pytest.mark.parametrize("secret", ["", "me:MARKED@"])
def test_a_proxy_that_refuses_is_named(secret: str) -> None:
    """CONNECT answered by 407: Remote naming the proxy, at once, without its password; spans and manifests alike."""
    with bad_server(lambda _: reply("407 Proxy Authentication Required")) as way:
        proxies = from_environment({"HTTPS_PROXY": f"http://{secret}{way.host}"})
        with reading(Endpoint("https", REPO.host), options=Options(proxies=proxies)) as (reader, client):
            with pytest.raises(Remote, match=f"HTTP 407.*{way.host}") as span:
                get(reader)
            with pytest.raises(Remote, match=f"HTTP 407.*{way.host}") as manifest:
                client.fetch(REPO, Descriptor("application/x", DIGEST, len(BLOB)), len(BLOB))
    assert [asked.method for asked in way.asked] == ["CONNECT"] * 2
    assert "MARKED" not in str(span.value) + str(manifest.value)
