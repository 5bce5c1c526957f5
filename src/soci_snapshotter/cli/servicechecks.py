"""What `soci doctor` asks of the services: containerd, its configuration, our daemon, the keeper, systemd."""

from __future__ import annotations

import glob
import os
import re
import socket
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ..containerd.client import ContainerdClient
from ..containerd.types import Plugin
from ..errors import Config, Remote, SociError
from ..policy import containerdconf
from ..policy.containerdconf import RESTART, Wanted
from ..policy.findings import Finding, ok, problem, warning
from ..serve.keeper_client import SOCKET_NAME
from .nodechecks import Node

# A service that takes longer for a trifle hangs: better said than waited for.
_PATIENCE_S = 10.0
# containerd's files are written by hand or by a node's installer.
_FILE_LIMIT = 1 << 20
_MAX_FILES = 64
_UNIT = "soci-snapshotter-grpc.service"
# Where units are looked for (systemd.unit(5)).
_UNIT_DIRECTORIES = tuple(
    f"{prefix}/systemd/system" for prefix in ("etc", "run", "usr/local/lib", "usr/lib", "lib")
)

_Answer = TypeVar("_Answer")


def check_containerd(node: Node) -> Iterator[Finding]:
    """containerd itself, whether it lists our snapshotter, and what its files say."""
    plugins: list[Plugin] | None = None
    version = ""
    try:
        with ContainerdClient(node.containerd, node.namespace) as client:
            version = _patiently(client.version, f"containerd at {node.containerd}")
            plugins = _patiently(client.snapshotter_plugins, f"containerd at {node.containerd}")
        yield ok("containerd", f"{version} at {node.containerd}")
    except (SociError, OSError) as error:
        yield problem(
            "containerd", str(error), "systemctl status containerd", "if its socket is elsewhere: --address"
        )
    ours = [plugin for plugin in plugins or () if plugin.id == node.snapshotter]
    number = re.match(r"v?(\d+)", version)
    tree: dict[str, Any] = {}
    unreadable: Exception | None = None
    try:
        tree = read_containerd_config(node.containerd_config)
    except (Config, FileNotFoundError) as error:
        unreadable = error
    wanted = Wanted(
        snapshotter=node.snapshotter,
        address=str(node.daemon),
        file=str(node.containerd_config),
        major=int(number[1]) if number else 2 if tree.get("version") == 3 else 1,
        running=bool(ours),
    )
    if plugins is not None:
        yield _check_plugin(ours, node, wanted)
    yield from _check_files(tree, unreadable, node, wanted)


def _check_plugin(ours: list[Plugin], node: Node, wanted: Wanted) -> Finding:
    name = "snapshotter"
    if not ours:
        return problem(
            name,
            f"containerd knows no snapshotter {node.snapshotter!r}",
            *containerdconf.proxy_lines(wanted),
        )
    plugin = ours[0]
    if plugin.error:
        return problem(name, f"containerd could not start {node.snapshotter!r}: {plugin.error}", RESTART)
    address = plugin.exports.get("address", "").removeprefix("unix://")
    if not address:
        return problem(
            name, f"{node.snapshotter!r} is containerd's own, not a proxy", "name ours with --snapshotter"
        )
    if address != wanted.address:
        return problem(
            name,
            f"containerd asks {address} for {node.snapshotter!r}, the daemon's socket is {wanted.address}",
            *containerdconf.proxy_lines(wanted),
        )
    return ok(name, f"containerd lists {node.snapshotter!r} at {address}")


def _check_files(
    tree: dict[str, Any], unreadable: Exception | None, node: Node, wanted: Wanted
) -> Iterator[Finding]:
    name = "containerd config"
    if isinstance(unreadable, FileNotFoundError):
        found = f"{node.containerd_config} is not there"
        if wanted.running:
            yield warning(
                name, found + "; containerd must have another file", "name it with --containerd-config"
            )
        else:
            yield problem(name, found, *containerdconf.proxy_lines(wanted))
        return
    if unreadable is not None:
        yield problem(name, str(unreadable), f"correct the file, then: {RESTART}")
        return
    yield containerdconf.check_proxy(tree, wanted)
    yield containerdconf.check_cri(tree, wanted)
    transfer = containerdconf.check_transfer(tree, wanted)
    if transfer is not None:
        yield transfer


