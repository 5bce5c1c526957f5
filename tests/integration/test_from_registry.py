"""`soci create` and `soci convert` straight against registries: no containerd, and nothing left on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.images import Layer, Layout, layer_from_tar, push, write_layout, write_multi_layout
from harness.proxy import Proxy, parse_link
from harness.registries import RunningRegistry, start_oci_registry, start_registry
from tests.integration.support import GNU, PIGZ, indexes_in

from soci_snapshotter.cli.main import run
from soci_snapshotter.errors import NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, reference, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.registry.client import RegistryClient

pytestmark = pytest.mark.root


@pytest.fixture(scope="module", params=[start_registry, start_oci_registry], ids=["docker-registry", "oci"])
def either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningRegistry]:
    """One without and one with the referrers API; each test has a repository of its own."""
    with request.param(tmp_path_factory.mktemp("registry")) as running:
        yield running


class Tool:
    """The CLI with a containerd that is nowhere; `scratch` is where temporary files go."""

    def __init__(self, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.scratch = scratch
        self._capsys = capsys

    def __call__(self, command: str, *arguments: str, code: int = 0) -> str:
        """Run it; return stdout, or stderr when a failure is expected. Whatever happens, nothing stays on disk."""
        nowhere = ("--address", "/nowhere/containerd.sock", "--root", "/nowhere/root")
        found = run([*nowhere, command, "--from-registry", "--min-layer-size", "0", *arguments])
        out, err = self._capsys.readouterr()
        assert found == code, (out, err)
        assert list(self.scratch.iterdir()) == []
        return str(out if code == 0 else err)


@pytest.fixture
def soci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """The CLI, its temporary files in a directory of the test's own."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # tempfile asks the environment once per process.
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    return Tool(scratch, capsys)


def published(tmp_path: Path, name: str) -> Layout:
    """An image of two platforms in the registry."""
    layout = write_multi_layout(tmp_path / "multi", {"amd64": [GNU, PIGZ], "arm64": [PIGZ]})
    push(layout, name)
    return layout


def documents(client: RegistryClient, target: Reference) -> dict[Digest, oci.Manifest]:
    """The manifests that an image's index names; all blobs they name are in the repository, or this fails."""
    index = oci.decode_manifest(client.fetch(target, client.resolve(target), oci.MANIFEST_LIMIT))
    assert isinstance(index, oci.Index)
    found = {}
    for entry in index.manifests:
        manifest = oci.decode_manifest(client.fetch(target, entry, oci.MANIFEST_LIMIT))
        assert isinstance(manifest, oci.Manifest)
        assert all(client.exists(target, blob) for blob in (manifest.config, *manifest.layers))
        found[entry.digest] = manifest
    return found


def test_create_puts_the_index_beside_the_image(soci: Tool, either: RunningRegistry, tmp_path: Path) -> None:
    """One platform, then all: each image has its index among its referrers, whole; again changes nothing."""
    name = f"{either.host}/create/x:1"
    layout = published(tmp_path, name)
    target = reference.parse(name)
    made = indexes_in(soci("create", "-p", "linux/arm64", name))
    made = [*indexes_in(soci("create", "--all-platforms", name))]
    assert len(made) == 2
    assert indexes_in(soci("create", "--all-platforms", name)) == made
    with RegistryClient() as client:
        for image, index in zip(layout.images, made, strict=True):
            listed = client.referrers(target, digests.parse(image.manifest["digest"]), sociindex.INDEX_V1)
            assert [entry.digest for entry in listed] == [index]
            manifest = sociindex.decode(client.fetch(target, listed[0], oci.MANIFEST_LIMIT))
            assert list(manifest.ztocs) == [entry["digest"] for entry in image.layers]
            assert all(client.exists(target, ztoc) for ztoc in manifest.ztocs.values())


def test_convert_to_a_tag_beside_it(soci: Tool, registry: RunningRegistry, tmp_path: Path) -> None:
    """Same repository, new tag: no layer moves, the old tag stays, and converting again gives the same digest."""
    source, name = f"{registry.host}/same/x:1", f"{registry.host}/same/x:2"
    layout = published(tmp_path, source)
    before = len(registry.requests())
    root = soci("convert", "--quiet", "--all-platforms", source, name).strip()
    assert not any_layer_sent(registry, before, layout)
    assert soci("convert", "--quiet", "--all-platforms", source, name).strip() == root
    with RegistryClient() as client:
        assert client.resolve(reference.parse(source)).digest == layout.digest
        assert client.resolve(reference.parse(name)).digest == root
        assert len(documents(client, reference.parse(name))) == 4


