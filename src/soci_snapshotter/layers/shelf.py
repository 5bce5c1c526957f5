"""The tables of layers and their mounts, and the steps that one layer goes through.

A row's number stays; which m/<n> it stands for changes: what was handed out before is superseded, and goes when no
snapshot holds it any more. A layer that nobody uses may sleep: its rows stand for nothing until somebody asks.

Steps of one layer run in its turn (`turns`); the tables are guarded by a lock that is never held over I/O.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from soci_snapshotter.errors import Remote, SociError
from soci_snapshotter.formats.digest import parse
from soci_snapshotter.layers.meta import meta_path
from soci_snapshotter.layers.mountpoints import Mounter, MountPoints
from soci_snapshotter.layers.openlayer import Layer, LayerKey, OpenLayer, Surroundings, WholeFile
from soci_snapshotter.layers.timing import measured
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.policy.proof import Claim
from soci_snapshotter.serve.flatfiles import FlatFile
from soci_snapshotter.store.content import ContentStore

_log = logging.getLogger(__name__)

_LONG_AGO = float("-inf")
GRACE_SECONDS = 10.0
"""A call that read a path just before it was superseded has noted it as given well within this."""


class FlatServer(Protocol):
    """Where flat files are served (serve.flatfiles.FuseServer)."""

    def add(self, node_id: int, file: FlatFile, *, opens: int = 0) -> None: ...
    def remove(self, node_id: int) -> None: ...
    def path_of(self, node_id: int) -> bytes: ...
    def in_use(self, node_id: int) -> bool: ...


class Shelf:
    """Every layer of the daemon, what is open of it and where it is mounted."""

    def __init__(
        self,
        root: Path,
        *,
        content: ContentStore,
        server: FlatServer,
        mounter: Mounter,
        around: Surroundings,
        on_full: Callable[[LayerKey], None],
        on_lie: Callable[[LayerKey, str], None],
    ) -> None:
        self.turns = Turns()
        self.points = MountPoints(root, mounter)
        self._content = content
        self._server = server
        self._around = around
        self._on_full = on_full
        self._on_lie = on_lie
        self._lock = threading.Lock()
        self._layers: dict[LayerKey, Layer] = {}
        self._by_node: dict[int, LayerKey] = {}
        self._owners: dict[int, LayerKey] = {}  # a row's number -> whose
        self._shown: dict[int, int] = {}  # a row's number -> n of the m/<n> that is up and handed out now
        self._superseded: dict[int, tuple[LayerKey, float]] = {}  # n -> whose, since when; to be looked at
        self._held: dict[int, LayerKey] = {}  # n -> whose: superseded, and some snapshot has it
        self._lost: dict[
            int, tuple[LayerKey, str]
        ] = {}  # a row's number -> whose, and why nothing can be mounted
        self._pins: Counter[int] = Counter()  # n -> who reads attributes below it at this moment
        self._used: dict[LayerKey, float] = {}  # when somebody last asked for a path of it, time.monotonic()

    # -- looking up ----------------------------------------------------------------------------------------------

    def all(self) -> list[Layer]:
        """Every layer."""
        with self._lock:
            return list(self._layers.values())

    def find(self, key: LayerKey) -> Layer | None:
        """The layer with this key."""
        with self._lock:
            return self._layers.get(key)

    def serving(self, node_id: int) -> LayerKey | None:
        """Whose node this is."""
        with self._lock:
            return self._by_node.get(node_id)

    def of_number(self, number: int) -> Layer | None:
        """The layer that a row's number stands for."""
        with self._lock:
            key = self._owners.get(number)
            return None if key is None else self._layers.get(key)

    def shown(self, number: int) -> int | None:
        """n of the m/<n> that a row's number stands for now, None when nothing is up."""
        with self._lock:
            return self._shown.get(number)

    def proven(self, claim: Claim) -> list[Layer]:
        """Complete layers whose bytes are what `claim` says, whatever their key."""
        return [layer for layer in self.all() if layer.record.complete and claim.fits(layer.record.diff_id)]

    def lowerdir(self, number: int) -> Path:
        """The path to hand out now for a row's number. Raises Remote when it cannot be brought up."""
        return self.points.path(self._up(number))

    def _up(self, number: int) -> int:
        with self._lock:
            shown, key = self._shown.get(number), self._owners.get(number)
            lost = self._lost.get(number)
            if key is not None:
                self._used[key] = time.monotonic()
        if shown is None:
            if key is None:
                raise Remote(f"lazy mount {number} is gone" if lost is None else lost[1])
            shown = self._wake(key, number)
        return shown

    def lose(self, number: int, key: LayerKey, reason: str) -> None:
        """Nothing can be mounted for this row's number; `reason` names the layer and what to do."""
        with self._lock:
            self._lost[number] = key, reason

    def forget_lost(self, number: int) -> LayerKey | None:
        """No row has this number any more; whose it was, if it was the lost layer's last."""
        with self._lock:
            key, _ = self._lost.pop(number, (None, ""))
            return None if any(other == key for other, _ in self._lost.values()) else key

    @contextmanager
    def pinned(self, numbers: Sequence[int]) -> Iterator[dict[int, bytes]]:
        """The paths of rows' numbers, none of which is unmounted while the block lasts."""
        pins: dict[int, int] = {}
        try:
            with self._lock:  # once for all those that are up: an image has up to hundreds
                for number in set(numbers) & self._shown.keys():
                    pins[number] = self._shown[number]
                    self._pins[pins[number]] += 1
                    self._used[self._owners[number]] = time.monotonic()
            for number in numbers:
                while number not in pins:
                    self._up(number)
                    with self._lock:
                        if (shown := self._shown.get(number)) is not None:
                            self._pins[shown] += 1
                            pins[number] = shown
            yield {number: self.points.name(shown) for number, shown in pins.items()}
        finally:
            with self._lock:
                for shown in pins.values():
                    self._pins[shown] -= 1
                    if not self._pins[shown]:
                        del self._pins[shown]

    # -- opening and serving -------------------------------------------------------------------------------------

    def put(self, layer: Layer) -> None:
        """A layer that is on disk from now on."""
        self.points.seen(layer.record.last_number())
        with self._lock:
            self._layers[layer.key] = layer
            self._used[layer.key] = time.monotonic()

    def serve(self, layer: Layer, opens: int = 0) -> None:
        """Open a lazy layer and serve its node, on which `opens` handles are known."""
        record, key = layer.record, layer.key
        lazy = OpenLayer(
            layer.directory,
            record,
            self._content.path(parse(record.ztoc_digest)),
            self._around,
            on_complete=lambda: self._on_full(key),
            on_lie=lambda reason: self._on_lie(key, reason),
        )
        self._server.add(record.node_id, lazy.reader, opens=opens)
        with self._lock:
            layer.lazy = lazy
            self._by_node[record.node_id] = key

    def serve_whole(self, layer: Layer, fd: int, opens: int = 0) -> None:
        """Serve a complete layer's node from `fd` of data.tar, for mounts that were made while it was lazy."""
        record = layer.record
        reads = self._around.counters.layer(record.layer_digest).reads
        whole = WholeFile(fd, record.data_size, condemned=record.condemned, reads=reads)
        self._server.add(record.node_id, whole, opens=opens)
        with self._lock:
            layer.whole, layer.lazy = whole, None
            self._by_node[record.node_id] = layer.key

    def stop_serving(self, layer: Layer) -> None:
        """Nobody has the node open: close what serves it."""
        with self._lock:
            self._by_node.pop(layer.record.node_id, None)
        self._server.remove(layer.record.node_id)
        layer.close()

    def in_use(self, layer: Layer) -> bool:
        """Whether somebody has the node open, by what the kernel says."""
        return self._server.in_use(layer.record.node_id)

    def fail(self, layer: Layer) -> None:
        """A condemned layer: reads through FUSE fail from now on."""
        if layer.whole is not None:
            layer.whole.condemned = True
        else:
            if layer.lazy is not None:
                layer.lazy.reader.retire(lambda: None)  # what is parked is answered by its flights
            self._refuse(layer)

    def _refuse(self, layer: Layer) -> None:
        record = layer.record
        reads = self._around.counters.layer(record.layer_digest).reads
        self._server.add(record.node_id, WholeFile(-1, record.data_size, condemned=True, reads=reads))
        with self._lock:
            self._by_node[record.node_id] = layer.key

    # -- mounts --------------------------------------------------------------------------------------------------

    def number_for(self, layer: Layer, meta_hash: str) -> int:
        """The row's number for this tree of the layer, mounted."""
        number = layer.record.mounts.get(meta_hash)
        if number is None:
            return self.show(layer, meta_hash)
        shown = self.shown(number)
        if shown is None or (layer.record.complete and shown not in layer.record.local):
            self.show(layer, meta_hash)
        return number

    def show(self, layer: Layer, meta_hash: str, again: int = 0) -> int:
        """Mount the tree afresh and hand that out from now on; the row's number. `again`: as this m/<n>, not a new one.

        The record follows the mount: a mount that no record names is taken down at the next start.
        """
        local = layer.record.complete
        if local:
            device = os.fsencode(layer.data)
        else:
            if layer.lazy is None:
                self.serve(layer)
            device = self._server.path_of(layer.record.node_id)
        shown = again or self.points.next()
        with measured(self._around.counters.layer(layer.record.layer_digest).duration("fuse_mount")):
            self.points.mount(shown, meta_path(layer.directory, meta_hash), device)
        try:
            number = layer.record.mounts.get(meta_hash, shown)
            old = self.shown(number)
            layer.save(layer.record.with_shown(meta_hash, number, shown, old or 0, local=local))
        except BaseException:
            self.points.unmount(shown)
            raise
        with self._lock:
            self._owners[number] = layer.key
            self._shown[number] = shown
            self._used[layer.key] = time.monotonic()
            if old is not None:
                self._superseded[old] = layer.key, time.monotonic()
        return number

    def show_local(self, layer: Layer) -> None:
        """Have a complete layer's rows stand for local mounts."""
        if layer.record.condemned:
            return
        for meta_hash in list(layer.record.mounts):
            if layer.record.path_number(meta_hash) in layer.record.local:
                continue
            try:
                self.show(layer, meta_hash)
            except (SociError, OSError) as error:
                _log.error(
                    "a complete layer cannot be mounted from its file: it stays in FUSE",
                    extra={"layer": str(layer.key), "error": str(error)},
                )

    def _wake(self, key: LayerKey, number: int) -> int:
        """Mount what a row's number stands for, if it is not; n of the m/<n>. Raises Remote."""
        with self.turns.turn(key):
            layer, shown = self.find(key), self.shown(number)
            if shown is not None:
                return shown
            for meta_hash, owner in [] if layer is None else list(layer.record.mounts.items()):
                if owner == number and layer is not None:
                    try:
                        self.show(layer, meta_hash)
                    except OSError as error:
                        raise Remote(
                            f"layer {key}: cannot be mounted: {error}; remove its image and pull it again"
                        ) from None
                    shown = self.shown(number)
        if shown is None:
            raise Remote(f"lazy mount {number} is gone")
        return shown

    def adopt(self, layer: Layer, alive: set[int]) -> None:
        """At start: of the layer's mounts these are up."""
        record = layer.record
        for number in record.superseded:
            if number in alive:
                with self._lock:
                    self._superseded[number] = layer.key, _LONG_AGO
            else:
                layer.save_if_possible(layer.record.without_superseded(number))
        with self._lock:
            for meta_hash, number in record.mounts.items():
                self._owners[number] = layer.key
                if record.path_number(meta_hash) in alive:
                    self._shown[number] = record.path_number(meta_hash)

    # -- letting go ----------------------------------------------------------------------------------------------

    def forget(self, layer: Layer, number: int) -> None:
        """No row has this number any more: its mount goes; with the last one all that is superseded, and the layer."""
        waits = bool(layer.record.through_fuse())  # for RELEASE
        with self._lock:
            shown = self._shown.pop(number, None)
            self._owners.pop(number, None)
        layer.save_if_possible(layer.record.without_mount(number))
        if shown is not None:
            self.points.unmount(shown)
        if layer.record.mounts:
            return
        for old in layer.record.superseded:
            self.unmount_superseded(layer.key, old)
        if not waits:
            self.drop(layer.key, layer, layer.directory)

    def returned(self, paths: Iterable[bytes]) -> None:
        """No snapshot holds these paths any longer: those that are superseded are to be looked at."""
        with self._lock:
            for path in paths:
                number = self.points.number_of(path)
                if number is not None and (key := self._held.pop(number, None)) is not None:
                    self._superseded[number] = key, _LONG_AGO

    def due(self) -> dict[int, LayerKey]:
        """What was superseded a while ago. Whoever asks looks whether some snapshot holds it, and unmounts the rest."""
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
        return due

    def unmount_superseded(self, key: LayerKey, number: int) -> None:
        """No snapshot holds m/<number>."""
        layer = self.find(key)
        with self._lock:
            self._held.pop(number, None)
            self._superseded.pop(number, None)
        if layer is not None and number in layer.record.superseded:
            layer.save_if_possible(layer.record.without_superseded(number))
            self.points.unmount(number)

    def idle_since(self, layer: Layer, handed: frozenset[bytes]) -> float | None:
        """When the layer was last asked for, if it is mounted or has bytes and no snapshot was given a mount of it."""
        standing = layer.record.standing()
        with self._lock:
            if any(number in self._pins for number in standing):
                return None
            used_at = self._used.get(layer.key, 0.0)
        if layer.record.superseded or any(self.points.name(n) in handed for n in standing):
            return None
        return used_at

    def sleep(self, layer: Layer, handed_out: Callable[[], frozenset[bytes]]) -> bool:
        """Unmount an idle layer; False when somebody was faster.

        A call that read a path before it was taken out of the table notes it as given and looks again: then it is seen
        here, or it waits for the layer's turn and gets another path.
        """
        numbers = set(layer.record.mounts.values())
        with self._lock:
            taken = {number: self._shown.pop(number) for number in numbers if number in self._shown}
        if self.idle_since(layer, handed_out()) is None:
            with self._lock:
                self._shown.update(taken)
            return False
        standing = layer.record.standing()
        layer.save(layer.record.asleep())
        for number in standing:
            self.points.unmount(number)
        return True

    def drop(self, key: LayerKey, layer: Layer | None, directory: Path) -> None:
        """Forget and delete a layer without mounts, and its ztoc when no other layer uses it."""
        with self._lock:
            self._layers.pop(key, None)
            self._used.pop(key, None)
            shared = any(other.ztoc == key.ztoc for other in self._layers)
        if layer is not None:
            self.stop_serving(layer)
            layer.delete()
        else:
            _remove_empty(directory)
        if not shared and not self._around.keeps(key.ztoc):
            self._content.delete(key.ztoc)


def _remove_empty(directory: Path) -> None:
    for name in os.listdir(directory):
        if name.startswith("meta-") or name == "data.tar":
            (directory / name).unlink()
    try:
        directory.rmdir()
        directory.parent.rmdir()
    except OSError:  # another Prepare of the same layer got further
        pass
