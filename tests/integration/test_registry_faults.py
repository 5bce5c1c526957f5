"""Registries that misbehave: the right bytes or a clear error, never wrong bytes, and credentials stay at home."""

from __future__ import annotations

import base64
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from harness.badserver import Asked, BadServer, bad_server, reply

from soci_snapshotter.errors import Integrity, NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.hosts import Tls
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.proxies import from_environment
from soci_snapshotter.registry.ranges import BlobReader

BLOB = bytes(range(256)) * 40
DIGEST = digests.sha256(BLOB)
MANIFEST = oci.encode(
    oci.Manifest(schema_version=2, config=Descriptor(oci.CONFIG, digests.sha256(b"{}"), 2), layers=())
)
SECRET = ("user", "s3cret")
FAST = Options(retry=Retry(attempts=2, min_wait=0.01, patience=1.0), span_timeout=0.5, read_timeout=0.5)


def piece(asked: Asked) -> bytes:
    """What a good server answers to a range request."""
    start, end = (int(part) for part in asked.headers["range"].removeprefix("bytes=").split("-"))
    data = BLOB[start : end + 1]
    return reply(
        "206 Partial Content", data, Content_Range=f"bytes {start}-{start + len(data) - 1}/{len(BLOB)}"
    )


def read(server: BadServer, start: int = 100, end: int = 5000, credentials: bool = False) -> bytes:
    """A range of the blob, as a flight reads it."""
    reference = references.parse(f"{server.host}/r:1")
    provider = (lambda host: SECRET if host == server.host else None) if credentials else None
    with RegistryClient(FAST, provider) as client:
        pool = ConnectionPool(client.options)
        try:
            reader = BlobReader(client, pool, reference, DIGEST, len(BLOB))
            return bytes(reader.read(start, end, time.monotonic() + 5))
        finally:
            pool.close()


def short(asked: Asked) -> bytes:
    """The right head, half of the body."""
    return piece(asked)[:-2000]


def wrong_place(asked: Asked) -> bytes:
    """Another range than was asked for."""
    return reply("206 Partial Content", BLOB[:4900], Content_Range=f"bytes 0-4899/{len(BLOB)}")


def multipart(asked: Asked) -> bytes:
    """multipart/byteranges, which nobody asked for."""
    return reply("206 Partial Content", b"--x--", Content_Type="multipart/byteranges; boundary=x")


@pytest.mark.parametrize(
    "answer", [wrong_place, multipart, short, lambda _: None, lambda _: b"not http\r\n\r\n"]
)
def test_wrong_answers_to_a_range_are_errors(answer: Callable[[Asked], bytes | None]) -> None:
    """Another place, multipart, always short, stalled, no HTTP at all: Remote naming host and blob, in bounded time."""
    started = time.monotonic()
    with bad_server(answer) as server, pytest.raises(Remote, match="r: blob sha256:") as caught:
        read(server)
    assert server.host in str(caught.value)
    assert time.monotonic() - started < 6


def test_short_bodies_are_continued() -> None:
    """A body that breaks off is asked for again from where it broke; the bytes are right."""
    with bad_server(
        lambda asked: short(asked) if len(server_asked) == 0 or asked.number == 0 else piece(asked)
    ) as server:
        server_asked = server.asked
        assert read(server) == BLOB[100:5000]
    assert len(server.asked) == 2


def test_the_whole_blob_instead_of_a_range_is_cut() -> None:
    """200 with everything: the range is taken out of it."""
    with bad_server(lambda _: reply("200 OK", BLOB)) as server:
        assert read(server) == BLOB[100:5000]


def test_failures_that_pass_are_retried() -> None:
    """503, then 429 with Retry-After, then the bytes."""
    answers = [reply("503 Service Unavailable"), reply("429 Too Many Requests", Retry_After="0")]
    with bad_server(lambda asked: answers[asked.number] if asked.number < 2 else piece(asked)) as server:
        assert read(server) == BLOB[100:5000]
    assert len(server.asked) == 3


def test_credentials_do_not_follow_a_redirect() -> None:
    """Basic credentials go to the registry that asked; the other host of a redirect sees none, and is remembered."""
    with bad_server(piece) as store:

        def registry(asked: Asked) -> bytes:
            if "authorization" not in asked.headers:
                return reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"')
            return reply("307 Temporary Redirect", Location=f"http://{store.host}/signed?token=abc")

        with bad_server(registry) as home:
            assert read(home, credentials=True) == BLOB[100:5000]
    expected = "Basic " + base64.b64encode(":".join(SECRET).encode()).decode()
    assert [asked.headers.get("authorization") for asked in home.asked] == [None, expected]
    assert [asked.headers.get("authorization") for asked in store.asked] == [None]


