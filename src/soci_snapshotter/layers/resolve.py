"""Which SOCI index belongs to an image: asked once per image however many layers come at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from soci_snapshotter.errors import Integrity, NotFound
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Manifest
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.formats.sociindex import SociIndex
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.policy.discovery import Source, sources
from soci_snapshotter.registry.client import RegistryClient

DEFAULT_CACHE = 30  # images remembered: [resolve_result_entry] of the Go daemon


@dataclass(frozen=True, slots=True)
class Image:
    """What discovery depends on."""

    locator: str
    manifest: Digest
    explicit: Digest | None


class IndexResolver:
    """Finds indexes. Thread safe. Only what cannot change is remembered: an index that was found, never a failure."""

    def __init__(self, client: RegistryClient, *, v1: bool, v2: bool, entries: int = DEFAULT_CACHE) -> None:
        self._client = client
        self._v1, self._v2 = v1, v2
        self._entries = entries
        self._turns = Turns()
        self._lock = threading.Lock()
        self._found: OrderedDict[Image, SociIndex] = OrderedDict()

    def index_for(self, reference: Reference, manifest: Digest, explicit: Digest | None) -> SociIndex | None:
        """The image's index, None when no source has one. Raises Remote, or Integrity for one that is malformed."""
        image = Image(reference.locator, manifest, explicit)
        with self._turns.turn(image):
            with self._lock:
                known = self._found.get(image)
                if known is not None:
                    self._found.move_to_end(image)
                    return known
            found = self._look(reference, image)
            if found is not None:
                with self._lock:
                    self._found[image] = found
                    while len(self._found) > self._entries:
                        self._found.popitem(last=False)
            return found

    def _look(self, reference: Reference, image: Image) -> SociIndex | None:
        for source in sources(image.explicit, v1=self._v1, v2=self._v2):
            if source is Source.EXPLICIT and image.explicit is not None:
                return self._fetch(reference, image.explicit)
            if source is Source.V2:
                named = self._annotated(reference, image.manifest)
                if named is not None:
                    try:
                        return self._fetch(reference, named)
                    except NotFound:
                        return None  # dangling: the image says v2, so v1 is not asked
            if source is Source.V1:
                listed = self._client.referrers(reference, image.manifest, sociindex.INDEX_V1)
                if listed:
                    return sociindex.decode(self._client.fetch(reference, listed[0], oci.MANIFEST_LIMIT))
        return None

    def _fetch(self, reference: Reference, digest: Digest) -> SociIndex:
        described = self._client.resolve(reference.with_digest(digest))
        return sociindex.decode(self._client.fetch(reference, described, oci.MANIFEST_LIMIT))

    def _annotated(self, reference: Reference, digest: Digest) -> Digest | None:
        described = self._client.resolve(reference.with_digest(digest))
        manifest = oci.decode_manifest(self._client.fetch(reference, described, oci.MANIFEST_LIMIT))
        if not isinstance(manifest, Manifest):
            raise Integrity(f"{reference}: {digest} is an index, not the manifest of an image")
        text = manifest.annotations.get(sociindex.INDEX_DIGEST)
        return digests.parse(text) if text else None


def with_size(descriptor: Descriptor, limit: int) -> Descriptor:
    """`descriptor`, refused with Integrity when its size could not be a ztoc's."""
    if not 0 < descriptor.size <= limit:
        raise Integrity(f"ztoc {descriptor.digest}: {descriptor.size} bytes; the limit is {limit}")
    return descriptor
