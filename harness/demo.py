"""`make demo`: one image, one program, started twice from cold caches; what it cost, in one table.

First as containerd does it, with overlayfs and a whole pull. Then the image is indexed with `soci create`
and `soci push`, and a second containerd with nothing in it starts it lazily. Registry, containerds and
daemon live in one scratch directory and end with this program, however it ends.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.coldcache import drop_caches
from harness.containerd import Containerd, start_containerd, unmount_below
from harness.daemon import start_daemon
from harness.demo_image import EXPECTED_LINE, REPOSITORY, DemoImage, demo_image, push
from harness.proxy import Link, Proxy, parse_link
from harness.registries import start_registry

RESULT = REPOSITORY / "bench" / "results" / "demo.json"

SCRATCH_PARENT = "/var/tmp"
"""Not /tmp, which is tmpfs on newer Debian: neither EROFS images nor cold caches work there."""

MOST_FETCHED, MOST_TIME = 0.35, 0.6
"""What `--check` asks for: shares of the image's bytes and of overlayfs's time to the line."""

_LINE_TIMEOUT = 300


@dataclass(frozen=True)
class Start:
    """One start: seconds to the end of the pull and to the program's line, both from the pull's beginning.

    bytes_fetched came from the registry until the line: HTTP headers, manifests and ztocs included.
    """

    pull_s: float
    first_line_s: float
    bytes_fetched: int


def main(arguments: list[str] | None = None) -> int:
    """The command. 0 if both starts printed the right line (and, with --check, kept the limits)."""
    parser = argparse.ArgumentParser(prog="demo", description=main.__doc__)
    parser.add_argument(
        "--link", type=parse_link, default=Link(), help="10ms,500mbit: how far the registry is"
    )
    parser.add_argument("--check", action="store_true", help="fail if the lazy start misses its limits")
    options = parser.parse_args(arguments)
    if os.geteuid() != 0:
        print("demo: mounts and containers need root; run it as root", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    return _demo(options.link, check=options.check)


def _demo(link: Link, *, check: bool) -> int:
    image = demo_image()
    with _scratch() as scratch:
        overlayfs, lazy = measure(image, scratch, link)
    result = {
        "overlayfs": {"pull_s": overlayfs.pull_s, "first_line_s": overlayfs.first_line_s},
        "lazy": {
            "pull_s": lazy.pull_s,
            "first_line_s": lazy.first_line_s,
            "bytes_fetched": lazy.bytes_fetched,
        },
        "image": {"bytes": image.size},
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(image.size, overlayfs, lazy))
    missed = lazy.bytes_fetched >= MOST_FETCHED * image.size
    missed |= lazy.first_line_s > MOST_TIME * overlayfs.first_line_s
    if check and missed:
        print(f"demo: the lazy start may fetch {MOST_FETCHED:.0%} and take {MOST_TIME:.0%}", file=sys.stderr)
        return 1
    return 0


def measure(image: DemoImage, scratch: Path, link: Link) -> tuple[Start, Start]:
    """Both starts, overlayfs first; the image and its index are in the registry in between."""
    with start_registry(scratch / "registry") as registry, Proxy(registry.address, link=link) as proxy:
        _say("pushing the image to a registry of its own")
        push(image, f"{registry.host}/demo/numeric:1")
        reference = f"{proxy.host}/demo/numeric:1"
        with start_containerd(scratch / "c1") as containerd:
            _say("starting it with overlayfs")
            pull = ["ctr", "-a", containerd.address, "images", "pull", "--plain-http", reference]
            overlayfs = _start(containerd, proxy, pull, reference, "overlayfs")
            _say("indexing it: soci create, soci push")
            for command in (["create", reference], ["push", "--plain-http", reference]):
                _run([*_soci(containerd, scratch), *command])
        # Nothing of the first start is left to help the second one.
        shutil.rmtree(scratch / "c1")
        socket = scratch / "soci.sock"
        with (
            start_containerd(scratch / "c2", proxy_plugins={"soci": socket}) as containerd,
            start_daemon(scratch / "d", address=socket, containerd=containerd),
        ):
            _say("starting it lazily: soci pull")
            pull = [*_soci(containerd, scratch), "pull", "--plain-http", reference]
            lazy = _start(containerd, proxy, pull, reference, "soci")
            containerd.ctr("images", "rm", "--sync", reference)
    return overlayfs, lazy


def table(image_bytes: int, overlayfs: Start, lazy: Start) -> str:
    """What the demo prints: a row for each start, then one over the other."""
    rows = [f"{'':18}{'pull':>10}{'to the line':>14}{'fetched':>14}{'of the image':>15}"]
    for name, each in (("overlayfs", overlayfs), ("lazy", lazy)):
        share = each.bytes_fetched / image_bytes
        rows.append(
            f"{name:18}{each.pull_s:>8.2f} s{each.first_line_s:>12.2f} s"
            f"{each.bytes_fetched / 1e6:>11.1f} MB{share:>14.1%}"
        )
    pull, line = lazy.pull_s / overlayfs.pull_s, lazy.first_line_s / overlayfs.first_line_s
    fetched = lazy.bytes_fetched / overlayfs.bytes_fetched
    rows.append(f"{'lazy / overlayfs':18}{pull:>10.2f}{line:>14.2f}{fetched:>14.2f}")
    rows.append(f"(both times from the beginning of the pull; the image has {image_bytes / 1e6:.1f} MB)")
    return "\n".join(rows)


def _start(containerd: Containerd, proxy: Proxy, pull: list[str], reference: str, snapshotter: str) -> Start:
    """Cold caches, `pull`, then a container of the image until its first line."""
    drop_caches()
    before, started = proxy.received, time.monotonic()
    _run(pull)
    pulled = time.monotonic()
    command = [
        "ctr",
        "-a",
        containerd.address,
        "run",
        "--rm",
        "--snapshotter",
        snapshotter,
        reference,
        "demo",
    ]
    with _process(command) as run:
        assert run.stdout is not None
        line = run.stdout.readline().decode(errors="replace").rstrip("\n")
        now = time.monotonic()
        fetched = proxy.received - before
        rest, _ = run.communicate(timeout=_LINE_TIMEOUT)
    if line != EXPECTED_LINE or run.returncode:
        output = f"{line}\n{rest.decode(errors='replace')}"
        raise SystemExit(f"demo: the container on {snapshotter} ended with {run.returncode}:\n{output}")
    _say(f"{snapshotter} printed: {line}")
    return Start(round(pulled - started, 3), round(now - started, 3), fetched)


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """`ctr run`, with both its outputs in one; killed if the caller leaves early or no line comes in time."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(_LINE_TIMEOUT)
        try:
            yield process
        finally:
            signal.alarm(0)
            if process.poll() is None:
                process.kill()


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A directory that goes with everything mounted in it."""
    directory = Path(tempfile.mkdtemp(prefix="soci-demo-", dir=SCRATCH_PARENT))
    try:
        yield directory
    finally:
        unmount_below(directory)
        shutil.rmtree(directory)


def _interrupted(number: int, _: object) -> None:
    """Unwinds, which stops and removes everything; a second signal does not disturb that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    _say("interrupted; cleaning up")
    raise SystemExit(128 + number)


def _soci(containerd: Containerd, scratch: Path) -> list[str]:
    """Our command, with its list of indexes in the scratch directory."""
    return [_program("soci"), "--address", containerd.address, "--root", str(scratch / "cli")]


def _program(name: str) -> str:
    """An entry point of the environment that runs this."""
    return str(Path(sys.executable).parent / name)


def _run(command: list[str]) -> None:
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if result.returncode:
        output = result.stdout.decode(errors="replace")[-3000:]
        raise SystemExit(f"demo: {' '.join(command)} failed with {result.returncode}:\n{output}")


def _say(text: str) -> None:
    print(f"demo: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
