"""How one command or worker reaches one registry: plain values that may be pickled, so that a spawned process can
open a client of its own from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.credentials import DockerConfig
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.urls import speaks_http


@dataclass(frozen=True, slots=True)
class RegistryAccess:
    """What `open` needs. The secrets are in it, but never in its repr."""

    host: str
    """The registry's `host[:port]`. `login` is for it, and for no other host."""
    login: tuple[str, str] | None = field(default=None, repr=False)
    """User name and password; without it, `docker_config` is asked."""
    docker_config: Path | None = None
    """Docker's config.json; None or a missing file means anonymous."""
    plain_http: bool = False
    """Speak http to `host`; without it, only to loopback."""
    skip_verify: bool = False
    """Accept any TLS certificate."""

    def open(self) -> RegistryClient:
        """A client, to be used as a context manager."""
        options = Options(plain_http=self._speaks_http, skip_verify=self.skip_verify)
        return RegistryClient(options, self.credentials)

    def credentials(self, host: str) -> tuple[str, str] | None:
        """User name and password for `host[:port]`, None for anonymous."""
        if self.login is not None:
            return self.login if host == self.host else None
        return None if self.docker_config is None else DockerConfig(self.docker_config)(host)

    def _speaks_http(self, host: str) -> bool:
        return (self.plain_http and host == self.host) or speaks_http(host)
