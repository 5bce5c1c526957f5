"""Finding again what indexes there are, from the stores' content alone: for a list that was lost or is stale.

A version 1 index names its image manifest. A version 2 index does not: the image's own index does, in an
annotation on the SOCI index's descriptor, and so does the image manifest, in an annotation of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import Invalid
from ..formats import digest as digests
from ..formats.digest import Digest
from ..formats.oci import Index
from ..formats.sociindex import INDEX_DIGEST, MANIFEST_DIGEST
from ..store.artifacts import Artifacts, IndexRecord, now_ns
from .holdings import Blobs, Document
from .imagenames import ImageNames


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """How many indexes were found, and how many records that made appear and disappear."""

    found: int
    added: int
    removed: int


@dataclass(slots=True)
class _Found:
    """What the documents of all stores say."""

    indexes: list[tuple[str, Document]] = field(default_factory=list)  # store, SOCI index
    images: dict[Digest, Digest] = field(default_factory=dict)  # SOCI index v2 -> image manifest
    platforms: dict[Digest, str] = field(default_factory=dict)  # image manifest -> platform


def rebuild(
    artifacts: Artifacts,
    stores: Sequence[Blobs],
    sources: Sequence[Blobs],
    names: ImageNames | None,
    namespace: str,
) -> Rebuilt:
    """Bring the records of `namespace` and these stores in line with what the stores hold.

    Records that hold true stay as they are. `sources` are further stores in which images may be found; `names` is
    None without a containerd to ask, and then images have no name.
    """
    found = _Found()
    for store in stores:
        _collect(store, found)
    for source in sources:
        _collect(source, found, indexes=False)
    before = artifacts.all()
    known = {(record.digest, record.store) for record in before if record.namespace == namespace}
    # The soci store is not divided by namespaces: an index that is some other one's is not ours too.
    foreign = {(record.digest, record.store) for record in before if record.namespace != namespace}
    by_manifest = {} if names is None else names.by_manifest()
    added = []
    for store_name, document in found.indexes:
        key = (document.digest, store_name)
        image = _image_of(document, found)
        if key in known or image is None or (key in foreign and image not in by_manifest):
            continue
        known.add(key)
        added.append(
            IndexRecord(
                digest=document.digest,
                store=store_name,
                namespace=namespace,
                image_digest=image,
                image_name=next(iter(by_manifest.get(image, ())), ""),
                platform=_platform(image, found, names),
                media_type=document.soci_version,
                size=document.size,
                created_ns=document.created_ns or now_ns(),
            )
        )
    here = {store.name: store for store in stores}
    gone = [
        record
        for record in before
        if record.namespace == namespace
        and record.store in here
        and not here[record.store].has(record.digest)
    ]
    artifacts.update(added, gone)
    return Rebuilt(len({document.digest for _, document in found.indexes}), len(added), len(gone))


def _collect(store: Blobs, found: _Found, *, indexes: bool = True) -> None:
    for document in store.documents():
        content = document.content
        if isinstance(content, Index):
            for entry in content.manifests:
                if entry.platform is not None:
                    found.platforms.setdefault(entry.digest, str(entry.platform.normalized()))
                _link(found, entry.digest, entry.annotations.get(MANIFEST_DIGEST))
        elif document.soci_version:
            if indexes:
                found.indexes.append((store.name, document))
        elif named := content.annotations.get(INDEX_DIGEST):
            _link(found, named, document.digest)


def _link(found: _Found, index: str, image: str | None) -> None:
    if image is None:
        return
    try:
        found.images.setdefault(digests.parse(index), digests.parse(image))
    except Invalid:
        pass  # annotations are anybody's


def _image_of(document: Document, found: _Found) -> Digest | None:
    """The image manifest of an index; None for a version 2 index whose image is not here."""
    subject = getattr(document.content, "subject", None)
    return subject.digest if subject is not None else found.images.get(document.digest)


def _platform(image: Digest, found: _Found, names: ImageNames | None) -> str:
    if image in found.platforms:
        return found.platforms[image]
    platform = None if names is None else names.platform_of(image)
    return "" if platform is None else str(platform)
