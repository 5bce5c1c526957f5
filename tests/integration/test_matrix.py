"""ctr and `soci pull` with each version of containerd, configured as docs/containerd.md says."""

from __future__ import annotations

import hashlib
import io
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import cri
from harness.containerdrig import documented
from harness.containerds import RELEASES
from harness.images import Layer, layer_from_dir, layer_from_tar, shell_rootfs
from harness.lazyrig import Rig
from tests.integration.versions import node, versions

from soci_snapshotter.cli import servicechecks
from soci_snapshotter.cli.nodechecks import Node
from soci_snapshotter.policy.findings import Finding, Level

pytestmark = pytest.mark.root

DATA = [hashlib.shake_128(f"matrix/{number}".encode()).digest(1 << 20) for number in range(24)]
PROGRAMS = ("dash", "cat", "sha256sum", "sleep")
SUMS = [hashlib.sha256(data).hexdigest() for data in DATA]


@dataclass(frozen=True)
class Matrix:
    """A node, the version of its containerd, and the layers of an image."""

    rig: Rig
    version: str
    layers: tuple[Layer, Layer]

    def sum(self, image: str, number: int, *, namespace: str = "default") -> str:
        """The sha256 that a new container computes of one file."""
        run = ("run", "--rm", "--snapshotter", "soci", image, f"c-{time.monotonic_ns()}")
        command = ("/bin/sha256sum", f"/data/{number:02}")
        return self.rig.containerd.ctr(*run, *command, namespace=namespace).stdout.partition(" ")[0]

    def fetched(self) -> int:
        """Bytes of layers on disk."""
        files = (self.rig.daemon.root / "layers").glob("*/*/data.tar")
        return sum(each.stat().st_blocks * 512 for each in files)

    def assert_nothing_left(self) -> None:
        """No lazy mount and no layer file, in a moment."""
        layers = self.rig.daemon.root / "layers"
        end = time.monotonic() + 20
        while (self.rig.lazy_layers() or list(layers.iterdir())) and time.monotonic() < end:
            time.sleep(0.05)
        assert (self.rig.lazy_layers(), list(layers.iterdir())) == (0, [])


def matrix_layers(base: Path) -> tuple[Layer, Layer]:
    """A layer with a shell, and one with files that come one by one."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, data in enumerate(DATA):
            member = tarfile.TarInfo(f"data/{number:02}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return layer_from_dir(shell_rootfs(base, PROGRAMS)), layer_from_tar(stream.getvalue())


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layer, Layer]:
    """The layers of most tests' image."""
    return matrix_layers(tmp_path_factory.mktemp("rootfs"))


@pytest.fixture(scope="module", params=versions("1.6"))
def matrix(request: pytest.FixtureRequest, layers: tuple[Layer, Layer]) -> Iterator[Matrix]:
    """One node for each version and all tests of the module."""
    with node(request.param) as rig:
        yield Matrix(rig, request.param, layers)


def check_lazy_pull(matrix: Matrix, repository: str, *pull: str) -> None:
    """The image is published and pulled: mounts come, a read fetches a part, and all goes with the image."""
    rig, name = matrix.rig, matrix.rig.name(repository)
    rig.publish(repository, matrix.layers)
    assert rig.lazy_layers() == 0
    if pull:
        rig.containerd.ctr(*pull, name)
    else:
        rig.pull(repository)
    assert rig.lazy_layers() == len(matrix.layers)
    before = matrix.fetched()
    assert matrix.sum(name, 7) == SUMS[7]
    assert before < matrix.fetched() < sum(len(data) for data in DATA)
    rig.containerd.ctr("images", "rm", "--sync", name)
    matrix.assert_nothing_left()


def test_soci_pull(matrix: Matrix) -> None:
    """`soci pull` is lazy, a container reads the right bytes, and nothing is left of an image that is removed."""
    check_lazy_pull(matrix, "pulled")


@pytest.mark.parametrize("version", versions("2.1", only=("1.7", "2.1")))
def test_smoke(version: str, layers: tuple[Layer, Layer]) -> None:
    """The newer ones of Debian's suites pull lazily, run and forget: 1.7 by `soci pull`, 2.1 by plain ctr."""
    transfer = ("images", "pull", "--plain-http", "--snapshotter", "soci")
    with node(version) as rig:
        pull = transfer if RELEASES[version].major >= 2 else ()
        check_lazy_pull(Matrix(rig, version, layers), "smoke", *pull)


