"""`soci status` against a daemon that a test plays at the socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from soci_snapshotter.cli.main import run
from soci_snapshotter.daemon.pages import Page, PageServer, listen_unix
from soci_snapshotter.policy.status import SOCKET, Background, DaemonStatus, LayerStatus, State

DIGEST = "sha256:" + "a1" * 32
FILLING = LayerStatus(
    images=("r.example.com/team/app:1", "r.example.com/team/other:1"),
    layer=DIGEST,
    ztoc="sha256:" + "b2" * 32,
    state=State.FILLING,
    spans=12,
    spans_present=3,
    size=48 << 20,
    fetched=12 << 20,
    disk=30 << 20,
    mounts=("/root/m/4", "/root/m/7"),
    flights=2,
    reads=99,
    served=1 << 20,
    errors=1,
)
HOSTILE = msgspec.structs.replace(FILLING, images=("r.example.com/x\x1b[2J:1",), layer="sha256:" + "c3" * 32)
STATUS = DaemonStatus(
    version="1.2.3",
    pid=77,
    root="/root",
    uptime=3723.5,
    layers=(FILLING, HOSTILE),
    background=Background(enabled=True, queued=5),
    flights_queued=6,
    counters={"synchronous_read_count": 99, "fuse_failure_state": 0},
)


@contextmanager
def daemon(directory: Path, body: bytes) -> Iterator[Path]:
    """Something that answers /status; the address of the daemon it plays."""
    listener = listen_unix(directory / SOCKET, "--address")
    with PageServer(listener, {"/status": lambda query: Page("application/json", body)}, "status"):
        yield directory / "soci.sock"


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """State, spans, bytes, mounts and counts of each layer, the queue, the counters; nothing moves the cursor."""
    with daemon(tmp_path, msgspec.json.encode(STATUS)) as address:
        assert run(["status", "--daemon-address", str(address)]) == 0
    out = capsys.readouterr().out
    first, header, *lines = out.splitlines()
    assert first == (
        "daemon 1.2.3, pid 77, up 1h2m3s; background fetch: 5 layers wait for it; 6 requests queued"
    )
    assert " ".join(header.split()) == "IMAGE LAYER STATE SPANS FETCHED DISK READS ERRORS MOUNTS"
    assert " ".join(lines[0].split()) == (
        "r.example.com/team/app:1 (+1) sha256:a1a1a1a1a1a1 filling (2) 3/12 12.0 MiB/48.0 MiB 30.0 MiB 99 1 4,7"
    )
    assert "\x1b" not in out
    assert lines[-1].split() == ["synchronous_read_count", "99"]
    assert "fuse_failure_state" not in out


def test_json_is_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json gives every field of every layer, digests in full."""
    with daemon(tmp_path, msgspec.json.encode(STATUS)) as address:
        assert run(["status", "--json", "--daemon-address", f"unix://{address}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(msgspec.json.encode(STATUS))
    assert found["layers"][0]["state"] == "filling"


def test_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """IMAGE leaves the layers that it has, by any of their names; one that is not here is not found, exit 4."""
    with daemon(tmp_path, msgspec.json.encode(STATUS)) as address:
        arguments = ["--daemon-address", str(address)]
        assert run(["status", "--json", *arguments, "r.example.com/team/other:1"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [layer["layer"] for layer in found["layers"]] == [DIGEST]
        assert run(["status", *arguments, "r.example.com/none:1"]) == 4
    assert "r.example.com/none:1" in capsys.readouterr().err


def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No socket, and one that nobody listens at any more: one line that says what to do, exit 9."""
    address = tmp_path / "soci.sock"
    for stale in (False, True):
        if stale:
            listen_unix(tmp_path / SOCKET, "--address").close()
        assert run(["status", "--daemon-address", str(address)]) == 9
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert "start soci-snapshotter-grpc" in captured.err


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"version": 1}', b"\xff"])
def test_answers_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], body: bytes) -> None:
    """Something else at the socket, or another version: one line, exit 9."""
    with daemon(tmp_path, body) as address:
        assert run(["status", "--daemon-address", str(address)]) == 9
    assert capsys.readouterr().err.count("\n") == 1


def test_a_server_that_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who takes the connection and closes it is reported, not waited for."""
    with listen_unix(tmp_path / SOCKET, "--address") as listener:
        thread = threading.Thread(target=hang_up, args=(listener,))
        thread.start()
        assert run(["status", "--daemon-address", str(tmp_path / "soci.sock")]) == 9
        thread.join()
    assert "does not answer" in capsys.readouterr().err


def hang_up(listener: socket.socket) -> None:
    """Take one connection and close it."""
    connection, _ = listener.accept()
    connection.close()
