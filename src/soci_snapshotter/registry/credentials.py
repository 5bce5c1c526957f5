"""Credentials for registries from Docker's config.json (`auths` only), re-read when the file changes."""

from __future__ import annotations

import base64
import binascii
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct, field

from soci_snapshotter.errors import Config, Integrity
from soci_snapshotter.formats import jsonfmt
from soci_snapshotter.formats.reference import DEFAULT_HOST

# Asked with the registry's `host[:port]`: user name and password, or "" and an identity token; None means anonymous.
CredentialProvider: TypeAlias = Callable[[str], tuple[str, str] | None]

# A config.json lists hosts and small settings; anything beyond 1 MiB is not one.
_FILE_LIMIT = 1 << 20
# docker login writes Docker Hub's entry under the first name; the registry is asked under the last.
_HUB_KEYS = ("index.docker.io", "docker.io", DEFAULT_HOST)


class _Entry(Struct, frozen=True):
    auth: str = ""
    username: str = ""
    password: str = ""
    identity_token: str = field(name="identitytoken", default="")


class _File(Struct, frozen=True):
    auths: dict[str, _Entry] = {}


class DockerConfig:
    """The `auths` of a Docker config.json; call it with a host. A missing file means anonymous everywhere.

    Raises Config, naming the file, when it cannot be read or understood.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._auths: dict[str, _Entry] = {}

    def __call__(self, host: str) -> tuple[str, str] | None:
        """User name and password, or "" and an identity token, for `host[:port]`; None when the file has none."""
        auths = self._load()
        for key in _HUB_KEYS if host in _HUB_KEYS else (host,):
            if key in auths:
                return self._decode(key, auths[key])
        return None

    def _load(self) -> dict[str, _Entry]:
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            with self._lock:
                if stamp == self._stamp:
                    return self._auths
            with self._path.open("rb") as file:
                data = file.read(_FILE_LIMIT + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Config(f"{self._path}: {error.strerror}; check the file's permissions") from None
        try:
            decoded = jsonfmt.decode(data, _File, str(self._path), _FILE_LIMIT)
        except Integrity as error:
            raise Config(f"{error}; correct the file or log in again") from None
        auths = {_host(key): entry for key, entry in decoded.auths.items()}
        with self._lock:
            self._stamp, self._auths = stamp, auths
        return auths

    def _decode(self, key: str, entry: _Entry) -> tuple[str, str] | None:
        if entry.identity_token:
            return "", entry.identity_token
        if entry.username:
            return entry.username, entry.password
        if not entry.auth:
            return None  # a credential helper has it
        try:
            user, colon, password = base64.b64decode(entry.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            colon = ""
        if not colon:
            raise Config(f"{self._path}: auths[{key!r}].auth is not base64 of user:password; log in again")
        return user, password.rstrip("\0")  # Docker pads with NULs


def _host(key: str) -> str:
    """`https://index.docker.io/v1/` and `index.docker.io` name the same host."""
    return key.partition("://")[2].partition("/")[0] if "://" in key else key.partition("/")[0]
