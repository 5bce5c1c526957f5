"""URLs of registries and what a redirect may do: decisions only, no I/O.

A redirect may lead to another host (blobs often lie with an object store) but credentials never follow it there,
and it never leads from https to http, where anybody on the way could read or change the answer.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote, urljoin, urlsplit

from soci_snapshotter.errors import Remote
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.registry.failures import Subject

# A blob behind an object store takes one hop, a mirror in front of it one more; loops must end.
MAX_REDIRECTS = 5

REDIRECTS = frozenset({301, 302, 303, 307, 308})
# Only these keep method and body (RFC 9110 15.4); an upload follows no other.
BODY_REDIRECTS = frozenset({307, 308})

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Signed URLs reach 2 to 4 KiB; 16 KiB is what servers take in a request line at most.
_URL_LIMIT = 16 << 10
_VISIBLE = re.compile(r"[\x21-\x7e]+", re.ASCII)


class Repo(Protocol):
    """What is asked of a repository's name; formats.reference.Reference is one."""

    @property
    def host(self) -> str:
        """`host[:port]` that answers the registry API."""

    @property
    def repository(self) -> str:
        """The repository's name there."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository by registry host (`host[:port]`) and name."""

    host: str
    repository: str


@dataclass(frozen=True, slots=True)
class Origin:
    """Whom a connection is made to."""

    scheme: str
    host: str
    port: int

    @property
    def place(self) -> str:
        """`host[:port]`, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


def is_loopback(host: str) -> bool:
    """True for `host[:port]` on this machine: `localhost`, 127.0.0.0/8 and ::1."""
    name = (urlsplit("//" + host).hostname or "").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def speaks_http(host: str) -> bool:
    """The default choice of scheme: http on loopback, unless the port is https's own."""
    return is_loopback(host) and not host.endswith(":443")


def split(url: str) -> tuple[Origin, str]:
    """An absolute http(s) URL as its origin and its request target (path and query). ValueError otherwise."""
    if len(url) > _URL_LIMIT or not _VISIBLE.fullmatch(url):
        raise ValueError("longer than any URL, or with spaces or control characters in it")
    parts = urlsplit(url)
    port = parts.port
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError("not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("user name or password in a URL")
    origin = Origin(parts.scheme, parts.hostname, _DEFAULT_PORTS[parts.scheme] if port is None else port)
    return origin, (parts.path or "/") + ("?" + parts.query if parts.query else "")


def origin(endpoint: Endpoint) -> Origin:
    """Whom an endpoint's connections are made to."""
    return split(f"{endpoint.scheme}://{endpoint.host}/")[0]


def follow(url: str, location: str, subject: Subject) -> str:
    """The absolute URL that `location`, absolute or relative to `url`, names; Remote when it may not be followed."""
    try:
        target = urljoin(url, _escaped(location)).partition("#")[0]
        before, _ = split(url)
        after, _ = split(target)
    except ValueError as error:
        raise Remote(f"{subject}: redirected to an unusable URL ({error}); check the registry") from None
    if before.scheme == "https" and after.scheme == "http":
        raise Remote(
            f"{subject}: redirected from https to http ({after.host}); check the registry's external URL setting"
        )
    return target


def _escaped(location: str) -> str:
    """Percent-encode what may not stand in a URL (a few registries put UTF-8 there), leave the rest alone."""
    return quote(location, safe="%/?#[]@!$&'()*+,;=:~-._")
