"""Byte ranges of one blob, on the path of a reader who waits for a span.

Mirrors are asked in their order, then the registry (registry.routes); what one of them does not finish goes on at the
next from the byte where it broke off, and when none is left from the first again, as the retry policy says. A mirror
with other bytes is found out by whoever checks them: then the registry is asked first. All waits end at the caller's
deadline.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing

from soci_snapshotter.errors import Condemned, Config, Integrity, NotFound, Remote, SociError
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.hosts import Capability
from soci_snapshotter.formats.httpfields import Range
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.registry.blobroute import BlobRoute, NoRanges, Sockets
from soci_snapshotter.registry.breaker import PASSED_OVER
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.urls import Repo

__all__ = ["BlobReader", "NoRanges", "Sink"]

_log = logging.getLogger(__name__)

# Connections that wait for a blob's first readers: a start misses some spans at once, and runs ahead of them.
_WARM = 4
# Far more than the hosts of any registry.
_MOST_PLACES = 64

Sink = Callable[[memoryview], None]


class BlobReader:
    """Ranges of one blob of `size` bytes. Thread safe; `bytes_fetched` counts body bytes handed on."""

    def __init__(
        self,
        client: RegistryClient,
        pool: ConnectionPool,
        repo: Repo,
        digest: Digest,
        size: int,
        counters: LayerCounters | None = None,
    ) -> None:
        self._options = client.options
        self._router = client.router
        self._pool = pool
        self._repo = repo
        self._digest = digest
        self._counters = LayerCounters() if counters is None else counters
        self._size = size
        self._subject = Subject(repo.host, repo.repository, f"blob {digest}")
        self._sockets = Sockets()
        self._lock = threading.Lock()
        self._places: dict[Route, BlobRoute] = {}
        self._lacking: dict[
            Route, float
        ] = {}  # has not got it, or not in ranges: until when it is asked last
        self.bytes_fetched = 0

    @property
    def group(self) -> str:
        """The registry: its blobs are slow or gone together, mirrors or not."""
        return self._repo.host

    def warm(self) -> None:
        """Learn where the blob is served from, and have connections open to there before somebody waits.

        Whatever goes wrong shows again, and is said, when bytes are needed.
        """
        deadline = time.monotonic() + self._options.span_timeout
        try:
            for route in self._routes():
                _, failure = self._feed(route, Range(0, 1), _nothing, deadline)
                if failure is None:
                    place = self._place(route)
                    self._pool.warm(place.peer, _WARM, place.dial)
                    return
        except (SociError, OSError) as error:
            _log.debug(
                "no connections ahead", extra={"blob": str(self._subject), "error": type(error).__name__}
            )

    def doubt(self) -> None:
        """What came was not the blob: from now on the registry is asked before its mirrors."""
        self._router.breaker.doubt(self._digest)

    def close(self) -> None:
        """End requests under way, and the waits between tries; the pool is its owner's to close."""
        self._sockets.stop()

    def read(self, start: int, end: int, deadline: float) -> bytearray:
        """Bytes [start, end) in one piece; see read_range."""
        data = bytearray()
        self.read_range(start, end, data.extend, deadline)
        return data

    def read_range(self, start: int, end: int, sink: Sink, deadline: float) -> None:
        """Feed bytes [start, end) to `sink` in order, each view valid during the call only.

        `deadline` is time.monotonic(). Raises Remote or NotFound; what the sink got until then is a prefix.
        """
        if end > self._size:
            raise Remote(f"{self._subject}: bytes up to {end} asked of {self._size}; check the index")
        position = start
        fresh = retry = self._options.span_retry or self._options.retry
        while position < end:
            before = position
            position, refusal = self._round(position, end, sink, deadline)
            if refusal is None:
                continue
            if position > before:
                retry = fresh  # it moves: only failures in a row count
            after = retry.after_failure(random.random(), refusal.retry_after)  # noqa: S311 - jitter
            late = after is None or time.monotonic() + after[0] >= deadline
            if after is None or late or self._sockets.stopped.wait(after[0]):
                raise refusal.error from None
            retry = after[1]

    def _round(self, position: int, end: int, sink: Sink, deadline: float) -> tuple[int, Transient | None]:
        """Ask each route for what is missing: how far it came, and how the registry failed if that is not the end.

        Raises what the registry says and asking again will not change.
        """
        refusal: Transient | None = None
        failure: Transient | SociError | None
        final: SociError | None = None
        for route in self._routes():
            fed, failure = self._feed(route, Range(position, end), sink, deadline)
            position += fed
            if failure is None:
                return position, None
            if isinstance(failure, Transient):
                refusal = failure if route.last else refusal
            else:
                final = failure if route.last else final
            if self._sockets.stopped.is_set():
                break
            if not route.last and time.monotonic() >= deadline:
                # No time to ask the others, who may have what this one has not.
                text = f"{failure}; no time was left to ask another host"
                return position, Transient(Remote(text))
        if final is not None:
            raise final
        return position, refusal or Transient(Remote(f"{self._subject}: not wanted any more"))

    def _feed(
        self, route: Route, wanted: Range, sink: Sink, deadline: float
    ) -> tuple[int, Transient | SociError | None]:
        """How many bytes of `wanted` the sink got from `route`, and what ended it early. Raises what the sink does."""
        fed = 0
        with closing(self._place(route).pieces(wanted, deadline)) as pieces:  # type: ignore[type-var]
            while True:
                try:
                    piece = next(pieces, None)
                except Config:
                    raise  # a certificate that cannot be read is for the user to mend, not to step over
                except (Transient, SociError) as error:
                    if time.monotonic() < deadline:  # else it may be as good as any, and was asked too late
                        self._blame(route, error)
                    return fed, error
                if piece is None:
                    self._router.praise(route)
                    return fed, None
                fed += len(piece)
                self._hand_on(route, sink, piece)

    def _hand_on(self, route: Route, sink: Sink, piece: memoryview) -> None:
        with self._lock:
            self.bytes_fetched += len(piece)
        try:
            sink(piece)
        except Condemned:
            raise
        except Integrity:
            if not route.last:
                _log.warning(
                    "mirror has other bytes", extra={"mirror": str(route), "blob": str(self._digest)}
                )
                self.doubt()
            raise

    def _blame(self, route: Route, error: Transient | SociError) -> None:
        if isinstance(error, NoRanges | NotFound):
            if not route.last:
                with self._lock:
                    self._lacking[route] = time.monotonic() + PASSED_OVER
            return  # of other things it may have all
        if not self._sockets.stopped.is_set():
            self._router.blame(route, error.error if isinstance(error, Transient) else error)

    def _routes(self) -> list[Route]:
        """Best first; those that have not got the blob are last, for a while."""
        routes = self._router.routes(self._repo, Capability.PULL, self._digest)
        if not self._lacking:
            return routes
        now = time.monotonic()
        with self._lock:
            self._lacking = {route: until for route, until in self._lacking.items() if until > now}
            return sorted(routes, key=self._lacking.__contains__)  # stable

    def _place(self, route: Route) -> BlobRoute:
        """The same object for the same route, as long as it is one of this blob's."""
        with self._lock:
            place = self._places.get(route)
            if place is None:
                if len(self._places) >= _MOST_PLACES:
                    self._places.clear()  # hosts.toml was changed again and again
                place = BlobRoute(route, self._pool, self._digest, self._size, self._counters, self._sockets)
                self._places[route] = place
        return place


def _nothing(piece: memoryview) -> None:
    """A sink."""
