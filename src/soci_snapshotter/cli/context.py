"""What every command shares: the global flags, and turning words of the command line into values."""

from __future__ import annotations

import contextlib
import platform as host
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from ..containerd.client import ContainerdClient
from ..errors import Invalid
from ..formats import reference
from ..formats.oci import Platform, parse_platform
from ..formats.reference import Reference
from ..index.sinks import ContainerdStore, DirectoryStore, Store
from ..store.artifacts import Artifacts
from ..store.content import ContentStore

# Go's duration syntax, which --timeout has in the Go tool.
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")


@dataclass(frozen=True, slots=True)
class Globals:
    """The global flags, as the command line and the environment gave them."""

    address: str
    namespace: str
    debug: bool
    content_store: str
    root: Path

    @contextlib.contextmanager
    def containerd(self) -> Iterator[ContainerdClient]:
        """A client of containerd for the length of a command."""
        with ContainerdClient(self.address, self.namespace) as client:
            yield client

    @contextlib.contextmanager
    def artifacts(self) -> Iterator[Artifacts]:
        """The table of indexes that were made here."""
        with Artifacts(self.root / "content" / "artifacts.sqlite") as artifacts:
            yield artifacts

    def store(self, client: ContainerdClient) -> Store:
        """The content store that --content-store names."""
        if self.content_store == "containerd":
            return ContainerdStore(client)
        return DirectoryStore(ContentStore(self.root / "content"))


def host_platform() -> Platform:
    """The platform of this machine's own programs."""
    return parse_platform(f"{host.system().lower()}/{host.machine()}")


def wanted_platforms(names: tuple[str, ...], *, everything: bool) -> list[Platform] | None:
    """--platform and --all-platforms as find_images takes them: None for all, this machine's by default."""
    if everything:
        if names:
            raise Invalid("--platform and --all-platforms exclude each other")
        return None
    return [parse_platform(name) for name in names] or [host_platform()]


def image_reference(text: str) -> Reference:
    """The image reference a user typed, normalised as Docker does."""
    return reference.parse(text)


def duration(text: str) -> float:
    """Seconds for a Go duration (`90s`, `1m30s`); 0 stays 0. Raises Invalid naming --timeout."""
    if text == "0":
        return 0.0
    total, position = 0.0, 0
    for part in _DURATION_PART.finditer(text):
        if part.start() != position:
            break
        total += float(part[1]) * _UNITS_S[part[2]]
        position = part.end()
    if position != len(text) or not text:
        raise Invalid(f"--timeout {text!r}: want a duration such as 30s, 5m or 1h30m")
    return total


class Bytes(click.ParamType[int]):
    """A positive number of bytes; zero only where `zero` allows it."""

    name = "bytes"

    def __init__(self, *, zero: bool = False) -> None:
        self._zero = zero

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """click's hook: the number, or a usage error that names flag and value."""
        del ctx
        flag = param.opts[0] if param is not None else "value"
        try:
            number = int(str(value))
        except ValueError:
            raise Invalid(f"{flag} {value!r}: want a whole number of bytes") from None
        # An int64, as ztocs store it.
        if number < (0 if self._zero else 1) or number >= 1 << 63:
            raise Invalid(f"{flag} {value!r}: must be {'0 or more' if self._zero else 'more than 0'}")
        return number
