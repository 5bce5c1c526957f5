"""The command line itself: flags, words turned into values, errors turned into one line and an exit code."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter import __version__, errors
from soci_snapshotter.cli.context import duration, host_platform, wanted_platforms
from soci_snapshotter.cli.main import run, soci
from soci_snapshotter.cli.pulling import snapshot_labels
from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference
from soci_snapshotter.formats.oci import Descriptor, parse_platform

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


@pytest.mark.parametrize(
    ("text", "seconds"), [("0", 0), ("30s", 30), ("1m30s", 90), ("1.5h", 5400), ("250ms", 0.25), (".5s", 0.5)]
)
def test_durations_are_gos(text: str, seconds: float) -> None:
    """Go's duration syntax, as scripts for the Go tool pass it."""
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "1m 30s", "-1s", "1d", "1mx"])
def test_bad_durations_name_the_flag(text: str) -> None:
    """Anything else is refused with flag and value."""
    with pytest.raises(Invalid, match="--timeout"):
        duration(text)


def test_platform_flags() -> None:
    """No flag is this machine, --all-platforms is all, both is an error."""
    assert wanted_platforms((), everything=False) == [host_platform()]
    assert wanted_platforms(("arm64", "linux/amd64"), everything=False) == [
        parse_platform("linux/arm64"),
        parse_platform("linux/amd64"),
    ]
    assert wanted_platforms((), everything=True) is None
    with pytest.raises(Invalid, match="--all-platforms"):
        wanted_platforms(("arm64",), everything=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "--span-size", "0", "x"], ["--span-size", "0"]),
        (["create", "--span-size", "4MB", "x"], ["--span-size", "4MB"]),
        (["create", "--min-layer-size", "-1", "x"], ["--min-layer-size", "-1"]),
        (["create", "--platform", "a/b/c/d", "x"], ["a/b/c/d"]),
        (["create", "UPPER"], ["UPPER", "lower case"]),
        (["create"], ["REF"]),
        (["--content-store", "disk", "create", "x"], ["--content-store", "disk"]),
        (["--timeout", "soon", "create", "x"], ["--timeout", "soon"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["no-such-command"], ["no-such-command"]),
    ],
    ids=" ".join,
)
def test_errors_are_one_line_and_exit_1(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every bad flag, value or address is one line on stderr that names it, and nothing on stdout."""
    code = run(["--root", str(tmp_path), *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.startswith("soci: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_each_kind_of_error_has_its_exit_code() -> None:
    """No two classes share a code but the base and Invalid (1, as in the Go tool), and --help lists every one."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {kind.__name__: kind.exit_code for kind in kinds if issubclass(kind, errors.SociError)}
    assert codes.pop("SociError") == codes.pop("Invalid") == 1
    assert codes.pop("Condemned") == codes["Integrity"]  # a kind of it
    listed = dict(re.findall(r"^ +(\d+)  (.+)$", soci.epilog or "", re.MULTILINE))
    assert len(set(codes.values())) == len(codes)
    assert {str(code) for code in codes.values()} | {"0", "1", "3", "10", "130", "143"} == set(listed)


def test_exit_codes_tell_errors_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A containerd that is not there is 9, not the 1 of a bad argument; still one line."""
    flags = ["--root", str(tmp_path)]
    assert run([*flags, "--address", "/nowhere/c.sock", "create", "x"]) == 9
    err = capsys.readouterr().err
    assert err.startswith("soci: containerd at /nowhere/c.sock")
    assert "--address" in err
    assert err.count("\n") == 1


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--version prints both versions, first one that nerdctl converts images with; --help lists the command."""
    assert run(["--version"]) == 0
    out = capsys.readouterr().out
    assert __version__ in out
    numbers = re.search(r"v?(\d+)\.(\d+)\.(\d+)", out)  # as nerdctl looks for it
    assert numbers is not None
    assert tuple(map(int, numbers.groups())) >= (0, 10, 0)
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert "create" in out


def test_address_and_namespace_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CONTAINERD_ADDRESS is used without --address, and --address beats it."""
    monkeypatch.setenv("CONTAINERD_ADDRESS", "/from/environment.sock")
    run(["--root", str(tmp_path), "create", "x"])
    assert "/from/environment.sock" in capsys.readouterr().err
    run(["--root", str(tmp_path), "--address", "/from/flag.sock", "create", "x"])
    assert "/from/flag.sock" in capsys.readouterr().err


def test_debug_shows_where_an_error_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --debug the traceback precedes the line; without it there is none (tested above)."""
    run(["--debug", "--root", str(tmp_path), "--address", "/nowhere/c.sock", "create", "x"])
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("soci: containerd at /nowhere/c.sock")


def test_unwritable_root_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A root that is a file is an error that names it and --root."""
    root = tmp_path / "file"
    root.write_text("")
    assert run(["--root", str(root), "create", "x"]) == 2
    err = capsys.readouterr().err
    assert str(root) in err
    assert "--root" in err


def test_a_fresh_root_is_for_its_owner_only(tmp_path: Path) -> None:
    """The command that makes the root gives it the mode that the daemon gives it, whatever the umask."""
    before = os.umask(0o022)
    try:
        run(["--root", str(tmp_path / "a" / "root"), "--address", "/nowhere/c.sock", "create", "x"])
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "root").stat().st_mode) == 0o700


def _silent_containerd(directory: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """A socket that accepts and never answers."""
    path = str(directory / "silent.sock")
    program = (
        "import socket,sys,time\ns=socket.socket(socket.AF_UNIX);s.bind(sys.argv[1]);s.listen(9)\n"
        "print('ready',flush=True);time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    return path, process


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [("interrupt", 130, "interrupted"), ("terminate", 143, "terminated"), ("timeout", 9, "--timeout 2s")],
)
def test_waiting_ends_cleanly(tmp_path: Path, how: str, code: int, says: str) -> None:
    """Ctrl-C is exit 130, SIGTERM 143, --timeout 9; all at once, with one line and no traceback."""
    address, silent = _silent_containerd(tmp_path)
    extra = ["--timeout", "2s"] if how == "timeout" else []
    command = [sys.executable, "-m", "soci_snapshotter.cli.main", *extra, "--address", address]
    try:
        started = time.monotonic()
        soci = subprocess.Popen(
            [*command, "--root", str(tmp_path / "root"), "create", "x"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": "src"},
        )
        if how != "timeout":
            time.sleep(1.5)
            soci.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGTERM)
        _, err = soci.communicate(timeout=20)
        assert time.monotonic() - started < 15
    finally:
        silent.kill()
        silent.wait()
    assert soci.returncode == code
    assert err.count("\n") == 1
    assert says in err


def _layers(count: int) -> list[Descriptor]:
    return [Descriptor(LAYER, digests.sha256(bytes([i])), 10**i % 9973) for i in range(count)]


def test_snapshot_labels_of_a_small_image() -> None:
    """The middle layer of three: its own digest and size, and the lists from it upward in image order."""
    layers = _layers(3)
    ref, manifest = reference.parse("busybox"), digests.sha256(b"m")
    labels = snapshot_labels(ref, manifest, layers, 1, None)
    assert labels == {
        "containerd.io/snapshot/cri.image-ref": "docker.io/library/busybox:latest",
        "containerd.io/snapshot/cri.manifest-digest": manifest,
        "containerd.io/snapshot/cri.layer-digest": layers[1].digest,
        "containerd.io/snapshot/cri.image-layers": f"{layers[1].digest},{layers[2].digest}",
        "containerd.io/snapshot/remote/soci.size": str(layers[1].size),
        "containerd.io/snapshot/remote/image.layers.size": f"{layers[1].size},{layers[2].size}",
    }
    explicit = snapshot_labels(ref, manifest, layers, 1, digests.sha256(b"i"))
    assert explicit["containerd.io/snapshot/remote/soci.index.digest"] == digests.sha256(b"i")


@given(count=st.integers(1, 160), data=st.data())
def test_snapshot_labels_always_fit(count: int, data: st.DataObject) -> None:
    """No label is longer than containerd accepts, and both lists name the same layers, this one first."""
    layers = _layers(count)
    position = data.draw(st.integers(0, count - 1))
    labels = snapshot_labels(reference.parse("x"), digests.sha256(b"m"), layers, position, None)
    assert all(len(key) + len(value) <= 4096 for key, value in labels.items())
    named = labels["containerd.io/snapshot/cri.image-layers"].split(",")
    sizes = labels["containerd.io/snapshot/remote/image.layers.size"].split(",")
    assert named == [layer.digest for layer in layers[position : position + len(named)]]
    assert sizes == [str(layer.size) for layer in layers[position : position + len(named)]]
    assert len(named) == min(count - position, 56)
