"""Which proxy a connection goes through, as the usual environment variables say (and Go's net/http understands them).

    HTTP_PROXY, HTTPS_PROXY   [http[s]://][user[:password]@]host[:port], for URLs of that scheme
    NO_PROXY                  comma-separated: *, 10.0.0.0/8, 10.1.2.3[:port], example.com[:port] (and all below it),
                              .example.com or *.example.com (only what is below it)

The names may be in lower case. Loopback is never asked through a proxy. Values only, no I/O: who reads the
environment is the daemon and the CLI.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from soci_snapshotter.errors import Config
from soci_snapshotter.registry.urls import Origin, is_loopback

_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy; `scheme` is how it is spoken to itself."""

    scheme: str
    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)
    """Its Proxy-Authorization, for nobody else."""

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class _Network:
    """A CIDR."""

    network: ipaddress.IPv4Network | ipaddress.IPv6Network

    def matches(self, host: str, port: int) -> bool:
        del port
        address = _address(host)
        return address is not None and address in self.network


@dataclass(frozen=True, slots=True)
class _Place:
    """An address, or a domain: `below` for the names below it, `itself` for its own."""

    host: str
    port: int | None
    itself: bool = True
    below: bool = False

    def matches(self, host: str, port: int) -> bool:
        if self.port not in (None, port):
            return False
        return (self.itself and host == self.host) or (self.below and host.endswith("." + self.host))


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies by scheme, and what is reached without them. The default: none."""

    http: Proxy | None = None
    https: Proxy | None = None
    direct: tuple[_Network | _Place, ...] = ()
    never: bool = False

    def of(self, origin: Origin) -> Proxy | None:
        """The proxy for a connection to `origin`, None for a direct one."""
        proxy = self.https if origin.scheme == "https" else self.http
        if proxy is None or self.never:
            return None
        host = origin.host.lower()
        if is_loopback(f"[{host}]" if ":" in host else host):
            return None
        if any(rule.matches(host, origin.port) for rule in self.direct):
            return None
        return proxy


def from_environment(environ: Mapping[str, str]) -> Proxies:
    """Config, which names the variable and never its value, for one that cannot be used."""
    http = None
    if "REQUEST_METHOD" not in environ:  # in a CGI program HTTP_PROXY is a header that anybody may send
        http = _proxy(environ, "HTTP_PROXY")
    rules: list[_Network | _Place] = []
    never = False
    for word in _get(environ, "NO_PROXY").lower().split(","):
        text = word.strip()
        never = never or text == "*"
        rule = _rule(text)
        if rule is not None:
            rules.append(rule)
    return Proxies(http, _proxy(environ, "HTTPS_PROXY"), tuple(rules), never)


def _get(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.lower()) or ""


def _proxy(environ: Mapping[str, str], name: str) -> Proxy | None:
    text = _get(environ, name)
    if not text:
        return None
    try:
        parts = urlsplit(text if "://" in text else "http://" + text)
        port, host = parts.port, parts.hostname
    except ValueError:
        port, host = None, None
    if not host:
        raise Config(f"{name}: want http://host:port")
    if parts.scheme not in _PORTS:
        raise Config(f"{name}: want an http or https proxy; others, such as SOCKS, are not spoken")
    authorization = None
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + base64.b64encode(pair.encode()).decode()
    return Proxy(parts.scheme, host, _PORTS[parts.scheme] if port is None else port, authorization)


def _rule(text: str) -> _Network | _Place | None:
    """What one word of NO_PROXY stands for; None for nothing, as in Go."""
    if "/" in text:
        try:
            return _Network(ipaddress.ip_network(text, strict=False))
        except ValueError:
            pass
    host, port = _split(text)
    address = _address(host)
    if address is not None:
        return _Place(str(address), port)
    if host.startswith("*."):
        host = host[1:]
    name = host.removeprefix(".")
    if not name or name == "*":
        return None
    return _Place(name, port, itself=name == host, below=True)


def _split(text: str) -> tuple[str, int | None]:
    """Host and port of `host:port`, `[address]:port`, or of one of them without a port."""
    if text.count(":") > 1 and not text.startswith("["):
        return text, None  # an IPv6 address
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal():
        host, port = text, ""
    return host.removeprefix("[").removesuffix("]"), int(port) if port else None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
