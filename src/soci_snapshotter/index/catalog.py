"""What SOCI indexes, ztocs and prefetch artifacts there are.

Indexes are recorded (store.artifacts); everything else is what their manifests name, read when it is asked for.
A recorded index whose content is gone is not listed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import Integrity, Invalid, NotFound
from ..formats import oci, sociindex
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.sociindex import INDEX_V1, INDEX_V2, SPAN_SIZE, SociIndex
from ..store.artifacts import Artifacts, IndexRecord
from .holdings import Blobs

_log = logging.getLogger(__name__)

ZTOC_LIMIT = 512 << 20
"""Bytes, as for the daemon (layers.lazy): 16,000 checkpoints of 32 KiB, a 64 GiB layer at the default span size."""

_VERSIONS = {INDEX_V1: "v1", INDEX_V2: "v2"}


@dataclass(frozen=True, slots=True)
class ListedIndex:
    """An index that is there, in each of `stores`; `record` is the newest of its records."""

    record: IndexRecord
    stores: tuple[str, ...]

    @property
    def digest(self) -> Digest:
        """Of the index manifest."""
        return self.record.digest

    @property
    def version(self) -> str:
        """`v1` or `v2`; empty for a kind this program does not know."""
        return _VERSIONS.get(self.record.media_type, "")


@dataclass(frozen=True, slots=True)
class ListedBlob:
    """A ztoc or prefetch artifact that is there; `size` and `span_size` in bytes, the latter 0 if unknown.

    `index`, its `image` manifest and `created_ns` are those of the newest index that names it.
    """

    digest: Digest
    size: int
    layer_digest: Digest
    span_size: int
    index: Digest
    image: Digest
    created_ns: int
    store: str


class Catalog:
    """The indexes of one namespace in these stores. A digest is looked for in the stores in their order."""

    def __init__(self, artifacts: Artifacts, stores: Sequence[Blobs], namespace: str) -> None:
        self._artifacts = artifacts
        self._stores = {store.name: store for store in stores}
        self._namespace = namespace

    def indexes(self) -> list[ListedIndex]:
        """Every index that is there, newest first."""
        stores: dict[Digest, list[str]] = {}
        newest: dict[Digest, IndexRecord] = {}
        for record in self._records():
            if self._stores[record.store].has(record.digest):
                stores.setdefault(record.digest, []).append(record.store)
                newest.setdefault(record.digest, record)
        return [ListedIndex(record, tuple(sorted(stores[digest]))) for digest, record in newest.items()]

    def ztocs(self, indexes: Iterable[ListedIndex]) -> list[ListedBlob]:
        """The ztocs of these indexes that are there, each once, sorted by digest."""
        return self._named(indexes, lambda index: index.ztocs)

    def prefetches(self, indexes: Iterable[ListedIndex]) -> list[ListedBlob]:
        """The prefetch artifacts of these indexes that are there, each once, sorted by digest."""
        return self._named(indexes, lambda index: index.prefetch)

    def ztoc(self, digest: Digest) -> ListedBlob:
        """The ztoc of that digest. NotFound, or Invalid when it is something else."""
        return self._find(digest, "ztoc")

    def prefetch(self, digest: Digest) -> ListedBlob:
        """The prefetch artifact of that digest. NotFound, or Invalid when it is something else."""
        return self._find(digest, "prefetch artifact")

    def index(self, digest: Digest) -> tuple[bytes, SociIndex]:
        """The manifest of that digest, recorded or not. NotFound, or Invalid when it is something else."""
        try:
            data = self.read(digest, oci.MANIFEST_LIMIT)
            return data, sociindex.decode(data)
        except Integrity:
            self.expect(digest, "index")
            raise

    def read(self, digest: Digest, limit: int) -> bytes:
        """A blob of at most `limit` bytes out of the first store that has it."""
        for store in self._stores.values():
            try:
                return store.get(digest, limit)
            except NotFound:
                continue
        raise NotFound(f"{digest} is not in the content store: {self._where()}")

    def remove(self, digest: Digest) -> list[ListedIndex]:
        """Remove an index from every store that it is recorded in, and what only it names.

        Returns what was removed, one for each store; NotFound when there is no such index.
        """
        records = [record for record in self._records() if record.digest == digest]
        if not records:
            self.expect(digest, "index")
            raise NotFound(f"{digest}: no such SOCI index in {self._where()}; see: soci index list")
        for record in records:
            store = self._stores[record.store]
            if store.namespaced or not self._elsewhere(record):
                store.remove(digest, record.image_digest, self._blobs_of(store, digest))
            self._artifacts.remove(digest, record.store, record.namespace)
        return [ListedIndex(record, (record.store,)) for record in records]

    def expect(self, digest: Digest, kind: str) -> None:
        """Raise Invalid that says what `digest` is, if it is here and not a `kind`: index, ztoc, prefetch artifact."""
        listed = self.indexes()
        kinds = {
            "index": ([one.digest for one in listed], "a SOCI index", "soci index info"),
            "ztoc": ([one.digest for one in self.ztocs(listed)], "a ztoc", "soci ztoc info"),
            "prefetch artifact": (
                [one.digest for one in self.prefetches(listed)],
                "a prefetch artifact",
                "soci prefetch info",
            ),
        }
        for other, (members, name, command) in kinds.items():
            if other != kind and digest in members:
                raise Invalid(f"{digest} is {name}, no {kind}; see: {command}")

    def _records(self) -> list[IndexRecord]:
        return [
            record
            for record in self._artifacts.all()
            if record.store in self._stores and record.namespace == self._namespace
        ]

    def _elsewhere(self, record: IndexRecord) -> bool:
        """Whether another namespace lists the same index in the same store."""
        return any(
            (other.digest, other.store) == (record.digest, record.store)
            and other.namespace != self._namespace
            for other in self._artifacts.all()
        )

    def _blobs_of(self, store: Blobs, digest: Digest) -> set[Digest]:
        """What the index names and would leave behind; nothing when it cannot be read any more."""
        try:
            manifest = oci.decode_manifest(store.get(digest, oci.MANIFEST_LIMIT))
        except (NotFound, Integrity):
            return set()
        if not isinstance(manifest, oci.Manifest):
            return set()
        return {manifest.config.digest, *(layer.digest for layer in manifest.layers)}

    def _named(
        self,
        indexes: Iterable[ListedIndex],
        pick: Callable[[SociIndex], Mapping[Digest, Descriptor]],
    ) -> list[ListedBlob]:
        found: dict[Digest, ListedBlob] = {}
        for listed in indexes:
            for name in listed.stores:
                store = self._stores[name]
                try:
                    index = sociindex.decode(store.get(listed.digest, oci.MANIFEST_LIMIT))
                except NotFound:
                    continue  # collected a moment ago
                except Integrity as error:
                    _log.warning("%s", error)
                    continue
                for layer, blob in pick(index).items():
                    if blob.digest not in found and store.has(blob.digest):
                        found[blob.digest] = ListedBlob(
                            digest=blob.digest,
                            size=blob.size,
                            layer_digest=layer,
                            span_size=_number(blob.annotations.get(SPAN_SIZE, "")),
                            index=listed.digest,
                            image=listed.record.image_digest,
                            created_ns=listed.record.created_ns,
                            store=name,
                        )
        return [found[digest] for digest in sorted(found)]

    def _find(self, digest: Digest, kind: str) -> ListedBlob:
        listed = self.indexes()
        blobs = self.ztocs(listed) if kind == "ztoc" else self.prefetches(listed)
        for blob in blobs:
            if blob.digest == digest:
                return blob
        self.expect(digest, kind)
        raise NotFound(
            f"{digest}: no SOCI index in {self._where()} names such a {kind}; if one was pulled or its record "
            f"lost, run: soci rebuild-db"
        )

    def _where(self) -> str:
        return f"{' or '.join(self._stores)} (namespace {self._namespace})"


def _number(text: str) -> int:
    # An int64 has at most 19 digits.
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
