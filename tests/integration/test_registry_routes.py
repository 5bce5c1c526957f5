"""Endpoints of hosts.toml against servers that misbehave: who is asked in which order, and who is told what."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from harness.badserver import Asked, BadServer, bad_server, reply

from soci_snapshotter.errors import Config, NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.hosts import Capability, Endpoint, Tls
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options

MANIFEST = oci.encode(
    oci.Manifest(schema_version=2, config=Descriptor(oci.CONFIG, digests.sha256(b"{}"), 2), layers=())
)
WANTED = Descriptor(oci.MANIFEST, digests.sha256(MANIFEST), len(MANIFEST))
REF = references.parse("registry.invalid/r:1")
FAST = Options(retry=Retry(attempts=1, min_wait=0.01), mirror_retry=Retry(attempts=0), read_timeout=0.5)
PULL = frozenset({Capability.PULL, Capability.RESOLVE})


def good(asked: Asked) -> bytes:
    """The manifest, whatever is asked."""
    del asked
    return reply("200 OK", MANIFEST, Content_Type=oci.MANIFEST)


def mirror(server: BadServer, **more: object) -> Endpoint:
    """An endpoint that may only be pulled from."""
    return Endpoint("http", server.host, capabilities=PULL, namespace="registry.invalid", **more)  # type: ignore[arg-type]


def client(*endpoints: Endpoint, login: tuple[str, str] | None = None) -> RegistryClient:
    """A client that finds these endpoints for every registry."""
    found: Sequence[Endpoint] = endpoints
    return RegistryClient(FAST, lambda _host: login, lambda _host: found)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda _: reply("500 Broken"),
        lambda _: reply("401 Unauthorized"),
        lambda _: reply("200 OK", b"x" * len(MANIFEST), Content_Type=oci.MANIFEST),
        lambda _: None,
        lambda _: b"no http\r\n\r\n",
    ],
    ids=["500", "401", "other bytes", "silent", "no http"],
)
def test_a_failing_mirror_is_asked_once_and_then_passed_over(wrong: object) -> None:
    """However it fails, the next gives the bytes; for the second fetch the mirror is not asked again."""
    with bad_server(wrong) as bad, bad_server(good) as home:  # type: ignore[arg-type]
        with client(mirror(bad), Endpoint("http", home.host)) as found:
            for _ in range(2):
                assert found.fetch(REF, WANTED, oci.MANIFEST_LIMIT) == MANIFEST
        assert len({asked.number for asked in bad.asked}) == 1
        assert len(home.asked) == 2


def test_a_mirror_that_lacks_something_is_asked_again_for_the_next() -> None:
    """404 is no failure of the mirror: the server is asked for this one, the mirror first for the next."""
    with bad_server(lambda _: reply("404 Not Found")) as bad, bad_server(good) as home:
        with client(mirror(bad), Endpoint("http", home.host)) as found:
            for _ in range(2):
                found.fetch(REF, WANTED, oci.MANIFEST_LIMIT)
        assert len(bad.asked) == 2
        assert all(asked.path.endswith("?ns=registry.invalid") for asked in bad.asked)


def test_the_last_one_decides() -> None:
    """Nobody has it: the error is the server's, and names it."""
    with bad_server(lambda _: reply("404 Not Found")) as bad:
        own = Endpoint("http", bad.host, path="/base/v2")
        with client(mirror(bad), own) as found, pytest.raises(NotFound, match=bad.host):
            found.fetch(REF, WANTED, oci.MANIFEST_LIMIT)
        assert bad.asked[-1].path == f"/base/v2/r/manifests/{WANTED.digest}"


