"""A containerd of the test's own, the CLI against it, a registry, and a layer with a shell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containerd import Containerd, start_containerd
from harness.images import Layer, layer_from_dir, shell_rootfs
from harness.registries import RunningRegistry, start_registry
from tests.integration.support import Soci

from soci_snapshotter.containerd.client import ContainerdClient


@pytest.fixture
def containerd() -> Iterator[Containerd]:
    """A containerd of the test's own: what is collected and what is not must not depend on others."""
    with start_containerd() as daemon:
        yield daemon


@pytest.fixture
def soci(containerd: Containerd, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Soci:
    """The CLI with a root of the test's own."""
    return Soci(containerd, tmp_path / "root", capsys)


@pytest.fixture
def client(containerd: Containerd) -> Iterator[ContainerdClient]:
    """A client in the namespace the CLI uses by default."""
    with ContainerdClient(containerd.address) as found:
        yield found


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """One registry; each test pushes to a repository of its own."""
    with start_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def name(registry: RunningRegistry, request: pytest.FixtureRequest) -> str:
    """An image name of the test's own in the registry."""
    words = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")
    return f"{registry.host}/{words}:1"


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    """A layer with a shell, cat, ls and sha256sum."""
    return layer_from_dir(shell_rootfs(tmp_path_factory.mktemp("shell")))
