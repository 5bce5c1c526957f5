"""TLS with registries and mirrors: whom it trusts, what it shows to whom, and what it says when it does not like it."""

from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from harness.badserver import Asked, bad_server, reply
from harness.tlsfront import Authority, make_authority

from soci_snapshotter.errors import Config, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.hosts import Endpoint, Tls
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.proxies import from_environment
from soci_snapshotter.registry.ranges import BlobReader
from soci_snapshotter.registry.urls import Repository

BLOB = hashlib.shake_128(b"tls").digest(10_000)
DIGEST = digests.sha256(BLOB)
WANTED = Descriptor("application/x", DIGEST, len(BLOB))
REPO = Repository("registry.test", "r")
FAST = Options(retry=Retry(attempts=2, min_wait=0.01), span_timeout=5, read_timeout=5)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A CA that only these tests know."""
    return make_authority(tmp_path_factory.mktemp("ca"))


def signed(authority: Authority, name: str, *, days: int = 2) -> ssl.SSLContext:
    """A server's context with a certificate for `name`, which ends in so many days."""
    stem = authority.directory / f"{name}{days}"
    (authority.directory / "san").write_text(f"subjectAltName=DNS:{name}\n")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    run = ["openssl", "req", "-new", *curve, "-nodes", "-subj", f"/CN={name}"]
    subprocess.run([*run, "-keyout", f"{stem}.key", "-out", f"{stem}.csr"], check=True, capture_output=True)
    sign = ["openssl", "x509", "-req", "-in", f"{stem}.csr", "-out", f"{stem}.crt", "-days", str(days)]
    issuer = ["-CA", str(authority.ca), "-CAkey", str(authority.directory / "ca.key"), "-CAcreateserial"]
    subprocess.run(
        [*sign, *issuer, "-extfile", str(authority.directory / "san")], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{stem}.crt", f"{stem}.key")
    return context


def answer(asked: Asked) -> bytes:
    """What a good registry says to the request for a range, or for all."""
    if "range" not in asked.headers:
        return reply("200 OK", BLOB)
    start, end = (int(part) for part in asked.headers["range"].removeprefix("bytes=").split("-"))
    return reply("206 Partial", BLOB[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(BLOB)}")


def at(host: str, authority: Authority, **more: object) -> Endpoint:
    """The server by the name that its certificate has."""
    name = "localhost:" + host.partition(":")[2]
    return Endpoint("https", name, tls=Tls(ca=(str(authority.ca),)), **more)  # type: ignore[arg-type]


@contextmanager
def reading(*endpoints: Endpoint, options: Options = FAST) -> Iterator[tuple[BlobReader, RegistryClient]]:
    """A reader of the blob that finds these endpoints."""
    with (
        RegistryClient(options, None, lambda _host: endpoints) as client,
        ConnectionPool(options) as pool,
    ):
        yield BlobReader(client, pool, REPO, DIGEST, len(BLOB)), client


def get(reader: BlobReader) -> bytes:
    """A range."""
    return bytes(reader.read(100, 5000, time.monotonic() + 20))


def both(reader: BlobReader, client: RegistryClient) -> list[Callable[[], object]]:
    """The two ways in which the blob is asked for."""
    return [lambda: get(reader), lambda: client.fetch(REPO, WANTED, len(BLOB))]


@pytest.mark.parametrize(
    ("name", "days", "why"),
    [("localhost", -1, "certificate has expired"), ("other.test", 2, "localhost.*match|mismatch.*localhost")],
    ids=["expired", "another name"],
)
def test_a_certificate_that_is_not_right(authority: Authority, name: str, days: int, why: str) -> None:
    """Expired, or for another name: Remote naming host, blob and reason, at once; nothing is asked over it."""
    with bad_server(answer, tls=signed(authority, name, days=days)) as server:
        own = at(server.host, authority)
        with reading(own) as (reader, client):
            for ask in both(reader, client):
                with pytest.raises(Remote, match=why) as caught:
                    ask()
                assert f"{own.host}/r: blob {DIGEST}: TLS with {own.host} failed" in str(caught.value)
    assert server.asked == []


def test_a_redirect_target_with_a_wrong_certificate_is_named(authority: Authority) -> None:
    """The error names the host that the registry redirected to, whose certificate it is."""
    with bad_server(answer, tls=signed(authority, "other.test")) as store:
        place = "localhost:" + store.host.partition(":")[2]

        def go(_: Asked) -> bytes:
            return reply("307 Temporary Redirect", Location=f"https://{place}/x?signature=MARKED")

        with (
            bad_server(go, tls=signed(authority, "localhost")) as home,
            reading(at(home.host, authority)) as (reader, client),
        ):
            for ask in both(reader, client):
                with pytest.raises(Remote, match=f"r: blob {DIGEST}: TLS with {place} failed") as caught:
                    ask()
                assert "MARKED" not in str(caught.value)


def test_a_redirect_from_https_to_http_is_refused(authority: Authority) -> None:
    """Remote naming both hosts, and the other one is not even connected to."""
    with bad_server(answer) as store:

        def go(_: Asked) -> bytes:
            return reply("307 Temporary Redirect", Location=f"http://{store.host}/x")

        with (
            bad_server(go, tls=signed(authority, "localhost")) as home,
            reading(at(home.host, authority)) as (reader, client),
        ):
            for ask in both(reader, client):
                with pytest.raises(Remote, match=rf"r: blob {DIGEST}: .*from https to http .127\.0\.0\.1"):
                    ask()
    assert store.asked == []


def test_a_mirror_with_a_wrong_certificate_is_passed_over(authority: Authority) -> None:
    """The registry gives the bytes; skip_verify for the mirror alone makes it good."""
    with (
        bad_server(answer, tls=signed(authority, "other.test")) as bad,
        bad_server(answer, tls=signed(authority, "localhost")) as home,
    ):
        own = at(home.host, authority)
        with reading(at(bad.host, authority), own) as (reader, _):
            assert get(reader) == BLOB[100:5000]
        assert (len(bad.asked), len(home.asked)) == (0, 1)
        careless = Endpoint("https", bad.host, tls=Tls(skip_verify=True))
        with reading(careless, own) as (reader, _):
            assert get(reader) == BLOB[100:5000]
        assert (len(bad.asked), len(home.asked)) == (1, 1)


def test_client_certificates_are_for_their_host(authority: Authority) -> None:
    """A mirror that wants a certificate gets the one that hosts.toml names for it; the store behind it gets none."""
    certificate, key = authority.issue("me", client=True)
    seen: list[object] = []
    wanting, asking = signed(authority, "localhost"), signed(authority, "store.test")
    for context in (wanting, asking):
        context.load_verify_locations(authority.ca)
    wanting.verify_mode = ssl.CERT_REQUIRED
    asking.verify_mode = ssl.CERT_OPTIONAL
    asking.sni_callback = lambda sock, _name, _context: seen.append(sock)
    with bad_server(answer, tls=asking) as store:

        def go(_: Asked) -> bytes:
            return reply("307 Temporary Redirect", Location=f"https://{store.host}/x")

        with bad_server(go, tls=wanting) as home:
            tls = Tls((str(authority.ca),), ((str(certificate), str(key)),), skip_verify=True)
            own = at(home.host, authority)
            with reading(Endpoint("https", own.host, tls=tls)) as (reader, _):
                assert get(reader) == BLOB[100:5000]
            with reading(own, options=Options(retry=Retry(attempts=0))) as (reader, _), pytest.raises(Remote):
                get(reader)
        assert len(home.asked) == 1
        assert len(store.asked) == 1


def test_a_tls_session_is_taken_up_again(authority: Authority) -> None:
    """A server that closes after each answer: the second handshake is a short one, and a third."""
    with (
        bad_server(answer, tls=signed(authority, "localhost")) as server,
        reading(at(server.host, authority)) as (reader, _),
    ):
        for _ in range(3):
            assert get(reader) == BLOB[100:5000]
    assert server.resumed == [False, True, True]


def test_a_renewed_ca_is_read_again(authority: Authority, tmp_path: Path) -> None:
    """The file changes: connections made from then on trust what is in it; a file that is broken changes nothing."""
    file = tmp_path / "ca.pem"
    other = make_authority(tmp_path / "other")
    file.write_bytes(other.ca.read_bytes())
    now = [time.monotonic()]
    with (
        pytest.MonkeyPatch.context() as patch,
        bad_server(answer, tls=signed(authority, "localhost")) as server,
    ):
        patch.setattr("soci_snapshotter.registry.contexts.time.monotonic", lambda: now[0])
        own = Endpoint("https", at(server.host, authority).host, tls=Tls(ca=(str(file),)))
        with reading(own) as (reader, _):
            with pytest.raises(Remote, match=r"self-signed|unable to get"):
                get(reader)
            file.write_bytes(authority.ca.read_bytes())
            now[0] += 11
            assert get(reader) == BLOB[100:5000]
            file.write_bytes(b"half")
            now[0] += 11
            assert get(reader) == BLOB[100:5000]
        with reading(own) as (reader, _), pytest.raises(Config, match=str(file)):
            get(reader)


def test_https_goes_through_connect(authority: Authority) -> None:
    """By a proxy the handshake is with the registry, whose name is all that the proxy is told, spans and manifests alike;
    the proxy's password goes to the proxy only.
    """
    with (
        bad_server(answer, tls=signed(authority, "registry.test")) as server,
        _tunnel(server.host) as (way, heads),
    ):
        proxies = from_environment({"HTTPS_PROXY": f"http://me:pw@{way}"})
        options = Options(retry=FAST.retry, proxies=proxies)
        own = Endpoint("https", "registry.test", tls=Tls(ca=(str(authority.ca),)))
        with reading(own, options=options) as (reader, client):
            for ask in both(reader, client):
                ask()
            assert get(reader) == BLOB[100:5000]
    assert {head.partition(" HTTP/")[0] for head in heads} == {"CONNECT registry.test:443"}
    assert all("proxy-authorization: basic bwu6chc=" in head.lower() for head in heads)
    assert not [asked for asked in server.asked if "proxy-authorization" in asked.headers]


def test_a_proxy_by_tls(authority: Authority) -> None:
    """An https proxy: TLS to the proxy, and TLS to the registry within it."""
    context = signed(authority, "localhost")
    with (
        bad_server(answer, tls=signed(authority, "registry.test")) as server,
        _tunnel(server.host, context) as (way, heads),
    ):
        tls = Tls(ca=(str(authority.ca),))
        proxies = from_environment({"HTTPS_PROXY": f"https://localhost:{way.partition(':')[2]}"})
        options = Options(retry=FAST.retry, proxies=proxies, tls=tls)
        with reading(Endpoint("https", "registry.test", tls=tls), options=options) as (reader, client):
            for ask in both(reader, client):
                ask()
    assert len(heads) == 2


@contextmanager
def _tunnel(target: str, tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, list[str]]]:
    """A proxy whose every CONNECT leads to `target`; its address, and the heads that it was sent."""
    heads: list[str] = []
    host, _, port = target.partition(":")

    def serve(plain: socket.socket) -> None:
        with (
            suppress(OSError),
            plain if tls is None else tls.wrap_socket(plain, server_side=True) as client,
        ):
            head = b""
            while b"\r\n\r\n" not in head:
                byte = client.recv(1)
                if not byte:
                    return
                head += byte
            heads.append(head.decode())
            with socket.create_connection((host, int(port))) as upstream:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=_carry, args=(upstream, client), daemon=True)
                back.start()
                _carry(client, upstream)
                back.join(5)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        ending = threading.Event()

        def accept() -> None:
            while not ending.is_set():
                with suppress(OSError):
                    client, _ = listener.accept()
                    threading.Thread(target=serve, args=(client,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", heads
        finally:
            ending.set()
            with suppress(OSError):
                socket.create_connection(listener.getsockname()).close()
            thread.join(5)


def _carry(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
