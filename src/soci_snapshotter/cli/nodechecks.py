"""What `soci doctor` looks at on the node itself: user, kernel, FUSE, EROFS, the root, files of configuration."""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..daemon import config as configs
from ..errors import Config, SociError
from ..linux import fusedev, mounts
from ..policy.findings import Finding, ok, problem, warning
from ..serve import probe as probes

# The detached FUSE mount's clones need 5.12; EROFS with 512-byte blocks 6.4; EROFS from a file 6.12.
_LEAST = (5, 12)
_FILESYSTEMS = ("erofs", "fuse", "overlay")
_SPARE = ("erofs",)  # layers can be mounted without
# A few layers' worth: below the first a pull is likely to fail, below the second any is.
_LITTLE_SPACE = 2 << 30
_NO_SPACE = 64 << 20
_DOCKER_LIMIT = 1 << 20  # as registry/credentials.py
# Filesystems in memory: EROFS cannot be mounted from a file there, and layers would take the node's memory.
_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class Node:
    """Where things are on this node: as the flags and the environment say. `daemon` is our daemon's socket."""

    containerd: str
    namespace: str
    snapshotter: str
    daemon: Path
    root: Path
    config: Path
    containerd_config: Path
    docker_config: Path


def check_user() -> Finding:
    """Whether mounts can be tried at all."""
    if os.geteuid() == 0:
        return ok("user", "root")
    return problem(
        "user", f"uid {os.geteuid()}: the daemon needs root, and so does this examination", "sudo soci doctor"
    )


def check_kernel() -> Finding:
    """The version, as a hint only: what counts is what the mounts below show."""
    release = platform.release()
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < _LEAST:
        return warning(
            "kernel", f"Linux {release}", "use Linux 5.12 or newer; best is 6.12, which mounts from files"
        )
    return ok("kernel", f"Linux {release}")


def check_fuse() -> Finding:
    """A FUSE connection, made and given up."""
    try:
        with fusedev.connect() as connection:
            if connection.can_resend:
                return ok("FUSE", f"{fusedev.DEVICE} opens and mounts")
            return warning(
                "FUSE",
                "mounts, but the kernel cannot send requests again: a daemon that dies fails its readers",
                "use Linux 6.9 or newer",
            )
    except (SociError, OSError) as error:
        return problem("FUSE", str(error), "modprobe fuse", "echo fuse > /etc/modules-load.d/soci.conf")


def check_mounts(root: Path, config: Path) -> Finding:
    """The whole stack of a lazy layer, mounted for a moment where and as the daemon would: the daemon's own probe."""
    name, place = "lazy mounts", _existing(root)
    try:
        method = configs.load(config)[0].mount_method
    except Config:  # check_config says it
        method = "auto"
    try:
        stack = probes.probe(place, None if method == "auto" else method)
    except (SociError, OSError) as error:
        forced = () if method == "auto" else (f'in {config}: mount_method = "auto"',)
        return problem(name, str(error), *forced)
    found = f"{stack.text}, and overlayfs above, on {place}"
    if method != "auto":
        found += f" (mount_method = {method})"
    if stack.method == "classic" and method == "auto":
        return warning(
            name, f"{found}: right, but slower than EROFS", "use Linux 6.12 or newer, with CONFIG_EROFS_FS"
        )
    if stack.method != "classic" and not stack.directio:
        found += "; data is cached twice, as this disk allows no direct I/O of 512 bytes"
    return ok(name, found)


def check_filesystems(listing: str) -> Finding:
    """/proc/filesystems; the probe has loaded by then what loads by itself."""
    known = {line.split("\t")[-1] for line in listing.splitlines()}
    missing = [name for name in _FILESYSTEMS if name not in known]
    if not missing:
        return ok("filesystems", ", ".join(_FILESYSTEMS))
    report = problem if set(missing) - set(_SPARE) else warning
    return report(
        "filesystems",
        f"the kernel does not know {', '.join(missing)}",
        *(f"modprobe {name}" for name in missing),
        f"for the next boot: printf '%s\\n' {' '.join(missing)} > /etc/modules-load.d/soci.conf",
    )