def test_an_expired_signed_url_is_renewed() -> None:
    """403 from the remembered target: the registry is asked for a new one."""
    valid = ["/one"]

    def store_answer(asked: Asked) -> bytes:
        return piece(asked) if asked.path == valid[0] else reply("403 Forbidden")

    with bad_server(store_answer) as store:
        go = [f"http://{store.host}/one", f"http://{store.host}/two"]
        with bad_server(lambda asked: reply("302 Found", Location=go[asked.number])) as home:
            reference = references.parse(f"{home.host}/r:1")
            with RegistryClient(FAST) as client:
                pool = ConnectionPool(client.options)
                reader = BlobReader(client, pool, reference, DIGEST, len(BLOB))
                assert reader.read(0, 100, time.monotonic() + 5) == BLOB[:100]
                valid[0] = "/two"
                assert reader.read(100, 300, time.monotonic() + 5) == BLOB[100:300]
                pool.close()
        assert len(home.asked) == 2


def test_a_signed_url_that_expires_under_two_flights_is_renewed_for_both() -> None:
    """403 to the one, which asks the registry again, and only then 403 to the other: it does so too."""
    expired, renewed = threading.Event(), threading.Event()
    both = threading.Barrier(2)

    def store_answer(asked: Asked) -> bytes:
        if asked.path != "/one" or not expired.is_set():
            return piece(asked)
        if both.wait(10):  # the one of the two to whom it says 1, not 0
            renewed.wait(10)
        return reply("403 Forbidden")

    patient = replace(FAST, span_timeout=20)
    with bad_server(store_answer) as store:

        def registry(asked: Asked) -> bytes:
            if asked.number:
                renewed.set()
            return reply("302 Found", Location=f"http://{store.host}/{'two' if asked.number else 'one'}")

        with (
            bad_server(registry) as home,
            RegistryClient(patient) as client,
            ConnectionPool(patient) as pool,
            ThreadPoolExecutor(2) as threads,
        ):
            reader = BlobReader(client, pool, references.parse(f"{home.host}/r:1"), DIGEST, len(BLOB))
            assert reader.read(0, 100, time.monotonic() + 20) == BLOB[:100]
            expired.set()
            flights = [
                threads.submit(reader.read, start, start + 100, time.monotonic() + 20) for start in (100, 300)
            ]
            assert [each.result(30) for each in flights] == [BLOB[100:200], BLOB[300:400]]
        assert len(home.asked) == 3


LONG = "9" * 5000  # int() refuses more than 4300 digits


def test_a_length_of_thousands_of_digits_is_an_error_of_the_registry() -> None:
    """To a body it is more than is allowed; a head that says it says nothing, and the manifest itself is asked for."""
    wanted = Descriptor(oci.MANIFEST, digests.sha256(MANIFEST), len(MANIFEST))

    def answer(asked: Asked) -> bytes:
        named = {"Content_Type": oci.MANIFEST, "Docker_Content_Digest": wanted.digest}
        if asked.method == "HEAD" or "/blobs/" in asked.path:
            return reply("200 OK", Content_Length=LONG, **named)
        return reply("200 OK", MANIFEST, **named)

    with bad_server(answer) as server, RegistryClient(FAST) as client:
        reference = references.parse(f"{server.host}/r:1")
        assert client.resolve(reference) == wanted
        with pytest.raises(Remote, match="bytes announced") as caught:
            client.fetch(reference, Descriptor("application/x", DIGEST, len(BLOB)), len(BLOB))
    assert len(str(caught.value)) < 300


