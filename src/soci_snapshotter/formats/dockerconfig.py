"""Docker's config.json, which kubernetes.io/dockerconfigjson secrets hold too: whose login is for which registry.

A key of `auths` is a registry, with or without a scheme: `host[:port]`, also followed by a path, and then it is for
the repositories below that path; `*` in a host stands for a part of one label (Kubernetes, "Images", "Interpretation
of config.json"). `/v1/` and `/v2/` are no path: docker login writes the first for Docker Hub.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
from msgspec import Struct

from soci_snapshotter.errors import Config, Integrity
from soci_snapshotter.formats import jsonfmt
from soci_snapshotter.formats.reference import DEFAULT_DOMAIN, DEFAULT_HOST

# A config.json lists hosts and small settings; a Kubernetes secret holds at most 1 MiB.
FILE_LIMIT = 1 << 20
# docker login writes Docker Hub's entry under the first name; the registry is asked under the last.
_HUB = ("index.docker.io", DEFAULT_DOMAIN, DEFAULT_HOST)
# What credential helpers know Docker Hub by.
_HUB_KEY = "https://index.docker.io/v1/"
_API_PATHS = frozenset({"v1", "v2"})


@dataclass(frozen=True, slots=True)
class Login:
    """A user with a password; with `user` "" an identity token (OAuth 2 calls it a refresh token); or with
    `registry_token` a token that the registry itself takes (Bearer). The secret is not in its repr."""

    user: str
    secret: str = field(repr=False)
    registry_token: bool = False


class _Entry(Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identity_token: str = msgspec.field(name="identitytoken", default="")
    registry_token: str = msgspec.field(name="registrytoken", default="")


class _File(Struct, frozen=True):
    auths: dict[str, _Entry] = {}
    helpers: dict[str, str] = msgspec.field(name="credHelpers", default={})
    store: str = msgspec.field(name="credsStore", default="")


@dataclass(frozen=True, slots=True)
class _Place:
    """What a key of `auths` says it is for."""

    key: str
    host: str
    path: str

    def rank(self, host: str, repository: str) -> tuple[bool, int] | None:
        """How well it fits, greater is better; None when it is for something else."""
        if self.path and repository != self.path and not repository.startswith(self.path + "/"):
            return None
        if self.host == host or (host in _HUB and self.host in _HUB):
            return True, len(self.path)
        return (False, len(self.path)) if "*" in self.host and _matches(self.host, host) else None


@dataclass(frozen=True, slots=True)
class DockerFile:
    """A decoded config.json. `name` says in errors where it came from."""

    name: str
    entries: tuple[tuple[_Place, _Entry], ...] = field(repr=False)
    helpers: Mapping[str, str]
    store: str

    def helper(self, host: str) -> str:
        """The credential helper to ask for `host[:port]`, "" for none."""
        for key, name in self.helpers.items():
            place = _place(key)
            if place.host == host or (host in _HUB and place.host in _HUB):
                return name
        return self.store

    def logins(self, host: str, repository: str) -> Iterator[Login]:
        """What `auths` has for a repository of `host[:port]`, what fits best first.

        Config names a broken entry, after all others.
        """
        ranked = [
            (rank, place, entry)
            for place, entry in self.entries
            if (rank := place.rank(host, repository)) is not None
        ]
        problem: Config | None = None
        for _, place, entry in sorted(ranked, key=lambda each: each[0], reverse=True):
            try:
                login = self._login(place, entry)
            except Config as error:
                problem = problem or error
                continue
            if login is not None:
                yield login
        if problem is not None:
            raise problem

    def problem(self) -> Config | None:
        """Names the first entry of `auths` that is broken; None when there is none."""
        for place, entry in self.entries:
            try:
                self._login(place, entry)
            except Config as error:
                return error
        return None

    def _login(self, place: _Place, entry: _Entry) -> Login | None:
        return _login(entry, f"{self.name}: auths[{place.key!r}]")


def parse(data: bytes, name: str) -> DockerFile:
    """Decode a config.json. Config naming it when it is none; nothing of its contents is quoted."""
    try:
        decoded = jsonfmt.decode(data, _File, name, FILE_LIMIT)
    except Integrity as error:
        raise Config(f"{error}; correct the file or log in again") from None
    entries = tuple((_place(key), entry) for key, entry in decoded.auths.items())
    return DockerFile(name, entries, decoded.helpers, decoded.store)


def helper_key(host: str) -> str:
    """What a credential helper is asked for to get the login of `host[:port]`."""
    return _HUB_KEY if host in _HUB else host


def decode_auth(text: str) -> tuple[str, str] | None:
    """User name and password from the base64 of `user:password`; None when it is not that."""
    try:
        user, colon, password = base64.b64decode(text, validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return (user, password.rstrip("\0")) if colon else None  # Docker pads with NULs


def same_registry(one: str, other: str) -> bool:
    """Whether two keys of `auths` (or a server address of the CRI) name the same registry."""
    left, right = _place(one).host, _place(other).host
    return left == right or (left in _HUB and right in _HUB)


def _login(entry: _Entry, where: str) -> Login | None:
    if entry.identity_token:
        return Login("", entry.identity_token)
    if entry.registry_token:
        return Login("", entry.registry_token, registry_token=True)
    if entry.username:
        return Login(entry.username, entry.password)
    if not entry.auth:
        return None  # a credential helper has it
    pair = decode_auth(entry.auth)
    if pair is None or not pair[0]:
        raise Config(f"{where}.auth is not base64 of user:password; log in again")
    return Login(*pair)


def _place(key: str) -> _Place:
    rest = key.partition("://")[2] if "://" in key else key
    host, _, path = rest.partition("/")
    first, _, below = path.strip("/").partition("/")
    return _Place(key, host.lower(), below if first in _API_PATHS else path.strip("/"))


def _matches(pattern: str, host: str) -> bool:
    """Label by label; both have as many, and the same port."""
    wanted, _, port = pattern.partition(":")
    name, _, own_port = host.partition(":")
    labels, own = wanted.split("."), name.split(".")
    if port != own_port or len(labels) != len(own):
        return False
    return all(
        re.fullmatch("[^.]*".join(re.escape(piece) for piece in label.split("*")), mine) is not None
        for label, mine in zip(labels, own, strict=True)
    )
