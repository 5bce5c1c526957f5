"""How to reach registries: scheme by host, TLS, timeouts, retries. Values only; the daemon and the CLI fill them."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soci_snapshotter.errors import Config
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.urls import speaks_http


@dataclass(frozen=True, slots=True)
class Options:
    """Seconds. The Go daemon's [http] gives dial 3 s, and 300 s for a whole request."""

    plain_http: Callable[[str], bool] = speaks_http
    """Says whether a registry `host[:port]` is spoken to by http."""
    skip_verify: bool = False
    """Take any certificate. Credentials are then as safe as the network is."""
    ca_file: Path | None = None
    """PEM certificates to trust beside the system's."""
    connect_timeout: float = 3.0
    read_timeout: float = 30.0
    """Between two pieces of an answer; also until its head comes."""
    upload_timeout: float = 300.0
    """Until the head comes after an upload: registries copy a blob to its place before they answer."""
    request_timeout: float = 300.0
    """The whole of a request whose answer is held in memory; a drip of bytes must end too."""
    span_timeout: float = 10.0
    """Between two pieces of a span, or until its head comes: somebody waits for it in read(2)."""
    retry: Retry = field(default_factory=Retry)
    user_agent: str = "soci-snapshotter"

    def scheme(self, host: str) -> str:
        """`http` or `https` for a registry's `host[:port]`."""
        return "http" if self.plain_http(host) else "https"

    def ssl_context(self) -> ssl.SSLContext:
        """What connections by https use. Config when ca_file cannot be used."""
        context = ssl.create_default_context()
        if self.ca_file is not None:
            try:
                context.load_verify_locations(self.ca_file)
            except (OSError, ssl.SSLError) as error:
                raise Config(
                    f"{self.ca_file}: no usable PEM certificates ({error.strerror or error})"
                ) from None
        if self.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
