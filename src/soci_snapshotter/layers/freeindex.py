"""What eager filling learned on the way, put where it is of use: ztocs into the content store, an index per image.

The next pull of a layer whose ztoc is here is lazy; `soci --content-store soci push` publishes the index, which is
the one that `soci create` makes. Whatever goes wrong here is logged and costs that convenience, never a pull.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from soci_snapshotter.errors import SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.sociindex import ZtocDescriptor
from soci_snapshotter.layers.eager import Filled, Pull
from soci_snapshotter.layers.images import Images
from soci_snapshotter.store.artifacts import Artifacts, IndexRecord, now_ns
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.freeztocs import FreeZtoc, FreeZtocs
from soci_snapshotter.store.locks import content_lock

_log = logging.getLogger(__name__)

MIN_LAYER_SIZE = 10 << 20
"""Bytes: smaller layers are left out, as `soci create` does, unless all are smaller."""
_PIECE = 1 << 20
_STORE = "soci"


class FreeIndexes:
    """Keeps ztocs and makes indexes. Thread safe."""

    def __init__(
        self, root: Path, content: ContentStore, images: Images, *, span_size: int, build_tool: str
    ) -> None:
        """`root`: the daemon's. `span_size` (bytes) and `build_tool` are those of the ztocs."""
        self.ztocs = FreeZtocs(root, content)
        self._root = root
        self._content = content
        self._images = images
        self._span_size = span_size
        self._build_tool = build_tool
        self._own = (
            root / "made-indexes"
        )  # an empty file for each index that was made here, by its digest's digits
        self._own.mkdir(mode=0o700, exist_ok=True)

    def keeps(self, ztoc: Digest) -> bool:
        """Whether a ztoc is remembered, or named by an index of this store, `soci create`'s too, that may be pushed yet.

        What cannot be read is no reason to delete anything.
        """
        if self.ztocs.keeps(ztoc):
            return True
        path = self._root / "content" / "artifacts.sqlite"
        if not path.exists():
            return False
        try:
            with Artifacts(path) as artifacts:
                return any(ztoc in named for _, named in self._listed(artifacts))
        except (SociError, OSError) as error:
            _log.warning("a ztoc is kept", extra={"ztoc": str(ztoc), "error": str(error)})
            return True

    def _listed(self, artifacts: Artifacts) -> Iterator[tuple[IndexRecord, set[Digest]]]:
        """The indexes of this store that are there, and the ztocs that each names."""
        for record in artifacts.all():
            if record.store == _STORE and self._content.exists(record.digest):
                index = sociindex.decode(self._content.get(record.digest, oci.MANIFEST_LIMIT))
                yield record, {descriptor.digest for descriptor in index.ztocs.values()}

    def keep(self, filled: Filled) -> None:
        """Put the ztoc into the content store, where a mount needs it, and remember it. Raises OSError, Integrity."""
        unpacked = filled.unpacked
        digest = digests.parse(unpacked.ztoc_digest)
        if not self._content.exists(digest):
            with content_lock(self._content.root, exclusive=False):
                self._content.put_stream(_pieces(filled.directory / "ztoc"), digest, unpacked.ztoc_size)
        entry = FreeZtoc(unpacked.ztoc_digest, unpacked.ztoc_size) if unpacked.by_span else FreeZtoc("", 0)
        try:
            self._prune(self.ztocs.add(filled.layer.digest, entry))
        except (SociError, OSError) as error:
            _log.warning("cannot remember a layer's ztoc", extra={"error": str(error)})

    def offer(self, pull: Pull) -> None:
        """Make the image's index, when all its layers are known."""
        try:
            self._offer(pull)
        except (SociError, OSError) as error:
            _log.warning(
                "no SOCI index of an image that was pulled whole",
                extra={"image": str(pull.reference), "error": str(error)},
            )

    def _offer(self, pull: Pull) -> None:
        described, manifest = self._images.manifest(pull.reference, pull.manifest)
        known: list[tuple[Descriptor, FreeZtoc]] = []
        for layer in manifest.layers:
            entry = self.ztocs.find(layer.digest)
            if entry is None:
                return
            if entry.ztoc:
                known.append((layer, entry))
        large = [(layer, entry) for layer, entry in known if layer.size >= MIN_LAYER_SIZE]
        chosen = [
            ZtocDescriptor(
                digests.parse(entry.ztoc), entry.size, layer.digest, layer.media_type, self._span_size
            )
            for layer, entry in large or known
        ]
        if not chosen:
            return
        data = sociindex.build(described, chosen, self._build_tool)
        digest = digests.sha256(data)
        if self._content.exists(digest):
            return
        config = self._images.config(pull.reference, pull.manifest)
        platform = oci.Platform(architecture=config.architecture, os=config.os)
        with content_lock(self._content.root, exclusive=False):
            self._content.put(oci.EMPTY_JSON)
            (self._own / digest.hex).touch()
            self._content.put(data)
            with Artifacts(self._root / "content" / "artifacts.sqlite") as artifacts:
                artifacts.add(
                    IndexRecord(
                        digest=digest,
                        store=_STORE,
                        namespace=pull.namespace,
                        image_digest=pull.manifest,
                        image_name=str(pull.reference),
                        platform=str(platform.normalized()),
                        media_type=sociindex.INDEX_V1,
                        size=len(data),
                        created_ns=now_ns(),
                    ),
                    only=False,
                )
        _log.info("made a SOCI index of an image that was pulled whole", extra={"index": str(digest)})

    def _prune(self, ztocs: list[Digest]) -> None:
        """These are not remembered any more: they go, and indexes of ours that name them, unless others do."""
        if not ztocs:
            return
        with (
            content_lock(self._content.root, exclusive=True),
            Artifacts(self._root / "content" / "artifacts.sqlite") as artifacts,
        ):
            gone = set(ztocs)
            needed: set[Digest] = set()
            for record, named in self._listed(artifacts):
                mark = self._own / record.digest.hex
                if named & gone and mark.exists():
                    artifacts.remove(record.digest, record.store, record.namespace)
                    self._content.delete(record.digest)
                    mark.unlink()
                else:
                    needed |= named
            for ztoc in gone - needed:
                # <root>/layers/<layer hex>/<ztoc hex>/ (store.layerfiles)
                if next((self._root / "layers").glob(f"*/{ztoc.hex}"), None) is None:
                    self._content.delete(ztoc)


def _pieces(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece
