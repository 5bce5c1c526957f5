"""Where a registry's requests go: containerd's `certs.d/<host>/hosts.toml` and Docker's certificate directories.

    server = "https://registry.example"          asked last; without it, the registry itself
    [host."https://mirror.example"]              asked before it, in the order of the file
      capabilities = ["pull", "resolve"]         all three (push too) when absent
      ca = "ca.pem" | ["a.pem", "b.pem"]         relative to the directory of the file
      client = "both.pem" | ["both.pem"] | [["cert.pem", "key.pem"]]
      skip_verify, override_path = bools         override_path: the URL's path stands instead of /v2
      dial_timeout = "1s"
      [host."https://mirror.example".header]
        x-name = "value" | ["value"]

The keys of a host may also stand at the top, for the server. Unknown keys are ignored. (containerd's docs/hosts.md
and core/remotes/docker/config.) Where containerd goes on without a file that it cannot read, this raises Config:
requests that avoid a configured mirror or proxy are no good answer to a typing error.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

from soci_snapshotter.errors import Config
from soci_snapshotter.formats.reference import DEFAULT_DOMAIN, DEFAULT_HOST

# A hosts.toml names a few mirrors; a generated one some dozen.
HOSTS_LIMIT = 256 << 10
HOSTS_FILE = "hosts.toml"

_URL = re.compile(r"[\x21-\x7e]{1,2048}", re.ASCII)
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}", re.ASCII)  # a token, RFC 9110 5.6.2
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]{0,8192}")
# What this program sets itself: a file may not bend the framing of its requests.
_RESERVED = frozenset({"host", "content-length", "transfer-encoding", "connection", "range"})
_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ns|us|µs|ms|s|m|h))+", re.ASCII)
_DURATION_PART = re.compile(r"([\d.]+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class Capability(Enum):
    """What a host is trusted with."""

    PULL = "pull"
    RESOLVE = "resolve"
    PUSH = "push"


_EVERYTHING = frozenset(Capability)


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files: `ca` is trusted beside the system's, `client` are (certificate, key) pairs.

    An empty key path means that the key is in the certificate's file.
    """

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False

    def without_client(self) -> Tls:
        """The same trust, but nothing to show who asks: for hosts that a registry names."""
        return replace(self, client=())


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place that answers a registry's API at `scheme://host/path`. `host` is `host[:port]`."""

    scheme: str
    host: str
    path: str = "/v2"
    capabilities: frozenset[Capability] = _EVERYTHING
    tls: Tls = Tls()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Sent to this host with every request; they may be secrets."""
    dial_timeout: float | None = None
    """Seconds for a connection; None for the client's own."""
    request_timeout: float | None = None
    """Seconds for one whole request; None for the client's own."""
    namespace: str = ""
    """The registry this is a mirror of, for the query `ns`; empty for the registry itself."""
    guessed: bool = False
    """`scheme` is a guess: with any TLS setting https is tried first, and http spoken if the host knows no TLS."""


def directories(host: str) -> tuple[str, ...]:
    """Names of a registry's directory below certs.d, the first that exists counts."""
    name = registry_name(host)
    before, colon, port = name.rpartition(":")
    return (f"{before}_{port}_", name, "_default") if colon else (name, "_default")


def parse(data: bytes, directory: str, default: Endpoint) -> tuple[Endpoint, ...]:
    """The endpoints of <directory>/hosts.toml in the order in which they are asked.

    `default` is the registry itself with the caller's TLS settings: its CA and skip_verify hold for all of them,
    its client certificate only for the last, the server. Raises Config naming the file.
    """
    reader = _Reader(f"{directory}/{HOSTS_FILE}", directory)
    tree = reader.load(data)
    endpoints = []
    for url, table in reader.table(tree, "host").items():
        shared = replace(default, tls=default.tls.without_client(), guessed=False)
        endpoints.append(reader.endpoint(url, reader.as_table(table, f'host."{url[:200]}"'), shared))
    server = tree.get("server", "")
    if not isinstance(server, str):
        raise reader.wrong("server", "want a URL")
    endpoints.append(reader.endpoint(server, tree, default))
    registry = registry_name(default.host)
    return tuple(
        each if each.host == default.host else replace(each, namespace=registry) for each in endpoints
    )


def mirror(name: str, default: Endpoint, *, insecure: bool, request_timeout: float | None) -> Endpoint:
    """One of config.toml's mirrors of the registry `default`: `host[:port]` by https, or by http where `insecure`.

    A URL with a path, as in hosts.toml, will do, too. It is pulled from only. Raises Config naming it.
    """
    reader = _Reader(f"mirror {name.rpartition('@')[2][:200]!r}", "")
    scheme = "" if "://" in name else "http://" if insecure else "https://"
    place = reader.endpoint(scheme + name, {}, replace(default, tls=default.tls.without_client()))
    return replace(
        place,
        capabilities=_EVERYTHING - {Capability.PUSH},
        request_timeout=request_timeout,
        namespace=registry_name(default.host),
    )


def registry_name(host: str) -> str:
    """What mirrors and configurations call the registry that answers at `host`."""
    return DEFAULT_DOMAIN if host == DEFAULT_HOST else host


