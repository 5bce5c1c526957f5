"""The registry client against docker-registry (referrers by tag) and the Go registry (referrers by API)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.proxy import Proxy
from harness.registries import RunningRegistry, start_oci_registry, start_registry

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import digest, oci, reference, sociindex
from soci_snapshotter.formats.oci import Descriptor, Manifest
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.ranges import BlobReader
from soci_snapshotter.registry.urls import Repository


@pytest.fixture(params=[start_registry, start_oci_registry], ids=["docker-registry", "oci"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningRegistry]:
    with request.param(tmp_path / "registry") as running:
        yield running


def _blob(client: RegistryClient, repo: Repository, data: bytes, media_type: str) -> Descriptor:
    described = Descriptor(media_type, digest.sha256(data), len(data))
    client.push_blob(repo, described, lambda: (data,))
    return described


def test_push_resolve_fetch_ranges_and_referrers(registry: RunningRegistry) -> None:
    """What is pushed resolves, comes back whole and in ranges, and two referrers of it are both found."""
    repo = Repository(registry.host, "a/b")
    data = os.urandom(3_000_001)
    with RegistryClient() as client:
        config = _blob(client, repo, b"{}", oci.CONFIG)
        layer = _blob(client, repo, data, "application/vnd.oci.image.layer.v1.tar")
        assert client.push_blob(repo, layer, lambda: (data,)) is False
        image = oci.encode(
            Manifest(schema_version=2, media_type=oci.MANIFEST, config=config, layers=(layer,))
        )
        pushed = client.push_manifest(repo, image, oci.MANIFEST, "v1")
        resolved = client.resolve(reference.parse(f"{registry.host}/a/b:v1"))
        assert resolved == pushed
        assert client.fetch(repo, resolved, oci.MANIFEST_LIMIT) == image
        with client.open_blob(repo, layer, 1000) as pieces:
            assert b"".join(pieces) == data[1000:]

        index_config = _blob(client, repo, oci.EMPTY_JSON, sociindex.INDEX_V1)
        indexes = []
        for note in "xy":
            index = Manifest(
                schema_version=2,
                media_type=oci.MANIFEST,
                config=index_config,
                layers=(layer,),
                subject=pushed,
                annotations={"note": note},
            )
            indexes.append(client.push_manifest(repo, oci.encode(index), oci.MANIFEST).digest)
        found = client.referrers(repo, pushed.digest, sociindex.INDEX_V1)
        assert sorted(each.digest for each in found) == sorted(indexes)
        assert client.referrers(repo, pushed.digest, "application/other") == []

        pool = ConnectionPool(client.options)
        reader = BlobReader(client, pool, repo, layer.digest, layer.size)
        got = bytearray()
        reader.read_range(17, 2_500_000, got.extend, time.monotonic() + 20)
        assert got == data[17:2_500_000]
        assert reader.read(2_999_999, 3_000_001, time.monotonic() + 20) == data[-2:]
        pool.close()


def test_missing_and_unreachable_name_host_and_repository(registry: RunningRegistry) -> None:
    """A missing tag is NotFound, a dead port Remote, and both lines name host and repository."""
    with RegistryClient(Options(retry=Retry(attempts=1))) as client:
        with pytest.raises(NotFound, match=rf"{registry.host}/a/b: manifest v9: .*404"):
            client.resolve(reference.parse(f"{registry.host}/a/b:v9"))
        with pytest.raises(Remote, match=r"127.0.0.1:1/a/b: .*connection refused.*check that"):
            client.resolve(reference.parse("127.0.0.1:1/a/b:v9"))


def test_a_failed_upload_lets_go_of_what_it_reads(registry: RunningRegistry) -> None:
    """An upload whose connection breaks closes its body at once: it may be the download from another registry."""
    begun, ended = [0], [0]

    with Proxy(registry.address) as proxy:

        def body() -> Iterator[bytes]:
            begun[0] += 1
            try:
                while True:
                    yield bytes(1 << 16)
                    if proxy.sent > 1 << 20:
                        proxy.cut()
            finally:
                ended[0] += 1

        described = Descriptor("application/octet-stream", digest.sha256(b"never"), 1 << 30)
        options = Options(retry=Retry(attempts=1, min_wait=0.01))
        # `caught` keeps the traceback, and with it whatever was not closed.
        with RegistryClient(options) as client, pytest.raises(Remote) as caught:
            client.push_blob(Repository(proxy.host, "a/b"), described, body)
    assert caught.value
    assert begun == ended != [0]
