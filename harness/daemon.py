"""Our daemon on a scratch root, for tests, the demo and the benches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from harness.containerd import Containerd, unmount_below
from soci_snapshotter.serve import keeper_client

CONFIG = "[pull_modes.soci_v1]\nenable = true\n"
_START_SECONDS = 60  # 1.5 s of a processor, which others may want as well
_STOP_SECONDS = 20


@dataclass
class Daemon:
    """A running daemon; `kill` and `start` imitate a crash."""

    base: Path
    address: Path
    config: str
    log_level: str = "debug"
    program: tuple[str, ...] = ("-m", "soci_snapshotter.daemon.main")
    """What Python runs."""
    source: Path = Path(__file__).parents[1] / "src"
    """Where the package is; another build lies elsewhere."""
    process: subprocess.Popen[bytes] = field(init=False)

    @property
    def pid(self) -> int:
        """Of the process that serves now."""
        return self.process.pid

    @property
    def root(self) -> Path:
        """What --root says."""
        return self.base / "root"

    @property
    def log(self) -> str:
        """Everything logged until now."""
        return (self.base / "daemon.log").read_text()

    def start(self) -> None:
        """Start it and wait until it serves."""
        config = self.base / "config.toml"
        config.write_text(self.config)
        ready = self.log.count('"msg": "serving"') if (self.base / "daemon.log").exists() else 0
        # As an installed daemon starts: it does not compile itself every time.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        with open(self.base / "daemon.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *self.program),
                    *("--address", str(self.address), "--root", str(self.root), "--config", str(config)),
                    *("--log-level", self.log_level),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"PYTHONPATH": str(self.source)},
            )
        end = time.monotonic() + _START_SECONDS
        while self.log.count('"msg": "serving"') == ready:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the daemon did not start:\n{self.log[-4000:]}")
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGINT) -> None:
        """Stop it: SIGINT unmounts everything, SIGTERM leaves mounts, SIGKILL is a crash."""
        self.process.send_signal(number)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def kill(self) -> None:
        """Crash it."""
        self.stop(signal.SIGKILL)


@contextmanager
def start_daemon(
    base: Path,
    *,
    address: Path,
    containerd: Containerd | None = None,
    config: str = CONFIG,
    log_level: str = "debug",
) -> Iterator[Daemon]:
    """A daemon that keeps everything below `base`; gone, with keeper and mounts, when the block is left."""
    del containerd  # it is told of the address by its own configuration
    base.mkdir(parents=True, exist_ok=True)
    address.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    daemon = Daemon(base, address, config, log_level)
    daemon.start()
    try:
        yield daemon
    finally:
        try:
            if daemon.process.poll() is None:
                daemon.stop()
        finally:
            keeper_client.stop(address.parent)
            unmount_below(base)
