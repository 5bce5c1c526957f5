"""`soci push` itself, with real registries: what it prints, refuses, skips, and leaves when it is interrupted."""

from __future__ import annotations

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containerd import Containerd, start_containerd
from harness.images import layer_from_blob, load, write_layout
from harness.proxy import Proxy, parse_link
from harness.registries import RunningRegistry
from harness.tokenserver import TokenService, start_token_registry
from tests.integration.push_rig import LOGIN, PASSWORD, REFRESH, USER, Rig, certs_d, push_rig

from soci_snapshotter.cli.main import run
from soci_snapshotter.errors import NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, reference, sociindex
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.registry.client import RegistryClient

pytestmark = pytest.mark.root
VECTORS = Path(__file__).parents[1] / "vectors"
GNU = layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz")
PIGZ = layer_from_blob(VECTORS / "pigz-edge3/layer.tar.gz")


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


def test_index_tag(soci: Soci, rig: Rig) -> None:
    """--index-tag names the index by our tag beside the referrer, says so, and a second push knows it by that."""
    name = soci.image(f"{rig.plain.host}/tagged/x:1")
    out, _ = soci("push", "--index-tag", name)
    image = digests.parse(_target(soci))
    tag = f"sha256-{image.hex}.soci"
    assert out.rstrip().endswith(f"as {tag}")
    target = reference.parse(name)
    with RegistryClient() as client:
        found = client.resolve(reference.parse(f"{target.locator}:{tag}"))
        assert [each.digest for each in client.referrers(target, image)] == [found.digest]
    skipped, _ = soci("push", "--index-tag", "--existing-index", "skip", name)
    assert found.digest in skipped


def test_chunk_size(soci: Soci, rig: Rig) -> None:
    """--chunk-size: larger blobs go in pieces of that size, smaller ones whole; a negative one is refused."""
    name = soci.image(f"{rig.plain.host}/pieces/x:1")
    _, err = soci("push", "--chunk-size", "20000", "--http-dump", name)
    assert "> PATCH " in err
    lengths = re.findall(r"^> PATCH .*\n(?:> .*\n)*?> Content-Length: (\d+)", err, re.MULTILINE)
    assert max(map(int, lengths)) == 20_000
    _, err = soci("push", "--chunk-size", "-1", name, code=1)
    assert err.startswith("soci: --chunk-size '-1'")


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


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=["interrupt", "kill"]
)
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
