"""The registry flags of `soci push` with real registries: TLS, client certificates, logins, tokens, mirrors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.registries import RunningRegistry, start_oci_registry, start_registry
from harness.tlsfront import make_authority, requests_seen
from harness.tokenserver import TokenService, start_token_registry
from tests.integration.push_rig import LOGIN, REFRESH, USER, Rig, certs_d, push_rig

from soci_snapshotter.cli.registries import RegistryFlags, open_registry
from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, reference, sociindex
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One set of servers for the module; every test has repositories of its own."""
    with push_rig(tmp_path_factory.mktemp("rig")) as found:
        yield found


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningRegistry, TokenService]]:
    """A registry that wants tokens, and who gives them."""
    with start_token_registry(tmp_path_factory.mktemp("tokens"), USER, REFRESH) as pair:
        yield pair


@pytest.fixture(autouse=True)
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No login of whoever runs the tests: a directory of the test's own."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return tmp_path / "docker"


def upload(flags: RegistryFlags, name: str, data: bytes = b"ztoc" * 1000) -> None:
    """Push a blob and a manifest that names it, and read both back, with the flags a user gave."""
    target = reference.parse(name)
    with open_registry(flags, target) as client:
        _upload(client, target, data)


def _upload(client: RegistryClient, target: Reference, data: bytes) -> Descriptor:
    blob = Descriptor("application/octet-stream", digests.sha256(data), len(data))
    config = Descriptor(sociindex.INDEX_V1, oci.EMPTY_JSON_DIGEST, len(oci.EMPTY_JSON))
    manifest = oci.encode(
        oci.Manifest(schema_version=2, media_type=oci.MANIFEST, config=config, layers=(blob,))
    )
    client.push_blob(target, blob, lambda: [data])
    client.push_blob(target, config, lambda: [oci.EMPTY_JSON])
    client.push_manifest(target, manifest, oci.MANIFEST, target.tag)
    found = client.resolve(target)
    assert client.fetch(target, found, oci.MANIFEST_LIMIT) == manifest
    with client.open_blob(target, blob) as pieces:
        assert b"".join(pieces) == data
    return found


def test_a_ca_of_its_own_is_trusted_by_flag_only(rig: Rig) -> None:
    """Without --tlscacert the certificate is refused by name; with it, or -k, the push works."""
    name = f"localhost:{rig.tls.port}/ca/x:1"
    other = make_authority(rig.root / "other-ca")
    with pytest.raises(Remote, match="TLS with localhost"):
        upload(RegistryFlags(user=LOGIN, tlscacert=str(other.ca)), name)
    upload(RegistryFlags(user=LOGIN, tlscacert=str(rig.authority.ca)), name)
    upload(RegistryFlags(user=LOGIN, skip_verify=True), name)


def test_a_wrong_login_is_refused_without_showing_it(rig: Rig) -> None:
    """A wrong password: an error that names the host, not the password; nothing is stored."""
    flags = RegistryFlags(user="me:MARKED-wrong", tlscacert=str(rig.authority.ca))
    with pytest.raises(Remote, match=rf"password for {rig.tls.host}") as caught:
        upload(flags, f"{rig.tls.host}/wrong/x:1")
    assert "MARKED" not in str(caught.value)
    with RegistryClient() as client, pytest.raises(NotFound):
        client.resolve(reference.parse(f"{rig.plain.host}/wrong/x:1"))


def test_client_certificates(rig: Rig) -> None:
    """--tlscert and --tlskey are shown to a registry that asks; without them it refuses."""
    name = f"{rig.mutual.host}/mutual/x:1"
    ca = str(rig.authority.ca)
    with pytest.raises(Remote, match="client certificate"):
        upload(RegistryFlags(tlscacert=ca), name)
    upload(RegistryFlags(tlscacert=ca, tlscert=str(rig.certificate), tlskey=str(rig.key)), name)


@pytest.mark.parametrize("which", ["tls", "plain"])
def test_an_insecure_registry_is_https_or_http(rig: Rig, which: str) -> None:
    """nerdctl's --insecure-registry passes --skip-verify and --plain-http for both kinds: each works."""
    registry = rig.tls if which == "tls" else rig.plain
    upload(
        RegistryFlags(user=LOGIN, skip_verify=True, plain_http=True), f"{registry.host}/insecure/{which}:1"
    )


