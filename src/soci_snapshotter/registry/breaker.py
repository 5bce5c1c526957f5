"""Which hosts failed a moment ago: whoever fetches asks others first, so that a dead mirror does not slow the node.

One for everything that a registry client does, manifests and spans alike: what one request learned spares the next
its wait. A host that failed comes back after a time, and then one request tries it while the others still pass it over.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from soci_snapshotter.formats.digest import Digest

PASSED_OVER = 60.0
"""Seconds that a host is passed over: a restart's length. A dead one costs one failed try a minute."""
DOUBTED = 600.0
"""Seconds that mirrors are asked for a blob last after one of them had other bytes: until someone looked into it."""
# What a node asks for in ten minutes, and hosts that it knows: to be bounded, not to be reached.
_MOST = 4096

_K = TypeVar("_K")


class Breaker:
    """Thread safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._failed: dict[str, float] = {}  # host -> until when it is passed over
        self._doubted: dict[Digest, float] = {}

    def failing(self, hosts: Iterable[str]) -> set[str]:
        """Those of `hosts` that are passed over. One whose time has come is not, this time: the caller tries it."""
        now = self._clock()
        found = set()
        with self._lock:
            for host in hosts:
                until = self._failed.get(host)
                if until is None:
                    continue
                if until > now:
                    found.add(host)
                else:
                    self._failed[host] = now + PASSED_OVER
        return found

    def failed(self, host: str) -> bool:
        """`host` did not do its part. True when that is new."""
        with self._lock:
            new = host not in self._failed
            _remember(self._failed, host, self._clock() + PASSED_OVER)
        return new

    def worked(self, host: str) -> bool:
        """`host` did. True when it had failed before."""
        if host not in self._failed:  # nearly always, and without the lock
            return False
        with self._lock:
            return self._failed.pop(host, None) is not None

    def doubt(self, blob: Digest) -> None:
        """A mirror had other bytes for `blob`."""
        with self._lock:
            _remember(self._doubted, blob, self._clock() + DOUBTED)

    def doubted(self, blob: Digest) -> bool:
        """Whether the registry itself is to be asked for `blob` first."""
        until = self._doubted.get(blob)
        return until is not None and until > self._clock()


def _remember(known: dict[_K, float], key: _K, until: float) -> None:
    known.pop(key, None)
    known[key] = until
    if len(known) > _MOST:
        del known[next(iter(known))]
