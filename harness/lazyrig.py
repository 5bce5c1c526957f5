"""A registry behind a proxy, a containerd and our daemon, for the end-to-end tests of lazy layers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from harness.containerd import Containerd, start_containerd, unmount_below
from harness.daemon import CONFIG, Daemon, start_daemon
from harness.images import Layer, Layout, push, write_layout
from harness.proxy import Proxy
from harness.registries import RunningRegistry, start_registry
from soci_snapshotter.cli.main import run
from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci


@dataclass
class Rig:
    """Everything a node has, and the registry it pulls from."""

    base: Path
    proxy: Proxy
    registry: RunningRegistry
    containerd: Containerd
    daemon: Daemon

    def soci(self, *arguments: str) -> int:
        """Run `soci` in this process; its exit code."""
        root = str(self.base / "cli")
        return run(["--address", self.containerd.address, "--root", root, *arguments])

    def name(self, repository: str) -> str:
        """The reference of a repository's image, as the node sees it: through the proxy."""
        return f"{self.proxy.host}/{repository}:1"

    def publish(self, repository: str, layers: Sequence[Layer], *, index: bool = True) -> Layout:
        """Push an image, and its SOCI index made by `soci create`; containerd forgets the image again."""
        layout = write_layout(self.base / repository, layers)
        name = self.name(repository)
        push(layout, name)
        if index:
            self.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", name)
            assert self.soci("create", "--min-layer-size", "0", name) == 0
            assert self.soci("push", "--plain-http", name) == 0
            self.containerd.ctr("images", "rm", "--sync", name)
        return layout

    def pull(self, repository: str, *arguments: str, snapshotter: str = "soci") -> None:
        """`soci pull`; it must succeed."""
        command = ("pull", "--quiet", "--plain-http", "--snapshotter", snapshotter)
        assert self.soci(*command, *arguments, self.name(repository)) == 0

    def reconnected(self, seconds: float = 40) -> None:
        """Wait until containerd talks to a daemon that was started (it tries in intervals that grow).

        With a snapshot made and removed: what it knows itself, as the list of none, it does not ask the daemon for.
        """
        snapshots = ("snapshots", "--snapshotter", "soci")
        end = time.monotonic() + seconds
        while self.containerd.ctr(*snapshots, "prepare", "reconnected", check=False).returncode:
            if time.monotonic() > end:
                raise TimeoutError("containerd does not come back to the daemon")
            time.sleep(0.1)
        self.containerd.ctr(*snapshots, "rm", "reconnected")

    def lazy_layers(self) -> int:
        """How many lazy mounts there are."""
        mounts = self.daemon.root / "m"
        return len(list(mounts.iterdir())) if mounts.is_dir() else 0

    @contextlib.contextmanager
    def rootfs(self, layout: Layout, snapshotter: str) -> Iterator[Path]:
        """The image's root file system, writable, as a container would get it."""
        chain = layout_chain(layout)
        key = f"rootfs-{os.urandom(4).hex()}"
        with ContainerdClient(self.containerd.address) as client:
            client.snapshots(snapshotter).prepare(key, chain, {"containerd.io/gc.root": "test"})
        target = self.base / key
        target.mkdir()
        script = self.containerd.ctr(
            "snapshots", "--snapshotter", snapshotter, "mounts", str(target), key
        ).stdout
        subprocess.run(["sh", "-c", script], check=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", str(target)], check=True)
            target.rmdir()
            self.containerd.ctr("snapshots", "--snapshotter", snapshotter, "rm", key)


def layout_chain(layout: Layout) -> str:
    """The chain id of the image's top layer (image-spec, config.md)."""
    config = layout.path / "blobs" / str(layout.images[0].config["digest"]).replace(":", "/")
    image = oci.decode_config(config.read_bytes())
    return str(oci.chain_id([digests.parse(str(diff)) for diff in image.rootfs.diff_ids]))


@contextlib.contextmanager
def lazy_rig(config: str = CONFIG) -> Iterator[Rig]:
    """Start all of it in a scratch directory on a real disk, and leave nothing behind. `config`: the daemon's."""
    base = Path(tempfile.mkdtemp(prefix="soci-", dir="/var/tmp"))
    socket = base / "run" / "soci.sock"
    try:
        with (
            start_registry(base / "registry") as registry,
            Proxy(registry.address) as proxy,
            start_containerd(base / "c", proxy_plugins={"soci": socket}) as containerd,
            start_daemon(base / "d", address=socket, config=config) as daemon,
        ):
            rig = Rig(base, proxy, registry, containerd, daemon)
            rig.reconnected()
            yield rig
    finally:
        unmount_below(base)
        rmtree(base)
