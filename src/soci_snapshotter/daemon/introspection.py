"""What the daemon says of itself, and where.

    status.sock beside --address    always; root only: /status (JSON, `soci status`), /metrics
    metrics_address                 /metrics, for Prometheus; TCP or a unix socket; not with no_prometheus
    debug_address                   TCP: /debug/stacks, /debug/profile?seconds=5, /debug/vars (as /status)

No page holds credentials, URLs or names of files; /status and /debug/vars name images.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from soci_snapshotter import __version__
from soci_snapshotter.daemon import debugging
from soci_snapshotter.daemon.config import Config
from soci_snapshotter.daemon.metrics import Metrics, Sources
from soci_snapshotter.daemon.pages import Page, PageServer, listen_tcp, listen_unix
from soci_snapshotter.errors import Config as ConfigError
from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats.promtext import CONTENT_TYPE
from soci_snapshotter.layers.background import Background
from soci_snapshotter.layers.openlayers import OpenLayers
from soci_snapshotter.layers.pool import FlightPool
from soci_snapshotter.layers.progress import statuses
from soci_snapshotter.policy.counters import Counters
from soci_snapshotter.policy.status import SOCKET, DaemonStatus
from soci_snapshotter.policy.status import Background as BackgroundStatus

_log = logging.getLogger(__name__)

_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"
_IMAGE_WAIT = 60  # the Go daemon's default, which 0 stands for
_PROFILE_SECONDS = "5"
_INDEX = b"/debug/stacks\n/debug/profile?seconds=5\n/debug/vars\n"


@dataclass(frozen=True, slots=True)
class Parts:
    """What there is to look at."""

    root: Path
    counters: Counters
    layers: OpenLayers
    background: Background
    background_enabled: bool
    pool: FlightPool
    events: Callable[[], Mapping[str, int]]
    """Counts that parts keep themselves, by name."""


@contextmanager
def introspection(config: Config, parts: Parts, run_dir: Path) -> Iterator[None]:
    """The servers run while the block lasts. Raises Config for an address that cannot be listened on."""
    view = _View(parts, config.fuse_metrics_emit_wait_duration_sec or _IMAGE_WAIT)
    metrics, status = {"/metrics": view.metrics}, {"/status": view.status}
    with ExitStack() as stack:
        try:
            own = listen_unix(run_dir / SOCKET, "--address")
        except ConfigError as error:  # a path too long for a socket, say: the snapshotter works without
            _log.warning("soci status will not work", extra={"error": str(error)})
        else:
            stack.enter_context(PageServer(own, metrics | status, "status"))
        if config.metrics_address and not config.no_prometheus:
            if config.metrics_network == "unix":
                listener = listen_unix(Path(config.metrics_address), "metrics_address")
            else:
                listener = listen_tcp(config.metrics_address, "metrics_address")
            stack.enter_context(PageServer(listener, metrics, "metrics"))
        if config.debug_address:
            pages = {
                "/debug/": _index,
                "/debug/stacks": _stacks,
                "/debug/profile": _profile,
                "/debug/vars": view.status,
            }
            stack.enter_context(PageServer(listen_tcp(config.debug_address, "debug_address"), pages, "debug"))
        yield


class _View:
    """The pages about this daemon."""

    def __init__(self, parts: Parts, image_wait: float) -> None:
        self._parts = parts
        self._started = time.monotonic()
        sources = Sources(
            counters=parts.counters,
            layers=lambda: statuses(parts.layers.all_layers(), parts.counters, parts.root / "m"),
            background=self._background,
            events=lambda: Counter(parts.layers.counts) + Counter(parts.events()),
            flights_queued=lambda: parts.pool.queued,
        )
        self._metrics = Metrics(sources, image_wait=image_wait)

    def _background(self) -> BackgroundStatus:
        background = self._parts.background
        return BackgroundStatus(self._parts.background_enabled, background.queued, background.evicted)

    def metrics(self, _query: Mapping[str, str]) -> Page:
        """Prometheus' text."""
        return Page(CONTENT_TYPE, self._metrics.exposition())

    def status(self, _query: Mapping[str, str]) -> Page:
        """policy.status.DaemonStatus."""
        parts = self._parts
        layers = statuses(parts.layers.all_layers(), parts.counters, parts.root / "m", disk=True)
        status = DaemonStatus(
            version=__version__,
            pid=os.getpid(),
            root=str(parts.root),
            uptime=time.monotonic() - self._started,
            layers=tuple(layers),
            background=self._background(),
            flights_queued=parts.pool.queued,
            counters=self._metrics.operations(),
        )
        return Page(_JSON, msgspec.json.encode(status))


def _index(_query: Mapping[str, str]) -> Page:
    return Page(_TEXT, _INDEX)


def _stacks(_query: Mapping[str, str]) -> Page:
    return Page(_TEXT, debugging.stacks().encode(errors="backslashreplace"))


def _profile(query: Mapping[str, str]) -> Page:
    try:
        seconds = float(query.get("seconds", _PROFILE_SECONDS))
    except ValueError:
        raise Invalid("seconds: want a number") from None
    return Page(_TEXT, debugging.profile(seconds).encode(errors="backslashreplace"))
