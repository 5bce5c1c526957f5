"""What config.toml and the environment say about registries, in the terms of registry/.

Values that equal the Go daemon's defaults count as unset where ours are better: ResponseHeaderTimeoutMsec's 3 s are
too few for a cache that fetches a blob before it answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from soci_snapshotter.daemon.config import Config, Http
from soci_snapshotter.daemon.fetching import flight_limit
from soci_snapshotter.formats import hosts
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry import proxies
from soci_snapshotter.registry.certsd import CertsDirectories
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.routes import Hosts

_UNSET = Http()


def registry_options(config: Config, environ: Mapping[str, str]) -> Options:
    """How requests are made. Config for a proxy variable that cannot be used."""
    http, blob = config.http, config.blob
    head = http.ResponseHeaderTimeoutMsec
    attempts, least, most = (http.MaxRetries or 8, http.MinWaitMsec or 30, http.MaxWaitMsec or 300_000)
    return Options(
        connect_timeout=(http.DialTimeoutMsec or 3000) / 1000,
        head_timeout=None if head in (0, _UNSET.ResponseHeaderTimeoutMsec) else head / 1000,
        request_timeout=(http.RequestTimeoutMsec or 300_000) / 1000,
        retry=Retry(attempts, least / 1000, most / 1000),
        span_retry=Retry(
            attempts=blob.max_retries or attempts,
            min_wait=(blob.min_wait_msec or least) / 1000,
            max_wait=(blob.max_wait_msec or most) / 1000,
        ),
        connections=flight_limit(config),
        proxies=proxies.from_environment(environ),
    )


def registry_hosts(config: Config, options: Options) -> Hosts:
    """Who is asked for a registry: config.toml's mirrors, then hosts.toml's, then the registry itself.

    Config, once and for all, for a mirror that is no host.
    """
    certs = CertsDirectories(
        [Path(each) for each in config.resolver.config_path.split(":") if each],
        lambda host: _itself(options, host),
    )
    ours = {
        hosts.registry_name(host): [
            hosts.mirror(
                each.host,
                _itself(options, host),
                insecure=each.insecure or options.plain_http(each.host),
                request_timeout=_request_timeout(each.request_timeout_sec),
            )
            for each in said.mirrors
        ]
        for host, said in config.resolver.host.items()
    }

    def asked(host: str) -> Sequence[Endpoint]:
        mirrors = ours.get(hosts.registry_name(host))
        return (*mirrors, *certs(host)) if mirrors else certs(host)

    return asked


def _itself(options: Options, host: str) -> Endpoint:
    scheme = options.scheme(host)
    # Certificates for a registry on loopback say that TLS is expected there.
    return Endpoint(scheme, host, tls=options.tls, guessed=scheme == "http")


def _request_timeout(seconds: int) -> float | None:
    return float("inf") if seconds < 0 else float(seconds) or None
