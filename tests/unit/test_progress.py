"""Progress of long work: bars on a terminal, silence elsewhere, messages of workers."""

from __future__ import annotations

import io
import pickle
import re
import sys
import threading
from contextlib import redirect_stderr

import pytest

from soci_snapshotter.cli.progress import metering, reporting
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.policy.progress import RELAY_BYTES, Relay, Step

LAYER = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", digests.sha256(b"x"), 3 << 20)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """As sys.stderr answers it in a shell."""
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 columns; tests put it in stderr's place themselves, as pytest sets stderr after fixtures."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def shown(stream: Terminal) -> str:
    """What is written, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_bars_show_bytes_and_rate(terminal: Terminal) -> None:
    """A task that threads advance shows its label, its state, the sum of bytes and a rate."""
    with redirect_stderr(terminal), metering() as meter:
        task = meter.task("layer [a]", 4_000_000, "fetching")

        def work() -> None:
            for _ in range(1000):
                task.advance(1000)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    last = shown(terminal).splitlines()[-1]
    assert "layer [a]" in last
    assert "fetching" in last
    assert "4.0/4.0 MB" in last
    assert "B/s" in last


@pytest.mark.parametrize("quiet", [True, False])
def test_nothing_without_a_terminal_or_with_quiet(
    quiet: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe gets nothing, nor does a terminal with --quiet; the same calls work."""
    stream = Terminal()
    if quiet:
        monkeypatch.setattr(sys, "stderr", stream)  # in the test itself: after pytest's own
    with metering(quiet=quiet) as meter:
        assert not meter.shown
        task = meter.task("x", 10)
        task.advance(5, "going")
        task.reach(6)
        task.finish()
        meter.apply(Step("y", 1, 2))
        meter.say("hello")
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_workers_report_by_messages(terminal: Terminal) -> None:
    """Steps that went through pickle make one bar a task, and a repeated or late message changes nothing for good."""
    sent: list[Step] = []
    relay = Relay(sent.append, "layer 1", 3 * RELAY_BYTES, "indexing")
    for _ in range(3 * 1024):
        relay.advance(1024)
    relay.finish("indexed")
    with redirect_stderr(terminal), metering() as meter:
        for step in sent:
            meter.apply(pickle.loads(pickle.dumps(step)))  # noqa: S301 - our own
        meter.apply(sent[-1])
    last = shown(terminal).splitlines()[-1]
    assert "indexed" in last
    assert "3.1/3.1 MB" in last
    assert shown(terminal).splitlines()[-1].count("layer 1") == 1
    assert [step.done for step in sent] == [0, *(n * RELAY_BYTES for n in (1, 2, 3)), 3 * RELAY_BYTES]


def test_a_pull_in_a_pipe_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal a pull is a line for the image and one per layer on stdout, nothing on stderr."""
    with reporting(quiet=False) as report:
        report.resolved("x:1", LAYER.digest, [LAYER])
        report.received(LAYER, 5)
        report.unpacking(LAYER)
        report.done(0, LAYER, "local")
    assert capsys.readouterr() == (f"x:1 {LAYER.digest}: 1 layers\nlayer {LAYER.digest}: local\n", "")


def test_a_pull_to_a_file_keeps_its_lines(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    """Bars on the terminal, and stdout, redirected, still has the lines and nothing of the bars."""
    with redirect_stderr(terminal), reporting(quiet=False) as report:
        report.resolved("x:1", LAYER.digest, [LAYER, LAYER])
        report.received(LAYER, LAYER.size)
        report.done(0, LAYER, "local")
        report.done(1, LAYER, "lazy")
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"layer {LAYER.digest}: local",
        f"layer {LAYER.digest}: lazy",
    ]
    first, second = [line for line in shown(terminal).splitlines() if LAYER.digest.hex[:12] in line][-2:]
    assert "3.1/3.1 MB" in first
    assert "local" in first
    assert "0.0/3.1 MB" in second
    assert "lazy" in second
