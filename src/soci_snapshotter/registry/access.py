"""How one command or worker reaches one registry: plain values that may be pickled, so that a spawned process can
open a client of its own from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from soci_snapshotter.formats.hosts import Endpoint, Tls
from soci_snapshotter.registry.certsd import CertsDirectories
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.credentials import DockerConfig
from soci_snapshotter.registry.credhelpers import Helpers
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.proxies import Proxies
from soci_snapshotter.registry.urls import speaks_http


@dataclass(frozen=True, slots=True)
class RegistryAccess:
    """What `open` needs. The secrets are in it, but never in its repr."""

    host: str
    """The registry's `host[:port]`. `login`, `plain_http` and a client certificate are for it, and for no other."""
    login: tuple[str, str] | None = field(default=None, repr=False)
    """User name and password, or "" and an identity token; without it, `docker_config` is asked."""
    docker_config: Path | None = None
    """Docker's config.json; None or a missing file means anonymous."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """For the credential helpers that it names; they are found by PATH."""
    plain_http: bool = False
    """Speak http; without it, only to loopback. With skip_verify: https, and http where there is no TLS."""
    tls: Tls = field(default_factory=Tls)
    hosts_dirs: tuple[Path, ...] = ()
    """certs.d directories; the first that has something for a registry counts."""
    proxies: Proxies = field(default_factory=Proxies)
    dump: Callable[[str], None] | None = None
    """Told of the heads of requests and answers, line by line; a function of a module, so that it can be pickled."""
    trace: Callable[[str], None] | None = None
    """Told of connections and times."""

    def open(self) -> RegistryClient:
        """A client, to be used as a context manager. Config when a certificate cannot be used."""
        options = Options(
            plain_http=self._speaks_http,
            tls=self.tls,
            proxies=self.proxies,
            dump=self.dump,
            trace=self.trace,
        )
        hosts = CertsDirectories(self.hosts_dirs, self.endpoint)
        return RegistryClient(options, self._credentials(hosts), hosts)

    def endpoint(self, host: str) -> Endpoint:
        """The registry `host[:port]` itself, without any hosts.toml."""
        scheme = "http" if self._speaks_http(host) else "https"
        own = host == self.host
        # nerdctl passes --plain-http and --skip-verify for an insecure registry, whichever of both it is; and
        # certificates for loopback, from flags or files, say that TLS is expected there.
        guessed = scheme == "http" and (not (own and self.plain_http) or self.tls.skip_verify)
        tls = self.tls if own else self.tls.without_client()
        return Endpoint(scheme, host, tls=tls, guessed=guessed)

    def _speaks_http(self, host: str) -> bool:
        return (self.plain_http and host == self.host) or speaks_http(host)

    def _credentials(
        self, hosts: Callable[[str], tuple[Endpoint, ...]]
    ) -> Callable[[str], tuple[str, str] | None]:
        """Of a host of the registry. The one login is for the registry, also where hosts.toml names its server."""
        login = self.login
        if login is None:
            if self.docker_config is None:
                return _anonymous
            return DockerConfig(self.docker_config, Helpers(self.environment))

        def own(host: str) -> tuple[str, str] | None:
            return login if host in (self.host, hosts(self.host)[-1].host) else None

        return own


def _anonymous(_host: str) -> None:
    return None