def read_containerd_config(path: Path) -> dict[str, Any]:
    """The file and what it imports, joined as containerd does.

    FileNotFoundError when `path` is not there, Config naming the file for anything else.
    """
    trees: list[dict[str, Any]] = []
    waiting, seen = [path], set[Path]()
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        if len(seen) > _MAX_FILES:
            raise Config(
                f"{path}: imports more than {_MAX_FILES} files; this is not a containerd configuration"
            )
        try:
            tree = _read_toml(current)
        except FileNotFoundError:
            if current == path:
                raise
            raise Config(f"{current}: imported by {path}, but not there") from None
        trees.append(tree)
        imports = tree.get("imports")
        for pattern in imports if isinstance(imports, list) else ():
            # Relative to the file that imports.
            absolute = os.path.join(current.parent, str(pattern))
            found = sorted(glob.glob(absolute)) if "*" in absolute else [absolute]
            waiting += [Path(each) for each in found]
    return containerdconf.merged(trees)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Config(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _FILE_LIMIT:
        raise Config(f"{path}: larger than {_FILE_LIMIT} bytes; this is not a containerd configuration")
    try:
        return tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Config(f"{path}: not TOML: {error}") from None


def check_daemon(node: Node) -> Iterator[Finding]:
    """Our daemon: asked for a snapshot that is not there, as containerd would ask it; and its keeper."""
    name = "daemon"
    start, restart = f"systemctl start {_UNIT}", f"systemctl restart {_UNIT}"
    if not node.daemon.exists():
        yield problem(
            name, f"{node.daemon} is not there: the daemon does not run", start, "systemctl status " + _UNIT
        )
        return
    what = f"the daemon at {node.daemon}"
    try:
        with ContainerdClient(str(node.daemon), node.namespace) as client:
            _patiently(lambda: client.snapshots(node.snapshotter).exists("soci doctor"), what)
        yield ok(name, f"answers at {node.daemon}")
    except (SociError, OSError) as error:
        text = str(error).replace("containerd at", "the daemon at").partition(":")[0]
        yield problem(name, f"{text} does not answer", f"journalctl -u {_UNIT}", restart)
        return
    keeper = node.daemon.parent / SOCKET_NAME
    if _listens(keeper):
        yield ok("keeper", f"listens at {keeper}: readers wait while the daemon is restarted")
    else:
        yield warning(
            "keeper",
            f"nothing listens at {keeper}: a restart of the daemon fails its readers",
            restart,
        )


def check_unit(under: Path = Path("/")) -> Finding:
    """Whether the daemon comes up after a boot, with units looked for below `under`."""
    name = "systemd"
    if not (under / "run/systemd/system").is_dir():
        return ok(name, "does not run here; start the daemon before containerd by other means")
    for directory in _UNIT_DIRECTORIES:
        unit = under / directory / _UNIT
        if unit.exists():
            return ok(name, str(unit))
    return warning(
        name,
        f"there is no {_UNIT}: nobody starts the daemon at boot",
        f"install it, then: systemctl enable --now {_UNIT}",
    )


def _listens(path: Path) -> bool:
    """Whether somebody listens on the keeper's socket; a connection without a message changes nothing there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.settimeout(_PATIENCE_S)
        try:
            channel.connect(str(path))
        except OSError:
            return False
        return True


def _patiently(question: Callable[[], _Answer], what: str) -> _Answer:
    """The answer to a question, or Remote after a while: doctor is called when things hang."""
    answers: list[_Answer | BaseException] = []

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=ask, name="question", daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    if not answers:
        raise Remote(f"{what} did not answer within {_PATIENCE_S:.0f} s; check its log")
    answer = answers[0]
    if isinstance(answer, BaseException):
        raise answer
    return answer