def test_plain_ctr_pull(matrix: Matrix) -> None:
    """`ctr images pull --snapshotter soci` is lazy through 2.x's transfer service, and with 1.x right but not lazy."""
    rig, name = matrix.rig, matrix.rig.name("plain")
    pull = ("images", "pull", "--plain-http", "--snapshotter")
    if RELEASES[matrix.version].major >= 2:
        check_lazy_pull(matrix, "plain", *pull, "soci")
        # ... and the list of unpack_config leaves containerd its own snapshotter.
        rig.containerd.ctr(*pull, "overlayfs", name)
        said = rig.containerd.run(name, "/bin/sha256sum", "/data/03")
        assert said.partition(" ")[0] == SUMS[3]
    else:
        rig.publish("plain", matrix.layers)
        rig.containerd.ctr(*pull, "soci", name)
        assert rig.lazy_layers() == 0
        assert matrix.sum(name, 3) == SUMS[3]
    rig.containerd.ctr("images", "rm", "--sync", name)
    matrix.assert_nothing_left()


def test_restarted_meanwhile(matrix: Matrix) -> None:
    """Over a restart of containerd a container reads on what nobody read before, and new ones start."""
    rig, name = matrix.rig, matrix.rig.name("restarted")
    rig.publish("restarted", matrix.layers)
    rig.pull("restarted")
    rig.containerd.ctr("run", "-d", "--snapshotter", "soci", name, "long", "/bin/sleep", "infinity")
    rig.containerd.restart()
    rig.reconnected()
    task = ("tasks", "exec", "--exec-id", "e", "long", "/bin/sha256sum", "/data/01")
    assert rig.containerd.ctr(*task).stdout.partition(" ")[0] == SUMS[1]
    assert matrix.sum(name, 9) == SUMS[9]
    rig.containerd.ctr("tasks", "rm", "--force", "long", check=False)
    rig.containerd.ctr("containers", "rm", "long")
    rig.containerd.ctr("images", "rm", "--sync", name)
    matrix.assert_nothing_left()


@pytest.mark.slow
def test_two_namespaces(matrix: Matrix) -> None:
    """Two namespaces have one image; what one removes, the other still reads, and then nothing is left."""
    rig, name = matrix.rig, matrix.rig.name("two")
    rig.publish("two", matrix.layers)
    for namespace in ("one", "two"):
        pull = ("pull", "--quiet", "--plain-http", "--snapshotter", "soci", name)
        assert rig.soci("--namespace", namespace, *pull) == 0
    rig.containerd.ctr("images", "rm", "--sync", name, namespace="one")
    assert rig.lazy_layers() == len(matrix.layers)
    assert matrix.sum(name, 5, namespace="two") == SUMS[5]
    rig.containerd.ctr("images", "rm", "--sync", name, namespace="two")
    matrix.assert_nothing_left()


@pytest.mark.slow
def test_above_layers_of_containerd(matrix: Matrix) -> None:
    """A lazy layer stands on one that containerd unpacked itself, and a container sees both."""
    rig = matrix.rig
    below, above = rig.name("below"), rig.name("above")
    rig.publish("below", matrix.layers[:1], index=False)
    rig.publish("above", matrix.layers)
    rig.pull("below")
    assert rig.lazy_layers() == 0
    rig.pull("above")
    assert rig.lazy_layers() == 1
    assert matrix.sum(above, 11) == SUMS[11]
    for name in (below, above):
        rig.containerd.ctr("images", "rm", "--sync", name)
    matrix.assert_nothing_left()


@pytest.mark.slow
def test_160_layers(matrix: Matrix, tmp_path: Path) -> None:
    """160 lazy layers make one root file system, in which the topmost and the lowest are read."""
    rig, name = matrix.rig, matrix.rig.name("many")
    stack = [matrix.layers[0]]
    for number in range(1, 160):
        layer = tmp_path / f"l{number}"
        layer.mkdir()
        (layer / "top").write_text(f"{number}\n")
        (layer / f"file-{number}").write_text(f"layer {number}\n")
        stack.append(layer_from_dir(layer))
    rig.publish("many", stack)
    rig.pull("many")
    assert rig.lazy_layers() == 160
    run = ("run", "--rm", "--snapshotter", "soci", name, "many", "/bin/cat", "/top", "/file-1", "/file-80")
    assert rig.containerd.ctr(*run).stdout == "159\nlayer 1\nlayer 80\n"
    rig.containerd.ctr("images", "rm", "--sync", name)
    matrix.assert_nothing_left()


