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
from ..formats.reference import Reference
from ..registry.access import RegistryAccess
from ..registry.client import RegistryClient


@dataclass(frozen=True, slots=True)
class RegistryFlags:
    """The registry flags as they were given. `user` may hold a password and is not in the repr."""

    user: str | None = field(default=None, repr=False)
    plain_http: bool = False
    skip_verify: bool = False


def registry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with the registry flags, which it gets as one argument: `registry`, a RegistryFlags."""

    @functools.wraps(command)
    def gathered(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever click gives the command
        own = {each.name: kwargs.pop(each.name) for each in fields(RegistryFlags)}
        return command(*args, registry=RegistryFlags(**own), **kwargs)

    for option in (
        click.option("--skip-verify", "-k", is_flag=True, help="Accept any TLS certificate."),
        click.option("--plain-http", is_flag=True, help="Use HTTP (without it, only on loopback)."),
        click.option("--user", "-u", metavar="NAME[:PASSWORD]", help="Credentials; a password is asked for."),
    ):
        gathered = option(gathered)
    return gathered


def registry_access(flags: RegistryFlags, reference: Reference) -> RegistryAccess:
    """How to reach the registry of `reference`: to be opened here, or pickled for a worker. Asks for a password."""
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    return RegistryAccess(
        host=reference.host,
        login=None if flags.user is None else _login(flags.user, reference.domain),
        docker_config=Path(directory) / "config.json",
        plain_http=flags.plain_http,
        skip_verify=flags.skip_verify,
    )


def open_registry(flags: RegistryFlags, reference: Reference) -> RegistryClient:
    """A client for the registry of `reference`, to be used as a context manager."""
    return registry_access(flags, reference).open()


def _login(user: str, domain: str) -> tuple[str, str]:
    name, colon, password = user.partition(":")
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