def test_a_blob_goes_on_elsewhere_when_a_mirror_breaks() -> None:
    """The body breaks off: opened again at the offset, the rest comes from the server."""
    blob = bytes(range(256)) * 8
    described = Descriptor("application/octet-stream", digests.sha256(blob), len(blob))

    def rest(asked: Asked) -> bytes:
        start = int(asked.headers["range"].removeprefix("bytes=").partition("-")[0])
        return reply("206 Partial", blob[start:], Content_Range=f"bytes {start}-{len(blob) - 1}/{len(blob)}")

    with (
        bad_server(lambda _: reply("200 OK", blob)[:-1000]) as bad,
        bad_server(rest) as home,
        client(mirror(bad), Endpoint("http", home.host)) as found,
    ):
        got = b""
        with pytest.raises(Remote), found.open_blob(REF, described) as pieces:
            for piece in pieces:
                got += piece
        with found.open_blob(REF, described, len(got)) as pieces:
            got += b"".join(pieces)
    assert got == blob
    assert len(home.asked) == 1


def test_no_place_to_push_to_is_named() -> None:
    """hosts.toml without the capability push: Config that names registry and capability."""
    with (
        client(Endpoint("http", "m.invalid", capabilities=PULL)) as found,
        pytest.raises(Config, match=r"registry\.invalid.*push"),
    ):
        found.push_manifest(REF, MANIFEST, oci.MANIFEST)


def test_a_mirrors_unreadable_certificate_is_no_reason_to_go_on() -> None:
    """A CA file that is not there: Config with its path, though another endpoint follows."""
    bad = Endpoint("https", "m.invalid", tls=Tls(ca=("/nowhere/ca.pem",)))
    with (
        client(bad, Endpoint("http", "s.invalid")) as found,
        pytest.raises(Config, match=r"/nowhere/ca\.pem"),
    ):
        found.fetch(REF, WANTED, oci.MANIFEST_LIMIT)


def test_fields_of_hosts_toml_stay_with_their_host() -> None:
    """The endpoint gets its header, the target of its redirect and its token service do not."""
    with bad_server(good) as store, bad_server(lambda _: reply("200 OK", b'{"token": "t"}')) as service:

        def registry(asked: Asked) -> bytes:
            if "authorization" not in asked.headers:
                realm = f'Bearer realm="http://{service.host}/token",service="s"'
                return reply("401 Unauthorized", WWW_Authenticate=realm)
            return reply("307 Temporary Redirect", Location=f"http://{store.host}/blob")

        with bad_server(registry) as home:
            own = Endpoint("http", home.host, headers=(("x-secret", "MARK"),))
            with client(own) as found:
                assert found.fetch(REF, WANTED, oci.MANIFEST_LIMIT) == MANIFEST
    assert [asked.headers.get("x-secret") for asked in home.asked] == ["MARK", "MARK"]
    assert [asked.headers.get("x-secret") for asked in (*store.asked, *service.asked)] == [None, None]


def test_a_refresh_token_is_not_carried_elsewhere() -> None:
    """A token service that redirects the POST to another host: Remote, and the other host is not even asked."""
    with (
        bad_server(lambda _: reply("200 OK", b'{"access_token": "t"}')) as thief,
        bad_server(lambda _: reply("307 Temporary Redirect", Location=f"http://{thief.host}/x")) as service,
    ):
        realm = f'Bearer realm="http://{service.host}/token",service="s"'
        with (
            bad_server(lambda _: reply("401 Unauthorized", WWW_Authenticate=realm)) as home,
            client(Endpoint("http", home.host), login=("", "MARKED-token")) as found,
            pytest.raises(Remote, match="another host") as caught,
        ):
            found.fetch(REF, WANTED, oci.MANIFEST_LIMIT)
    assert "MARKED" not in str(caught.value)
    assert thief.asked == []
    assert [asked.method for asked in service.asked] == ["POST"]


def test_an_identity_token_is_never_basic() -> None:
    """A registry that asks for Basic gets no identity token: the 401 stands."""
    with (
        bad_server(lambda _: reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"')) as home,
        client(Endpoint("http", home.host), login=("", "MARKED-token")) as found,
        pytest.raises(Remote, match="401"),
    ):
        found.fetch(REF, WANTED, oci.MANIFEST_LIMIT)
    assert [asked.headers.get("authorization") for asked in home.asked] == [None]
