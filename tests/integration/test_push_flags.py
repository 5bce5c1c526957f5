"""The registry flags of `soci push` with real registries: TLS, client certificates, logins, tokens, mirrors."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.containerd import Containerd, start_containerd
from harness.images import layer_from_blob, load, write_layout
from harness.proxy import Proxy, parse_link
from harness.registries import RunningRegistry, start_oci_registry, start_registry
from harness.tlsfront import Authority, make_authority, requests_seen, start_tls_front
from harness.tokenserver import TokenService, start_token_registry

from soci_snapshotter.cli.main import run
from soci_snapshotter.cli.registries import RegistryFlags, open_registry
from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, reference, sociindex
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options

pytestmark = pytest.mark.root
VECTORS = Path(__file__).parents[1] / "vectors"
GNU = layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz")
PIGZ = layer_from_blob(VECTORS / "pigz-edge3/layer.tar.gz")
# Searched for in everything that is shown.
PASSWORD = "MARKED-pa:ss-word"
REFRESH = "MARKED-refresh-token"
USER = ("me", PASSWORD)
LOGIN = f"me:{PASSWORD}"


@dataclass(frozen=True)
class Rig:
    """A plain registry, and before it nginx with TLS and a login, and one that also wants a client certificate."""

    root: Path
    plain: RunningRegistry
    authority: Authority
    tls: RunningRegistry
    mutual: RunningRegistry
    certificate: Path
    key: Path


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One set of servers for the module; every test has repositories of its own."""
    root = tmp_path_factory.mktemp("rig")
    authority = make_authority(root / "ca")
    certificate, key = authority.issue("client", client=True)
    with (
        start_registry(root / "registry") as plain,
        start_tls_front(root / "tls", plain, authority, login=USER) as tls,
        start_tls_front(root / "mutual", plain, authority, client_ca=authority.ca) as mutual,
    ):
        yield Rig(root, plain, authority, tls, mutual, certificate, key)


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


def certs_d(root: Path, host: str, text: str) -> str:
    """A certs.d directory with one hosts.toml; returned as --hosts-dir takes it."""
    directory = root / host.replace(":", "_", 1)
    directory = directory.with_name(directory.name + "_") if ":" in host else directory
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(text)
    return str(root)


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


# --- the command itself -----------------------------------------------------------------------------------------


