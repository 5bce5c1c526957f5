"""Registries on free loopback ports: Debian's docker-registry, and a Go one with the OCI 1.1 referrers API."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.gobuild import build_go


@dataclass(frozen=True)
class RunningRegistry:
    """Where it listens, and what it logs, an access log among it."""

    port: int
    log: Path | None = None

    @property
    def host(self) -> str:
        """`127.0.0.1:PORT`, as an image reference takes it."""
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        """For a socket, or harness.proxy."""
        return "127.0.0.1", self.port

    def requests(self) -> list[tuple[str, str]]:
        """Method and target of every request so far, in order."""
        assert self.log is not None
        return _REQUEST.findall(self.log.read_text())


# docker-registry quotes the request line, the Go registry writes method and URL bare.
_REQUEST = re.compile(r"\b(GET|HEAD|POST|PUT|PATCH|DELETE) (/v2/\S*)")


@contextlib.contextmanager
def start_registry(root: Path) -> Iterator[RunningRegistry]:
    """docker-registry (no referrers API), its storage under `root`."""
    port = free_port()
    root.mkdir(parents=True, exist_ok=True)
    config = root / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {root / 'data'}}}, delete: {{enabled: true}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with running(["docker-registry", "serve", str(config)], port, root / "log"):
        yield RunningRegistry(port, root / "log")


@contextlib.contextmanager
def start_oci_registry(root: Path) -> Iterator[RunningRegistry]:
    """The Go registry with the referrers API; blobs on disk under `root`."""
    binary = build_go("ociregistry")
    port = free_port()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    with running([str(binary), f"127.0.0.1:{port}", str(root / "blobs")], port, root / "log"):
        yield RunningRegistry(port, root / "log")


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server process that listens on `port`, from then until the block is left."""
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "none"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, port, log)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"{process.args!r} did not start: {log.read_text()[-2000:]}")