def check_root(root: Path) -> Finding:
    """The filesystem that layers are kept on, and who may look into the root."""
    place = _existing(root)
    status = place.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    kinds = [entry.fstype.decode() for entry in mounts.mountinfo() if entry.device == device]
    kind = kinds[-1] if kinds else "unknown filesystem"
    space = os.statvfs(place)
    free = space.f_bavail * space.f_frsize
    found = f"{root} on {kind}, {free / (1 << 30):.1f} GiB free"
    if kind in _IN_MEMORY:
        return problem(
            "root", found, "use a root on ext4 or xfs: --root, or SOCI_SNAPSHOTTER_ROOT for the daemon"
        )
    if free < _NO_SPACE or not space.f_favail:
        return problem("root", found, f"make room on the filesystem of {place} (df {place}; df -i {place})")
    if place == root and stat.S_IMODE(status.st_mode) & 0o077:
        mode = f"{found}; mode {stat.S_IMODE(status.st_mode):04o} lets others read images"
        return warning("root", mode, f"chmod 0700 {root}")
    if free < _LITTLE_SPACE:
        return warning("root", found, f"make room on the filesystem of {place}")
    return ok("root", found)


def check_config(path: Path) -> Iterator[Finding]:
    """The daemon's config.toml, read as the daemon reads it."""
    name = "config"
    try:
        loaded, warnings = configs.load(path)
    except Config as error:
        yield problem(name, str(error), f"correct {path}; every key: soci-snapshotter-grpc config default")
        return
    modes = loaded.pull_modes
    on = [word for word, mode in (("v1", modes.soci_v1), ("v2", modes.soci_v2)) if mode.enable]
    found = f"{path}{'' if path.exists() else ' (not there: defaults)'}, indexes looked for: {', '.join(on) or 'none'}"
    if on:
        yield ok(name, found)
    else:
        yield warning(name, found, f"in {path}:", "  [pull_modes.soci_v2]", "    enable = true")
    for text in warnings:
        yield warning(name, text, f"correct the key, or take it out of {path}")


class _Docker(msgspec.Struct, frozen=True):
    """The names in a Docker config.json; nothing secret is decoded."""

    auths: dict[str, msgspec.Raw] = {}
    helpers: dict[str, str] = msgspec.field(name="credHelpers", default={})
    store: str = msgspec.field(name="credsStore", default="")


def check_credentials(path: Path) -> Finding:
    """Docker's config.json: readable, and the programs it names for credentials are there. Shows hosts, no secrets."""
    name = "credentials"
    try:
        with open(path, "rb") as file:
            data = file.read(_DOCKER_LIMIT + 1)
    except FileNotFoundError:
        return ok(name, f"{path} is not there: registries are asked without a login")
    except OSError as error:
        return problem(name, f"{path}: {error.strerror}", f"chmod u+r {path}")
    if len(data) > _DOCKER_LIMIT:
        return problem(name, f"{path}: larger than {_DOCKER_LIMIT} bytes; not a Docker config.json")
    try:
        decoded = msgspec.json.decode(data, type=_Docker)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # The decoder's message may quote what is there.
        return problem(
            name, f"{path}: not a Docker config.json", f"correct {path}, or move it away and log in again"
        )
    programs = {*decoded.helpers.values(), decoded.store} - {""}
    missing = sorted(program for program in programs if shutil.which(f"docker-credential-{program}") is None)
    if missing:
        return problem(
            name,
            f"{path} names credential helpers that are not in PATH: {', '.join(missing)}",
            *(f"install docker-credential-{program} into /usr/local/bin" for program in missing),
        )
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077 and decoded.auths:
        return warning(name, f"{path} may be read by others", f"chmod 0600 {path}")
    return ok(name, f"{path}: {', '.join(sorted(decoded.auths)) or 'no registry'}")


def _existing(path: Path) -> Path:
    """`path`, or the nearest directory above it that is there: where the daemon would make it."""
    while not path.is_dir():
        path = path.parent
    return path
