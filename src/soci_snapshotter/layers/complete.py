"""Complete layers: their bytes made durable and hashed, off every path that a reader waits on.

the last span lands -> fdatasync(data.tar) -> sha256 over the tar with its tail = the DiffID
-> layer.json says `complete` -> the snapshots' claims are held against it (policy.proof)
-> a local mount m/<n> for whoever comes next; what was handed out before stays as long as it is used
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from soci_snapshotter.errors import Integrity, SociError
from soci_snapshotter.layers.openlayer import Layer, LayerKey, OpenLayer
from soci_snapshotter.store.layerfiles import Stamp, stamp_of

_log = logging.getLogger(__name__)

_PIECE = 1 << 20  # what is read and hashed without the interpreter's lock at a time
_TRIES = 600  # looks at a layer whose last flights still end, one a tick: ten minutes
TICK_SECONDS = 1.0


class Unfinished(Exception):
    """The layer is not ready to be hashed, or changed meanwhile: look again later."""


def hash_tar(fd: int, size: int, ending: Callable[[], bool] = lambda: False) -> str:
    """sha256 of the first `size` bytes of a file, as a digest. Integrity when it is shorter.

    What was read is dropped from the page cache: mounts read data.tar past it (directio), or keep pages of their own.
    Raises Unfinished when `ending()` says that there is no time.
    """
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    offset = 0
    while offset < size:
        if ending():
            raise Unfinished
        length = os.preadv(fd, [buffer[: min(_PIECE, size - offset)]], offset)
        if length <= 0:
            raise Integrity(f"data.tar ends at {offset}, not at {size}")
        hasher.update(buffer[:length])
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        offset += length
    return "sha256:" + hasher.hexdigest()


class Table(Protocol):
    """What the completer needs of OpenLayers."""

    def layers(self) -> list[OpenLayer]: ...
    def all_layers(self) -> list[Layer]: ...
    def condemn(self, key: LayerKey, reason: str) -> None: ...
    def completed(self, layer: OpenLayer, diff_id: str, tar_size: int, stamp: Stamp) -> None: ...
    def settle(self, key: LayerKey) -> None: ...
    def tick(self) -> None: ...


class Completer:
    """The thread that hashes full layers, one after the other, and gives the table its ticks. A context manager."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._queue: queue.SimpleQueue[tuple[LayerKey, str] | None] = queue.SimpleQueue()
        self._tries: dict[LayerKey, int] = {}
        self._ending = False
        self._threads = [
            threading.Thread(target=self._run, name="complete", daemon=True),
            threading.Thread(target=self._tick, name="tick", daemon=True),
        ]
        self._stop = threading.Event()

    def __enter__(self) -> Completer:
        for layer in self._table.layers():
            if layer.full:
                self.submit(layer.key)
        for whole in self._table.all_layers():
            if whole.record.boot:
                self.submit(whole.key)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        self._queue.put(None)
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def submit(self, key: LayerKey) -> None:
        """Every span of this layer is here. Never blocks."""
        self._queue.put((key, ""))

    def condemn(self, key: LayerKey, reason: str) -> None:
        """The layer's ztoc lies about this. Never blocks."""
        self._queue.put((key, reason))

    def _run(self) -> None:
        while (job := self._queue.get()) is not None and not self._ending:
            key, lie = job
            try:
                if lie:
                    self._table.condemn(key, lie)
                else:
                    self._complete(key)
            except Unfinished:
                self._later(key)
            except (SociError, OSError) as error:
                self._tries.pop(key, None)
                _log.error(
                    "a full layer cannot be completed: it stays as it is until the daemon starts again",
                    extra={"layer": str(key), "error": str(error)},
                )
            except Exception:  # a bug here must not end the thread that serves all other layers
                self._tries.pop(key, None)
                _log.exception("completing a layer failed", extra={"layer": str(key)})

    def _later(self, key: LayerKey) -> None:
        tries = self._tries.get(key, 0) + 1
        if self._ending or tries > _TRIES:
            self._tries.pop(key, None)
            return
        self._tries[key] = tries
        self._stop.wait(TICK_SECONDS)
        self._queue.put((key, ""))

    def _complete(self, key: LayerKey) -> None:
        layer = next((layer for layer in self._table.layers() if layer.key == key), None)
        if layer is None:
            self._tries.pop(key, None)  # dropped, or complete already
            self._table.settle(key)
            return
        if layer.reader.flying:
            raise Unfinished
        layer.files.make_durable()
        if layer.full:  # else the disk lost writes; the next last span tells again
            try:
                # A descriptor of our own: the layer may be dropped meanwhile.
                fd = os.open(layer.directory / "data.tar", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            try:
                self._hash(layer, fd)
            finally:
                os.close(fd)
        self._tries.pop(key, None)

    def _hash(self, layer: OpenLayer, fd: int) -> None:
        files = layer.files
        os.fsync(fd)  # the times, too: they tell after a power loss that nobody else wrote
        epoch, stamp = files.epoch, stamp_of(os.fstat(fd))
        diff_id = hash_tar(fd, files.tar_size, lambda: self._ending)
        if files.epoch != epoch or layer.reader.flying or stamp_of(os.fstat(fd)) != stamp:
            raise Unfinished
        self._table.completed(layer, diff_id, files.tar_size, stamp)

    def _tick(self) -> None:
        while not self._stop.wait(TICK_SECONDS):
            try:
                self._table.tick()
            except (SociError, OSError) as error:
                _log.warning("cannot tidy up lazy layers", extra={"error": str(error)})
            except Exception:
                _log.exception("tidying up lazy layers failed")
