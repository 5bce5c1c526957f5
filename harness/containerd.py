"""A containerd of one's own in a scratch directory: its own root, state and socket, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

# A unix socket path has 108 bytes (unix(7)); containerd adds ".ttrpc" to its own.
_MAX_SOCKET_PATH = 100


@dataclass
class Containerd:
    """A running containerd. Use start_containerd(), which also takes it down.

    bin_dir holds another version's binaries (containerd, ctr, containerd-shim-runc-v2); None means PATH.
    """

    base: Path
    bin_dir: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """The socket's path, as --address takes it."""
        return str(self.base / "containerd.sock")

    @property
    def root(self) -> Path:
        """containerd's root: content, metadata, snapshots."""
        return self.base / "root"

    @property
    def state(self) -> Path:
        """containerd's state: running tasks and their root filesystems."""
        return self.base / "state"

    @property
    def log_path(self) -> Path:
        """What containerd wrote to stdout and stderr."""
        return self.base / "containerd.log"

    def env(self) -> dict[str, str]:
        """The environment containerd runs in: bin_dir first in PATH, then the caller's additions."""
        env = dict(os.environ)
        if self.bin_dir is not None:
            env["PATH"] = f"{self.bin_dir}{os.pathsep}{env.get('PATH', '')}"
        env.update(self.environment)
        return env

    def start(self) -> None:
        """Start containerd and wait until its socket answers."""
        log: IO[bytes]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [self._binary("containerd"), "--config", str(self.base / "config.toml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env(),
                cwd=self.base,
            )
        deadline = time.monotonic() + 30
        while not _answers(self.address):
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = self.log_path.read_text(errors="replace")[-3000:]
                self.stop()
                raise RuntimeError(f"containerd did not start in {self.base}:\n{tail}")
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after 10 seconds. Tasks and mounts stay, as they do on a real node."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def restart(self) -> None:
        """Stop and start again on the same root."""
        self.stop()
        self.start()

    def ctr(
        self, *args: str, namespace: str = "default", check: bool = True, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run containerd's own client. With `check`, a failure raises with ctr's stderr in the message."""
        command = [self._binary("ctr"), "--address", self.address, "--namespace", namespace, *args]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=self.env(),
            check=False,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"ctr {' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def run(
        self, image: str, *command: str, snapshotter: str = "overlayfs", name: str = "", timeout: float = 120
    ) -> str:
        """Start a container from an image that was pulled, wait for it, return what it wrote to stdout."""
        identity = name or f"run-{os.urandom(4).hex()}"
        args = ["run", "--rm", "--snapshotter", snapshotter, image, identity, *command]
        return self.ctr(*args, timeout=timeout).stdout

    def garbage_collect(self, namespace: str = "default") -> None:
        """Run containerd's garbage collector now and wait for it (deleting a lease with sync does that)."""
        lease = f"gc-{os.urandom(4).hex()}"
        self.ctr("leases", "create", "--id", lease, namespace=namespace)
        self.ctr("leases", "delete", "--sync", lease, namespace=namespace)

    def close(self) -> None:
        """Kill every task, stop containerd, end its shims by pid, unmount what is left below base."""
        if self.process is not None and self.process.poll() is None:
            for namespace in self.ctr("namespaces", "ls", "-q", check=False).stdout.split():
                self._remove_tasks(namespace)
        self.stop()
        for pid in _shims_of(self.address):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        unmount_below(self.base)

    def _remove_tasks(self, namespace: str) -> None:
        for task in self.ctr("tasks", "ls", "-q", namespace=namespace, check=False).stdout.split():
            self.ctr("tasks", "rm", "--force", task, namespace=namespace, check=False)
        for name in self.ctr("containers", "ls", "-q", namespace=namespace, check=False).stdout.split():
            self.ctr("containers", "rm", name, namespace=namespace, check=False)

    def _binary(self, name: str) -> str:
        return str(self.bin_dir / name) if self.bin_dir is not None else name


@contextlib.contextmanager
def start_containerd(
    base: Path | None = None,
    *,
    proxy_plugins: Mapping[str, str | Path] | None = None,
    bin_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
    extra_config: str = "",
    settings: str = "",
) -> Iterator[Containerd]:
    """A containerd in `base` (default: a fresh directory under /tmp, removed at the end).

    proxy_plugins maps a snapshotter's name to its socket, e.g. {"soci": "/tmp/x/soci.sock"}; that entry is
    all the configuration a snapshotter needs. Or `settings` is a node's whole config.toml, to which only the places
    of files are added; the CRI is on then. A `base` given by the caller keeps its files, without mounts or processes.
    """
    directory = Path(tempfile.mkdtemp(prefix="ctd-", dir="/tmp")) if base is None else base
    directory.mkdir(parents=True, exist_ok=True)
    daemon = Containerd(directory, bin_dir, dict(environment or {}))
    if len(daemon.address) > _MAX_SOCKET_PATH:
        raise ValueError(f"{directory}: too long for a unix socket; leave base out or choose a shorter one")
    text = _placed(daemon, settings) if settings else _config(daemon, proxy_plugins or {})
    (directory / "config.toml").write_text(text + extra_config)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()
        if base is None:
            shutil.rmtree(directory)


def unmount_below(directory: Path) -> None:
    """Detach every mount at or below `directory`, deepest first."""
    prefix = str(directory.resolve())
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # Field 5 is the mount point with \040 for a space (proc(5)).
        point = line.split(" ")[4].encode().decode("unicode_escape")
        if point == prefix or point.startswith(prefix + "/"):
            points.append(point)
    for point in reversed(points):
        subprocess.run(["umount", "--lazy", "--no-canonicalize", point], check=False, capture_output=True)


def _config(daemon: Containerd, proxy_plugins: Mapping[str, str | Path]) -> str:
    # CRI needs CNI and a pause image, which tests do without. "opt" would create /opt/containerd.
    lines = [
        "version = 2",
        f'root = "{daemon.root}"',
        f'state = "{daemon.state}"',
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]',
        "[grpc]",
        f'  address = "{daemon.address}"',
        '[plugins."io.containerd.internal.v1.opt"]',
        f'  path = "{daemon.base / "opt"}"',
    ]
    if proxy_plugins:
        lines.append("[proxy_plugins]")
    for name, address in proxy_plugins.items():
        lines += [f"  [proxy_plugins.{name}]", '    type = "snapshot"', f'    address = "{address}"']
    return "\n".join(lines) + "\n"


def _placed(daemon: Containerd, settings: str) -> str:
    """A node's configuration, at this containerd's own places; top-level keys stand before its first table."""
    top, bracket, tables = settings.partition("\n[")
    lines = [
        f'root = "{daemon.root}"',
        f'state = "{daemon.state}"',
        top,
        "[grpc]",
        f'  address = "{daemon.address}"',
        '[plugins."io.containerd.internal.v1.opt"]',
        f'  path = "{daemon.base / "opt"}"',
        # Its socket has one place for the whole machine.
        '[plugins."io.containerd.nri.v1.nri"]',
        "  disable = true",
    ]
    return "\n".join(lines) + bracket + tables + "\n"


def _answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(address)
        except OSError:
            return False
        return True


def _shims_of(address: str) -> list[int]:
    """Pids of the shims that were started for this containerd: they carry its address in their arguments."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            args = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"containerd-shim" in args[0] and address.encode() in args:
            pids.append(int(entry.name))
    return pids
