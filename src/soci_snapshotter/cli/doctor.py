"""`soci doctor`: what on this node is missing or misconfigured, and how to mend it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from ..daemon.config import DEFAULT_PATH
from ..policy.findings import Finding, Level, healthy
from .context import Globals
from .nodechecks import (
    Node,
    check_config,
    check_credentials,
    check_filesystems,
    check_fuse,
    check_kernel,
    check_mounts,
    check_root,
    check_user,
)
from .servicechecks import check_containerd, check_daemon, check_unit

_COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
DAEMON_ADDRESS = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"


@click.command(name="doctor")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    envvar="SOCI_SNAPSHOTTER_CONFIG",
    default=DEFAULT_PATH,
    show_default=True,
    show_envvar=True,
    help="The daemon's config.toml.",
)
@click.option(
    "--daemon-address",
    type=str,
    envvar="SOCI_SNAPSHOTTER_ADDRESS",
    default=DAEMON_ADDRESS,
    show_default=True,
    show_envvar=True,
    help="The daemon's socket.",
)
@click.option(
    "--containerd-config",
    type=click.Path(path_type=Path),
    default="/etc/containerd/config.toml",
    show_default=True,
    help="containerd's configuration.",
)
@click.option(
    "--snapshotter",
    envvar="CONTAINERD_SNAPSHOTTER",
    default="soci",
    show_default=True,
    show_envvar=True,
    help="The snapshotter, as containerd's configuration names it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print an array of {name, level, found, mend}.")
@click.pass_context
def doctor_command(
    ctx: click.Context,
    *,
    config: Path,
    daemon_address: str,
    containerd_config: Path,
    snapshotter: str,
    as_json: bool,
) -> None:
    """Say what on this node keeps images from being lazy, and how to mend it.

    Exits with 1 when there is a problem; warnings alone are 0. Nothing is changed: what is mounted to try the
    kernel is gone again.
    """
    flags: Globals = ctx.obj
    docker = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    node = Node(
        containerd=flags.address,
        namespace=flags.namespace,
        snapshotter=snapshotter,
        daemon=Path(daemon_address.removeprefix("unix://")),
        root=flags.root.absolute(),
        config=config,
        containerd_config=containerd_config,
        docker_config=Path(docker) / "config.json",
    )
    findings = []
    for finding in examine(node):
        findings.append(finding)
        if not as_json:
            _print(finding)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    if not healthy(findings):
        ctx.exit(1)


def examine(node: Node) -> Iterator[Finding]:
    """Every check, one after the other: the kernel before what is built on it."""
    yield check_user()
    yield check_kernel()
    yield check_fuse()
    yield check_mounts(node.root, node.config)
    yield check_filesystems(Path("/proc/filesystems").read_text())
    yield check_root(node.root)
    yield from check_config(node.config)
    yield from check_daemon(node)
    yield from check_containerd(node)
    yield check_credentials(node.docker_config)
    yield check_unit()


def _print(finding: Finding) -> None:
    # click leaves colours out where stdout is no terminal.
    click.secho(f"{finding.level.value:<8}", fg=_COLOURS[finding.level], nl=False)
    click.echo(f"{finding.name}: {finding.found}")
    for line in finding.mend:
        click.echo(f"          {line}")
