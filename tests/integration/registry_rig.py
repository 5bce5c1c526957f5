"""One node, and every kind of registry that the tests have: what test_registry_suite and test_no_secrets share."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.badserver import BadServer, bad_server
from harness.images import Layout
from harness.lazyrig import Rig, lazy_rig
from harness.memregistry import MemRegistry
from harness.registries import start_oci_registry
from harness.tlsfront import make_authority, start_tls_front
from harness.tokenserver import TokenService, start_token_registry

from soci_snapshotter.cli.registries import RegistryFlags, open_registry
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.sociindex import ZtocDescriptor
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index.build import build_ztoc
from soci_snapshotter.index.create import BUILD_TOOL

KINDS = ("docker-registry", "oci", "token", "nginx", "raw")
SPAN = 1 << 18
# Quick to give up: what a registry does wrong here, it does again.
FAST = (
    "[pull_modes.soci_v1]\nenable = true\n[http]\nMaxRetries = 2\nMinWaitMsec = 10\n"
    "[blob]\nfetching_timeout_sec = 3\n[background_fetch]\ndisable = true\n"
)


@dataclass
class Registries:
    """A node and the registries that it can reach, by KINDS."""

    rig: Rig
    hosts: dict[str, str]
    raw: MemRegistry
    raw_server: BadServer
    tokens: TokenService
    certs: Path

    @property
    def flags(self) -> tuple[str, ...]:
        """What the CLI needs for the registry with a CA of its own; harmless for the others."""
        return ("--hosts-dir", str(self.certs))

    def name(self, kind: str, repository: str) -> str:
        """An image's reference."""
        return f"{self.hosts[kind]}/{repository}:1"

    def push_image(self, name: str, layout: Layout) -> None:
        """Push the image of a layout with our own client: it has the logins and certificates."""
        reference = references.parse(name)
        with open_registry(RegistryFlags(hosts_dir=(str(self.certs),)), reference) as client:
            image = layout.images[0]
            for entry in (image.config, *image.layers):
                data = blob_of(layout, str(entry["digest"]))
                described = Descriptor(entry["mediaType"], digests.sha256(data), len(data))
                client.push_blob(reference, described, lambda data=data: (data,))
            client.push_manifest(
                reference, blob_of(layout, str(image.manifest["digest"])), oci.MANIFEST, reference.tag
            )


def blob_of(layout: Layout, digest: str) -> bytes:
    """A blob of a layout."""
    return (layout.path / "blobs" / digest.replace(":", "/")).read_bytes()


@contextmanager
def registries(
    base: Path,
    *,
    password: str,
    refresh: str,
    top: str = "",
    config: str = FAST,
) -> Iterator[Registries]:
    """Start all of it. `top` are root keys of the daemon's configuration, which ends with `config`."""
    certs, docker = base / "certs.d", base / "docker"
    certs.mkdir()
    docker.mkdir()
    raw = MemRegistry(page=1)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("DOCKER_CONFIG", str(docker))
        resolver = f'[resolver]\nconfig_path = "{certs}"\n'
        rig = stack.enter_context(lazy_rig(top + config + resolver))
        behind = stack.enter_context(start_oci_registry(base / "oci"))
        token, service = stack.enter_context(start_token_registry(base / "token", ("me", password), refresh))
        authority = make_authority(base / "ca")
        certificate, key = authority.issue("client", client=True)
        front = stack.enter_context(
            start_tls_front(base / "front", behind, authority, client_ca=authority.ca, login=("me", password))
        )
        server = stack.enter_context(bad_server(raw))
        hosts = {
            "docker-registry": rig.proxy.host,
            "oci": behind.host,
            "token": token.host,
            "nginx": front.host,
            "raw": server.host,
        }
        basic = base64.b64encode(f"me:{password}".encode()).decode()
        auths = {front.host: {"auth": basic}, token.host: {"auth": "MDAwOg==", "identitytoken": refresh}}
        (docker / "config.json").write_text(json.dumps({"auths": auths}))
        own = certs / (front.host.replace(":", "_") + "_")
        own.mkdir()
        (own / "hosts.toml").write_text(
            f'server = "https://{front.host}"\nca = "{authority.ca}"\nclient = [["{certificate}", "{key}"]]\n'
        )
        yield Registries(rig, hosts, raw, server, service, certs)


@dataclass
class Indexed:
    """An image in the raw registry with its v1 index: everything made here, nothing pushed."""

    layout: Layout
    name: str
    index: bytes
    ztoc: bytes

    @property
    def layer(self) -> bytes:
        """The only layer's blob."""
        return blob_of(self.layout, str(self.layout.images[0].layers[0]["digest"]))


def put_indexed(raw: MemRegistry, host: str, repository: str, layout: Layout) -> Indexed:
    """Put an image of one layer and its index straight into the raw registry."""
    image = layout.images[0]
    entry = image.layers[0]
    layer = blob_of(layout, str(entry["digest"]))
    ztoc = build_ztoc((layer,), compression=Compression.GZIP, span_size=SPAN, build_tool=BUILD_TOOL).data
    manifest = blob_of(layout, str(image.manifest["digest"]))
    described = ZtocDescriptor(
        digests.sha256(ztoc), len(ztoc), digests.sha256(layer), str(entry["mediaType"]), SPAN
    )
    subject = Descriptor(oci.MANIFEST, digests.sha256(manifest), len(manifest))
    index = sociindex.build(subject, [described], BUILD_TOOL)
    blobs = (layer, ztoc, oci.EMPTY_JSON, blob_of(layout, str(image.config["digest"])))
    raw.blobs[repository] = {digests.sha256(data): data for data in blobs}
    raw.manifests[repository] = {
        name: (oci.MANIFEST, data)
        for name, data in ((subject.digest, manifest), ("1", manifest), (digests.sha256(index), index))
    }
    return Indexed(layout, f"{host}/{repository}:1", index, ztoc)
