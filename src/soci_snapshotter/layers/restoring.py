"""The start of a daemon: what is on the disk, what is mounted and what the snapshots' rows say, brought together again.

    files      every layer directory read, its node served: before the first request of a kernel that waited
    mounts     what is mounted adopted, what is not mounted again, what nobody refers to dropped
    swept      what a Prepare or Remove that was killed left

One bad layer harms nobody else: its snapshots are unavailable, and say why. What may be in use is not touched, in
whatever state its record is.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from soci_snapshotter.errors import SociError
from soci_snapshotter.formats.digest import Digest, from_hex
from soci_snapshotter.layers.meta import meta_path
from soci_snapshotter.layers.openlayer import Layer, LayerKey, Surroundings
from soci_snapshotter.layers.proving import LOST, Prover, believed
from soci_snapshotter.layers.shelf import Shelf
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.layerfiles import read_record, remove_empty, scan

_log = logging.getLogger(__name__)

_DO = "remove its image and pull it again"
# What mount(2) says of a damaged image; with anything else the image may be good.
_DAMAGED = (errno.EINVAL, errno.EUCLEAN, errno.EIO)


class Restorer:
    """Restores one table of layers, once."""

    def __init__(
        self, root: Path, shelf: Shelf, prover: Prover, content: ContentStore, around: Surroundings
    ) -> None:
        self._root = root
        self._shelf = shelf
        self._prover = prover
        self._content = content
        self._around = around
        self._bad: dict[LayerKey, tuple[Path, str]] = {}
        self.refilled = 0
        """Complete layers whose bytes are not believed any more: lazy again."""
        self.expect_lost = False
        """Whether layers that cannot be restored are expected: they are reported as a warning, not as an error."""

    def files(self, *, fresh: bool) -> None:
        """Read every layer on disk and serve its node. `fresh`: nobody has a node open."""
        self._content.sweep()
        for directory in scan(self._root):
            key = LayerKey(from_hex(directory.parent.name), from_hex(directory.name))
            try:
                layer = Layer(directory, read_record(directory))
                _sweep_unfinished(directory)
                if layer.record.complete and not believed(layer, os.fsdecode(self._around.boot)):
                    self._disbelieve(layer)
            except (SociError, OSError) as error:
                # Whether anybody misses it is not known before the rows are.
                self._bad[key] = directory, str(error)
                continue
            try:
                self._serve(layer, fresh)
            except (SociError, OSError) as error:
                # Its record stands: it comes back when its ztoc does, at the latest with the next pull.
                self._report(f"layer {key.layer}: its bytes cannot be served", error, {"layer": str(key)})
            self._shelf.put(layer)
            _log.debug("layer restored", extra={"layer": str(key)})

    def mounts(self, rows: Iterable[tuple[int, str]], references: Counter[int], *, fresh: bool) -> None:
        """Adopt what is mounted, mount what is not, drop what no row refers to.

        `rows`: mount number and layer key of each lazy row; they are counted into `references`. `fresh`: the FUSE
        connection is new, so that mounts made over an older one answer nothing any more; containers that still run on
        those are lost, new ones get new mounts.
        """
        wanted: defaultdict[str, Counter[int]] = defaultdict(Counter)
        for number, text in rows:
            if number < 0:  # its layer is still to be mounted (store.snapshots)
                continue
            wanted[text][number] += 1
        mounted = self._shelf.points.mounted()
        # A number that a lost record gave may be known to a row, or be mounted: it must not be given again.
        numbers = [number for counts in wanted.values() for number in counts]
        self._shelf.points.seen(max([0, *mounted, *numbers]))
        for layer in self._shelf.all():
            counts = wanted.pop(str(layer.key), Counter())
            with self._shelf.turns.turn(layer.key):  # its node is served: a RELEASE may come
                self._restore_or_report(layer, counts, references, mounted, fresh)
        self._lose(wanted, references)
        self._unmount_strays(mounted)
        self._shelf.points.sweep()
        remove_empty(self._root)

    def released(self, number: int) -> None:
        """No row has the number of a lost layer any more: what is left of it goes with the last one."""
        key = self._shelf.forget_lost(number)
        if key is None:
            return
        with self._shelf.turns.turn(key):  # the next Prepare works in the same directory
            bad = self._bad.pop(key, None)
            if bad is not None and self._shelf.find(key) is None:
                _remove(bad[0])

    # -- one layer -----------------------------------------------------------------------------------------------

    def _serve(self, layer: Layer, fresh: bool) -> None:
        # Each mount opened the node once, before this process: without that count one of two mounts that
        # goes would look like the last. Nothing is open on a fresh connection.
        readers = layer.record.through_fuse()
        opens = 0 if fresh else len(readers)
        if layer.record.complete:
            if opens:
                self._shelf.serve_whole(layer, os.open(layer.data, os.O_RDONLY | os.O_CLOEXEC), opens)
        elif layer.record.lie:
            self._shelf.fail(layer)
        elif readers or not layer.record.mounts:
            self._shelf.serve(layer, opens)

    def _disbelieve(self, layer: Layer) -> None:
        if layer.record.by_span:
            layer.forget_bytes()
            self.refilled += 1
        else:
            self._prover.lost(layer)

    def _restore_or_report(
        self, layer: Layer, counts: Counter[int], references: Counter[int], mounted: set[int], fresh: bool
    ) -> None:
        if self._shelf.find(layer.key) is not layer:  # its last reader went a moment ago
            if counts:
                self._lost(layer.key, counts, references, "it went while the daemon started")
            return
        try:
            self._restore(layer, counts, references, mounted, fresh)
        except (SociError, OSError) as error:
            self._report(f"layer {layer.key.layer}: cannot be mounted", error, {"layer": str(layer.key)})
            for number, count in counts.items():
                references[number] = count
                if self._shelf.of_number(number) is None:
                    self._shelf.lose(number, layer.key, f"layer {layer.key.layer} is lost: {error}; {_DO}")

    def _restore(
        self, layer: Layer, counts: Counter[int], references: Counter[int], mounted: set[int], fresh: bool
    ) -> None:
        shelf = self._shelf
        record = layer.record
        if record.through_fuse() and layer.lazy is None and not (record.complete or record.lie):
            layer.save_if_possible(
                record.all_superseded()
            )  # not served: nobody is given these mounts until it is
            record = layer.record
        alive = mounted - (record.through_fuse() if fresh else set())
        for number in record.standing() & (mounted - alive):
            _log.warning(
                "a mount outlived its FUSE connection: containers that use it must be restarted",
                extra={"layer": str(layer.key), "mount": number},
            )
            shelf.points.unmount(number)
        shelf.adopt(layer, alive)
        for number in record.mounts.values():
            references[number] = counts[number]
            if not counts[number]:
                shelf.forget(layer, number)
        for number in counts.keys() - record.mounts.values():
            self._lost(
                layer.key, Counter({number: counts[number]}), references, "its record has no such mount"
            )
        if not layer.record.mounts:
            there = shelf.find(layer.key) is not None
            served = layer.lazy is not None or layer.whole is not None
            if there and (fresh or not served or not shelf.in_use(layer)):
                shelf.drop(layer.key, layer, layer.directory)
            return
        _sweep_images(layer)
        if layer.record.lie == LOST:
            self._prover.lost(layer)  # there is a book now
        if layer.record.complete:
            self._prover.judge(layer)
            shelf.show_local(layer)
        if layer.record.condemned:
            return
        for meta_hash, number in layer.record.mounts.items():
            shown = layer.record.path_number(meta_hash)
            if shown and shelf.shown(number) is None:
                self._show(layer, meta_hash, shown)

    def _show(self, layer: Layer, meta_hash: str, again: int) -> None:
        try:
            self._shelf.show(layer, meta_hash, again)
        except (SociError, OSError) as error:
            self._report(f"layer {layer.key.layer}: cannot be mounted", error, {"layer": str(layer.key)})
            if isinstance(error, OSError) and error.errno in _DAMAGED:  # the next Prepare builds it anew
                meta_path(layer.directory, meta_hash).unlink(missing_ok=True)

    # -- what is left over ---------------------------------------------------------------------------------------

    def _lose(self, wanted: dict[str, Counter[int]], references: Counter[int]) -> None:
        """Rows that stand for layers which are not on the shelf; directories that stand for no row."""
        for key, (directory, problem) in list(self._bad.items()):
            counts = wanted.pop(str(key), None)
            if counts:
                self._lost(key, counts, references, problem)
                continue
            del self._bad[key]
            if (directory / "layer.json").exists():
                _log.warning(
                    "a layer that no snapshot refers to is removed: its record cannot be read",
                    extra={"layer": str(key), "error": problem},
                )
            _remove(directory)
            if not self._around.keeps(key.ztoc) and all(o.key.ztoc != key.ztoc for o in self._shelf.all()):
                self._content.delete(key.ztoc)
        for text, counts in wanted.items():
            layer, _, ztoc = text.partition("+")
            self._lost(
                LayerKey(Digest(layer), Digest(ztoc)), counts, references, "its directory is not there"
            )

    def _lost(self, key: LayerKey, counts: Counter[int], references: Counter[int], problem: str) -> None:
        book = self._prover.book
        claims = [] if book is None else book.claims(tuple(counts))
        images = sorted({claim.image for claim in claims if claim.image})
        for number, count in counts.items():
            references[number] = count
            self._shelf.lose(number, key, f"layer {key.layer} is lost: {problem}; {_DO}")
        extra: dict[str, object] = {"layer": str(key), "images": images, "snapshots": counts.total()}
        self._report(f"layer {key.layer} is lost: {_DO}", problem, extra)

    def _unmount_strays(self, mounted: set[int]) -> None:
        """What an interrupted Prepare or Remove left, and no record names. What a snapshot was given stays."""
        shelf, book = self._shelf, self._prover.book
        known = {number for layer in shelf.all() for number in layer.record.standing()}
        strays = mounted - known
        handed = book.handed_out() if book is not None and strays else frozenset()
        for number in strays:
            if os.fsencode(shelf.points.path(number)) not in handed:
                shelf.points.unmount(number)

    def _report(self, message: str, error: object, extra: dict[str, object]) -> None:
        """One bad layer, by name. Where the configuration expects such layers it is no error."""
        level = logging.WARNING if self.expect_lost else logging.ERROR
        _log.log(level, message, extra={**extra, "error": str(error)})


def _sweep_unfinished(directory: Path) -> None:
    """Remove files that were being written when the daemon was killed; nobody writes yet."""
    for name in os.listdir(directory):
        if name.endswith(".tmp"):
            (directory / name).unlink(missing_ok=True)


def _sweep_images(layer: Layer) -> None:
    """Remove images that no row knows."""
    for name in os.listdir(layer.directory):
        known = name[len("meta-") : -len(".erofs")] in layer.record.mounts
        if name.startswith("meta-") and name.endswith(".erofs") and not known:
            (layer.directory / name).unlink(missing_ok=True)


def _remove(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        directory.parent.rmdir()
    except OSError:  # another ztoc of the same layer lives there
        pass