def test_convert_to_another_repository_takes_layers_along(
    soci: Tool, either: RunningRegistry, tmp_path: Path
) -> None:
    """Another repository of the same registry: layers and configs are mounted there; their bytes are not sent."""
    source, name = f"{either.host}/from/x:1", f"{either.host}/to/other:1"
    layout = published(tmp_path, source)
    before = len(either.requests())
    soci("convert", "--quiet", "--all-platforms", source, name)
    assert not any_layer_sent(either, before, layout)
    with RegistryClient() as client:
        assert len(documents(client, reference.parse(name))) == 4


def test_convert_to_another_registry(soci: Tool, registry: RunningRegistry, tmp_path: Path) -> None:
    """Between registries every blob goes along, one platform's SOCI index with it."""
    source = f"{registry.host}/away/x:1"
    published(tmp_path, source)
    with start_registry(tmp_path / "other") as other:
        name = f"{other.host}/away/x:1"
        # What was not converted is left as it was, and has to be there too.
        root = soci("convert", "--quiet", "--all-platforms", source, name).strip()
        with RegistryClient() as client:
            assert client.resolve(reference.parse(name)).digest == root
            assert len(documents(client, reference.parse(name))) == 4


def test_the_disk_holds_ztocs_only(soci: Tool, registry: RunningRegistry, tmp_path: Path) -> None:
    """While layers of 48 MB are read, the temporary files stay below a tenth of that."""
    layers = [noise(seed, 24) for seed in (1, 2)]
    name = f"{registry.host}/big/x:1"
    push(write_layout(tmp_path / "big", layers), name)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            with contextlib.suppress(FileNotFoundError):  # a directory went while it was listed
                peak[0] = max(peak[0], sum(size_of(file) for file in soci.scratch.rglob("*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        soci("convert", name, f"{registry.host}/big/x:2")
    finally:
        done.set()
        watcher.join()
    assert 0 < peak[0] < sum(len(layer.blob) for layer in layers) / 10


def test_a_registry_that_dies_shows_nothing(soci: Tool, registry: RunningRegistry, tmp_path: Path) -> None:
    """The connection to DST is gone for good in the middle of a layer: exit 9 naming it, and no tag there."""
    source = f"{registry.host}/dies/x:1"
    layout = write_layout(tmp_path / "dies", [noise(3, 8)])
    push(layout, source)
    with start_registry(tmp_path / "other") as other:
        with Proxy(other.address, link=parse_link("16mbit")) as proxy:
            host = proxy.host
            with ended_by(proxy, 1 << 20):
                err = soci("convert", source, f"{host}/dies/x:1", code=9)
        assert host in err
        assert err.count("\n") == 1
        with RegistryClient() as client, pytest.raises(NotFound):
            client.resolve(reference.parse(f"{other.host}/dies/x:1"))


@contextlib.contextmanager
def ended_by(proxy: Proxy, sent: int) -> Iterator[None]:
    """The proxy ends for good once it has carried so many bytes to its target."""
    left = threading.Event()

    def end() -> None:
        while proxy.sent < sent and not left.wait(0.01):
            pass
        proxy.__exit__(None, None, None)

    ending = threading.Thread(target=end)
    ending.start()
    try:
        yield
    finally:
        left.set()
        ending.join()


def any_layer_sent(registry: RunningRegistry, start: int, layout: Layout) -> bool:
    """Whether a layer of the image was uploaded since request `start`."""
    sent = [
        target for method, target in registry.requests()[start:] if method == "PUT" and "/blobs/" in target
    ]
    layers = [digests.parse(entry["digest"]).hex for image in layout.images for entry in image.layers]
    return any(layer in target for layer in layers for target in sent)


def noise(seed: int, megabytes: int) -> Layer:
    """A layer that does not get smaller."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo(f"noise-{seed}")
        member.size = megabytes << 20
        tar.addfile(member, io.BytesIO(hashlib.shake_128(bytes([seed])).digest(member.size)))
    return layer_from_tar(stream.getvalue(), "python")


def size_of(file: Path) -> int:
    """Bytes on disk, 0 for what went a moment ago."""
    try:
        return os.stat(file).st_blocks * 512
    except FileNotFoundError:
        return 0
