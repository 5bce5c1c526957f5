"""What the tests with a real containerd share: the vectors' layers, the CLI in this process, a walk over an image."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness.containerd import Containerd
from harness.images import Layer, Layout, layer_from_blob, load, write_layout

from soci_snapshotter.cli.main import run
from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.errors import NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest

VECTORS = Path(__file__).parents[1] / "vectors"
GNU = layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz")
PIGZ = layer_from_blob(VECTORS / "pigz-edge3/layer.tar.gz")
PLAIN = layer_from_blob(VECTORS / "none-edge3-span1m/layer.tar")


class Soci:
    """The CLI, run in this process, against one containerd and one root."""

    def __init__(self, containerd: Containerd, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.containerd = containerd
        self.flags = ["--address", containerd.address, "--root", str(root)]
        self.root = root
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        """Run a command line; return stdout, or stderr when a failure is expected."""
        found = run([*self.flags, *arguments])
        out, err = self._capsys.readouterr()
        assert found == code, (out, err)
        return str(out if code == 0 else err)

    def create(self, *arguments: str, store: str = "containerd") -> list[Digest]:
        """Run create with every layer counting; return the digests of the indexes it names."""
        return indexes_in(self("--content-store", store, "create", "--min-layer-size", "0", *arguments))

    def convert(self, *arguments: str, store: str = "containerd") -> Digest:
        """Run convert with every layer counting; return the digest of the image it makes."""
        out = self("--content-store", store, "convert", "--min-layer-size", "0", "--quiet", *arguments)
        return digests.parse(out.strip())

    def pull(self, name: str, *arguments: str, snapshotter: str = "overlayfs", code: int = 0) -> str:
        """Run pull."""
        return self("pull", "--snapshotter", snapshotter, *arguments, name, code=code)


def indexes_in(out: str) -> list[Digest]:
    """The indexes that create says it made."""
    return [digests.parse(found) for found in re.findall(r"^index (sha256:\S+) ", out, re.MULTILINE)]


def image(
    tmp_path: Path, containerd: Containerd, *layers: Layer, name: str = "docker.io/library/x:1"
) -> Layout:
    """An image of one platform in containerd."""
    layout = write_layout(tmp_path / f"layout-{name.replace('/', '-')}", layers, name=name)
    load(layout, containerd)
    return layout


def tree(client: ContainerdClient, digest: Digest) -> tuple[set[Digest], set[Digest]]:
    """What an image or index names, itself too, in containerd: the blobs that are there, and those that are not."""
    there: set[Digest] = set()
    gone: set[Digest] = set()
    waiting = [digest]
    while waiting:
        one = waiting.pop()
        try:
            document = oci.decode_manifest(client.content.get(one, oci.MANIFEST_LIMIT))
        except NotFound:
            gone.add(one)
            continue
        there.add(one)
        if isinstance(document, oci.Index):
            waiting += [entry.digest for entry in document.manifests]
        else:
            for entry in (document.config, *document.layers):
                (there if client.content.exists(entry.digest) else gone).add(entry.digest)
    return there, gone
