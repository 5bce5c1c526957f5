"""A registry with an image in it, and nodes that pull it: the rig of the data plane's benches."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import images
from harness.containerd import Containerd, start_containerd, unmount_below
from harness.daemon import CONFIG, Daemon, start_daemon
from harness.disk import ext4_scratch
from harness.proxy import Link, Proxy
from harness.registries import RunningRegistry, start_registry

from bench import bulk, indexing
from bench.peers import OVERLAYFS, Peer
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci

OURS = "soci"

NO_BACKGROUND = CONFIG + "[background_fetch]\ndisable = true\n"
"""Bytes come because somebody reads them, and for no other reason."""

EAGER_BACKGROUND = CONFIG + "[background_fetch]\nsilence_period_msec = 1\n"
"""The background fetch begins at once and not after 30 s without a mount."""


@dataclass
class Node:
    """A containerd, and by the name it knows them our daemons."""

    base: Path
    containerd: Containerd
    daemons: dict[str, Daemon]

    def pull(self, snapshotter: str, reference: str) -> float:
        """Seconds of a pull: of `ctr images pull` for overlayfs, else of our client, which says what lazy ones need."""
        started = time.monotonic()
        if snapshotter == OVERLAYFS:
            self.containerd.ctr("images", "pull", "--plain-http", reference, timeout=600)
        else:
            soci(self.containerd, "pull", "--quiet", "--plain-http", "--snapshotter", snapshotter, reference)
        return time.monotonic() - started

    def mount(self, snapshotter: str, chain_id: str, key: str) -> Path:
        """An active snapshot above the image, mounted as containerd's own `ctr snapshots mounts` says."""
        target = self.base / "mounts" / key
        target.mkdir(parents=True)
        snapshots = ("snapshots", "--snapshotter", snapshotter)
        name = f"{key}-{os.urandom(4).hex()}"  # a peer that runs for longer knows other runs' names
        self.containerd.ctr(*snapshots, "prepare", name, chain_id)
        commands = self.containerd.ctr(*snapshots, "mounts", str(target), name).stdout
        for command in commands.strip().splitlines():
            subprocess.run(command.split(), check=True)
        return target

    def forget(self, snapshotter: str) -> None:
        """Remove everything from a snapshotter that outlives this containerd, so that the next pull is a first one."""
        unmount_below(self.base / "mounts")
        for image in self.containerd.ctr("images", "ls", "-q").stdout.split():
            self.containerd.ctr("images", "rm", "--sync", image)
        snapshots = ("snapshots", "--snapshotter", snapshotter)
        while left := self.containerd.ctr(*snapshots, "ls").stdout.splitlines()[1:]:
            removed = [self.containerd.ctr(*snapshots, "rm", each.split()[0], check=False) for each in left]
            if all(each.returncode for each in removed):  # one whose children are gone goes in each round
                raise RuntimeError(f"{snapshotter}: {removed[0].stderr}")
        self.containerd.garbage_collect()

    def layers(self, key: str) -> list[Path]:
        """The directories below a mount, the topmost layer first, as they were when it was made."""
        target = str(self.base / "mounts" / key)
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, _, options, *_ = line.split()
            if point == target:
                lower = next(each for each in options.split(",") if each.startswith("lowerdir="))
                return [Path(each) for each in lower.removeprefix("lowerdir=").split(":")]
        raise RuntimeError(f"{target} is not mounted")


@dataclass
class Site:
    """A registry, and a scratch directory on a disk for everything."""

    scratch: Path
    registry: RunningRegistry

    def image(self, repository: str, blobs: Sequence[bulk.Blob], peer: Peer) -> str:
        """Publish an image of these layers (for another lazy peer a second one, <repository>-<its name>, with its own
        index); the chain id of its top layer.
        """
        with indexing.image(blobs) as layout:
            self.publish(layout, repository)
            if peer.lazy:
                self.publish(layout, f"{repository}-{peer.name}", peer)
        return str(oci.chain_id([digests.parse(blob.diff_id) for blob in blobs]))

    def publish(self, layout: Path, repository: str, peer: Peer | None = None) -> None:
        """Push the layout's image and our index, or the one that the peer's CLI makes."""
        reference = f"{self.registry.host}/{repository}:1"
        images.push(images.Layout(layout, {}, []), reference)
        with start_containerd(self.scratch / "publisher") as containerd:
            containerd.ctr("content", "fetch", "--plain-http", reference, timeout=600)
            for command in (["create", "--min-layer-size", "0"], ["push", "--plain-http"]):
                soci(containerd, *command, reference, peer=peer)
        subprocess.run(["rm", "-rf", str(self.scratch / "publisher")], check=True)

    def warm(self) -> None:
        """Have the registry's blobs in memory: its disk is this node's, too, and not what is measured."""
        for blob in (self.scratch / "registry" / "data").rglob("data"):
            with open(blob, "rb") as file:
                while file.read(1 << 20):
                    pass

    @contextlib.contextmanager
    def far(self, link: Link | None = None) -> Iterator[Proxy]:
        """The registry at the other end of `link`; without one on loopback, its bytes counted."""
        with Proxy(self.registry.address, link=link) as proxy:
            yield proxy

    @contextlib.contextmanager
    def node(self, configs: Mapping[str, str], peer: Peer | None = None) -> Iterator[Node]:
        """A fresh containerd with one daemon of ours for each config; nothing of it is left afterwards."""
        base = self.scratch / "node"
        sockets: dict[str, Path] = {name: base / name / "run" / "s.sock" for name in configs}
        plugins = {**sockets, **({peer.name: peer.socket} if peer and peer.socket else {})}
        try:
            with contextlib.ExitStack() as stack:
                # First: containerd gives up for some seconds on a socket that is not there yet.
                daemons = {
                    name: stack.enter_context(
                        start_daemon(base / name, address=sockets[name], config=config, log_level="info")
                    )
                    for name, config in configs.items()
                }
                containerd = stack.enter_context(
                    start_containerd(base / "c", proxy_plugins=plugins, bin_dir=containerd_directory())
                )
                node = Node(base, containerd, daemons)
                stack.callback(unmount_below, base / "mounts")
                if peer and peer.lazy:
                    stack.callback(node.forget, peer.name)
                yield node
        finally:
            unmount_below(base)
            subprocess.run(["rm", "-rf", str(base)], check=True)


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """A registry with nothing in it."""
    with ext4_scratch("soci-bench-") as scratch, start_registry(scratch / "registry") as registry:
        yield Site(scratch, registry)


def containerd_directory() -> Path | None:
    """Where $BENCH_CONTAINERD has another containerd, its shim and ctr; None for those in $PATH."""
    directory = os.environ.get("BENCH_CONTAINERD")
    return Path(directory) if directory else None


def soci(containerd: Containerd, *arguments: str, peer: Peer | None = None) -> None:
    """Runs our command (or the peer's) against this containerd; its output is shown only if it fails."""
    program = str(Path(sys.executable).parent / "soci")
    root = containerd.base / "cli"
    if peer is not None and peer.cli is not None:
        program, root = peer.cli, peer.root or root
    command = [program, "--address", containerd.address, "--root", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
