"""Which SOCI index belongs to an image: asked once per image however many layers come at once."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.formats.sociindex import SociIndex
from soci_snapshotter.layers.images import Images
from soci_snapshotter.layers.turns import Turns
from soci_snapshotter.policy.counters import Counters
from soci_snapshotter.policy.discovery import Source, candidates, sources
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.referrers import index_tag

_log = logging.getLogger(__name__)

DEFAULT_CACHE = 30  # images remembered: [resolve_result_entry] of the Go daemon
_CANDIDATES = 4  # v1 indexes that are listed but gone are passed over, so many at most


@dataclass(frozen=True, slots=True)
class Image:
    """What discovery depends on."""

    locator: str
    manifest: Digest
    explicit: Digest | None


@dataclass(frozen=True, slots=True)
class Step:
    """One source that was asked: the index it named, None for none; `count` of them; `dangling`: it is not there.

    `note`: what is worth knowing of the choice, a sentence.
    """

    source: Source
    named: Digest | None = None
    count: int = 0
    dangling: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """The index, None when no source had one, and the sources in the order they were asked."""

    index: SociIndex | None
    steps: tuple[Step, ...]


class IndexResolver:
    """Finds indexes. Thread safe. Only what cannot change is remembered: an index that was found, never a failure."""

    def __init__(
        self,
        client: RegistryClient,
        *,
        v1: bool,
        v2: bool,
        tag: bool = False,
        entries: int = DEFAULT_CACHE,
        counters: Counters | None = None,
        images: Images | None = None,
    ) -> None:
        self._client = client
        self._images = Images(client) if images is None else images
        self._v1, self._v2, self._tag = v1, v2, tag
        self._entries = entries
        self._counters = Counters() if counters is None else counters
        self._turns = Turns()
        self._lock = threading.Lock()
        self._found: OrderedDict[Image, SociIndex] = OrderedDict()

    @property
    def discovers(self) -> bool:
        """Whether an index is looked for that nobody names."""
        return self._v1 or self._v2

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
        started = time.monotonic()
        found = look(
            self._client, reference, image, v1=self._v1, v2=self._v2, tag=self._tag, images=self._images
        )
        for step in found.steps:
            if step.note:
                _log.info("SOCI index: %s", step.note, extra={"image": str(reference)})
        if (
            found.index is not None
        ):  # the last step named it; this metric's "layer" is the index, as the Go daemon's
            took = self._counters.layer(str(found.steps[-1].named)).duration("soci_index_fetch")
            took.observe((time.monotonic() - started) * 1000)
        return found.index


def look(
    client: RegistryClient,
    reference: Reference,
    image: Image,
    *,
    v1: bool,
    v2: bool,
    tag: bool = False,
    images: Images | None = None,
) -> Found:
    """Look for the image's index once, and say how it went. Raises as IndexResolver.index_for.

    `images`: where manifests are remembered.
    """
    images = Images(client) if images is None else images
    steps: list[Step] = []
    index: SociIndex | None = None
    for source in sources(image.explicit, v1=v1, v2=v2, tag=tag):
        named = image.explicit
        if source is Source.V2:
            named = _annotated(images, reference, image.manifest)
        elif source is not Source.EXPLICIT:
            if source is Source.V1:
                step, index = _referring(client, reference, image.manifest, refusable=tag)
            else:
                step, index = _tagged(client, reference, image.manifest)
            steps.append(step)
            if index is not None:
                break
            continue
        if named is None:
            steps.append(Step(source))
            continue
        try:
            index = _fetch(client, reference, named)
        except NotFound:
            steps.append(Step(source, named, dangling=True))
            if source is Source.EXPLICIT:
                raise
            break  # the image says v2, so v1 is not asked
        steps.append(Step(source, named, 1))
        break
    return Found(index, tuple(steps))


def _referring(
    client: RegistryClient, reference: Reference, manifest: Digest, *, refusable: bool
) -> tuple[Step, SociIndex | None]:
    """The v1 index among the manifest's referrers. With `refusable` a registry that lists none has none."""
    try:
        listed = client.referrers(reference, manifest, sociindex.INDEX_V1)
    except Remote as error:
        if not refusable:
            raise
        return Step(Source.V1, note=f"referrers were not listed ({error}); the tag is asked"), None
    entries = {entry.digest: entry for entry in listed}
    order = candidates(entries)
    gone = 0
    for digest in order[:_CANDIDATES]:
        try:
            index = sociindex.decode(client.fetch(reference, entries[digest], oci.MANIFEST_LIMIT))
        except NotFound:
            gone += 1  # the list under a fallback tag outlives what is deleted
            continue
        note = ""
        if len(order) > 1:
            note = f"{len(order)} v1 indexes refer to the image; taken is {digest}, the smallest digest"
            note += f" of those that are there ({gone} are gone)" if gone else ""
        return Step(Source.V1, digest, len(order), note=note), index
    if order:
        note = f"the registry lists {len(order)} v1 indexes of the image, but does not have {order[0]}"
        return Step(Source.V1, None, len(order), dangling=True, note=note), None
    return Step(Source.V1), None


def _tagged(client: RegistryClient, reference: Reference, manifest: Digest) -> tuple[Step, SociIndex | None]:
    """What our tag convention names, if that says itself that it is of this manifest."""
    tag = index_tag(manifest)
    try:
        described = client.resolve(replace(reference, tag=tag, digest=None))
        index = sociindex.decode(client.fetch(reference, described, oci.MANIFEST_LIMIT))
    except NotFound:
        return Step(Source.TAG), None
    if index.subject is None or index.subject.digest != manifest:
        return Step(Source.TAG, note=f"the tag {tag} names an index of another image; it is not used"), None
    return Step(Source.TAG, described.digest, 1, note=f"{described.digest} is found by the tag {tag}"), index


def _fetch(client: RegistryClient, reference: Reference, digest: Digest) -> SociIndex:
    described = client.resolve(reference.with_digest(digest))
    return sociindex.decode(client.fetch(reference, described, oci.MANIFEST_LIMIT))


def _annotated(images: Images, reference: Reference, digest: Digest) -> Digest | None:
    _, manifest = images.manifest(reference, digest)
    text = manifest.annotations.get(sociindex.INDEX_DIGEST)
    return digests.parse(text) if text else None
