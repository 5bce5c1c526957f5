"""The flags that say how to reach a registry, and whose credentials it is shown."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from ..errors import Invalid
from ..formats.hosts import Tls
from ..formats.reference import Reference
from ..registry.access import RegistryAccess
from ..registry.client import RegistryClient
from ..registry.proxies import from_environment


@dataclass(frozen=True, slots=True)
class RegistryFlags:
    """The registry flags as they were given; `user` may hold a password. Secrets are not in the repr."""

    user: str | None = field(default=None, repr=False)
    refresh: str | None = field(default=None, repr=False)
    plain_http: bool = False
    skip_verify: bool = False
    hosts_dir: tuple[str, ...] = ()
    tlscacert: str | None = None
    tlscert: str | None = None
    tlskey: str | None = None
    http_dump: bool = False
    http_trace: bool = False


# The names are the Go tool's; ctr has the same.
_OPTIONS = (
    click.option("--user", "-u", metavar="NAME[:PASSWORD]", help="Credentials; a password is asked for."),
    click.option("--refresh", metavar="TOKEN", help="Identity (refresh) token, for the token service."),
    click.option(
        "--plain-http",
        is_flag=True,
        help="Use HTTP (without it, only on loopback); with --skip-verify, only where there is no TLS.",
    ),
    click.option("--skip-verify", "-k", is_flag=True, help="Accept any TLS certificate."),
    click.option(
        "--hosts-dir",
        multiple=True,
        metavar="DIR[,DIR]",
        help="Directories laid out as /etc/containerd/certs.d, or Docker's certs.d.",
    ),
    click.option("--tlscacert", metavar="FILE", help="CA to trust beside the system's (PEM)."),
    click.option("--tlscert", metavar="FILE", help="Client certificate (PEM)."),
    click.option("--tlskey", metavar="FILE", help="Its key (PEM)."),
    click.option("--http-dump", is_flag=True, help="Show requests and answers, without secrets or bodies."),
    click.option("--http-trace", is_flag=True, help="Show connections and how long answers took."),
)


def registry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with the registry flags, which it gets as one argument: `registry`, a RegistryFlags."""

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever click gives the command
        own = {each.name: kwargs.pop(each.name) for each in fields(RegistryFlags)}
        return command(*args, registry=RegistryFlags(**own), **kwargs)

    for option in reversed(_OPTIONS):
        gathered = option(gathered)
    return gathered


def registry_access(flags: RegistryFlags, reference: Reference) -> RegistryAccess:
    """How to reach the registry of `reference`: to be opened here, or pickled for a worker. Asks for a password."""
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    return RegistryAccess(
        host=reference.host,
        login=_login(flags, reference.domain),
        docker_config=Path(directory) / "config.json",
        environment=dict(os.environ),
        plain_http=flags.plain_http,
        tls=_tls(flags),
        hosts_dirs=tuple(Path(name) for given in flags.hosts_dir for name in given.split(",") if name),
        proxies=from_environment(os.environ),
        dump=show_line if flags.http_dump else None,
        trace=show_line if flags.http_trace else None,
    )


def open_registry(flags: RegistryFlags, reference: Reference) -> RegistryClient:
    """A client for the registry of `reference`, to be used as a context manager."""
    return registry_access(flags, reference).open()


def show_line(line: str) -> None:
    """A line for --http-dump and --http-trace; stdout is for results."""
    print(line, file=sys.stderr)


def _tls(flags: RegistryFlags) -> Tls:
    if bool(flags.tlscert) != bool(flags.tlskey):
        given, missing = ("--tlscert", "--tlskey") if flags.tlscert else ("--tlskey", "--tlscert")
        raise Invalid(f"{given} without {missing}: a client certificate needs both")
    return Tls(
        ca=(flags.tlscacert,) if flags.tlscacert else (),
        client=((flags.tlscert, flags.tlskey),) if flags.tlscert and flags.tlskey else (),
        skip_verify=flags.skip_verify,
    )


def _login(flags: RegistryFlags, domain: str) -> tuple[str, str] | None:
    """User name and password, or "" and a refresh token. With both flags the user counts, as in ctr."""
    if flags.user is None:
        return ("", flags.refresh) if flags.refresh else None
    name, colon, password = flags.user.partition(":")
    if not name:
        raise Invalid("--user: the name is empty; want NAME or NAME:PASSWORD")
    if colon:
        return name, password
    if sys.stdin.isatty():
        return name, str(click.prompt(f"Password for {name} at {domain}", hide_input=True, err=True))
    # In a pipe, as a CI job keeps a password out of the process list.
    password = sys.stdin.readline().rstrip("\r\n")
    if not password:
        raise Invalid(f"--user {name}: no password; give NAME:PASSWORD, or write it to standard input")
    return name, password