@pytest.mark.parametrize("version", versions(only=("2.2", "2.4")))
@pytest.mark.parametrize("index", [False, True])
def test_unpacked_side_by_side(version: str, index: bool, tmp_path: Path) -> None:
    """With the capability rebase containerd unpacks layers in parallel and names their parents at Commit.

    From 2.4 on the root file system is the image's then too, with an index or without; before, the pull is refused.
    """
    text = documented("containerd 2.x").replace(
        '  type = "snapshot"\n', '  type = "snapshot"\n  capabilities = ["rebase"]\n'
    )
    first, transfer = '[[plugins."io.containerd.transfer', '[plugins."io.containerd.transfer.v1.local"]'
    text = text.replace(first, f"{transfer}\n  max_concurrent_unpacks = 4\n\n{first}", 1)
    stack = [layer_from_dir(shell_rootfs(tmp_path / "0", PROGRAMS))]
    for number in range(1, 6):
        layer = tmp_path / str(number)
        layer.mkdir()
        (layer / "top").write_text(f"{number}\n")
        (layer / f"file-{number}").write_text(f"layer {number}\n")
        if number > 1:
            (layer / f".wh.file-{number - 1}").touch()
        stack.append(layer_from_dir(layer))
    with node(version, text=text, extra='\n[debug]\n  level = "debug"\n') as rig:
        name = rig.name("side")
        rig.publish("side", stack, index=index)
        pull = ("images", "pull", "--plain-http", "--snapshotter", "soci", name)
        if version == "2.2":
            done = rig.containerd.ctr(*pull, check=False)
            assert done.returncode != 0
            assert "take the capability rebase out" in done.stderr
            return
        rig.containerd.ctr(*pull)
        assert "parallel=true" in rig.containerd.log_path.read_text()
        # What has no parent in the image, and only that, can be lazy.
        assert rig.lazy_layers() == (1 if index else 0)
        script = "/bin/cat /top /file-5; for name in /file-*; do echo $name; done"
        run = ("run", "--rm", "--snapshotter", "soci", name, "side", "/bin/sh", "-c", script)
        assert rig.containerd.ctr(*run).stdout == "5\nlayer 5\n/file-5\n"
        rig.containerd.ctr("images", "rm", "--sync", name)
        Matrix(rig, version, (stack[0], stack[1])).assert_nothing_left()


def findings(rig: Rig) -> list[Finding]:
    """What doctor says of containerd."""
    file = rig.containerd.base / "config.toml"
    examined = Node(
        containerd=rig.containerd.address,
        namespace="default",
        snapshotter="soci",
        daemon=rig.daemon.address,
        root=rig.daemon.root,
        config=file,
        containerd_config=file,
        docker_config=file,
    )
    return list(servicechecks.check_containerd(examined))


def test_doctor_likes_what_the_document_says(matrix: Matrix) -> None:
    """With the document's configuration doctor finds nothing to mend, whatever the version."""
    found = findings(matrix.rig)
    assert [each for each in found if each.level is not Level.OK] == []
    transfer = "transfer service" in {each.name for each in found}
    assert transfer == (RELEASES[matrix.version].major >= 2)


@pytest.mark.parametrize("version", versions("1.6"))
def test_doctors_advice_is_enough(version: str, layers: tuple[Layer, Layer]) -> None:
    """What doctor advises for a bare containerd, written as it says, makes a node that pulls lazily by ctr and CRI."""
    major = RELEASES[version].major
    bare = f'version = {3 if major >= 2 else 2}\n\n[debug]\n  level = "info"\n'
    with node(version, text=bare) as rig:
        found = findings(rig)
        assert Level.PROBLEM in {each.level for each in found}
        with (rig.containerd.base / "config.toml").open("a") as file:
            # Two checks may miss the same section: it is written once.
            for mend in dict.fromkeys(each.mend for each in found):
                file.writelines(f"{line}\n" for line in mend if line.startswith("  "))
        rig.containerd.restart()
        rig.reconnected()
        assert [each for each in findings(rig) if each.level is not Level.OK] == []
        matrix = Matrix(rig, version, layers)
        pull = ("images", "pull", "--plain-http", "--snapshotter", "soci") if major >= 2 else ()
        check_lazy_pull(matrix, "advised", *pull)
        with cri.connect(rig.containerd.address) as kubelet:
            kubelet.pull(rig.name("advised"))
            assert rig.lazy_layers() == len(layers)
            kubelet.remove_image(rig.name("advised"))
        matrix.assert_nothing_left()
