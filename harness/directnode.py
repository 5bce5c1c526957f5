"""Our daemon and a registry behind a proxy, driven over gRPC as containerd does it, but without a containerd between."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from harness.containerd import unmount_below
from harness.daemon import Daemon, start_daemon
from harness.images import Layer, layer_from_tar, push, write_layout
from harness.proxy import Proxy
from harness.registries import RunningRegistry, start_registry
from soci_snapshotter.cli.main import run
from soci_snapshotter.containerd.stubs import snapshots_pb2 as pb
from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import SnapshotsStub
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats import reference as references
from soci_snapshotter.policy import prepare as policy
from soci_snapshotter.registry.client import RegistryClient

CONFIG = "[background_fetch]\ndisable = true\n"
ALREADY = grpc.StatusCode.ALREADY_EXISTS
_numbers = itertools.count(1)


def data_layer(seed: int, files: int = 12, size: int = 1 << 20) -> tuple[Layer, dict[str, str]]:
    """A layer of files that do not compress, so that it has many spans; with the sha256 of each file."""
    sums = {}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(files):
            data = hashlib.shake_128(f"{seed}/{number}".encode()).digest(size)
            member = tarfile.TarInfo(f"data-{seed}-{number:03}")
            member.size = size
            tar.addfile(member, io.BytesIO(data))
            sums[member.name] = hashlib.sha256(data).hexdigest()
    return layer_from_tar(stream.getvalue(), "python"), sums


@dataclass(frozen=True)
class Published:
    """An image in the registry with its index inside (v2): what containerd knows of it."""

    name: str
    manifest: str
    layers: tuple[str, ...]
    chain: tuple[str, ...]
    """The chain ID of each layer, bottom first."""

    def labels(self, level: int) -> dict[str, str]:
        """What containerd says when it asks for layer `level`."""
        return {
            policy.TARGET: self.chain[level],
            policy.IMAGE_REF: self.name,
            policy.MANIFEST_DIGEST: self.manifest,
            policy.LAYER_DIGEST: self.layers[level],
            policy.IMAGE_LAYERS: ",".join(self.layers[level:])[:4000],
        }


@dataclass
class Client:
    """One client of the daemon's socket; a namespace of its own, so that nothing is shared by accident."""

    stub: SnapshotsStub
    namespace: str = "default"
    deferred: list[str] = field(default_factory=list)
    """Chain IDs that were left to this client."""

    def key(self, name: str) -> str:
        """As containerd's metadata store makes them."""
        return f"{self.namespace}/{next(_numbers)}/{name}"

    def prepare(self, image: Published, level: int, parent: str) -> str:
        """Have layer `level` lazily; the name of its committed snapshot, "" when it was left to us."""
        key = self.key(f"extract-{os.urandom(4).hex()} {image.chain[level]}")
        request = pb.PrepareSnapshotRequest(key=key, parent=parent, labels=image.labels(level))
        try:
            self.stub.Prepare(request)
        except grpc.RpcError as error:
            if error.code() != ALREADY:
                raise
            return self.find(image.chain[level], parent)
        self.stub.Remove(pb.RemoveSnapshotRequest(key=key))
        self.deferred.append(image.chain[level])
        return ""

    def find(self, target: str, parent: str) -> str:
        """The committed snapshot that containerd finds then."""
        filters = [f'labels."{policy.TARGET}"=={target},parent=="{parent}"']
        found = [
            i.name for part in self.stub.List(pb.ListSnapshotsRequest(filters=filters)) for i in part.info
        ]
        assert found, f"no snapshot for {target} on {parent!r}"
        return found[0]

    def pull(self, image: Published) -> list[str]:
        """Every layer, all of them lazy; the names of the snapshots, bottom first."""
        names: list[str] = []
        for level in range(len(image.layers)):
            names.append(self.prepare(image, level, names[-1] if names else ""))
            assert names[-1], f"{image.name}: layer {level} was not lazy"
        return names

    def remove(self, names: Sequence[str]) -> None:
        """Remove these snapshots, the topmost first."""
        for name in reversed(names):
            self.stub.Remove(pb.RemoveSnapshotRequest(key=name))

    @contextlib.contextmanager
    def container(self, parent: str, target: Path) -> Iterator[Path]:
        """A container's root over `parent`, mounted at `target`."""
        key = self.key(f"container-{os.urandom(4).hex()}")
        [mount] = self.stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=parent)).mounts
        target.mkdir()
        command = ["mount", "-t", mount.type, "-o", ",".join(mount.options), mount.source, str(target)]
        subprocess.run(command, check=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", str(target)], check=True)
            target.rmdir()
            self.stub.Remove(pb.RemoveSnapshotRequest(key=key))


@dataclass
class DirectNode:
    """A daemon, and a registry behind a proxy."""

    base: Path
    registry: RunningRegistry
    proxy: Proxy
    daemon: Daemon

    @contextlib.contextmanager
    def client(self, namespace: str = "default") -> Iterator[Client]:
        """A connection of its own (gRPC shares one between channels of the same arguments)."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{self.daemon.address}", options) as channel:
            yield Client(SnapshotsStub(channel), namespace)

    def publish(self, repository: str, layers: Sequence[Layer]) -> Published:
        """Push an image with its index inside."""
        source = self.base / repository
        plain = f"{self.registry.host}/{repository}:plain"
        push(write_layout(source, layers), plain)
        name = f"{self.registry.host}/{repository}:1"
        flags = ["--from-registry", "--plain-http", "--min-layer-size", "0", "--quiet"]
        assert run(["--root", str(self.base / "cli"), "convert", *flags, plain, name]) == 0
        shutil.rmtree(source)
        with RegistryClient() as client:
            reference = references.parse(name)
            index = oci.decode_manifest(
                client.fetch(reference, client.resolve(reference), oci.MANIFEST_LIMIT)
            )
        assert isinstance(index, oci.Index)
        manifest = next(entry.digest for entry in index.manifests if entry.platform is not None)
        diff_ids = [digests.parse(layer.diff_id) for layer in layers]
        chain = tuple(str(oci.chain_id(diff_ids[: n + 1])) for n in range(len(layers)))
        names = tuple(layer.digest for layer in layers)
        return Published(f"{self.proxy.host}/{repository}:1", str(manifest), names, chain)


@contextlib.contextmanager
def direct_node(config: str = CONFIG) -> Iterator[DirectNode]:
    """Start all of it in a scratch directory on a real disk, and leave nothing behind."""
    base = Path(tempfile.mkdtemp(prefix="soci-", dir="/var/tmp"))
    try:
        with (
            start_registry(base / "registry") as registry,
            Proxy(registry.address) as proxy,
            start_daemon(base / "d", address=base / "run" / "soci.sock", config=config) as daemon,
        ):
            yield DirectNode(base, registry, proxy, daemon)
    finally:
        unmount_below(base)
        shutil.rmtree(base)
