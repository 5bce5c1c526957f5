"""One layer of many small files, unpacked by containerd on one side and mounted lazily by us on the other."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness import images, trees
from harness.coldcache import filesystem_type
from harness.containerd import Containerd, start_containerd, unmount_below
from harness.daemon import Daemon, start_daemon
from harness.proxy import Proxy
from harness.registries import start_registry

SCRATCH_PARENT = "/var/tmp"
"""A disk: /tmp is tmpfs on newer Debian, where caches are never cold."""

_SETTLE_S = 60
"""How long the layer may take from its last span to completion."""


@dataclass
class Environment:
    """Both sides. `peer` and `ours` are overlayfs mounts above the layer; `tree` says what is in it."""

    scratch: Path
    containerd: Containerd
    daemon: Daemon
    proxy: Proxy
    reference: str
    chain_id: str
    tree: trees.Tree

    @property
    def peer(self) -> Path:
        """overlayfs above the layer as containerd unpacked it."""
        return self.scratch / "peer"

    @property
    def ours(self) -> Path:
        """overlayfs above the layer as it was mounted while lazy: EROFS over FUSE over data.tar."""
        return self.scratch / "ours"

    @property
    def filesystem(self) -> str:
        """What both sides' files lie on."""
        return filesystem_type(self.scratch)

    def mount(self, snapshotter: str, target: Path) -> None:
        """An active snapshot above the layer, mounted as containerd's own `ctr snapshots mounts` says."""
        target.mkdir()
        snapshots = ("snapshots", "--snapshotter", snapshotter)
        self.containerd.ctr(*snapshots, "prepare", target.name, self.chain_id)
        commands = self.containerd.ctr(*snapshots, "mounts", str(target), target.name).stdout
        for command in commands.strip().splitlines():
            subprocess.run(command.split(), check=True)

    def fill(self) -> None:
        """Reads every file once through `ours`, until nothing comes from the registry any more."""
        read_all(file_list(self.ours), 2)
        deadline, before = time.monotonic() + _SETTLE_S, -1
        while time.monotonic() < deadline and before != self.proxy.received:
            before = self.proxy.received
            time.sleep(1)


@contextlib.contextmanager
def small_files(count: int) -> Iterator[Environment]:
    """Makes, pushes, indexes and pulls (both ways) an image of one layer with `count` files; mounts both."""
    scratch = Path(tempfile.mkdtemp(prefix="soci-bench-", dir=SCRATCH_PARENT))
    try:
        tree = trees.write_tar(scratch / "layer.tar", count)
        blob, diff_id = trees.layer(scratch / "layer.tar")
        (scratch / "layer.tar").unlink()
        layout = images.write_layout(scratch / "layout", [images.Layer(blob, diff_id)])
        socket = scratch / "soci.sock"
        with contextlib.ExitStack() as stack:
            registry = stack.enter_context(start_registry(scratch / "registry"))
            proxy = stack.enter_context(Proxy(registry.address))
            images.push(layout, f"{registry.host}/bench/small:1")
            containerd = stack.enter_context(start_containerd(scratch / "c", proxy_plugins={"soci": socket}))
            daemon = stack.enter_context(start_daemon(scratch / "d", address=socket, containerd=containerd))
            reference = f"{proxy.host}/bench/small:1"
            environment = Environment(scratch, containerd, daemon, proxy, reference, diff_id, tree)
            stack.callback(unmount_below, scratch)
            containerd.ctr("images", "pull", "--plain-http", reference)
            soci(containerd, "create", reference)
            soci(containerd, "push", "--plain-http", reference)
            soci(containerd, "pull", "--plain-http", reference)
            environment.mount("overlayfs", environment.peer)
            environment.mount("soci", environment.ours)
            yield environment
    finally:
        unmount_below(scratch)
        shutil.rmtree(scratch)


def soci(containerd: Containerd, *arguments: str) -> None:
    """Runs our command against this containerd; its output is shown only if it fails."""
    program = str(Path(sys.executable).parent / "soci")
    root = containerd.base / "cli"
    command = [program, "--address", containerd.address, "--root", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")


def file_list(root: Path) -> bytes:
    """Every regular file below `root`, NUL-terminated, in order of names: the same for both sides."""
    found = subprocess.run(
        ["find", str(root), "-xdev", "-type", "f", "-print0"], check=True, capture_output=True
    )
    return b"".join(name + b"\0" for name in sorted(found.stdout.split(b"\0")) if name)


def read_all(names: bytes, processes: int) -> float:
    """Seconds to `cat` every file of the list, 400 at a time, in so many processes at once."""
    command = ["xargs", "-0", "-n", "400", "-P", str(processes), "cat"]
    started = time.monotonic()
    subprocess.run(command, input=names, stdout=subprocess.DEVNULL, check=True)
    return time.monotonic() - started
