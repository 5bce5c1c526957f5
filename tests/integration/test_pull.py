"""`soci pull` with a real containerd, a real registry and runc; lazily too, through our daemon."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness.containerd import Containerd
from harness.images import Layer, Layout, push, write_layout, write_multi_layout
from harness.registries import RunningRegistry as Registry
from tests.integration.support import GNU, PIGZ, PLAIN, Soci

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.digest import Digest

pytestmark = pytest.mark.root


def _push(tmp_path: Path, name: str, *layers: Layer) -> Layout:
    layout = write_layout(tmp_path / "layout", layers)
    push(layout, name)
    return layout


def _counts(out: str) -> tuple[int, ...]:
    """Lazy, local, existing of the end line."""
    found = re.search(r"(\d+) lazy, (\d+) local, (\d+) existing", out)
    assert found is not None
    return tuple(int(number) for number in found.groups())


def _blobs(client: ContainerdClient) -> set[Digest]:
    return {blob.digest for blob in client.content.find()}


def test_pulled_image_runs_and_survives_collection(
    soci: Soci, containerd: Containerd, shell: Layer, name: str, tmp_path: Path
) -> None:
    """Gzip, pigz, plain and a repeated layer: after collection a container starts and lists them."""
    _push(tmp_path, name, shell, GNU, PIGZ, PLAIN, GNU)
    out = soci.pull(name)
    assert _counts(out) == (0, 5, 0)
    assert out.count("\nlayer sha256:") == 5
    containerd.garbage_collect()
    assert containerd.run(name, "sh", "-c", "echo it runs; ls /").splitlines()[0] == "it runs"


def test_second_pull_fetches_nothing(soci: Soci, shell: Layer, name: str, tmp_path: Path) -> None:
    """The same image again: every layer exists, no byte of a layer is fetched."""
    _push(tmp_path, name, shell, GNU)
    soci.pull(name)
    out = soci.pull(name)
    assert _counts(out) == (0, 0, 2)
    assert " 0 bytes of layers fetched" in out


def test_what_is_pulled_goes_with_the_image(
    soci: Soci, client: ContainerdClient, shell: Layer, name: str, tmp_path: Path
) -> None:
    """Labels hold manifest, config, layers and snapshots to the image: it goes, all go."""
    layout = _push(tmp_path, name, shell, GNU)
    soci.pull(name)
    image = layout.images[0]
    parts = [image.manifest, image.config, *image.layers]
    assert _blobs(client) == {str(part["digest"]) for part in parts}
    labels = client.content.info(digests.parse(str(image.layers[1]["digest"]))).labels
    assert labels["containerd.io/uncompressed"] == GNU.diff_id
    domain, _, path = name.rpartition(":")[0].partition("/")
    assert labels["containerd.io/distribution.source." + domain.partition(":")[0]] == path
    client.images.delete(name, collect=True)
    assert _blobs(client) == set()
    assert list(client.snapshots("overlayfs").find()) == []


def test_same_result_as_ctr(
    soci: Soci, client: ContainerdClient, containerd: Containerd, *, shell: Layer, name: str, tmp_path: Path
) -> None:
    """containerd's own pull of the same image leaves the same content, labels and snapshots."""
    _push(tmp_path, name, shell, GNU, PIGZ)
    soci.pull(name)

    def state() -> tuple[object, ...]:
        content = {blob.digest: dict(blob.labels) for blob in client.content.find()}
        chain = {(found.name, found.parent, found.kind) for found in client.snapshots("overlayfs").find()}
        return content, chain, client.images.get(name).target

    ours = state()
    client.images.delete(name, collect=True)
    containerd.ctr("images", "pull", "--plain-http", name)
    for mine, theirs in zip(ours, state(), strict=True):
        assert mine == theirs


def test_platform(soci: Soci, client: ContainerdClient, shell: Layer, name: str, tmp_path: Path) -> None:
    """--platform takes that manifest of an index; one the index lacks is an error that lists what it has."""
    layout = write_multi_layout(tmp_path / "multi", {"amd64": [shell], "arm64": [PIGZ]})
    push(layout, name)
    soci.pull(name, "--platform", "linux/arm64")
    arm = layout.images[1]
    assert client.content.exists(digests.parse(str(arm.manifest["digest"])))
    assert not client.content.exists(digests.parse(str(layout.images[0].manifest["digest"])))
    assert client.images.get(name).target.digest == layout.digest
    err = soci.pull(name, "--platform", "linux/riscv64", code=4)
    assert "linux/riscv64" in err
    assert "linux/arm64" in err


def test_quiet_prints_nothing(soci: Soci, shell: Layer, name: str, tmp_path: Path) -> None:
    """--quiet: success is silent."""
    _push(tmp_path, name, shell)
    assert soci.pull(name, "--quiet") == ""


def test_wrong_diff_id_is_refused(
    soci: Soci, client: ContainerdClient, shell: Layer, name: str, tmp_path: Path
) -> None:
    """A config that promises another DiffID: an error with both digests, no image, no active snapshot."""
    _push(tmp_path, name, shell, Layer(GNU.blob, PIGZ.diff_id))
    err = soci.pull(name, code=7)
    assert GNU.diff_id in err
    assert PIGZ.diff_id in err
    assert client.images.find() == []
    assert [found.name for found in client.snapshots("overlayfs").find() if found.kind == "active"] == []


def test_unknown_image_and_dead_registry(soci: Soci, registry: Registry, name: str) -> None:
    """404 and a registry that is not there: one line with host and repository, exit 4 and 9."""
    err = soci.pull(name, code=4)
    assert registry.host in err
    assert name.partition("/")[2].rpartition(":")[0] in err
    assert err.count("\n") == 1
    gone = "127.0.0.1:1/gone/away:1"
    err = soci("--timeout", "30s", "pull", "--snapshotter", "overlayfs", gone, code=9)
    assert "127.0.0.1:1" in err
    assert "gone/away" in err
    assert err.count("\n") == 1


def test_unknown_snapshotter_says_what_to_configure(soci: Soci, name: str) -> None:
    """A containerd without the proxy plugin: the line names the section to add, and nothing is fetched."""
    err = soci.pull(name, snapshotter="soci", code=2)
    assert "[proxy_plugins.soci]" in err
