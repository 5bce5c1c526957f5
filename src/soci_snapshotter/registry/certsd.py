"""Reading certs.d directories: containerd's hosts.toml, or Docker's certificate files (formats.hosts says how)."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from soci_snapshotter.errors import Config
from soci_snapshotter.formats import hosts
from soci_snapshotter.formats.hosts import Endpoint

_log = logging.getLogger(__name__)

# containerd reads the files for each pull; a daemon that asks for spans all day looks this often.
_FRESH = 10.0


class CertsDirectories:
    """Endpoints of a registry, by the first of `directories` that has something for it. Call it with `host[:port]`.

    Thread safe. Raises Config naming the file that cannot be read or understood; not any more when it could be before.
    """

    def __init__(self, directories: Sequence[Path], default: Callable[[str], Endpoint]) -> None:
        """`default` makes the endpoint of a registry that no directory knows."""
        self._directories = tuple(directories)
        self._default = default
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, tuple[Endpoint, ...]]] = {}

    def __call__(self, host: str) -> tuple[Endpoint, ...]:
        """The endpoints in the order in which they are asked."""
        now = time.monotonic()
        with self._lock:
            known = self._known.get(host)
        if known is not None and now - known[0] < _FRESH:
            return known[1]
        try:
            endpoints = self._read(host)
        except Config as error:
            if known is None:
                raise
            # Somebody is editing: containers that run go on with what was good.
            endpoints = known[1]
            _log.warning("a changed hosts.toml is not used", extra={"registry": host, "error": str(error)})
        with self._lock:
            self._known[host] = now, endpoints
        return endpoints

    def _read(self, host: str) -> tuple[Endpoint, ...]:
        default = self._default(host)
        for directory in self._directories:
            for name in hosts.directories(host):
                found = _load(directory / name, default)
                if found is not None:
                    return found
        return (default,)


def _load(directory: Path, default: Endpoint) -> tuple[Endpoint, ...] | None:
    """What one directory says; None when it is not there."""
    try:
        names = os.listdir(directory)
        if hosts.HOSTS_FILE in names:
            with (directory / hosts.HOSTS_FILE).open("rb") as file:
                data = file.read(hosts.HOSTS_LIMIT + 1)
            if data:
                return hosts.parse(data, str(directory), default)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Config(f"{error.filename or directory}: {error.strerror}; check its permissions") from None
    return (hosts.certificate_files(names, str(directory), default),)
