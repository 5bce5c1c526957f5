"""No secret is shown: marked ones are planted everywhere, everything is done and goes wrong, and they are looked for.

Looked at: the daemon's log at debug level, its pages and sockets, every file that it or the CLI leaves on disk, and
what the CLI prints with --debug, --http-dump and --http-trace.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
from harness.badserver import Asked, BadServer, Stalled, bad_server, reply
from harness.images import write_layout
from harness.memregistry import MemRegistry
from tests.integration.registry_rig import FAST, SPAN, Indexed, Registries, put_indexed, registries
from tests.integration.test_introspection import free_port, get
from tests.integration.test_lazy import big_layer

from soci_snapshotter.containerd.stubs import cri_images_pb2
from soci_snapshotter.containerd.stubs.cri_images_pb2_grpc import ImageServiceStub
from soci_snapshotter.formats import digest as digests

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

MARK = "MARKED"
PASSWORD = f"{MARK}-pass:word"
IDENTITY = f"{MARK}-identity-token"
HELPER = f"{MARK}-of-a-helper"
KUBE = f"{MARK}-of-kubernetes"
CRI = f"{MARK}-of-the-cri"
HEADER = f"{MARK}-header"
PROXY = f"{MARK}-proxy"
SIGNATURE = f"{MARK}-signature"
COOKIE = f"{MARK}-cookie"
BODY = f"{MARK}-body"
BEARER = f"{MARK}-bearer"

PARALLEL = "[pull_modes.parallel_pull_unpack]\nenable = true\ndiscard_unpacked_layers = true\n"
SIGNED = f"?X-Amz-Signature={SIGNATURE}&X-Amz-Credential={SIGNATURE}"
LIES = {"errors": [{"code": "DENIED", "message": BODY, "detail": {"token": BODY}}]}


@dataclass
class Script:
    """What the raw registry does wrong, by the first part of the repository's name; it sets a cookie with all it says."""

    raw: MemRegistry
    store: str = ""
    tls: str = ""
    seen: list[Asked] = field(default_factory=list)

    def __call__(self, asked: Asked) -> bytes | None:
        """MemRegistry.before."""
        self.seen.append(asked)
        if asked.path.startswith("/token"):
            return self._token(asked)
        fault = asked.path.removeprefix("/v2/").partition("/")[0]
        path, _, query = asked.path.partition("?")
        layer = asked.method == "GET" and "/blobs/" in path and path.endswith(self._layer(asked))
        if query and fault == "redirected":
            layer = False  # the object store, by its other name
        headers = {"Set_Cookie": f"session={COOKIE}", "X_Auth": BEARER}
        body = json.dumps(LIES).encode()
        given = asked.headers.get("authorization")
        realm = f'Bearer realm="http://{asked.headers["host"]}/token",service="{fault}"'
        if fault == "basic" and given is None:
            return reply("401 Unauthorized", body, WWW_Authenticate='Basic realm="x"', **headers)
        if (
            fault in ("wrongtoken", "deniedtoken", "bearer")
            and given is None
            and (layer or fault == "bearer")
        ):
            return reply("401 Unauthorized", body, WWW_Authenticate=realm, **headers)
        if not layer:
            return None
        away = {
            "redirected": f"http://{self.store}{asked.path}{SIGNED}",
            "dead": f"http://127.0.0.1:9{asked.path}{SIGNED}",
            "badtls": f"https://{self.tls}{asked.path}{SIGNED}",
            "userinfo": f"http://me:{SIGNATURE}@{self.store}/x",
            "loop": f"{path}{SIGNED}",
        }
        if fault in away:
            return reply("307 Temporary Redirect", Location=away[fault], **headers)
        statuses = {"unauthorized": "401 No", "forbidden": "403 No", "missing": "404 No", "broken": "500 No"}
        if fault in statuses:
            more = {"WWW_Authenticate": 'Basic realm="x"'} if fault == "unauthorized" else {}
            return reply(statuses[fault], body, **more, **headers)
        return Stalled(b"HTTP/1.1 206 Partial Content\r\n") if fault == "silent" else None

    def _layer(self, asked: Asked) -> str:
        """The digest of the layer of the repository that is asked, as put_indexed stores it: the first blob."""
        repository = asked.path.removeprefix("/v2/").partition("/blobs/")[0]
        return next(iter(self.raw.blobs.get(repository, {"?": b""})))

    def _token(self, asked: Asked) -> bytes:
        if "service=wrongtoken" in asked.path:
            return reply("200 OK", json.dumps({"token": [BODY], "access_token": BODY}).encode())
        if "service=deniedtoken" in asked.path:
            return reply("401 Unauthorized", json.dumps(LIES).encode())
        return reply("200 OK", json.dumps({"token": BEARER, "expires_in": 300}).encode())


