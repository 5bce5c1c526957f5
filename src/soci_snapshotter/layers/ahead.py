"""Ztocs of an image's next layers, fetched before anybody asks: a pull prepares one layer after the other, and each would
wait for the registry by itself.

They wait in memory: a pull that is given up leaves nothing on the disk. What does not arrive is fetched again by
whoever needs it, who then says what is wrong.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

from soci_snapshotter.errors import SociError
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.store.content import ContentStore

_log = logging.getLogger(__name__)

_THREADS = 4  # four round trips at a time are faster than Prepare is
MOST_LAYERS = 16  # how far ahead: four rounds of those
MOST_BYTES = 256 << 10  # of one ztoc: of a larger one the transfer counts, not the round trip
_HELD_BYTES = 16 << 20  # of all together; the layers of four images at once
_PATIENCE = 10.0  # seconds that Prepare waits for a small answer before it asks by itself
HELD_SECONDS = 30.0  # a pull asks for the next layer within seconds, or never


@dataclass(frozen=True, slots=True)
class _Held:
    since: float
    size: int
    bytes: Future[bytes | None]


class ZtocsAhead:
    """Fetches and keeps ztocs. Thread safe; a context manager."""

    def __init__(self, client: RegistryClient, content: ContentStore) -> None:
        self._client = client
        self._content = content
        self._queue: SimpleQueue[tuple[Reference, Descriptor, Future[bytes | None]] | None] = SimpleQueue()
        # No executor: the interpreter would wait at its end for a registry that does not answer.
        self._threads = [
            threading.Thread(target=self._work, name=f"ztoc-{number}", daemon=True)
            for number in range(_THREADS)
        ]
        self._lock = threading.Lock()
        self._held: OrderedDict[Digest, _Held] = OrderedDict()
        self._sweeper: threading.Timer | None = None
        self._closed = False

    def __enter__(self) -> ZtocsAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            sweeper, self._sweeper = self._sweeper, None
            left = list(self._held.values())
            self._held.clear()
        if sweeper is not None:
            sweeper.cancel()
        for held in left:
            held.bytes.cancel()
        for _ in self._threads:
            self._queue.put(None)

    def expect(self, reference: Reference, farthest_first: Iterable[Descriptor]) -> None:
        """These will be asked for next. Returns at once.

        The farthest comes first, since all behind one that is known were expected before: a pull says nearly the same
        with every layer.
        """
        wanted: list[Descriptor] = []
        for ztoc in farthest_first:
            with self._lock:
                if ztoc.digest in self._held:
                    break
            if 0 < ztoc.size <= MOST_BYTES and not self._content.exists(ztoc.digest):
                wanted.append(ztoc)
        for ztoc in reversed(wanted):
            with self._lock:
                full = sum(held.size for held in self._held.values()) + ztoc.size > _HELD_BYTES
                if self._closed or full or ztoc.digest in self._held:
                    continue
                future: Future[bytes | None] = Future()
                self._queue.put((reference, ztoc, future))
                self._held[ztoc.digest] = _Held(time.monotonic(), ztoc.size, future)
                self._arm()

    def take(self, ztoc: Digest) -> bytes | None:
        """The bytes of a ztoc that was expected, once; None when nobody did, or it could not be had."""
        with self._lock:
            held = self._held.pop(ztoc, None)
        if held is None or held.bytes.cancel():  # not begun: whoever asks is faster
            return None
        try:
            return held.bytes.result(_PATIENCE)
        except TimeoutError:
            return None

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            reference, ztoc, future = job
            if future.set_running_or_notify_cancel():
                future.set_result(self._fetch(reference, ztoc))

    def _fetch(self, reference: Reference, ztoc: Descriptor) -> bytes | None:
        try:
            return self._client.fetch(reference, ztoc, MOST_BYTES)
        except (SociError, OSError) as error:
            _log.debug("a ztoc did not come ahead", extra={"ztoc": str(ztoc.digest), "error": str(error)})
        except Exception:  # a bug here must not cost the thread
            _log.exception("a ztoc did not come ahead", extra={"ztoc": str(ztoc.digest)})
        return None

    def _arm(self) -> None:
        """Under the lock: see that what nobody takes goes."""
        if self._sweeper is None and self._held and not self._closed:
            self._sweeper = threading.Timer(HELD_SECONDS, self._sweep)
            self._sweeper.daemon = True
            self._sweeper.start()

    def _sweep(self) -> None:
        limit = time.monotonic() - HELD_SECONDS
        with self._lock:
            self._sweeper = None
            for digest in [digest for digest, held in self._held.items() if held.since <= limit]:
                self._held.pop(digest).bytes.cancel()
            self._arm()
