"""`soci-snapshotter-grpc`: flags, environment, signals."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import click

from soci_snapshotter import __version__
from soci_snapshotter.daemon import config as configs
from soci_snapshotter.daemon import logs, startup, systemd
from soci_snapshotter.daemon.relay import Relay
from soci_snapshotter.daemon.survival import Survival
from soci_snapshotter.daemon.wiring import running
from soci_snapshotter.errors import Config, SociError
from soci_snapshotter.linux.malloc import give_memory_back

_log = logging.getLogger(__name__)

DEFAULT_ADDRESS = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
DEFAULT_ROOT = "/var/lib/soci-snapshotter-grpc"
RELAYED = "grpc.sock"  # gRPC's own socket when systemd listens on the one that clients know
SWITCH_SECONDS = (
    0.001  # a page fault waits for the interpreter at most this long behind other Python (DATA-PLANE.md)
)


@click.group(invoke_without_command=True)
@click.option("--address", envvar="SOCI_SNAPSHOTTER_ADDRESS", default=DEFAULT_ADDRESS, show_default=True)
@click.option(
    "--config",
    "config_path",
    envvar="SOCI_SNAPSHOTTER_CONFIG",
    default=str(configs.DEFAULT_PATH),
    show_default=True,
)
@click.option("--log-level", envvar="SOCI_SNAPSHOTTER_LOG_LEVEL", default="info", show_default=True)
@click.option("--root", envvar="SOCI_SNAPSHOTTER_ROOT", default=DEFAULT_ROOT, show_default=True)
@click.version_option(__version__, "--version", "-v")
@click.pass_context
def cli(context: click.Context, address: str, config_path: str, log_level: str, root: str) -> None:
    """The snapshotter daemon: containerd's snapshots service on a unix socket, layers mounted lazily."""
    context.obj = config_path
    if context.invoked_subcommand is None:
        _serve(address, Path(config_path), log_level, Path(root))


@cli.group()
def config() -> None:
    """Show configuration."""


@config.command()
def default() -> None:
    """The defaults, as TOML."""
    sys.stdout.write(configs.dump(configs.Config()).decode())


@config.command()
@click.pass_obj
def dump(config_path: str) -> None:
    """What --config says, with the defaults filled in, as TOML."""
    loaded, _ = configs.load(Path(config_path))
    sys.stdout.write(configs.dump(loaded).decode())


def _serve(address: str, config_path: Path, log_level: str, root: Path) -> None:
    logs.set_up(log_level)
    loaded, warnings = configs.load(config_path)
    for warning in warnings:
        _log.warning(warning)
    found = systemd.inherited()
    ours, listener = _places(address, found)
    root = root.absolute()
    sys.setswitchinterval(SWITCH_SECONDS)
    give_memory_back()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})  # before the first thread
    startup.raise_descriptor_limit()
    startup.refuse_own_mounts(root)
    docker = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    aborted = threading.Event()

    def abort() -> None:
        aborted.set()
        os.kill(os.getpid(), signal.SIGTERM)

    survival = Survival(found, on_abort=abort)
    with startup.owned(root):
        startup.free_socket(ours)
        with ExitStack() as stack:
            relay = stack.enter_context(Relay(listener, ours)) if listener is not None else None
            daemon = stack.enter_context(
                running(loaded, root=root, address=ours, docker_config=docker, survival=survival)
            )
            if relay is not None:
                stack.enter_context(relay.accepting())
            systemd.notify("READY=1")
            _log.info("serving", extra={"address": address, "root": str(root), "version": __version__})
            number = signal.sigwait({signal.SIGTERM, signal.SIGINT})
            systemd.notify("STOPPING=1")
            _log.info("stopping", extra={"signal": signal.Signals(number).name})
            if number == signal.SIGINT:
                daemon.unmount_all()
    if aborted.is_set():
        raise SociError(
            "the FUSE connection was aborted: containers on lazy layers that were not complete must be restarted; "
            "start the daemon again for new ones"
        )


def _places(address: str, found: systemd.Inherited) -> tuple[Path, socket.socket | None]:
    """Where gRPC binds its socket, and the listener behind which it does, for `fd://`."""
    if address.startswith("unix://"):
        address = address.removeprefix("unix://")
    if address.startswith("fd://"):
        if len(found.listeners) != 1:
            raise Config(
                f"--address {address}: {len(found.listeners)} unix sockets were given in LISTEN_FDS, want one; start "
                "the daemon through its .socket unit, or give --address a path"
            )
        name = found.listeners[0].getsockname()
        listens = isinstance(name, str) and name.startswith("/")
        directory = Path(name if listens else DEFAULT_ADDRESS).parent
        return directory / RELAYED, found.listeners[0]
    if not address.startswith("/"):
        raise Config(f"--address {address}: want an absolute path of a unix socket, or fd://")
    return Path(address), None


def main() -> None:
    """The console script: one line for an error, its exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        print(f"soci-snapshotter-grpc: {error.format_message()}", file=sys.stderr)
        sys.exit(1)
    except SociError as error:
        print(f"soci-snapshotter-grpc: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