def test_no_certificate_is_read_while_the_session_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not the one for a proxy: a slow disk would hold up every request."""
    locked: list[bool] = []
    with bad_server(lambda _: reply("404 No")) as proxy:
        proxies = from_environment({"HTTP_PROXY": f"http://{proxy.host}"})
        options = replace(FAST, proxies=proxies, plain_http=lambda _: True)
        with RegistryClient(options) as client:
            session = client.session
            known = session._contexts.get

            def get(tls: Tls) -> ssl.SSLContext:
                locked.append(session._lock.locked())
                return known(tls)

            monkeypatch.setattr(session._contexts, "get", get)
            with pytest.raises(NotFound):
                client.resolve(references.parse("registry.invalid:5000/r:1"))
    assert locked
    assert not any(locked)


def test_redirect_loops_end() -> None:
    """A registry that redirects to itself: Remote naming host and blob after a bounded number of requests."""
    with (
        bad_server(lambda asked: reply("302 Found", Location=asked.path)) as server,
        RegistryClient(FAST) as client,
    ):
        with pytest.raises(Remote, match=rf"{server.host}/r: blob {DIGEST}: more than 5 redirects"):
            read(server)
        assert len(server.asked) < 15
        with pytest.raises(Remote, match=rf"{server.host}/r: manifest 1: more than 5 redirects"):
            client.resolve(references.parse(f"{server.host}/r:1"))


def test_a_blob_of_another_size_is_named() -> None:
    """The registry has more or fewer bytes than the descriptor says: Remote naming host, blob and both sizes."""
    blob = BLOB + b"x"

    def longer(asked: Asked) -> bytes:
        if "range" not in asked.headers:
            return reply("200 OK", blob)
        return piece(asked).replace(b"/%d" % len(BLOB), b"/%d" % len(blob))

    described = Descriptor("application/x", DIGEST, len(BLOB))
    for answer in (longer, lambda _: reply("200 OK", blob), lambda _: reply("200 OK", BLOB[:-1])):
        with bad_server(answer) as server, pytest.raises(Remote) as caught:
            read(server)
        assert f"{server.host}/r: blob {DIGEST}: " in str(caught.value)
        assert f"not the {len(BLOB)} of its descriptor" in str(caught.value)
    with (
        bad_server(longer) as server,
        RegistryClient(FAST) as client,
        pytest.raises((Remote, Integrity), match=rf"{server.host}/r: blob {DIGEST}"),
    ):
        client.fetch(references.parse(f"{server.host}/r:1"), described, 1 << 20)


@pytest.mark.parametrize(
    ("status", "kind", "word"), [(401, Remote, "password"), (403, Remote, "account"), (404, NotFound, "name")]
)
def test_refusals_name_host_repository_and_what_to_check(
    status: int, kind: type[Exception], word: str
) -> None:
    """One line with host, repository and what to check."""
    with (
        bad_server(lambda _: reply(f"{status} No")) as server,
        RegistryClient(FAST) as client,
        pytest.raises(kind, match=word) as caught,
    ):
        client.resolve(references.parse(f"{server.host}/team/app:1"))
    assert f"{server.host}/team/app" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_that_are_not_what_their_digest_says() -> None:
    """Other bytes under a digest, and an answer larger than announced: Integrity or Remote, nothing returned."""
    wanted = Descriptor(oci.MANIFEST, digests.sha256(MANIFEST), len(MANIFEST))
    for body in (b"x" * len(MANIFEST), MANIFEST + b"x" * 100):
        with (
            bad_server(lambda _, body=body: reply("200 OK", body)) as server,  # type: ignore[misc]
            RegistryClient(FAST) as client,
            pytest.raises((Integrity, Remote)),
        ):
            client.fetch(references.parse(f"{server.host}/r:1"), wanted, oci.MANIFEST_LIMIT)


def test_a_descriptor_over_the_limit_is_not_fetched() -> None:
    """Its size alone refuses it: no request is made."""
    huge = Descriptor(oci.MANIFEST, digests.sha256(MANIFEST), 1 << 40)
    with bad_server(lambda _: reply("200 OK", MANIFEST)) as server, RegistryClient(FAST) as client:
        with pytest.raises(Integrity):
            client.fetch(references.parse(f"{server.host}/r:1"), huge, oci.MANIFEST_LIMIT)
        assert server.asked == []


def test_bearer_tokens_are_fetched_once_and_renewed() -> None:
    """The challenge's realm gets the credentials, the token serves many reads, a rejected one is renewed."""
    granted = ["one"]

    def answer(asked: Asked) -> bytes:
        if asked.path.startswith("/token"):
            return reply("200 OK", b'{"token": "%s", "expires_in": 300}' % granted[0].encode())
        if asked.headers.get("authorization") != f"Bearer {granted[0]}":
            realm = (
                f'Bearer realm="http://{asked.headers["host"]}/token",service="s",scope="repository:r:pull"'
            )
            return reply("401 Unauthorized", WWW_Authenticate=realm)
        return piece(asked)

    with bad_server(answer) as server:
        reference = references.parse(f"{server.host}/r:1")
        with RegistryClient(FAST, lambda host: SECRET) as client:
            pool = ConnectionPool(client.options)
            reader = BlobReader(client, pool, reference, DIGEST, len(BLOB))
            for start in range(0, 1000, 100):
                assert reader.read(start, start + 100, time.monotonic() + 5) == BLOB[start : start + 100]
            assert sum(asked.path.startswith("/token") for asked in server.asked) == 1
            granted[0] = "two"
            assert reader.read(0, 100, time.monotonic() + 5) == BLOB[:100]
            assert sum(asked.path.startswith("/token") for asked in server.asked) == 2
            pool.close()


def test_a_realm_on_another_plain_host_gets_nothing() -> None:
    """A challenge whose realm is a metadata address over http: refused before anything is sent there."""
    realm = 'Bearer realm="http://169.254.169.254/token",service="s"'
    with (
        bad_server(lambda _: reply("401 Unauthorized", WWW_Authenticate=realm)) as server,
        pytest.raises(Remote, match="realm"),
    ):
        read(server, credentials=True)