FAULTS = (
    *("redirected", "dead", "badtls", "userinfo", "loop", "unauthorized", "forbidden", "missing", "broken"),
    *("wrongtoken", "deniedtoken", "bearer", "basic", "silent"),
)


@dataclass
class Planted:
    """The node with its secrets."""

    node: Registries
    script: Script
    metrics: int
    debug: int
    directory: Path
    proxied: list[Asked]
    kube: BadServer

    def forms(self) -> list[bytes]:
        """The secrets as they may be met: the mark, and what was made of marked ones."""
        pairs = [f"me:{secret}" for secret in (PASSWORD, HELPER, KUBE, CRI, PROXY)]
        encoded = [base64.b64encode(pair.encode()).rstrip(b"=") for pair in pairs]
        tokens = [part for token in self.node.tokens.issued for part in token.split(".")[1:]]
        return [MARK.encode(), *encoded, *(token.encode() for token in tokens)]

    def check(self, text: bytes, where: str) -> None:
        """Nothing of it is in `text`."""
        for form in self.forms():
            at = text.find(form)
            assert at < 0, f"{where}: ...{text[max(0, at - 300) : at + 100].decode(errors='replace')}"


def proxy_answer(holder: list[MemRegistry], asked_of: list[Asked], asked: Asked) -> bytes | None:
    """A proxy that lets nobody through to `refused.invalid`, and serves the raw registry's content for the rest."""
    asked_of.append(asked)
    if "refused.invalid" in asked.path:
        return reply(
            "407 Proxy Authentication Required", json.dumps(LIES).encode(), Proxy_Authenticate="Basic"
        )
    return holder[0](replace(asked, path=asked.path.partition(".invalid")[2]))


