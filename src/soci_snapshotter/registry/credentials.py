"""Where logins come from, and Docker's config.json as one source of them, re-read when the file changes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, TypeAlias

from soci_snapshotter.errors import Config
from soci_snapshotter.formats import dockerconfig
from soci_snapshotter.formats.dockerconfig import DockerFile, Login
from soci_snapshotter.registry.credhelpers import Helpers

# Asked with the registry's `host[:port]`: user name and password, or "" and an identity token; None means anonymous.
CredentialProvider: TypeAlias = Callable[[str], tuple[str, str] | None]


class Source(Protocol):
    """Something that knows logins."""

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        """Logins for a repository of the registry `host[:port]`, and for no other host, the best first.

        `fresh`: what was given before was rejected, so nothing remembered will do. Raises Config, one line, when
        the source cannot be asked.
        """


class DockerConfig:
    """A Docker config.json: `auths`, and with `helpers` also `credHelpers` and `credsStore`.

    A missing file knows no logins. Thread safe.
    """

    def __init__(self, path: Path, helpers: Helpers | None = None) -> None:
        self._path = path
        self._helpers = helpers
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._file: DockerFile | None = None

    def __call__(self, host: str) -> tuple[str, str] | None:
        """The first login for `host[:port]` that is a pair; so it is a CredentialProvider too."""
        for login in self.logins(host, ""):
            if not login.registry_token:
                return login.user, login.secret
        return None

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        """The helper's answer, then what `auths` has. A helper that fails is named only if nothing else is there."""
        file = self._load()
        if file is None:
            return
        failed = None
        name = file.helper(host)
        if name and self._helpers is not None:
            try:
                login = self._helpers.login(name, host, fresh=fresh)
            except Config as error:
                failed, login = error, None
            if login is not None:
                yield login
        yield from file.logins(host, repository)
        if failed is not None:
            raise failed

    def _load(self) -> DockerFile | None:
        try:
            status = os.stat(self._path)
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            with self._lock:
                if stamp == self._stamp:
                    return self._file
            with self._path.open("rb") as file:
                data = file.read(dockerconfig.FILE_LIMIT + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Config(f"{self._path}: {error.strerror}; check the file's permissions") from None
        parsed = dockerconfig.parse(data, str(self._path))
        with self._lock:
            self._stamp, self._file = stamp, parsed
        return parsed