class Soci:
    """The CLI in this process, against one containerd, with an image that was indexed."""

    def __init__(self, containerd: Containerd, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.flags = ["--address", containerd.address, "--root", str(root)]
        self.containerd = containerd
        self.index = ""
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """Run a command line; stdout and stderr."""
        found = run([*self.flags, *arguments])
        out, err = self._capsys.readouterr()
        assert (found == 0) == (code == 0), (found, out, err)
        return out, err

    def image(self, name: str) -> str:
        """Give the image this name too."""
        self.containerd.ctr("images", "tag", "--force", "docker.io/library/x:1", name)
        return name


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A containerd with one image of two layers."""
    with start_containerd() as daemon:
        layout = write_layout(tmp_path_factory.mktemp("layout"), (GNU, PIGZ), name="docker.io/library/x:1")
        load(layout, daemon)
        yield daemon


@pytest.fixture
def soci(containerd: Containerd, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    """The CLI, the image's index made."""
    soci = Soci(containerd, tmp_path / "root", capsys)
    soci("create", "--min-layer-size", "0", "x:1")
    return soci


def test_what_nerdctl_passes(soci: Soci, rig: Rig, tmp_path: Path) -> None:
    """nerdctl's own argument vector: global flags first, platforms apart, insecure, its default directories."""
    directory = certs_d(tmp_path / "certs.d", rig.tls.host, f'ca = "{rig.authority.ca}"\n')
    name = soci.image(f"{rig.plain.host}/nerdctl/x:1")
    arguments = [
        "--namespace",
        "default",
        "push",
        "--platform",
        "linux/amd64",
        "--skip-verify",
        "--plain-http",
    ]
    soci(*arguments, "--hosts-dir", f"{directory},/nowhere/certs.d", name)
    with RegistryClient() as client:
        image = digests.parse(str(_target(soci)))
        assert len(client.referrers(reference.parse(name), image, sociindex.INDEX_V1)) == 1


def _target(soci: Soci) -> str:
    lines = soci.containerd.ctr("images", "ls", "name==docker.io/library/x:1").stdout.splitlines()
    return lines[1].split()[2]


def test_every_flag_at_once_and_no_secret_shown(
    soci: Soci, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TLS, client certificate, dump, trace, snapshotter, quiet: works; stdout is a digest, stderr has no secret."""
    monkeypatch.setenv("CONTAINERD_SNAPSHOTTER", "soci")
    name = soci.image(f"{rig.tls.host}/flags/x:1")
    ca, cert, key = str(rig.authority.ca), str(rig.certificate), str(rig.key)
    flags = ["--user", LOGIN, "--tlscacert", ca, "--tlscert", cert, "--tlskey", key, "--refresh", REFRESH]
    more = ["--max-concurrent-uploads", "1", "--existing-index", "allow", "--quiet"]
    out, err = soci("--debug", "push", *flags, *more, "--http-dump", "--http-trace", name)
    assert digests.parse(out.strip())
    assert "MARKED" not in out + err
    assert "> PUT https://" in err
    assert "> Authorization: (hidden)" in err
    assert "connected to 127.0.0.1" in err
    assert "certificate verified" in err
    puts = [line for line in err.splitlines() if line.startswith("> PUT ")]
    assert "/blobs/uploads/" in puts[0]
    assert "/manifests/" in puts[-1]


def test_dumped_tokens_are_hidden(soci: Soci, tokens: tuple[RunningRegistry, TokenService]) -> None:
    """A push by refresh token with a dump: neither it nor a token that was issued is shown."""
    registry, service = tokens
    name = soci.image(f"{registry.host}/dumped/x:1")
    out, err = soci("--debug", "push", "--refresh", REFRESH, "--http-dump", "--http-trace", name)
    assert f"> POST {service.realm}" in err
    assert "MARKED" not in out + err
    assert service.issued
    assert not any(part in out + err for token in service.issued for part in token.split("."))


def test_a_password_comes_from_a_pipe(
    soci: Soci, rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """--user without a password reads one line of standard input; an empty one is an error that names the flag."""
    name = soci.image(f"{rig.tls.host}/piped/x:1")
    flags = ["push", "--user", "me", "--tlscacert", str(rig.authority.ca), name]
    for text, code in ((f"{PASSWORD}\n", 0), ("", 1)):
        (tmp_path / "stdin").write_text(text)
        with (tmp_path / "stdin").open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            _, err = soci(*flags, code=code)
    assert "--user me" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tlscert", "/nowhere"], ["--tlscert", "--tlskey"]),
        (["--tlskey", "/nowhere"], ["--tlscert", "--tlskey"]),
        (["--tlscacert", "/nowhere/ca.pem"], ["/nowhere/ca.pem"]),
        (["--tlscert", "/nowhere/c.pem", "--tlskey", "/nowhere/k.pem"], ["/nowhere/c.pem", "/nowhere/k.pem"]),
        (["--existing-index", "never"], ["--existing-index", "never"]),
        (["--max-concurrent-uploads", "-1"], ["--max-concurrent-uploads", "-1"]),
        (["--max-concurrent-uploads", "many"], ["--max-concurrent-uploads", "many"]),
        (["--user", ":x"], ["--user"]),
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line(soci: Soci, rig: Rig, flags: list[str], words: list[str]) -> None:
    """Files that are not there and values that cannot be: one line that names them, before anything is sent."""
    _, err = soci("push", *flags, soci.image(f"{rig.plain.host}/bad/x:1"), code=1)
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_existing_index(soci: Soci, rig: Rig) -> None:
    """Another index there: warn says so and pushes, skip does not push, allow is silent; quiet skips silently."""
    name = soci.image(f"{rig.plain.host}/existing/x:1")
    first, err = soci("push", "--quiet", name)
    assert err == ""
    # The same one again is no other.
    assert soci("push", "--quiet", name) == (first, "")
    soci("create", "--min-layer-size", "0", "--span-size", "65536", "x:1")
    out, err = soci("push", "--existing-index", "skip", name)
    assert out.startswith("skipped: ")
    assert first.strip() in out
    assert soci("push", "--quiet", "--existing-index", "skip", name) == ("", "")
    out, err = soci("push", name)
    assert first.strip() in err
    assert "warning" in err
    soci("create", "--min-layer-size", "0", "--span-size", "131072", "x:1")
    assert soci("push", "--existing-index", "allow", name)[1] == ""


def test_a_converted_image_is_pushed_whole(soci: Soci, rig: Rig) -> None:
    """`soci push` of what `soci convert` made: the registry has the tag, the image, its SOCI index and ztocs."""
    name = f"{rig.plain.host}/converted/x:2"
    soci("convert", "--min-layer-size", "0", "x:1", name)
    out, _ = soci("push", "--quiet", name)
    target = reference.parse(name)
    with RegistryClient() as client:
        root = client.resolve(target)
        assert root.digest == out.strip()
        index = oci.decode_manifest(client.fetch(target, root, oci.MANIFEST_LIMIT))
        assert isinstance(index, oci.Index)
        assert sociindex.INDEX_V2 in [entry.artifact_type for entry in index.manifests]
        for entry in index.manifests:
            manifest = oci.decode_manifest(client.fetch(target, entry, oci.MANIFEST_LIMIT))
            assert isinstance(manifest, oci.Manifest)
            assert all(client.exists(target, blob) for blob in (manifest.config, *manifest.layers))
    assert soci("push", "--quiet", name)[0] == out


def test_a_converted_image_with_a_layer_nowhere_names_it(soci: Soci, rig: Rig) -> None:
    """A layer that is neither in containerd nor in the registry: its digest and what to do, and no tag."""
    name = f"{rig.plain.host}/gone/x:2"
    soci("convert", "--min-layer-size", "0", "x:1", name)
    soci.containerd.ctr("content", "rm", PIGZ.digest)
    try:
        _, err = soci("push", name, code=1)
    finally:
        path = VECTORS / "pigz-edge3/layer.tar.gz"
        with path.open("rb") as blob:
            size = str(path.stat().st_size)
            command = ["ctr", "--address", soci.containerd.address, "content", "ingest"]
            subprocess.run(
                [*command, "--expected-size", size, "--expected-digest", PIGZ.digest, "restore"],
                stdin=blob,
                check=True,
            )
    assert PIGZ.digest in err
    with RegistryClient() as client, pytest.raises(NotFound):
        client.resolve(reference.parse(name))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_an_interrupted_push_leaves_nothing_visible(soci: Soci, rig: Rig, how: signal.Signals) -> None:
    """Stopped in the middle of a ztoc: no index in the registry, no wait for the upload; pushing again completes it."""
    with Proxy(rig.plain.address, link=parse_link("1ms,40kbit")) as slow:
        name = soci.image(f"{slow.host}/{how.name.lower()}/x:1")
        command = [sys.executable, "-m", "soci_snapshotter.cli.main", *soci.flags, "push", name]
        environment = {**os.environ, "PYTHONPATH": "src"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        deadline = time.monotonic() + 30
        while slow.sent < 6000 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert slow.sent >= 6000
        process.send_signal(how)
        _, err = process.communicate(timeout=15)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    assert err == ("soci: interrupted\n" if how is signal.SIGINT else "")
    again = soci.image(f"{rig.plain.host}/{how.name.lower()}/x:1")
    image = digests.parse(_target(soci))
    find = functools.partial(_indexes, reference.parse(again), image)
    assert find() == []
    out, _ = soci("push", "--quiet", again)
    assert find() == [out.strip()]


def _indexes(target: Reference, image: digests.Digest) -> list[str]:
    with RegistryClient() as client:
        return [entry.digest for entry in client.referrers(target, image, sociindex.INDEX_V1)]