def test_plain_http_alone_speaks_no_tls(rig: Rig) -> None:
    """--plain-http against TLS fails with a hint; credentials are not sent to try something else."""
    with pytest.raises(Remote, match="wants https"):
        upload(RegistryFlags(user=LOGIN, plain_http=True), f"{rig.tls.host}/plain/x:1")


def test_hosts_toml_names_server_and_certificates(rig: Rig, tmp_path: Path) -> None:
    """A registry name that exists nowhere, whose server, CA and client certificate are in hosts.toml."""
    shutil.copy(rig.authority.ca, tmp_path / "ca.pem")
    text = (
        f'server = "https://{rig.mutual.host}"\nca = "../../ca.pem"\n'
        f'client = [["{rig.certificate}", "{rig.key}"]]\n'
    )
    directory = certs_d(tmp_path / "certs.d", "nowhere.invalid:5000", text)
    upload(RegistryFlags(hosts_dir=(directory,)), "nowhere.invalid:5000/hosts/x:1")
    assert any(
        " /v2/hosts/x/manifests/1?ns=nowhere.invalid%3A5000 201" in line for line in seen(rig, "mutual")
    )


def seen(rig: Rig, front: str) -> list[str]:
    """What a front of the rig was asked."""
    return requests_seen(rig.root / front)


def test_docker_certificate_directories(rig: Rig, tmp_path: Path) -> None:
    """Docker's layout: *.crt, *.cert and *.key in <dir>/<host:port>; a list of directories as nerdctl passes it."""
    directory = tmp_path / "docker-certs.d" / rig.mutual.host
    directory.mkdir(parents=True)
    shutil.copy(rig.authority.ca, directory / "ca.crt")
    shutil.copy(rig.certificate, directory / "client.cert")
    shutil.copy(rig.key, directory / "client.key")
    flags = RegistryFlags(hosts_dir=(f"/nowhere/certs.d,{directory.parent}",))
    upload(flags, f"{rig.mutual.host}/docker/x:1")


def test_pulls_try_mirrors_and_pushes_do_not(rig: Rig, tmp_path: Path) -> None:
    """A dead mirror, one that lacks the image, the server: reads fall back in order, uploads go to the server only."""
    with start_oci_registry(tmp_path / "mirror") as mirror:
        text = (
            f'server = "http://{rig.plain.host}"\n'
            '[host."http://127.0.0.1:9"]\ncapabilities = ["pull", "resolve"]\n'
            f'[host."http://{mirror.host}"]\ncapabilities = ["pull", "resolve"]\n'
        )
        directory = certs_d(tmp_path / "certs.d", "mirrored.invalid", text)
        target = reference.parse("mirrored.invalid/pulls/x:1")
        flags = RegistryFlags(hosts_dir=(directory,))
        with open_registry(flags, target) as client:
            found = _upload(client, target, b"upstream")
        here = reference.parse(f"{mirror.host}/pulls/x:1")
        with RegistryClient() as client, pytest.raises(NotFound):
            client.resolve(here)
        # Once the mirror has an image of the name, it is believed.
        with RegistryClient() as client:
            other = _upload(client, here, b"from the mirror")
        with open_registry(flags, target) as client:
            assert client.resolve(target) == other != found


def test_a_mirror_that_lies_is_passed_over(rig: Rig, tmp_path: Path) -> None:
    """Without the capability resolve a mirror is not asked for tags; its wrong bytes for a digest are not taken."""
    with RegistryClient() as client:
        found = _upload(client, reference.parse(f"{rig.plain.host}/lies/x:1"), b"true")
    liar = rig.root / "liar"
    with start_registry(liar) as mirror:
        with RegistryClient() as client:
            _upload(client, reference.parse(f"{mirror.host}/lies/x:1"), b"true")
        stored = next(liar.rglob(f"blobs/sha256/*/{found.digest.hex}/data"))
        stored.write_bytes(b"x" * found.size)
        text = f'server = "http://{rig.plain.host}"\n[host."http://{mirror.host}"]\ncapabilities = ["pull"]\n'
        directory = certs_d(tmp_path / "certs.d", "lied.invalid", text)
        target = reference.parse("lied.invalid/lies/x:1")
        with open_registry(RegistryFlags(hosts_dir=(directory,)), target) as client:
            assert client.resolve(target).digest == found.digest
            assert found.digest.matches(client.fetch(target, found, oci.MANIFEST_LIMIT))


