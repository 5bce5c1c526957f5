"""All layers of the daemon: opened once, mounted once per tree, counted, dropped when nobody refers to them.

    prepare    (layer, ztoc) open -> meta built for these lower layers -> m/<n> mounted -> one reference more on n
    release    one reference less; at none: its mount goes; with the last mount the layer, behind FUSE RELEASE
    completed  all bytes are here and hashed: claims are judged, local mounts are shown from now on
    restore    at start: every layer directory opened, what FUSE serves served; then mounts adopted or made again

A row's number stays; which m/<n> it stands for changes: what was handed out before is superseded, and goes when no
snapshot holds it any more. Steps of one layer take turns (Turns); the tables are guarded by a lock that is never held
over I/O.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from soci_snapshotter.errors import Remote, SociError
from soci_snapshotter.formats.digest import parse
from soci_snapshotter.layers.complete import hash_tar
from soci_snapshotter.layers.meta import MetaRequest, MetaResult, meta_path
from soci_snapshotter.layers.mountpoints import Mounter, MountPoints
from soci_snapshotter.layers.openlayer import Layer, LayerKey, OpenLayer, Surroundings, WholeFile
from soci_snapshotter.layers.timing import measured
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.layers.workers import MetaWorkers
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.policy.lazy import Declined
from soci_snapshotter.policy.proof import Claim, judge
from soci_snapshotter.serve.flatfiles import FIRST_NODE, FlatFile
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.layerfiles import (
    LayerRecord,
    Stamp,
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
_LONG_AGO = float("-inf")
GRACE_SECONDS = (
    10.0  # a call that read a path just before it was superseded notes it as given well within this
)


class FlatServer(Protocol):
    """Where flat files are served (serve.flatfiles.FuseServer)."""

    def add(self, node_id: int, file: FlatFile, *, opens: int = 0) -> None: ...
    def remove(self, node_id: int) -> None: ...
    def path_of(self, node_id: int) -> bytes: ...


class Book(Protocol):
    """Who knows the snapshots (snapshotter.Snapshotter)."""

    def handed_out(self) -> frozenset[bytes]:
        """Every path that an active or view snapshot was given."""

    def claims(self, mount_ids: Sequence[int]) -> list[Claim]:
        """What the snapshots on these rows' numbers say of their layers; condemned ones are left out."""

    def condemn(self, reasons: dict[int, str]) -> None:
        """These snapshots (row id -> why) are not to be used any more."""


