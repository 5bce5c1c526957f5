"""All lazy layers of the daemon: opened once, mounted once per tree, counted, dropped when nobody refers to them.

    prepare    (layer, ztoc) open -> meta built for these lower layers -> m/<n> mounted -> one reference more on n
    release    one reference less; at none: m/<n> unmounted; with the last mount the layer leaves FUSE RELEASE behind it
    restore    at start: every layer directory opened and its node served; then mounts adopted or made again

Steps of one layer take turns (Turns); the tables are guarded by a lock that is never held over I/O.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from soci_snapshotter.errors import Remote, SociError
from soci_snapshotter.formats.digest import parse
from soci_snapshotter.layers.meta import MetaRequest, MetaResult, meta_path
from soci_snapshotter.layers.openlayer import LayerKey, OpenLayer, Surroundings
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.layers.workers import MetaWorkers
from soci_snapshotter.serve.flatfiles import FIRST_NODE, FlatFile
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.layerfiles import (
    LayerRecord,
    layer_directory,
    read_record,
    scan,
    sync_directory,
    write_record,
)

_log = logging.getLogger(__name__)

_NODE_BITS = (
    62  # node ids are drawn at random and never used twice: the kernel remembers an inode by its number
)


class FlatServer(Protocol):
    """Where flat files are served (serve.flatfiles.FuseServer)."""

    def add(self, node_id: int, file: FlatFile, *, opens: int = 0) -> None: ...
    def remove(self, node_id: int) -> None: ...
    def path_of(self, node_id: int) -> bytes: ...


class Mounter(Protocol):
    """Who mounts EROFS (serve.erofs_mounts)."""

    def mount(self, meta: Path, device: bytes, target: Path) -> None: ...
    def unmount(self, target: Path) -> None: ...
    def mounted(self) -> set[Path]: ...


@dataclass(frozen=True, slots=True)
class Mounted:
    """One m/<n>."""

    number: int
    key: LayerKey
    entries: int


class OpenLayers:
    """The table. Thread safe; a context manager that closes the files and leaves the mounts."""

    def __init__(
        self,
        root: Path,
        *,
        content: ContentStore,
        workers: MetaWorkers,
        server: FlatServer,
        mounter: Mounter,
        around: Surroundings,
    ) -> None:
        self._root = root
        self._content = content
        self._workers = workers
        self._server = server
        self._mounter = mounter
        self._around = around
        self._turns = Turns()
        self._lock = threading.Lock()
        self._layers: dict[LayerKey, OpenLayer] = {}
        self._by_node: dict[int, LayerKey] = {}
        self._mounts: dict[int, LayerKey] = {}  # n -> whose; present while m/<n> is mounted and served
        self._references: Counter[int] = Counter()
        self._last_number = 0
        (root / "layers").mkdir(mode=0o700, exist_ok=True)
        (root / "m").mkdir(mode=0o700, exist_ok=True)

    def __enter__(self) -> OpenLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers():
            layer.close()

    def layers(self) -> list[OpenLayer]:
        """Those open now."""
        with self._lock:
            return list(self._layers.values())

    def path(self, number: int) -> Path:
        """Where mount `number` is."""
        return self._root / "m" / str(number)

    def lowerdir(self, number: int) -> Path:
        """The path to hand out for mount `number`. Raises Remote when it could not be brought up."""
        with self._lock:
            if number in self._mounts:
                return self.path(number)
        raise Remote(f"lazy mount {number} is not available; the log of the daemon's start says why")

    def layer_of(self, number: int) -> OpenLayer | None:
        """The layer that mount `number` shows."""
        with self._lock:
            key = self._mounts.get(number)
            return None if key is None else self._layers.get(key)

    def prepare(
        self, key: LayerKey, reference: str, lowers: Sequence[Path], layer_size: int | None = None
    ) -> Mounted:
        """Have the layer mounted above `lowers` (topmost first) and take one reference on the mount.

        `layer_size`: bytes of the blob as its descriptor says, if known; the ztoc must agree.

        The ztoc is in the content store. Raises Integrity, Unsupported or OSError; then nothing is left behind.
        """
        with self._turns.turn(key):
            with self._lock:
                known = self._layers.get(key)
            directory = layer_directory(self._root, key.layer, key.ztoc)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            layer = known
            try:
                meta = self._build_meta(key, directory, lowers, layer_size)
                if layer is None:
                    layer = self._open_new(key, directory, reference, meta)
                layer.save(layer.record.with_source(reference))
                number = self._mount(layer, meta.meta_hash)
            except BaseException:
                if known is None:
                    self._drop(key, layer, directory)
                raise
            with self._lock:
                self._references[number] += 1
            return Mounted(number, key, meta.entries)

    def release(self, number: int) -> None:
        """Take back one reference. At none the mount goes, and with the last mount, after FUSE RELEASE, the layer."""
        layer = self.layer_of(number)
        if layer is None:
            return
        with self._turns.turn(layer.key):
            with self._lock:
                self._references[number] -= 1
                if self._references[number] > 0:
                    return
                del self._references[number]
                self._mounts.pop(number, None)
            self._unmount(layer, number)

    def released(self, node_id: int) -> None:
        """FUSE closed the last handle on a node: its layer goes unless it is mounted again. Does I/O: not on a
        FUSE thread."""
        with self._lock:
            key = self._by_node.get(node_id)
        if key is None:
            return
        with self._turns.turn(key):
            with self._lock:
                layer = self._layers.get(key)
            if layer is not None and not layer.record.mounts:
                self._drop(key, layer, layer.directory)

    def restore_files(self, *, fresh: bool) -> None:
        """Open every layer on disk and serve its node: before the FUSE server starts, for requests in flight."""
        for directory in scan(self._root):
            try:
                record = read_record(directory)
                # Each mount opened the node once, before this process: without that count one of two mounts that
                # goes would look like the last. Nothing is open on a fresh connection.
                layer = self._open(directory, record, opens=0 if fresh else len(record.mounts))
            except (SociError, OSError) as error:
                _log.error(
                    "lazy layer cannot be restored: its snapshots are unavailable, the others are not affected",
                    extra={"directory": str(directory), "error": str(error)},
                )
            else:
                with self._lock:
                    self._last_number = max((self._last_number, *record.mounts.values()))
                _log.debug("layer restored", extra={"layer": str(layer.key)})

    def restore_mounts(self, references: Iterable[int], *, fresh: bool) -> None:
        """Adopt what is mounted, mount what is not, drop what no row refers to.

        `references`: the mount number of each lazy row. `fresh`: the FUSE connection is new, so that mounts made over
        an older one answer nothing any more; containers that still run on those are lost, new ones get new mounts.
        """
        counts = Counter(references)
        mounted = self._mounter.mounted()
        for layer in self.layers():
            for meta_hash, number in list(layer.record.mounts.items()):
                try:
                    self._restore_mount(layer, meta_hash, number, counts[number], mounted, fresh)
                except (SociError, OSError) as error:
                    _log.error(
                        "lazy mount cannot be restored",
                        extra={"layer": str(layer.key), "mount": number, "error": str(error)},
                    )
            if fresh and not layer.record.mounts:
                self._drop(layer.key, layer, layer.directory)
        for path in mounted:  # an interrupted Prepare or Remove left it, and no record names it
            if path.name.isdigit() and int(path.name) not in self._mounts:
                self._unmount_quietly(path)

    def unmount_all(self) -> None:
        """Take down every mount (SIGINT); records stay, the next start mounts them again."""
        with self._lock:
            numbers = sorted(self._mounts)
        for number in numbers:
            self._unmount_quietly(self.path(number))

    # -- steps, in the layer's turn ------------------------------------------------------------------------------

    def _build_meta(
        self, key: LayerKey, directory: Path, lowers: Sequence[Path], layer_size: int | None
    ) -> MetaResult:
        return self._workers.build(
            MetaRequest(
                ztoc_path=str(self._content.path(key.ztoc)),
                ztoc_digest=str(key.ztoc),
                layer_digest=str(key.layer),
                directory=str(directory),
                layer_size=layer_size,
                lowers=tuple(os.fsencode(lower) for lower in lowers),
            )
        )

    def _open_new(self, key: LayerKey, directory: Path, reference: str, meta: MetaResult) -> OpenLayer:
        record = LayerRecord(
            layer_digest=str(key.layer),
            ztoc_digest=str(key.ztoc),
            node_id=FIRST_NODE + secrets.randbits(_NODE_BITS),
            data_size=meta.data_size,
            sources=(reference,),
            mounts={},
        )
        write_record(directory, record)
        sync_directory(directory.parent)
        return self._open(directory, record)

    def _open(self, directory: Path, record: LayerRecord, *, opens: int = 0) -> OpenLayer:
        layer = OpenLayer(directory, record, self._content.path(parse(record.ztoc_digest)), self._around)
        self._server.add(record.node_id, layer.reader, opens=opens)
        with self._lock:
            self._layers[layer.key] = layer
            self._by_node[record.node_id] = layer.key
        return layer

    def _mount(self, layer: OpenLayer, meta_hash: str) -> int:
        number = layer.record.mounts.get(meta_hash)
        with self._lock:
            if number is not None and number in self._mounts:
                return number
            if number is None:
                self._last_number += 1
                number = self._last_number
        layer.save(layer.record.with_mount(meta_hash, number))
        try:
            self._mount_at(layer, meta_hash, number)
        except BaseException:
            layer.save(layer.record.without_mount(number))
            raise
        return number

    def _mount_at(self, layer: OpenLayer, meta_hash: str, number: int) -> None:
        target = self.path(number)
        target.mkdir(mode=0o700, exist_ok=True)
        try:
            device = self._server.path_of(layer.record.node_id)
            self._mounter.mount(meta_path(layer.directory, meta_hash), device, target)
        except BaseException:
            target.rmdir()
            raise
        with self._lock:
            self._mounts[number] = layer.key

    def _unmount(self, layer: OpenLayer, number: int) -> None:
        layer.save(layer.record.without_mount(number))
        self._unmount_quietly(self.path(number))

    def _unmount_quietly(self, path: Path) -> None:
        try:
            self._mounter.unmount(path)
            path.rmdir()
        except OSError as error:
            if error.errno != errno.ENOENT:
                _log.warning("cannot unmount a lazy layer", extra={"path": str(path), "error": str(error)})

    def _restore_mount(
        self, layer: OpenLayer, meta_hash: str, number: int, count: int, mounted: set[Path], fresh: bool
    ) -> None:
        path = self.path(number)
        if count == 0:
            self._unmount(layer, number)
            return
        if path in mounted and fresh:
            _log.warning(
                "a mount outlived its FUSE connection: containers that use it must be restarted",
                extra={"layer": str(layer.key), "mount": number},
            )
            self._unmount_quietly(path)
        if path in mounted and not fresh:
            with self._lock:
                self._mounts[number] = layer.key
        else:
            self._mount_at(layer, meta_hash, number)
        with self._lock:
            self._references[number] = count

    def _drop(self, key: LayerKey, layer: OpenLayer | None, directory: Path) -> None:
        """Forget and delete a layer without mounts, and its ztoc when no other layer uses it."""
        with self._lock:
            self._layers.pop(key, None)
            if layer is not None:
                self._by_node.pop(layer.record.node_id, None)
            shared = any(other.ztoc == key.ztoc for other in self._layers)
        if layer is not None:
            self._server.remove(layer.record.node_id)
            layer.delete()
        else:
            _remove_empty(directory)
        if not shared:
            self._content.delete(key.ztoc)


def _remove_empty(directory: Path) -> None:
    for name in os.listdir(directory):
        if name.startswith("meta-"):
            (directory / name).unlink()
    try:
        directory.rmdir()
        directory.parent.rmdir()
    except OSError:  # another Prepare of the same layer got further
        pass
