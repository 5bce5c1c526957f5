"""Layer blobs on their way from the registry into containerd, several at once, in the order asked for."""

from __future__ import annotations

import functools
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Protocol

from ..containerd.client import ContainerdClient
from ..errors import Remote
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.reference import Reference

# Connections break in the middle of big blobs. A try that brought bytes does not count, so only a registry
# that is really gone uses these up; the client has retried each request by then.
_TRIES = 3
_PAUSE_S = 0.5
# How long closing waits for a worker that is blocked in a read; it is a daemon thread and dies with the
# process.
_JOIN_S = 2.0


class Registry(Protocol):
    """What a pull needs of a registry client; errors are Remote or NotFound naming host and repository."""

    def resolve(self, ref: Reference) -> Descriptor:
        """What the reference points to: a manifest or an index."""

    def fetch(self, ref: Reference, descriptor: Descriptor, limit: int) -> bytes:
        """A manifest or blob of at most `limit` bytes, checked against size and digest."""

    def open_blob(
        self, ref: Reference, descriptor: Descriptor, offset: int
    ) -> AbstractContextManager[Iterable[bytes]]:
        """A blob's bytes from `offset` on, unchecked, while the `with` lasts."""


class Downloads:
    """A context manager with worker threads; leaving it stops what is under way.

    `received` is the number of bytes that came from the registry; `on_bytes(layer, count)` is told of each
    chunk.
    """

    def __init__(
        self,
        client: ContainerdClient,
        registry: Registry,
        ref: Reference,
        *,
        labels: Mapping[str, str],
        on_bytes: Callable[[Descriptor, int], None],
        workers: int,
    ) -> None:
        self._client = client
        self._registry = registry
        self._ref = ref
        self._labels = labels
        self._on_bytes = on_bytes
        self._count = workers
        self._queue: queue.SimpleQueue[tuple[Descriptor, Future[None]] | None] = queue.SimpleQueue()
        self._futures: dict[Digest, Future[None]] = {}
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._identity = secrets.token_hex(8)
        self.received = 0

    def __enter__(self) -> Downloads:
        for number in range(self._count):
            thread = threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for _thread in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def start(self, layer: Descriptor) -> None:
        """Ask for a blob; a no-op when it was asked for before."""
        if layer.digest not in self._futures:
            future: Future[None] = Future()
            self._futures[layer.digest] = future
            self._queue.put((layer, future))

    def wait(self, layer: Descriptor) -> None:
        """Return when a blob that was asked for is in containerd; raise what kept it from there."""
        self._futures[layer.digest].result()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            layer, future = item
            try:
                self._fetch(layer)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    def _fetch(self, layer: Descriptor) -> None:
        failures = 0
        while True:
            before = self.received
            try:
                self._client.content.write(
                    layer,
                    functools.partial(self._source, layer),
                    labels=self._labels,
                    ref=self._upload(layer),
                )
            except Remote:
                failures = 1 if self.received > before else failures + 1
                if failures >= _TRIES or self._stop.is_set():
                    self._client.content.abort(self._upload(layer))
                    raise
                self._stop.wait(_PAUSE_S * failures)
            else:
                return

    def _upload(self, layer: Descriptor) -> str:
        # Of this pull alone: two pulls that share an upload would exclude each other.
        return f"soci-pull-{self._identity}-{layer.digest}"

    def _source(self, layer: Descriptor, offset: int) -> Iterator[bytes]:
        with self._registry.open_blob(self._ref, layer, offset) as chunks:
            for chunk in chunks:
                if self._stop.is_set():
                    raise Remote(f"layer {layer.digest}: download stopped")
                with self._lock:
                    self.received += len(chunk)
                self._on_bytes(layer, len(chunk))
                yield chunk
