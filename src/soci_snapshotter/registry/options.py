"""How to reach registries: scheme by host, TLS, timeouts, retries. Values only; the daemon and the CLI fill them."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from soci_snapshotter.errors import Config
from soci_snapshotter.formats.hosts import Endpoint, Tls
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.proxies import Proxies
from soci_snapshotter.registry.urls import speaks_http


@dataclass(frozen=True, slots=True)
class Options:
    """Seconds. The Go daemon's [http] gives dial 3 s, and 300 s for a whole request."""

    plain_http: Callable[[str], bool] = speaks_http
    """Says whether a registry `host[:port]` is spoken to by http."""
    tls: Tls = field(default_factory=Tls)
    """For every registry. With skip_verify credentials are only as safe as the network is."""
    connect_timeout: float = 3.0
    read_timeout: float = 30.0
    """Between two pieces of an answer; also until its head comes."""
    upload_timeout: float = 300.0
    """Until the head comes after an upload: registries copy a blob to its place before they answer."""
    request_timeout: float = 300.0
    """The whole of a request; a drip of bytes must end too. A span's or a layer's then goes on with another one."""
    head_timeout: float | None = None
    """Until the head of an answer comes; None: as between two pieces of it."""
    span_timeout: float = 10.0
    """Between two pieces of a span, or until its head comes: somebody waits for it in read(2)."""
    retry: Retry = field(default_factory=Retry)
    span_retry: Retry | None = None
    """For spans; None: `retry`."""
    mirror_retry: Retry = field(default_factory=lambda: Retry(attempts=1))
    """For a host that has another one after it: asking that one is the better second try."""
    connections: int | None = None
    """At once to one host for spans; everything else has 16 at most, and no more than these. None: as many as needed."""
    proxies: Proxies = field(default_factory=Proxies)
    user_agent: str = "soci-snapshotter"
    dump: Callable[[str], None] | None = None
    """Told of the head of each request and answer, secrets left out."""
    trace: Callable[[str], None] | None = None
    """Told of each connection and of how long each answer took."""

    def scheme(self, host: str) -> str:
        """`http` or `https` for a registry's `host[:port]`."""
        return "http" if self.plain_http(host) else "https"

    def endpoint(self, host: str) -> Endpoint:
        """The registry itself, without any hosts.toml."""
        return Endpoint(self.scheme(host), host, tls=self.tls)

    def ssl_context(self, tls: Tls | None = None) -> ssl.SSLContext:
        """What connections by https use. Config naming the file of a certificate or key that cannot be used."""
        tls = self.tls if tls is None else tls
        context = ssl.create_default_context()
        for path in tls.ca:
            try:
                context.load_verify_locations(path)
            except (OSError, ssl.SSLError) as error:
                raise Config(f"{path}: no usable PEM certificates ({_why(error)})") from None
        for certificate, key in tls.client:
            try:
                context.load_cert_chain(certificate, key or None, password=_no_password)
            except (OSError, ssl.SSLError, ValueError) as error:
                named = f"{certificate} and {key}" if key else certificate
                raise Config(f"{named}: no usable certificate with its key ({_why(error)})") from None
        if tls.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # OpenSSL would ask on the terminal


def _why(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error) or "not in PEM format"
