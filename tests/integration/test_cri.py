"""The CRI as the kubelet speaks it, with each version of containerd configured as docs/containerd.md says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import cri
from harness.cri import NAMESPACE, Cri, Pod
from harness.images import Layer
from tests.integration.test_matrix import DATA, SUMS, Matrix, matrix_layers
from tests.integration.versions import node, versions

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layer, Layer]:
    """The layers of every test's image."""
    return matrix_layers(tmp_path_factory.mktemp("rootfs"))


@pytest.fixture(scope="module", params=versions("1.6"))
def matrix(request: pytest.FixtureRequest, layers: tuple[Layer, Layer]) -> Iterator[Matrix]:
    """One node for each version and all tests of the module."""
    with node(request.param) as rig:
        yield Matrix(rig, request.param, layers)


@pytest.fixture
def kubelet(matrix: Matrix) -> Iterator[Cri]:
    """A connection to the CRI; no image of a test stays."""
    with cri.connect(matrix.rig.containerd.address) as found:
        yield found
    with cri.connect(matrix.rig.containerd.address) as found:
        for name in found.images():
            found.remove_image(name)


def logged(logs: Path, name: str) -> str:
    """A container's log, once it has a line (CRI: time, stream, F or P, text)."""
    file, end = logs / f"{name}.log", time.monotonic() + 20
    while not (file.exists() and file.read_text().endswith("\n")) and time.monotonic() < end:
        time.sleep(0.05)
    return "".join(line.split(" ", 3)[3] for line in file.read_text().splitlines(keepends=True))


def sleeper(kubelet: Cri, pod: Pod, name: str, image: str) -> str:
    """A container that says the sum of a file, and stays."""
    script = (
        "/bin/sha256sum /data/02; while :; do read x </tmp/none || /bin/ls / >/dev/null; done 2>/dev/null"
    )
    return kubelet.start(pod, name, image, ["/bin/sh", "-c", script])


def test_a_pod_from_pull_to_removal(matrix: Matrix, kubelet: Cri) -> None:
    """PullImage is lazy, a pod's containers read the right bytes by log and exec, and removing all leaves nothing."""
    rig, image, logs = matrix.rig, matrix.rig.name("pod"), matrix.rig.base / "logs"
    rig.publish("pod", matrix.layers)
    assert kubelet.ready()
    assert kubelet.image(image) is None
    assert rig.lazy_layers() == 0
    # The kubelet sends such an annotation for a runtime class; containerd must find its own beside it.
    reference = kubelet.pull(image, annotations={"io.containerd.cri.runtime-handler": ""})
    assert rig.lazy_layers() == len(matrix.layers)
    known = kubelet.image(image)
    assert known is not None
    assert known.id == reference
    pod = kubelet.run_pod("lazy", logs)
    first = sleeper(kubelet, pod, "first", image)
    assert logged(logs, "first").partition(" ")[0] == SUMS[2]
    assert kubelet.state(first) == ("CONTAINER_RUNNING", 0)
    output, code = kubelet.run(first, "/bin/sha256sum", "/data/10")
    assert (output.decode().partition(" ")[0], code) == (SUMS[10], 0)
    assert matrix.fetched() < sum(len(data) for data in DATA)
    second = kubelet.start(pod, "second", image, ["/bin/sha256sum", "/data/04"])
    assert logged(logs, "second").partition(" ")[0] == SUMS[4]
    for container in (first, second):
        kubelet.remove(container)
    kubelet.stop_pod(pod)
    assert rig.lazy_layers() >= len(matrix.layers)
    kubelet.remove_image(image)
    assert kubelet.image(image) is None
    matrix.assert_nothing_left()


def test_a_pod_over_a_restart(matrix: Matrix, kubelet: Cri) -> None:
    """containerd and our daemon restart under a pod: its container reads on, and a new one starts."""
    rig, image, logs = matrix.rig, matrix.rig.name("restart"), matrix.rig.base / "logs"
    rig.publish("restart", matrix.layers)
    kubelet.pull(image)
    pod = kubelet.run_pod("restart", logs)
    first = sleeper(kubelet, pod, "over", image)
    assert logged(logs, "over").partition(" ")[0] == SUMS[2]
    rig.daemon.kill()
    rig.daemon.start()
    rig.reconnected()
    # Only now: images whose snapshots it cannot see when it starts, containerd forgets until they are pulled again.
    rig.containerd.restart()
    rig.reconnected()
    with cri.connect(rig.containerd.address) as again:
        output, code = again.run(first, "/bin/sha256sum", "/data/08")
        assert (output.decode().partition(" ")[0], code) == (SUMS[8], 0)
        again.start(pod, "after", image, ["/bin/sha256sum", "/data/06"])
        assert logged(logs, "after").partition(" ")[0] == SUMS[6]
        again.stop_pod(pod)
        again.remove_image(image)
    matrix.assert_nothing_left()


@pytest.mark.slow
def test_pulled_by_ctr_and_by_kubernetes(matrix: Matrix, kubelet: Cri) -> None:
    """An image that `soci pull` put into Kubernetes' namespace is Kubernetes' own: it runs, and goes by RemoveImage."""
    rig, image = matrix.rig, matrix.rig.name("shared")
    rig.publish("shared", matrix.layers)
    pull = ("pull", "--quiet", "--plain-http", "--snapshotter", "soci", image)
    assert rig.soci("--namespace", NAMESPACE, *pull) == 0
    mounted = rig.lazy_layers()
    kubelet.pull(image)
    assert rig.lazy_layers() == mounted == len(matrix.layers)
    pod = kubelet.run_pod("shared", rig.base / "logs")
    kubelet.start(pod, "shared", image, ["/bin/sha256sum", "/data/00"])
    assert logged(rig.base / "logs", "shared").partition(" ")[0] == SUMS[0]
    kubelet.stop_pod(pod)
    kubelet.remove_image(image)
    matrix.assert_nothing_left()
