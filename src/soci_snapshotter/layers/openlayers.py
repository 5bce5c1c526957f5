"""All layers of the daemon: opened once, mounted once per tree, counted, dropped when nobody refers to them.

    prepare    (layer, ztoc) open -> meta built for these lower layers -> m/<n> mounted -> one reference more on n
    release    one reference less; at none: its mount goes; with the last mount the layer, behind FUSE RELEASE
    completed  all bytes are here and hashed: claims are judged, local mounts are shown from now on
    tick       what was superseded goes when no snapshot has it; idle layers give up bytes for the quota
    restore    at start: every layer directory opened, what FUSE serves served; then mounts adopted or made again

The steps of one layer take turns; they are in layers.shelf.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.layers.donors import Donor, adopt, borrow
from soci_snapshotter.layers.eager import Filled
from soci_snapshotter.layers.meta import MetaRequest, MetaResult
from soci_snapshotter.layers.mountpoints import Mounter
from soci_snapshotter.layers.openlayer import Layer, LayerKey, OpenLayer, Surroundings
from soci_snapshotter.layers.proving import Book, Prover
from soci_snapshotter.layers.restoring import Restorer
from soci_snapshotter.layers.shelf import FlatServer, Shelf
from soci_snapshotter.layers.timing import measured
from soci_snapshotter.layers.workers import MetaWorkers
from soci_snapshotter.policy.counters import LayerCounters
from soci_snapshotter.policy.eviction import Idle, choose
from soci_snapshotter.policy.lazy import Declined
from soci_snapshotter.policy.proof import Claim
from soci_snapshotter.serve.flatfiles import FIRST_NODE
from soci_snapshotter.store.condemned import Condemned
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.layerfiles import (
    LayerRecord,
    Stamp,
    layer_directory,
    sync_directory,
)

_log = logging.getLogger(__name__)

_NODE_BITS = (
    62  # node ids are drawn at random and never used twice: the kernel remembers an inode by its number
)
EVICT_SECONDS = 5.0  # between two looks at what the layers take on disk
IDLE_SECONDS = 20.0  # a layer that was asked for since is about to be used


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
        quota: int = 0,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        """`quota`: bytes that the layers may take on disk before idle ones are emptied, 0 for no limit."""
        self._root = root
        self._content = content
        self._workers = workers
        self._around = around
        self._quota = quota
        self._idle_seconds = idle_seconds
        self._references: Counter[int] = Counter()  # changed in the layer's turn
        self._looked = time.monotonic()
        self.counts: Counter[str] = Counter()
        """layers_completed, layers_condemned, snapshots_condemned, layers_refilled, layers_evicted, layers_shared: since
        the start."""
        self.on_full: Callable[[LayerKey], None] = lambda key: None
        """Called when all spans of a layer are here; must be quick (layers.complete.Completer.submit)."""
        self.on_lie: Callable[[LayerKey, str], None] = self.condemn
        """Called with what a ztoc lies about; must be quick (layers.complete.Completer.condemn)."""
        self._prover = Prover(Condemned(root), self.counts)
        self._shelf = Shelf(
            root,
            content=content,
            server=server,
            mounter=mounter,
            around=around,
            on_full=self._full,
            on_lie=self._lies,
        )
        self._restorer = Restorer(root, self._shelf, self._prover, content, around)
        self._lost_lock = threading.Lock()
        (root / "layers").mkdir(mode=0o700, exist_ok=True)

    def __enter__(self) -> OpenLayers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._shelf.all():
            layer.close()

    def attach(self, book: Book) -> None:
        """Name who knows the snapshots: before restore_mounts."""
        self._prover.book = book

    def layers(self) -> list[OpenLayer]:
        """The lazy layers that are served now."""
        return [layer.lazy for layer in self._shelf.all() if layer.lazy is not None]

    def all_layers(self) -> list[Layer]:
        """Every layer, lazy and complete."""
        return self._shelf.all()

    def lowerdir(self, number: int) -> Path:
        """The path to hand out now for a row's number. Raises Remote when it cannot be brought up."""
        return self._shelf.lowerdir(number)

    def pinned(self, numbers: Sequence[int]) -> AbstractContextManager[dict[int, bytes]]:
        """The paths of rows' numbers, none of which is unmounted while the block lasts."""
        return self._shelf.pinned(numbers)

    def layer_of(self, number: int) -> Layer | None:
        """The layer that a row's number stands for."""
        return self._shelf.of_number(number)

    def made(self, layer: Digest) -> LayerKey | None:
        """The key under which this layer is here, filled as one stream and still whole."""
        for other in self._shelf.all():
            record = other.record
            if other.key.layer == layer and record.made and record.complete and not record.lie:
                return other.key if self._content.exists(other.key.ztoc) else None
        return None

    def prepare(
        self,
        key: LayerKey,
        reference: str,
        lowers: Sequence[bytes],
        layer_size: int | None,
        claim: Claim,
        filled: Filled | None = None,
    ) -> Mounted | Declined:
        """Have the layer mounted above `lowers` (topmost first) and take one reference on the mount.

        `layer_size`: bytes of the blob as its descriptor says, if known; the ztoc must agree. A layer that is known not
        to be what `claim` says is declined; bytes that are known to be what it says are taken from where they are.
        `filled`: the layer as it was just pulled whole, its ztoc made from these very bytes.

        The ztoc is in the content store. Raises Integrity, Unsupported or OSError; then nothing is left behind.
        """
        with self._shelf.turns.turn(key):
            known = self._shelf.find(key)
            self._counters(key).count("resolve_cache_miss" if known is None else "resolve_cache_hit").add()
            refusal = self._prover.refusal(key, None if known is None else known.record, claim)
            if refusal is not None:
                return Declined(refusal)
            directory = layer_directory(self._root, key.layer, key.ztoc)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            layer = known
            try:
                donor = None
                if known is None and filled is not None:
                    donor = adopt(filled, directory, os.fsdecode(self._around.boot))
                elif known is None:
                    donor = borrow(self._shelf.proven(claim), directory)
                with measured(self._counters(key).duration("init_metadata_store")):
                    meta = self._build_meta(key, directory, lowers, layer_size, donor)
                if donor is not None and donor.stamp.size < meta.data_size:
                    donor = None  # the last block is not whole there; the link is replaced
                    (directory / "data.tar").unlink()
                if layer is None:
                    layer = self._new(key, directory, reference, meta, donor)
                layer.save(layer.record.with_source(reference))
                number = self._shelf.number_for(layer, meta.meta_hash)
            except BaseException:
                if known is None:
                    self._shelf.drop(key, layer, directory)
                raise
            self._references[number] += 1
            return Mounted(number, key, meta.entries)

    def committed(self, number: int) -> None:
        """A row with this number was committed: had its layer been completed since, its claim is judged now."""
        layer = self._shelf.of_number(number)
        if layer is not None and layer.record.complete:
            with self._shelf.turns.turn(layer.key):
                self._prover.judge(layer)

    def release(self, number: int) -> None:
        """Take back one reference. At none its mount goes, and with the last one, after FUSE RELEASE, the layer."""
        layer = self._shelf.of_number(number)
        if layer is None:
            self._release_lost(number)
            return
        with self._shelf.turns.turn(layer.key):
            self._references[number] -= 1
            if self._references[number] <= 0:
                del self._references[number]
                self._shelf.forget(layer, number)

    def returned(self, paths: Iterable[bytes]) -> None:
        """No snapshot holds these paths any longer: what is superseded of them goes."""
        self._shelf.returned(paths)
        self._tidy()

    def released(self, node_id: int) -> None:
        """FUSE closed the last handle on a node: what was open for it closes, and a layer that is not mounted goes.

        Does I/O: not on a FUSE thread.
        """
        key = self._shelf.serving(node_id)
        if key is None:
            return
        with self._shelf.turns.turn(key):
            layer = self._shelf.find(key)
            if layer is None or layer.record.through_fuse():
                return
            if layer.whole is not None:
                self._shelf.stop_serving(layer)
                _log.info("layer left FUSE", extra={"layer": str(layer.key)})
            if not layer.record.mounts:
                self._shelf.drop(key, layer, layer.directory)
            elif not layer.record.standing():
                self._empty(layer)

    def completed(self, lazy: OpenLayer, diff_id: str, tar_size: int, stamp: Stamp) -> None:
        """`lazy` has all its bytes, on the disk, with this DiffID: serve it without FUSE from now on."""
        with self._shelf.turns.turn(lazy.key):
            layer = self._shelf.find(lazy.key)
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
            self._shelf.serve_whole(layer, lazy.hand_over())
            layer.remove_marks()
            self.counts["layers_completed"] += 1
            _log.info("layer complete", extra={"layer": str(layer.key), "diff_id": diff_id})
            self._prover.judge(layer)
            self._shelf.show_local(layer)

    def settle(self, key: LayerKey) -> None:
        """Have the bytes of a layer that was filled as one stream on the disk. Raises OSError; then it is lost."""
        layer = self._shelf.find(key)
        if layer is not None and layer.record.boot:
            self._prover.settle(layer, lambda: self._shelf.turns.turn(key))

    def condemn(self, key: LayerKey, reason: str) -> None:
        """The ztoc does not say what is in the layer: reads fail, its snapshots are not used, it is declined from now on.

        Does I/O: not on a FUSE thread.
        """
        with self._shelf.turns.turn(key):
            layer = self._shelf.find(key)
            if layer is not None and not layer.record.lie:
                self._shelf.fail(layer)
                self._prover.lie(layer, reason)

    def tick(self) -> None:
        """Unmount what was superseded a while ago and no snapshot holds; mind the quota. Called every second or so."""
        self._tidy()
        now = time.monotonic()
        if self._quota and now - self._looked >= EVICT_SECONDS:
            self._looked = now
            self.evict()

    def evict(self) -> None:
        """Empty idle layers when all take more than the quota: they are lazy again, and asleep till asked for."""
        book = self._prover.book
        layers = self._shelf.all()
        sizes = {layer.key: layer.allocated()[0] for layer in layers}
        used = sum(sizes.values())
        if book is None or used <= self._quota:
            return
        handed = book.handed_out()
        latest = time.monotonic() - self._idle_seconds
        idle = [
            Idle(layer.key, since, sizes[layer.key])
            for layer in layers
            if layer.record.by_span
            and (since := self._shelf.idle_since(layer, handed)) is not None
            and since <= latest
        ]
        for key in choose(idle, used=used, quota=self._quota):
            with self._shelf.turns.turn(key):
                layer = self._shelf.find(key)
                if layer is None or not layer.record.mounts:
                    continue
                waits = bool(layer.record.through_fuse())  # RELEASE empties it
                if self._shelf.sleep(layer, book.handed_out) and not waits:
                    self._empty(layer)

    def restore_files(self, *, fresh: bool) -> None:
        """Read every layer on disk and serve its node: before the FUSE server starts, for requests in flight."""
        self._restorer.files(fresh=fresh)
        self.counts["layers_refilled"] += self._restorer.refilled

    def restore_mounts(
        self, rows: Iterable[tuple[int, str]], *, fresh: bool, expect_lost: bool = False
    ) -> None:
        """Adopt what is mounted, mount what is not, drop what no row refers to.

        `rows`: mount number and layer key of each lazy row. `fresh`: the FUSE connection is new. `expect_lost`: layers
        that cannot be restored are a warning, not an error; the start goes on either way.
        """
        self._restorer.expect_lost = expect_lost
        self._restorer.mounts(rows, self._references, fresh=fresh)

    def unmount_all(self) -> None:
        """Take down every mount (SIGINT); records stay, the next start mounts them again."""
        for layer in self._shelf.all():
            for number in layer.record.standing():
                self._shelf.points.unmount(number)

    def _full(self, key: LayerKey) -> None:
        self.on_full(key)

    def _lies(self, key: LayerKey, reason: str) -> None:
        self.on_lie(key, reason)

    def _release_lost(self, number: int) -> None:
        with self._lost_lock:
            self._references[number] -= 1
            last = self._references[number] <= 0
            if last:
                del self._references[number]
        if last:
            self._restorer.released(number)

    # -- steps, in the layer's turn ------------------------------------------------------------------------------

    def _counters(self, key: LayerKey) -> LayerCounters:
        return self._around.counters.layer(str(key.layer))

    def _build_meta(
        self,
        key: LayerKey,
        directory: Path,
        lowers: Sequence[bytes],
        layer_size: int | None,
        donor: Donor | None,
    ) -> MetaResult:
        compare = donor is not None and not donor.made
        return self._workers.build(
            MetaRequest(
                ztoc_path=str(self._content.path(key.ztoc)),
                ztoc_digest=str(key.ztoc),
                layer_digest=str(key.layer),
                directory=str(directory),
                layer_size=layer_size,
                lowers=tuple(lowers),
                whole=str(directory / "data.tar") if compare else "",
                whole_size=donor.tar_size if compare and donor is not None else 0,
            )
        )

    def _new(
        self, key: LayerKey, directory: Path, reference: str, meta: MetaResult, donor: Donor | None
    ) -> Layer:
        record = LayerRecord(
            layer_digest=str(key.layer),
            ztoc_digest=str(key.ztoc),
            node_id=FIRST_NODE + secrets.randbits(_NODE_BITS),
            data_size=meta.data_size,
            sources=(reference,),
            mounts={},
        )
        if donor is not None:
            record = donor.give(record)
        sync_directory(directory.parent)
        layer = Layer(directory, record)  # written when it is mounted: without a record the directory goes
        if donor is None:
            self._shelf.serve(layer)
        elif not donor.made:
            self.counts["layers_shared"] += 1
            _log.info("layer shared: its bytes are here already", extra={"layer": str(layer.key)})
        self._shelf.put(layer)
        if record.boot:
            self._full(key)  # to be settled
        return layer

    def _empty(self, layer: Layer) -> None:
        """A layer that sleeps, and that nobody has open, gives up its bytes."""
        self._shelf.stop_serving(layer)
        layer.forget_bytes()
        self.counts["layers_evicted"] += 1
        _log.info("layer emptied: it was idle, and the disk is wanted", extra={"layer": str(layer.key)})

    def _tidy(self) -> None:
        due = self._shelf.due()
        if not due or self._prover.book is None:
            return
        handed = self._prover.book.handed_out()
        for number, key in due.items():
            if self._shelf.points.name(number) not in handed:
                with self._shelf.turns.turn(key):
                    self._shelf.unmount_superseded(key, number)
