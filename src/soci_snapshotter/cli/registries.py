"""The flags that say how to reach a registry, and whose credentials it is shown."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import Invalid
from ..formats.reference import Reference
from ..registry.client import RegistryClient
from ..registry.credentials import CredentialProvider, DockerConfig
from ..registry.options import Options
from ..registry.urls import speaks_http

_Command = TypeVar("_Command", bound=Callable[..., Any])


def registry_options(command: _Command) -> _Command:
    """Decorate a command with --user, --plain-http and --skip-verify."""
    for option in (
        click.option("--skip-verify", "-k", is_flag=True, help="Accept any TLS certificate."),
        click.option("--plain-http", is_flag=True, help="Use HTTP (without it, only on loopback)."),
        click.option("--user", "-u", metavar="NAME[:PASSWORD]", help="Credentials; a password is asked for."),
    ):
        command = option(command)
    return command


def credentials(ref: Reference, user: str | None) -> CredentialProvider:
    """--user for the host of `ref` and no other, or what Docker's config.json has for each host."""
    if user is None:
        directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
        return DockerConfig(Path(directory) / "config.json")
    name, colon, password = user.partition(":")
    if not name:
        raise Invalid("--user: the name is empty; want NAME or NAME:PASSWORD")
    if not colon:
        password = str(click.prompt(f"Password for {name} at {ref.domain}", hide_input=True, err=True))

    def only_this_host(host: str) -> tuple[str, str] | None:
        return (name, password) if host == ref.host else None

    return only_this_host


def open_registry(ref: Reference, *, user: str | None, plain_http: bool, skip_verify: bool) -> RegistryClient:
    """A client for the registry of `ref`, to be used as a context manager."""
    options = Options(
        plain_http=(lambda host: host == ref.host or speaks_http(host)) if plain_http else speaks_http,
        skip_verify=skip_verify,
    )
    return RegistryClient(options, credentials(ref, user))
