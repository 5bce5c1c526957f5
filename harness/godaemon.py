"""The Go soci-snapshotter-grpc, and roots as it leaves them without running it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from harness.gobuild import build_go
from soci_snapshotter.linux import mounts

_HARNESS = Path(__file__).parent
_PROGRAM = "github.com/awslabs/soci-snapshotter/cmd/soci-snapshotter-grpc"  # a Go module's name
_START_SECONDS = 60
_KINDS = {1: "view", 2: "active", 3: "committed"}


def build_go_daemon() -> Path:
    """The Go daemon, built once from its Go module into .cache/bin; it links zlib's static library."""
    binary = _HARNESS.parent / ".cache" / "bin" / "soci-snapshotter-grpc"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        go = shutil.which("go") or "/usr/local/go/bin/go"
        made = binary.with_suffix(".part")
        command = ["nice", go, "build", "-o", str(made), _PROGRAM]
        subprocess.run(command, cwd=_HARNESS / "godaemon", check=True)
        made.replace(binary)
    return binary


@dataclass
class GoDaemon:
    """The Go daemon on `root`; to be started and stopped by the test."""

    binary: Path
    root: Path
    address: Path
    config: Path
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it and wait until it serves."""
        served = self._served()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(str(self.binary), "--address", str(self.address), "--root", str(self.root)),
                    *("--config", str(self.config)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        end = time.monotonic() + _START_SECONDS
        while self._served() == served:
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop(signal.SIGKILL)
                raise RuntimeError(f"the Go daemon did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self, number: int) -> None:
        """End it with a signal: SIGINT unmounts everything, SIGTERM and SIGKILL leave mounts without a process."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _served(self) -> int:
        return self.log.read_text().count("successfully started") if self.log.exists() else 0


def as_go_root(root: Path) -> None:
    """Turn the root of our stopped daemon into what the Go daemon would have left: its database, directories for lazy
    layers, and nothing else. containerd's references are to the same keys.
    """
    snapshotter = root / "snapshotter"
    with closing(sqlite3.connect(snapshotter / "metadata.sqlite")) as db:
        rows = db.execute(
            "SELECT s.id, s.key, p.key, s.kind, s.labels, s.size, s.inodes, s.mount FROM snapshots s"
            " LEFT JOIN snapshots p ON p.id = s.parent ORDER BY s.id"
        ).fetchall()
    listed = []
    for number, key, parent, kind, labels, size, inodes, mount in rows:
        kept = {k: v for k, v in json.loads(labels).items() if k != "containerd.io/snapshot/diff-id"}
        usage = {} if mount else {"size": size, "inodes": inodes}
        row = {"at": str(number), "key": key, "parent": parent or "", "kind": _KINDS[kind], "labels": kept}
        listed.append(row | usage)
        if mount:
            for name in ("fs", "work"):
                (snapshotter / "snapshots" / str(number) / name).mkdir(parents=True)
    for path in (*root.iterdir(), *snapshotter.iterdir()):
        if path not in (snapshotter, snapshotter / "snapshots"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    subprocess.run(
        [str(build_go("boltgen")), "snapshots", str(snapshotter / "metadata.db")],
        input=json.dumps(listed).encode(),
        check=True,
    )


def lazy_directories(root: Path) -> list[Path]:
    """Where a root that as_go_root made had lazy layers mounted."""
    listed = subprocess.run(
        [str(build_go("boltgen")), "list", str(root / "snapshotter/metadata.db")],
        stdout=subprocess.PIPE,
        check=True,
    )
    rows = json.loads(listed.stdout)
    lazy = [row for row in rows if "containerd.io/snapshot/remote" in (row["labels"] or {})]
    return [root / "snapshotter/snapshots" / row["id"] / "fs" for row in lazy]


def fuse_mount(target: Path) -> int:
    """A FUSE mount nobody answers on; the descriptor that keeps it: closed, it is as a killed daemon's."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % device
        mounts.mount(b"soci", os.fsencode(target), b"fuse.rawBridge", 0, options)
    except BaseException:
        os.close(device)
        raise
    return device