@dataclass(frozen=True, slots=True)
class Mounted:
    """What a row stands for."""

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
        self._points = MountPoints(root, mounter)
        self._around = around
        self._turns = Turns()
        self._lock = threading.Lock()
        self._book: Book | None = None
        self._layers: dict[LayerKey, Layer] = {}
        self._by_node: dict[int, LayerKey] = {}
        self._owners: dict[int, LayerKey] = {}  # a row's number -> whose
        self._shown: dict[int, int] = {}  # a row's number -> n of the m/<n> that is up and handed out now
        self._superseded: dict[int, tuple[LayerKey, float]] = {}  # n -> whose, since when; to be looked at
        self._held: dict[int, LayerKey] = {}  # n -> whose: superseded, and some snapshot has it
        self._pins: Counter[int] = Counter()  # n -> who reads attributes below it at this moment
        self._references: Counter[int] = Counter()
        self.counts: Counter[str] = Counter()
        """layers_completed, layers_condemned, snapshots_condemned, layers_refilled: since the start, for metrics."""
        self.on_full: Callable[[LayerKey], None] = lambda key: None
        """Called when all spans of a layer are here; must be quick (layers.complete.Completer.submit)."""
        (root / "layers").mkdir(mode=0o700, exist_ok=True)

    def __enter__(self) -> OpenLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            layers = list(self._layers.values())
        for layer in layers:
            layer.close()

    def attach(self, book: Book) -> None:
        """Name who knows the snapshots: before restore_mounts."""
        self._book = book

    def layers(self) -> list[OpenLayer]:
        """The lazy layers that are served now."""
        with self._lock:
            return [layer.lazy for layer in self._layers.values() if layer.lazy is not None]

    def all_layers(self) -> list[Layer]:
        """Every layer, lazy and complete."""
        with self._lock:
            return list(self._layers.values())

    def lowerdir(self, number: int) -> Path:
        """The path to hand out now for a row's number. Raises Remote when it cannot be brought up."""
        with self._lock:
            shown, key = self._shown.get(number), self._owners.get(number)
        if shown is None:
            if key is None:
                raise Remote(f"lazy mount {number} is not available; the log of the daemon's start says why")
            shown = self._wake(key, number)
        return self._points.path(shown)

    @contextmanager
    def pinned(self, numbers: Sequence[int]) -> Iterator[dict[int, Path]]:
        """The paths of rows' numbers, none of which is unmounted while the block lasts."""
        pins: dict[int, int] = {}
        try:
            for number in numbers:
                while number not in pins:
                    self.lowerdir(number)
                    with self._lock:
                        if (shown := self._shown.get(number)) is not None:
                            self._pins[shown] += 1
                            pins[number] = shown
            yield {number: self._points.path(shown) for number, shown in pins.items()}
        finally:
            with self._lock:
                self._pins.subtract(pins.values())
                for shown in pins.values():
                    if not self._pins[shown]:
                        del self._pins[shown]

    def layer_of(self, number: int) -> Layer | None:
        """The layer that a row's number stands for."""
        with self._lock:
            key = self._owners.get(number)
            return None if key is None else self._layers.get(key)

    def prepare(
        self, key: LayerKey, reference: str, lowers: Sequence[Path], layer_size: int | None, claim: Claim
    ) -> Mounted | Declined:
        """Have the layer mounted above `lowers` (topmost first) and take one reference on the mount.

        `layer_size`: bytes of the blob as its descriptor says, if known; the ztoc must agree. A layer whose DiffID is
        known and does not fit `claim` is declined.

        The ztoc is in the content store. Raises Integrity, Unsupported or OSError; then nothing is left behind.
        """
        with self._turns.turn(key):
            with self._lock:
                known = self._layers.get(key)
            self._counters(key).count("resolve_cache_miss" if known is None else "resolve_cache_hit").add()
            if known is not None and known.record.complete and not claim.fits(known.record.diff_id):
                return Declined(_misfit(known.record, claim))
            directory = layer_directory(self._root, key.layer, key.ztoc)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            layer = known
            try:
                with measured(self._counters(key).duration("init_metadata_store")):
                    meta = self._build_meta(key, directory, lowers, layer_size)
                if layer is None:
                    layer = self._new(key, directory, reference, meta)
                layer.save(layer.record.with_source(reference))
                number = self._number_for(layer, meta.meta_hash)
            except BaseException:
                if known is None:
                    self._drop(key, layer, directory)
                raise
            with self._lock:
                self._references[number] += 1
            return Mounted(number, key, meta.entries)

    def committed(self, number: int) -> None:
        """A row with this number was committed: had its layer been completed since, its claim is judged now."""
        layer = self.layer_of(number)
        if layer is not None and layer.record.complete:
            with self._turns.turn(layer.key):
                self._judge(layer)

    def release(self, number: int) -> None:
        """Take back one reference. At none its mount goes, and with the last one, after FUSE RELEASE, the layer."""
        layer = self.layer_of(number)
        if layer is None:
            return
        with self._turns.turn(layer.key):
            with self._lock:
                self._references[number] -= 1
                if self._references[number] > 0:
                    return
                del self._references[number]
            self._forget(layer, number)

    def returned(self, paths: Iterable[bytes]) -> None:
        """No snapshot holds these paths any longer: look at those that are superseded."""
        with self._lock:
            for path in paths:
                number = self._points.number_of(path)
                if number is not None and (key := self._held.pop(number, None)) is not None:
                    self._superseded[number] = key, _LONG_AGO
        self.tick()

    def released(self, node_id: int) -> None:
        """FUSE closed the last handle on a node: what was open for it closes, and a layer that is not mounted goes.

        Does I/O: not on a FUSE thread.
        """
        with self._lock:
            key = self._by_node.get(node_id)
        if key is None:
            return
        with self._turns.turn(key):
            with self._lock:
                layer = self._layers.get(key)
            if layer is None or layer.record.through_fuse():
                return
            if layer.whole is not None:
                self._stop_serving(layer)
                _log.info("layer left FUSE", extra={"layer": str(layer.key)})
            if not layer.record.mounts:
                self._drop(key, layer, layer.directory)

    def completed(self, lazy: OpenLayer, diff_id: str, tar_size: int, stamp: Stamp) -> None:
        """`lazy` has all its bytes, on the disk, with this DiffID: serve it without FUSE from now on."""
        with self._turns.turn(lazy.key):
            with self._lock:
                layer = self._layers.get(lazy.key)
            if layer is None or layer.lazy is not lazy or not lazy.full:
                return
            layer.save(
                msgspec.structs.replace(
                    layer.record,
                    diff_id=diff_id,
                    tar_size=tar_size,
                    stamp=stamp,
                    spans=len(lazy.spans),
                    compressed_size=lazy.compressed_size,
                )
            )
            reads = self._counters(lazy.key).reads
            layer.whole = WholeFile(lazy.hand_over(), layer.record.data_size, condemned=False, reads=reads)
            self._server.add(layer.record.node_id, layer.whole)
            with self._lock:
                layer.lazy = None
            layer.remove_marks()
            self.counts["layers_completed"] += 1
            _log.info("layer complete", extra={"layer": str(layer.key), "diff_id": diff_id})
            self._judge(layer)
            self._show_local(layer)

    def tick(self) -> None:
        """Unmount what was superseded a while ago and no snapshot holds. Called now and then."""
        limit = time.monotonic() - GRACE_SECONDS
        with self._lock:
            due = {
                number: key
                for number, (key, since) in self._superseded.items()
                if since < limit and number not in self._pins
            }
            for number, key in due.items():
                del self._superseded[number]
                self._held[number] = key  # first: a path that is returned from here on is looked at again
        if not due or self._book is None:
            return
        handed = self._book.handed_out()
        for number, key in due.items():
            if os.fsencode(self._points.path(number)) not in handed:
                with self._turns.turn(key):
                    self._unmount_superseded(key, number)

    def restore_files(self, *, fresh: bool) -> None:
        """Read every layer on disk and serve its node: before the FUSE server starts, for requests in flight."""
        for directory in scan(self._root):
            try:
                layer = Layer(directory, read_record(directory))
                self._points.seen(layer.record.last_number())
                if layer.record.complete and not self._believed(layer):
                    layer.forget_bytes()
                    self.counts["layers_refilled"] += 1
                # Each mount opened the node once, before this process: without that count one of two mounts that
                # goes would look like the last. Nothing is open on a fresh connection.
                readers = layer.record.through_fuse()
                opens = 0 if fresh else len(readers)
                if layer.record.complete:
                    if opens:
                        self._serve_whole(layer, opens)
                elif readers or not layer.record.mounts:
                    self._serve(layer, opens)
            except (SociError, OSError) as error:
                _log.error(
                    "layer cannot be restored: its snapshots are unavailable, the others are not affected",
                    extra={"directory": str(directory), "error": str(error)},
                )
            else:
                with self._lock:
                    self._layers[layer.key] = layer
                _log.debug("layer restored", extra={"layer": str(layer.key)})

    def restore_mounts(self, references: Iterable[int], *, fresh: bool) -> None:
        """Adopt what is mounted, mount what is not, drop what no row refers to.

        `references`: the mount number of each lazy row. `fresh`: the FUSE connection is new, so that mounts made over
        an older one answer nothing any more; containers that still run on those are lost, new ones get new mounts.
        """
        counts = Counter(references)
        mounted = self._points.mounted()
        for layer in self.all_layers():
            try:
                self._restore(layer, counts, mounted, fresh)
            except (SociError, OSError) as error:
                _log.error(
                    "the mounts of a layer cannot be restored",
                    extra={"layer": str(layer.key), "error": str(error)},
                )
        known = {number for layer in self.all_layers() for number in layer.record.standing()}
        for number in mounted - known:  # an interrupted Prepare or Remove left it, and no record names it
            self._points.unmount(number)

    def unmount_all(self) -> None:
        """Take down every mount (SIGINT); records stay, the next start mounts them again."""
        for layer in self.all_layers():
            for number in layer.record.standing():
                self._points.unmount(number)

    def _counters(self, key: LayerKey) -> LayerCounters:
        return self._around.counters.layer(str(key.layer))

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

    def _new(self, key: LayerKey, directory: Path, reference: str, meta: MetaResult) -> Layer:
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
        layer = Layer(directory, record)
        self._serve(layer, 0)
        with self._lock:
            self._layers[key] = layer
        return layer

    def _serve(self, layer: Layer, opens: int) -> None:
        """Open a lazy layer and serve its node."""
        record, key = layer.record, layer.key
        ztoc = self._content.path(parse(record.ztoc_digest))
        lazy = OpenLayer(layer.directory, record, ztoc, self._around, on_complete=lambda: self.on_full(key))
        self._server.add(record.node_id, lazy.reader, opens=opens)
        with self._lock:
            layer.lazy = lazy
            self._by_node[record.node_id] = key

    def _serve_whole(self, layer: Layer, opens: int) -> None:
        """Serve a complete layer's node, for mounts that were made while it was lazy."""
        record = layer.record
        fd = os.open(layer.data, os.O_RDONLY | os.O_CLOEXEC)
        reads = self._counters(layer.key).reads
        layer.whole = WholeFile(fd, record.data_size, condemned=record.condemned, reads=reads)
        self._server.add(record.node_id, layer.whole, opens=opens)
        with self._lock:
            self._by_node[record.node_id] = layer.key

    def _stop_serving(self, layer: Layer) -> None:
        """Nobody has the node open: close what serves it."""
        with self._lock:
            self._by_node.pop(layer.record.node_id, None)
        self._server.remove(layer.record.node_id)
        layer.close()

    def _number_for(self, layer: Layer, meta_hash: str) -> int:
        """The row's number for this tree of the layer, mounted."""
        number = layer.record.mounts.get(meta_hash)
        if number is None:
            return self._show(layer, meta_hash)
        with self._lock:
            shown = self._shown.get(number)
        if shown is None or (layer.record.complete and shown not in layer.record.local):
            self._show(layer, meta_hash)
        return number

    def _wake(self, key: LayerKey, number: int) -> int:
        """Mount what a row's number stands for, if it is not; n of the m/<n>. Raises Remote."""
        with self._turns.turn(key):
            with self._lock:
                layer, shown = self._layers.get(key), self._shown.get(number)
            if shown is not None:
                return shown
            for meta_hash, owner in [] if layer is None else layer.record.mounts.items():
                if owner == number and layer is not None:
                    try:
                        self._show(layer, meta_hash)
                    except OSError as error:
                        raise Remote(f"layer {key}: cannot be mounted: {error}") from None
                    with self._lock:
                        return self._shown[number]
        raise Remote(f"lazy mount {number} is gone")

    def _show(self, layer: Layer, meta_hash: str, again: int = 0) -> int:
        """Mount the tree afresh and hand that out from now on; the row's number. `again`: as this m/<n>, not a new one.

        The record follows the mount: a mount that no record names is taken down at the next start.
        """
        local = layer.record.complete
        if local:
            device = os.fsencode(layer.data)
        else:
            if layer.lazy is None:
                self._serve(layer, 0)
            device = self._server.path_of(layer.record.node_id)
        shown = again or self._points.next()
        with measured(self._counters(layer.key).duration("fuse_mount")):
            self._points.mount(shown, meta_path(layer.directory, meta_hash), device)
        try:
            number = layer.record.mounts.get(meta_hash, shown)
            with self._lock:
                old = self._shown.get(number)
            layer.save(layer.record.with_shown(meta_hash, number, shown, old or 0, local=local))
        except BaseException:
            self._points.unmount(shown)
            raise
        with self._lock:
            self._owners[number] = layer.key
            self._shown[number] = shown
            if old is not None:
                self._superseded[old] = layer.key, time.monotonic()
        return number

    def _show_local(self, layer: Layer) -> None:
        """Have a complete layer's rows stand for local mounts."""
        if layer.record.condemned:
            return
        for meta_hash in list(layer.record.mounts):
            if layer.record.path_number(meta_hash) in layer.record.local:
                continue
            try:
                self._show(layer, meta_hash)
            except (SociError, OSError) as error:
                _log.error(
                    "a complete layer cannot be mounted from its file: it stays in FUSE",
                    extra={"layer": str(layer.key), "error": str(error)},
                )

    def _judge(self, layer: Layer) -> None:
        """Hold a complete layer against what its snapshots say, and condemn what does not fit."""
        record = layer.record
        claims = [] if self._book is None else self._book.claims(tuple(record.mounts.values()))
        if self._book is None or not claims:
            return
        found = judge(record.diff_id, claims)
        if found.condemned:
            self._book.condemn({claim.snapshot: _misfit(record, claim) for claim in found.condemned})
        for claim in found.condemned:
            self.counts["snapshots_condemned"] += 1
            _log.error(
                "snapshot condemned: its layer is not what the image says; remove the image and pull it again",
                extra={
                    "image": claim.image,
                    "layer": record.layer_digest,
                    "ztoc": record.ztoc_digest,
                    "diff_id": record.diff_id,
                    "target": claim.target,
                },
            )
        if record.condemned != (not found.proven):
            layer.save(msgspec.structs.replace(record, condemned=not found.proven))
            self.counts["layers_condemned"] += not found.proven
        if layer.whole is not None:
            layer.whole.condemned = layer.record.condemned

    def _forget(self, layer: Layer, number: int) -> None:
        """No row has this number any more: its mount goes; with the last one all that is superseded, and the layer."""
        waits = bool(layer.record.through_fuse())  # for RELEASE
        with self._lock:
            shown = self._shown.pop(number, None)
            self._owners.pop(number, None)
        layer.save(layer.record.without_mount(number))
        if shown is not None:
            self._points.unmount(shown)
        if layer.record.mounts:
            return
        for old in layer.record.superseded:
            self._unmount_superseded(layer.key, old)
        if not waits:
            self._drop(layer.key, layer, layer.directory)

    def _unmount_superseded(self, key: LayerKey, number: int) -> None:
        with self._lock:
            layer = self._layers.get(key)
            self._held.pop(number, None)
            self._superseded.pop(number, None)
        if layer is not None and number in layer.record.superseded:
            layer.save(layer.record.without_superseded(number))
            self._points.unmount(number)

    def _believed(self, layer: Layer) -> bool:
        """Whether a complete layer's data.tar is what was hashed: untouched, or of the same DiffID still."""
        if layer.intact():
            return True
        record = layer.record
        try:
            fd = os.open(layer.data, os.O_RDONLY | os.O_CLOEXEC)
            try:
                before = os.fstat(fd)
                same = before.st_size >= record.data_size and hash_tar(fd, record.tar_size) == record.diff_id
            finally:
                os.close(fd)
        except (SociError, OSError):
            same = False
        if same:
            layer.save(msgspec.structs.replace(record, stamp=layer.stamp()))
            _log.warning("data.tar was touched, not changed", extra={"layer": str(layer.key)})
        else:
            _log.error(
                "data.tar of a complete layer was changed by somebody else: it is fetched again",
                extra={"layer": str(layer.key)},
            )
        return same

    def _restore(self, layer: Layer, counts: Counter[int], mounted: set[int], fresh: bool) -> None:
        record = layer.record
        alive = mounted - (record.through_fuse() if fresh else set())
        for number in record.standing() & (mounted - alive):
            _log.warning(
                "a mount outlived its FUSE connection: containers that use it must be restarted",
                extra={"layer": str(layer.key), "mount": number},
            )
            self._points.unmount(number)
        for number in record.superseded:
            if number in alive:
                with self._lock:
                    self._superseded[number] = layer.key, _LONG_AGO
            else:
                layer.save(layer.record.without_superseded(number))
        for meta_hash, number in record.mounts.items():
            shown = layer.record.path_number(meta_hash)
            with self._lock:
                self._owners[number] = layer.key
                self._references[number] = counts[number]
                if shown in alive:
                    self._shown[number] = shown
            if not counts[number]:
                self._forget(layer, number)
        if not layer.record.mounts:
            with self._lock:
                there = layer.key in self._layers
            if there and (fresh or (layer.lazy is None and layer.whole is None)):
                self._drop(layer.key, layer, layer.directory)
            return
        if layer.record.complete:
            self._judge(layer)
            self._show_local(layer)
            if layer.record.condemned:
                return
        for meta_hash, number in layer.record.mounts.items():
            with self._lock:
                up = number in self._shown
            shown = layer.record.path_number(meta_hash)
            if not up and shown:
                self._show(layer, meta_hash, shown)

    def _drop(self, key: LayerKey, layer: Layer | None, directory: Path) -> None:
        """Forget and delete a layer without mounts, and its ztoc when no other layer uses it."""
        with self._lock:
            self._layers.pop(key, None)
            shared = any(other.ztoc == key.ztoc for other in self._layers)
        if layer is not None:
            self._stop_serving(layer)
            layer.delete()
        else:
            _remove_empty(directory)
        if not shared:
            self._content.delete(key.ztoc)


def _misfit(record: LayerRecord, claim: Claim) -> str:
    return (
        f"layer {record.layer_digest} with ztoc {record.ztoc_digest} has the DiffID {record.diff_id}, which does not "
        f"make {claim.target} of image {claim.image or '(no name)'}"
    )


def _remove_empty(directory: Path) -> None:
    for name in os.listdir(directory):
        if name.startswith("meta-"):
            (directory / name).unlink()
    try:
        directory.rmdir()
        directory.parent.rmdir()
    except OSError:  # another Prepare of the same layer got further
        pass