def test_the_login_is_not_shown_to_mirrors(rig: Rig, tmp_path: Path) -> None:
    """A mirror that asks for a login gets none of the registry's; the registry behind it does."""
    text = (
        f'server = "https://{rig.tls.host}"\nca = "{rig.authority.ca}"\n'
        f'[host."https://{rig.tls.host.replace("127.0.0.1", "localhost")}"]\nca = "{rig.authority.ca}"\n'
        'capabilities = ["pull", "resolve"]\n'
    )
    directory = certs_d(tmp_path / "certs.d", "shown.invalid", text)
    shown: list[str] = []
    target = reference.parse("shown.invalid/shown/x:1")
    flags = RegistryFlags(user=LOGIN, hosts_dir=(directory,))
    with open_registry(flags, target) as client:
        recording = Options(dump=shown.append)
        with RegistryClient(recording, client.credentials, client.router.hosts) as recorded:
            _upload(recorded, target, b"login")
    text = "\n".join(shown)
    to_mirror = [part for part in text.split("> ") if f"localhost:{rig.tls.port}" in part.partition("\n")[0]]
    assert to_mirror
    requests = text.split("\n> HEAD ")
    mirrored = [each for each in requests if each.startswith("https://localhost:")]
    assert mirrored
    assert not any("> Authorization" in each.partition("\n< ")[0] for each in mirrored)
    assert "> Authorization: (hidden)" in text


def test_tokens_by_password(tokens: tuple[RunningRegistry, TokenService]) -> None:
    """--user gets one token with pull and push for the whole upload."""
    registry, service = tokens
    service.asked.clear()
    upload(RegistryFlags(user=LOGIN), f"{registry.host}/tok/password:1")
    assert service.asked == [
        "GET basic repository:tok/password:pull,push",
        "GET basic repository:tok/password:pull",
    ]


def test_tokens_by_refresh_token(tokens: tuple[RunningRegistry, TokenService], docker_config: Path) -> None:
    """--refresh, and identitytoken in Docker's config.json, are posted to the token service and never sent as Basic."""
    registry, service = tokens
    service.asked.clear()
    upload(RegistryFlags(refresh=REFRESH), f"{registry.host}/tok/refresh:1")
    docker_config.mkdir()
    config = {"auths": {registry.host: {"auth": "MDAwOg==", "identitytoken": REFRESH}}}
    (docker_config / "config.json").write_text(json.dumps(config))
    upload(RegistryFlags(), f"{registry.host}/tok/identity:1")
    assert [asked.split(" repository")[0] for asked in service.asked] == ["POST refresh_token"] * 4


def test_a_wrong_refresh_token_is_not_shown(tokens: tuple[RunningRegistry, TokenService]) -> None:
    """The error names the token service, not the token."""
    registry, service = tokens
    with pytest.raises(Remote, match=rf"127\.0\.0\.1:{service.port}.*401") as caught:
        upload(RegistryFlags(refresh="MARKED-wrong"), f"{registry.host}/tok/wrong:1")
    assert "MARKED" not in str(caught.value)


def test_a_blob_is_taken_from_another_repository(tokens: tuple[RunningRegistry, TokenService]) -> None:
    """A mount sends no bytes, with one token for both repositories; where that one is closed, the blob is sent."""
    registry, service = tokens
    data = b"mounted" * 1000
    blob = Descriptor("application/octet-stream", digests.sha256(data), len(data))
    flags = RegistryFlags(user=LOGIN)
    upload(flags, f"{registry.host}/tok/from:1", data)
    for closed, sent in (("", False), ("tok/from", True)):
        service.closed = closed
        target = reference.parse(f"{registry.host}/tok/to{len(closed)}:1")
        with open_registry(flags, target) as client:
            assert client.push_blob(target, blob, lambda: [data], mount_from="tok/from") is sent
            assert client.exists(target, blob)
    service.closed = ""
