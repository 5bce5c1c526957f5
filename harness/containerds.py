"""The versions of containerd that the tests run against, and where their programs come from.

Debian's suites have three; newer ones are built from containerd's Go module. What is fetched is kept in
.cache/containerds/<version>: once there, nothing is asked of the network. runc is the installed one for all.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "containerds"
PROGRAMS = ("containerd", "ctr", "containerd-shim-runc-v2")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# A suite's index has 10 MB, the package 30 MB: a link on which that takes longer is no place for a version matrix.
_FETCH_SECONDS = 180
# On two processors, with nothing in Go's own cache.
_BUILD_SECONDS = 1500


class Unavailable(Exception):
    """This version cannot be had here; the message says why, for a test's skip."""


@dataclass(frozen=True)
class Release:
    """One version: `name` is MAJOR.MINOR; it comes from a Debian `suite`, or from the Go `module`'s version."""

    name: str
    suite: str = ""
    module: str = ""

    @property
    def major(self) -> int:
        """1 or 2."""
        return int(self.name.partition(".")[0])


RELEASES = {
    each.name: each
    for each in (
        Release("1.6", suite="bookworm"),
        Release("1.7", suite="trixie"),
        Release("2.1", suite="forky"),
        Release("2.2", module="v2.2.9"),
        Release("2.4", module="v2.4.2"),
    )
}


def cached(name: str) -> bool:
    """Whether `binaries` needs neither network nor compiler for this version."""
    return _runs(None, name) or _runs(CACHE / name, name)


def binaries(name: str) -> Path | None:
    """The directory with this version's programs, as Containerd.bin_dir takes it: None where PATH has it.

    Fetches or builds them if need be. Raises Unavailable.
    """
    if _runs(None, name):
        return None
    release, target = RELEASES[name], CACHE / name
    if _runs(target, name):
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with _alone(name):
        if not _runs(target, name):
            part = CACHE / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                if release.suite:
                    _from_debian(release, part)
                else:
                    _from_module(release, part)
                shutil.rmtree(target, ignore_errors=True)
                if not _runs(part, name):
                    found = release.suite and f"Debian's {release.suite} has another by now"
                    raise Unavailable(f"containerd {name}: what was fetched does not run as that; {found}")
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target


def version(bin_dir: Path | None) -> str:
    """What `containerd --version` says, e.g. 1.6.20; "" where it does not run."""
    program = shutil.which("containerd") if bin_dir is None else str(bin_dir / "containerd")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return ""
    found = re.search(r" v?(\d+\.\d+\.\d+)", done.stdout)
    return found[1] if found else ""


def _runs(bin_dir: Path | None, name: str) -> bool:
    if bin_dir is not None and not all((bin_dir / program).exists() for program in PROGRAMS):
        return False
    return version(bin_dir).startswith(f"{name}.")


def _from_debian(release: Release, part: Path) -> None:
    """The package, by apt with lists of its own: apt checks signature and digests; the node's lists stay as they are."""
    if shutil.which("apt-get") is None or not _KEYRING.exists():
        raise Unavailable(f"containerd {release.name} comes from Debian's {release.suite}: no apt-get here")
    apt = part / "apt"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {_mirror()} {release.suite} main\n")
    options = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
    }
    command = [
        "apt-get",
        "-q",
        *(word for key, value in options.items() for word in ("-o", f"{key}={value}")),
    ]
    _run([*command, "update"], apt, release)
    _run([*command, "download", f"containerd/{release.suite}"], apt, release)
    [package] = apt.glob("containerd_*.deb")
    _run(["dpkg", "-x", str(package), str(apt / "root")], apt, release)
    for program in PROGRAMS:
        (apt / "root/usr/bin" / program).rename(part / program)
    shutil.rmtree(apt)


def _mirror() -> str:
    """The Debian mirror that this machine is configured for."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout.split()
    # Security has no other suites' packages.
    for uri in found:
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise Unavailable("apt here knows no Debian mirror")


def _from_module(release: Release, part: Path) -> None:
    """containerd's own main packages, checked against Go's checksum database by the go command."""
    go = shutil.which("go") or "/usr/local/go/bin/go"
    if not Path(go).exists():
        raise Unavailable(f"containerd {release.name} is built from its Go module: no go here")
    module = "github.com/containerd/containerd/v2/cmd"
    packages = [f"{module}/{program}@{release.module}" for program in PROGRAMS]
    # Without btrfs and cgo: no headers needed. The shim must be static for a container's mount namespace.
    environment = {"GOBIN": str(part), "CGO_ENABLED": "0", "GOFLAGS": "-trimpath -tags=no_btrfs,no_zfs"}
    _run(["nice", go, "install", *packages], part, release, environment, _BUILD_SECONDS)


def _run(
    command: list[str],
    cwd: Path,
    release: Release,
    environment: dict[str, str] | None = None,
    seconds: float = _FETCH_SECONDS,
) -> None:
    env = {**os.environ, **(environment or {})}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"containerd {release.name}: not here within {seconds:.0f} s") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"containerd {release.name} cannot be had: {last[:300]}")


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """One process at a time for each version: the suite runs in two."""
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