def kube_answer(asked: Asked) -> bytes:
    """An API server with a secret for the raw registry, one that is broken, and a watch that says nothing."""
    if "watch=1" in asked.path:
        return Stalled(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    auths = {"auths": {"*.kube.invalid": {"username": "me", "password": KUBE}}}
    broken = b'{"auths": {"x": {"auth": "' + KUBE.encode()
    items = [
        {
            "metadata": {"name": name, "namespace": "default", "resourceVersion": "1"},
            "data": {".dockerconfigjson": base64.b64encode(data).decode()},
        }
        for name, data in (("good", json.dumps(auths).encode()), ("broken", broken))
    ]
    document = {"metadata": {"resourceVersion": "1"}, "items": items}
    return reply("200 OK", json.dumps(document).encode(), Content_Type="application/json")


def write_helpers(directory: Path) -> None:
    """One that has a login, one that shouts it out and fails."""
    directory.mkdir()
    good = json.dumps({"ServerURL": "x", "Username": "me", "Secret": HELPER})
    for name, script in (
        ("good", f"#!/bin/sh\ncat >/dev/null\necho '{good}'\n"),
        ("bad", f"#!/bin/sh\ncat >/dev/null\necho '{HELPER}'; echo '{HELPER}' >&2; exit 1\n"),
    ):
        program = directory / f"docker-credential-{name}"
        program.write_text(script)
        program.chmod(0o755)


def kubeconfig(path: Path, server: BadServer) -> None:
    """A kubeconfig with a marked token."""
    document = {
        "current-context": "x",
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        "clusters": [{"name": "x", "cluster": {"server": f"http://{server.host}"}}],
        "users": [{"name": "x", "user": {"token": KUBE}}],
    }
    path.write_text(json.dumps(document))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """A node, its registries, and a secret wherever one can be."""
    base = tmp_path_factory.mktemp("secrets")
    metrics, debug = free_port(), free_port()
    top = f'metrics_address = "127.0.0.1:{metrics}"\ndebug_address = "127.0.0.1:{debug}"\n'
    write_helpers(base / "helpers")
    holder: list[MemRegistry] = []
    proxied: list[Asked] = []
    config = (
        FAST + f'[kubeconfig_keychain]\nenable_keychain = true\nkubeconfig_path = "{base / "kubeconfig"}"\n'
        '[cri_keychain]\nenable_keychain = true\nimage_service_path = "/nowhere/cri.sock"\n'
    )
    with (
        pytest.MonkeyPatch.context() as patch,
        bad_server(lambda asked: proxy_answer(holder, proxied, asked)) as proxy,
        bad_server(kube_answer) as kube,
    ):
        kubeconfig(base / "kubeconfig", kube)
        patch.setenv("HTTP_PROXY", f"http://me:{PROXY}@{proxy.host}")
        patch.setenv("PATH", f"{base / 'helpers'}:{os.environ['PATH']}")
        with registries(base, password=PASSWORD, refresh=IDENTITY, top=top, config=config) as node:
            holder.append(node.raw)
            script = Script(
                node.raw, node.raw_server.host.replace("127.0.0.1", "localhost"), node.hosts["nginx"]
            )
            node.raw.before = script
            _plant(node, base / "docker" / "config.json")
            yield Planted(node, script, metrics, debug, base, proxied, kube)


def _plant(node: Registries, docker: Path) -> None:
    document = json.loads(docker.read_text())
    basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    document["auths"][node.raw_server.host] = {"auth": basic}
    document["credHelpers"] = {"helped.invalid": "good", "shouted.invalid": "bad"}
    docker.write_text(json.dumps(document))
    own = node.certs / (node.raw_server.host.replace(":", "_") + "_")
    own.mkdir()
    (own / "hosts.toml").write_text(
        f'server = "http://{node.raw_server.host}"\n[header]\nx-secret = "{HEADER}"\n'
    )
    # Names that exist nowhere but behind the proxy: without a login, with one of each source, and refused by it.
    for name in ("proxied", "refused", "helped", "shouted", "a.kube"):
        (node.certs / f"{name}.invalid").mkdir()
        (node.certs / f"{name}.invalid" / "hosts.toml").write_text(f'server = "http://{name}.invalid"\n')


def image(planted: Planted, directory: Path, repository: str, host: str = "") -> Indexed:
    """An indexed image in the raw registry; its name is of `host`."""
    directory.mkdir(parents=True)
    layer, _ = big_layer(hash_of(repository), files=1, size=SPAN)
    layout = write_layout(directory / "layout", [layer])
    return put_indexed(planted.node.raw, host or planted.node.raw_server.host, repository, layout)


def hash_of(text: str) -> int:
    """A seed by name."""
    return int(digests.sha256(text.encode()).hex[:6], 16)


def read(planted: Planted, indexed: Indexed) -> bool:
    """Read the image's file through its mount; whether that went well."""
    with planted.node.rig.rootfs(indexed.layout, "soci") as root:
        try:
            for name in root.iterdir():
                name.read_bytes()
        except OSError:
            return False
        return True


def pages(planted: Planted) -> Iterator[tuple[str, bytes]]:
    """All that the daemon answers."""
    for port, paths in (
        (planted.metrics, ["/metrics"]),
        (planted.debug, ["/debug/stacks", "/debug/vars", "/debug/profile?seconds=0.1"]),
    ):
        for path in paths:
            yield path, get(port, path)
    for path in ("/status", "/metrics"):
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        with contextlib.closing(connection):
            connection.sock.connect(str(planted.node.rig.daemon.address.parent / "status.sock"))
            connection.request("GET", path)
            yield f"status.sock {path}", connection.getresponse().read()


def files(planted: Planted) -> Iterator[tuple[str, bytes]]:
    """All that the daemon and the CLI left on disk, but for the layers' own bytes."""
    rig = planted.node.rig
    for top in (rig.daemon.root, rig.base / "cli", rig.daemon.address.parent):
        for directory, _, names in os.walk(top):
            if directory.startswith(str(rig.daemon.root / "m")):
                continue  # mounts: the image's own files
            for name in names:
                path = Path(directory) / name
                if path.is_file() and name != "data.tar":
                    yield str(path), path.read_bytes()


def cri_pull(planted: Planted) -> None:
    """A kubelet's pull with a login, through our socket, of a CRI that is not there."""
    with grpc.insecure_channel(f"unix:{planted.node.rig.daemon.address}") as channel:
        auth = cri_images_pb2.AuthConfig(username="me", password=CRI, identity_token=CRI, registry_token=CRI)
        spec = cri_images_pb2.ImageSpec(image=f"{planted.node.raw_server.host}/basic/x:1")
        request = cri_images_pb2.PullImageRequest(image=spec, auth=auth)
        with contextlib.suppress(grpc.RpcError):
            ImageServiceStub(channel).PullImage(request, timeout=5)


def _lazily(planted: Planted, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way to a lazy mount, and to none."""
    node, rig = planted.node, planted.node.rig
    soci, flags = rig.soci, node.flags
    # Lazy by v1, with a password, an identity token, a bearer token, a helper's and a Kubernetes secret's login, a proxy.
    for kind in ("nginx", "token"):
        layer, _ = big_layer(hash_of(kind), files=1, size=SPAN)
        layout = write_layout(directory / kind, [layer])
        name = node.name(kind, "secrets/x")
        node.push_image(name, layout)
        assert soci("create", "--from-registry", "--min-layer-size", "0", *flags, name) == 0
        assert soci("pull", *flags, name) == 0
        assert "1 lazy" in capsys.readouterr().out
        with rig.rootfs(layout, "soci") as root:
            assert all(path.read_bytes() for path in root.iterdir() if path.is_file())
    for repository, host in (
        ("basic/x", ""),
        ("bearer/x", ""),
        ("basic/helped", "helped.invalid"),
        ("basic/kube", "a.kube.invalid"),
        ("plain/proxied", "proxied.invalid"),
    ):
        indexed = image(planted, directory / repository, repository, host)
        login = ("--user", f"me:{PASSWORD}") if host == "a.kube.invalid" else ()  # the CLI asks no cluster
        assert soci("pull", "--quiet", *login, *flags, indexed.name) == 0
        assert read(planted, indexed), repository

    # By v2, by an explicit digest, and deferred: without any index.
    plain = image(planted, directory / "modes", "plain/modes")
    converted = f"{node.raw_server.host}/plain/modes:v2"
    convert = ("convert", "--from-registry", "--min-layer-size", "0", *flags, plain.name, converted)
    assert soci(*convert) == 0
    assert soci("pull", "--quiet", *flags, converted) == 0
    explicit = image(planted, directory / "explicit", "plain/explicit")
    index = str(digests.sha256(explicit.index))
    assert soci("pull", "--quiet", "--soci-index-digest", index, *flags, explicit.name) == 0
    deferred = image(planted, directory / "deferred", "plain/deferred")
    del node.raw.manifests["plain/deferred"][digests.sha256(deferred.index)]
    assert soci("pull", "--quiet", *flags, deferred.name) == 0


def _failing(planted: Planted, directory: Path) -> None:
    """Everything that goes wrong."""
    soci, flags = planted.node.rig.soci, planted.node.flags
    # Failures: under a mount, and before there is one.
    for fault in FAULTS:
        indexed = image(planted, directory / "faults" / fault, f"{fault}/fault")
        assert soci("pull", "--quiet", *flags, indexed.name) == 0, fault
        assert read(planted, indexed) is (fault in ("redirected", "bearer", "basic")), fault
    for host in ("shouted.invalid", "refused.invalid"):
        image(planted, directory / host, f"basic/{host}")
        assert soci("pull", "--quiet", *flags, f"{host}/basic/{host}:1") != 0
        assert soci("why", *flags, f"{host}/basic/{host}:1") != 0


def _whole(planted: Planted, directory: Path) -> None:
    """Pulls by another daemon, whole."""
    node, rig = planted.node, planted.node.rig
    soci, flags = rig.soci, node.flags
    # Pulled whole by configuration, by a daemon that starts over all these layers.
    rig.daemon.stop(signal.SIGTERM)
    rig.daemon.config += PARALLEL
    rig.daemon.start()
    rig.reconnected()
    for repository in ("plain/parallel", "redirected/parallel"):
        indexed = image(planted, directory / repository, repository)
        assert soci("pull", "--quiet", *flags, indexed.name) == 0
        assert read(planted, indexed)
    for fault in ("dead", "forbidden", "wrongtoken"):
        indexed = image(planted, directory / "whole" / fault, f"{fault}/whole")
        assert soci("pull", "--quiet", *flags, indexed.name) != 0


def test_the_daemon_shows_no_secret(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pull mode, every source of logins and every failure, at debug level: no mark in log, pages or files."""
    node, rig = planted.node, planted.node.rig
    cri_pull(planted)
    _lazily(planted, tmp_path, capsys)
    _failing(planted, tmp_path)
    _whole(planted, tmp_path)

    # What was planted was used: else nothing could have been shown.
    sent = [asked.headers for asked in planted.script.seen]
    assert any(HEADER in headers.get("x-secret", "") for headers in sent)
    assert any(BEARER in headers.get("authorization", "") for headers in sent)
    assert any(SIGNATURE in asked.path for asked in planted.script.seen)
    assert any("proxy-authorization" in asked.headers for asked in planted.proxied)
    assert node.tokens.issued
    assert any(KUBE in asked.headers.get("authorization", "") for asked in planted.kube.asked)
    logins = {asked.headers.get("authorization") for asked in planted.proxied}
    assert {"Basic " + base64.b64encode(f"me:{each}".encode()).decode() for each in (HELPER, KUBE)} <= logins
    with pytest.raises(AssertionError, match="what was sent"):  # and would be found
        planted.check(repr(planted.script.seen).encode(), "what was sent")
    log = rig.daemon.log
    for words in ("span not available", "could not be pulled whole", '"debug"', "HTTP 403", "no token"):
        assert words in log, words
    planted.check(log.encode(), "log")
    for where, text in pages(planted):
        planted.check(text, where)
    for where, text in files(planted):
        planted.check(text, where)


# A pull gives up slowly; what it shows of a failure, `why` and the daemon show too.
@pytest.mark.parametrize("command", [pytest.param("pull", marks=pytest.mark.slow), "why"])
def test_the_cli_shows_no_secret(
    planted: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """--debug, --http-dump and --http-trace over each failure, a login by flag among it: no mark on either stream."""
    node = planted.node
    wire = ("--http-dump", "--http-trace", "--user", f"me:{PASSWORD}", *node.flags)
    # Those that are tried again for seconds are left to the daemon's test.
    faults = ("redirected", "badtls", "loop", "wrongtoken", "unauthorized", "bearer", "basic")
    names = [image(planted, tmp_path / fault, f"{fault}/{command}").name for fault in faults]
    names += [f"{host}/basic/x:1" for host in ("refused.invalid", "shouted.invalid", "helped.invalid")]
    names += [node.name(kind, "nothing/there") for kind in ("nginx", "token")]
    more = ("--snapshotter", "overlayfs") if command == "pull" else ()
    for name in names:
        node.rig.soci("--debug", command, *more, *wire, name)
    out, err = capsys.readouterr()
    assert "(hidden)" in err
    assert "> GET " in err
    planted.check(out.encode(), "stdout")
    planted.check(err.encode(), "stderr")