def certificate_files(names: Iterable[str], directory: str, default: Endpoint) -> Endpoint:
    """`default` with the certificates of a Docker-style directory: *.crt is a CA, *.cert and *.key a client pair."""
    found = sorted(names)
    keys = {name for name in found if name.endswith(".key")}
    pairs = []
    for name in found:
        if name.endswith(".cert"):
            key = name.removesuffix(".cert") + ".key"
            pairs.append(
                (posixpath.join(directory, name), posixpath.join(directory, key) if key in keys else "")
            )
    ca = tuple(posixpath.join(directory, name) for name in found if name.endswith(".crt"))
    tls = replace(default.tls, ca=(*default.tls.ca, *ca), client=(*pairs, *default.tls.client))
    return replace(default, tls=tls)


class _Reader:
    """Turns TOML values into endpoints; every complaint names the file and the key."""

    def __init__(self, name: str, directory: str) -> None:
        self._name = name
        self._directory = directory

    def load(self, data: bytes) -> dict[str, Any]:
        if len(data) > HOSTS_LIMIT:
            raise Config(f"{self._name}: larger than {HOSTS_LIMIT} bytes; this is not a hosts.toml")
        try:
            return tomllib.loads(data.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise Config(f"{self._name}: {str(error)[:200]}; correct the file") from None

    def wrong(self, key: str, why: str) -> Config:
        return Config(f"{self._name}: {key}: {why}; correct the file")

    def table(self, tree: Mapping[str, Any], key: str) -> dict[str, Any]:
        return self.as_table(tree.get(key, {}), key)

    def as_table(self, value: object, key: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong(key, "want a table")
        return value

    def endpoint(self, url: str, table: Mapping[str, Any], default: Endpoint) -> Endpoint:
        """The endpoint of one table; an empty `url` leaves scheme, host and path as they are in `default`."""
        own = self._place(url, self._bool(table, "override_path"), default) if url else default
        skip = self._bool(table, "skip_verify") if "skip_verify" in table else default.tls.skip_verify
        tls = Tls(
            ca=(*default.tls.ca, *self._ca(table.get("ca"))),
            client=(*self._client(table.get("client")), *default.tls.client),
            skip_verify=skip,
        )
        return replace(
            own,
            capabilities=self._capabilities(table.get("capabilities")),
            tls=tls,
            headers=self._headers(self.table(table, "header")),
            dial_timeout=self._duration(table.get("dial_timeout")),
        )

    def _place(self, url: str, override_path: bool, default: Endpoint) -> Endpoint:
        full = url if url.startswith(("http://", "https://")) else f"https://{url}"
        try:
            parts = urlsplit(full)
            usable = bool(parts.hostname) and parts.port != 0 and not parts.netloc.endswith(":")
        except ValueError:
            usable = False
        if not usable or not _URL.fullmatch(full) or parts.query or parts.fragment:
            shown = url.rpartition("@")[2][:200]  # no password
            raise self.wrong(f"{shown!r}", "want http[s]://host[:port][/path]")
        if parts.username is not None or parts.password is not None:
            raise self.wrong("host or server", "has a user name or password in its URL; log in instead")
        path = "/" + posixpath.normpath("/" + parts.path).lstrip("/")
        path = "" if path == "/" else path
        if not override_path and not path.endswith("/v2"):
            path += "/v2"
        return replace(default, scheme=parts.scheme, host=parts.netloc, path=path, guessed=False)

    def _bool(self, table: Mapping[str, Any], key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "want true or false")
        return value

    def _capabilities(self, value: object) -> frozenset[Capability]:
        words = self._strings(value, "capabilities")
        try:
            return frozenset(Capability(word.lower()) for word in words) or _EVERYTHING
        except ValueError:
            raise self.wrong("capabilities", "want of pull, resolve, push") from None

    def _strings(self, value: object, key: str) -> list[str]:
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(key, "want a list of strings")
        return value

    def _path(self, text: str, key: str) -> str:
        if not text or "\0" in text:
            raise self.wrong(key, "want the path of a PEM file")
        return posixpath.join(self._directory, text)

    def _ca(self, value: object) -> tuple[str, ...]:
        values = [value] if isinstance(value, str) else self._strings(value, "ca")
        return tuple(self._path(each, "ca") for each in values)

    def _client(self, value: object) -> tuple[tuple[str, str], ...]:
        if value is None:
            return ()
        pairs = []
        for each in value if isinstance(value, list) else [value]:
            pair = [each, ""] if isinstance(each, str) else self._strings(each, "client")
            if len(pair) != 2:
                raise self.wrong("client", "want a path, or pairs of certificate and key")
            key = self._path(pair[1], "client") if pair[1] else ""
            pairs.append((self._path(pair[0], "client"), key))
        return tuple(pairs)

    def _headers(self, table: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        found = []
        for name, value in table.items():
            values = [value] if isinstance(value, str) else self._strings(value, f"header {name[:80]!r}")
            text = ", ".join(values)
            if not _FIELD_NAME.fullmatch(name) or not _FIELD_VALUE.fullmatch(text):
                raise self.wrong(f"header {name[:80]!r}", "is no HTTP field")
            if name.lower() in _RESERVED:
                raise self.wrong(f"header {name!r}", "is set by the client itself")
            found.append((name, text))
        return tuple(found)

    def _duration(self, value: object) -> float | None:
        if value is None or value == "":
            return None
        if not isinstance(value, str) or not _DURATION.fullmatch(value):
            raise self.wrong("dial_timeout", "want a duration such as 1s or 500ms")
        seconds = sum(float(part[1]) * _SECONDS[part[2]] for part in _DURATION_PART.finditer(value))
        return seconds or None
