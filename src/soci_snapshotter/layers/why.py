"""Whether an image would be lazy, layer by layer, asked of its registry alone.

Every decision is the daemon's own code: policy.prepare for the labels, layers.resolve for the index, policy.lazy for
the ztoc, the worker that builds meta.erofs, the bound on spans. Only mounting is left out.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from soci_snapshotter.errors import Integrity, NotFound, SociError, Unsupported
from soci_snapshotter.formats import oci, sociindex, ztoc
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Manifest, Platform
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.formats.sociindex import SociIndex
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.layers import ztocs
from soci_snapshotter.layers.meta import MetaRequest
from soci_snapshotter.layers.resolve import Found, Image, Step, look
from soci_snapshotter.layers.spandecode import check_sizes
from soci_snapshotter.layers.workers import MetaWorkers
from soci_snapshotter.policy import prepare
from soci_snapshotter.policy.discovery import Source
from soci_snapshotter.policy.lazy import Declined, ztoc_of
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.store.content import ContentStore

# What the Go tool, and ours, leave out of an index unless told otherwise.
_USUAL_MIN_LAYER_SIZE = 10 << 20


@dataclass(frozen=True, slots=True)
class Modes:
    """[pull_modes] of the daemon's configuration, and [snapshotter] min_layer_size (bytes)."""

    v1: bool = False
    v2: bool = True
    min_layer_size: int = 0
    tag: bool = False


@dataclass(frozen=True, slots=True)
class LayerAnswer:
    """One layer, sizes in bytes. `why` is None for a lazy one; `spans` and `files` are None when not looked at."""

    digest: Digest
    size: int
    media_type: str
    why: str | None
    ztoc: Digest | None = None
    ztoc_size: int | None = None
    span_size: int | None = None
    spans: int | None = None
    files: int | None = None

    @property
    def lazy(self) -> bool:
        """True when the daemon would mount it before its bytes are here."""
        return self.why is None


@dataclass(frozen=True, slots=True)
class Answer:
    """An image. `version` is the index's, 1 or 2; `notes` are what else is worth knowing, a sentence each."""

    reference: str
    manifest: Digest
    index: Digest | None
    version: int | None
    source: Source | None
    notes: tuple[str, ...]
    layers: tuple[LayerAnswer, ...]

    @property
    def lazy(self) -> bool:
        """True when at least one layer would be."""
        return any(layer.lazy for layer in self.layers)


def explain(
    client: RegistryClient,
    reference: Reference,
    platform: Platform,
    modes: Modes,
    *,
    explicit: Digest | None = None,
    quick: bool = False,
    on_layer: Callable[[LayerAnswer], None] = lambda _: None,
) -> Answer:
    """Ask the registry about `reference`. With `quick` ztocs are believed without being fetched.

    Raises what keeps any client from pulling the image: NotFound, Remote, Integrity and Unsupported, naming it.
    """
    described, manifest = _manifest(client, reference, platform)
    config = oci.decode_config(client.fetch(reference, manifest.config, oci.CONFIG_LIMIT))
    if len(config.diff_ids) != len(manifest.layers):
        raise Integrity(
            f"image {reference}: {len(manifest.layers)} layers, but {len(config.diff_ids)} diff_ids in its config"
        )
    image = Image(reference.locator, described.digest, explicit)
    notes: list[str] = []
    found = _look(client, reference, image, modes, notes)
    if found.index is not None:
        _check_subject(found.index, described.digest, notes)
    chain = oci.chain_ids(config.diff_ids)
    with tempfile.TemporaryDirectory(prefix="soci-why-") as scratch, MetaWorkers(1) as workers:
        look_at = _Layers(client, reference, image, modes, found.index, Path(scratch), workers, quick=quick)
        layers = look_at.answers(manifest.layers, chain, on_layer)
    step = found.steps[-1] if found.index is not None else None
    return Answer(
        reference=str(reference),
        manifest=described.digest,
        index=step.named if step else None,
        version=found.index.version if found.index else None,
        source=step.source if step else None,
        notes=tuple(notes),
        layers=layers,
    )


def _manifest(
    client: RegistryClient, reference: Reference, platform: Platform
) -> tuple[Descriptor, Manifest]:
    described = client.resolve(reference)
    document = oci.decode_manifest(client.fetch(reference, described, oci.MANIFEST_LIMIT))
    if isinstance(document, oci.Index):
        try:
            described = oci.select_platform(document, platform)
        except NotFound as error:
            raise NotFound(f"image {reference}: {error}") from None
        document = oci.decode_manifest(client.fetch(reference, described, oci.MANIFEST_LIMIT))
    if not isinstance(document, Manifest):
        raise Integrity(f"image {reference}: {described.digest} is an index inside an index")
    for layer in document.layers:
        if oci.layer_compression(layer.media_type) is None:
            raise Unsupported(
                f"image {reference}: layer {layer.digest} is {layer.media_type!r}, no container layer"
            )
    return described, document


def _look(
    client: RegistryClient, reference: Reference, image: Image, modes: Modes, notes: list[str]
) -> Found:
    """The index as the daemon would find it. What keeps it from one becomes a note: it would unpack the layers."""
    try:
        found = look(client, reference, image, v1=modes.v1, v2=modes.v2, tag=modes.tag)
    except SociError as error:
        notes.append(f"the index cannot be used: {error}")
        return Found(None, ())
    notes.extend(filter(None, (_spoken(step) for step in found.steps)))
    if found.index is None and image.explicit is None:
        notes.extend(_what_if(client, reference, image, modes))
    return found


def _spoken(step: Step) -> str | None:
    if step.note:
        return step.note
    if step.dangling:
        return (
            f"the image's annotation names the index {step.named}, which the registry does not have: push the "
            "converted image whole; while the annotation is there, no v1 index is looked for"
        )
    return None


def _what_if(client: RegistryClient, reference: Reference, image: Image, modes: Modes) -> list[str]:
    """Notes on what an index that the configuration does not look for would give, and on the registry."""
    notes = []
    for source, on, other in (
        (Source.V2, modes.v2, Modes(v1=False, v2=True)),
        (Source.V1, modes.v1, Modes(v1=True, v2=False)),
    ):
        if on:
            continue
        try:
            found = look(client, reference, image, v1=other.v1, v2=other.v2)
        except SociError:
            continue
        if found.index is not None:
            notes.append(
                f"there is a {source.value} index, {found.steps[-1].named}, but [pull_modes.soci_{source.value}] is "
                "off in config.toml"
            )
    try:
        if modes.v1 and not client.has_referrers(reference, image.manifest):
            notes.append("the registry has no referrers API; its fallback tag was read instead")
    except SociError as error:
        notes.append(f"whether the registry has a referrers API is not known: {error}")
    return notes


def _check_subject(index: SociIndex, manifest: Digest, notes: list[str]) -> None:
    if index.subject is not None and index.subject.digest != manifest:
        notes.append(f"the index says it is of another image, {index.subject.digest}")


class _Layers:
    """Answers for the layers of one image, each digest looked at once."""

    def __init__(
        self,
        client: RegistryClient,
        reference: Reference,
        image: Image,
        modes: Modes,
        index: SociIndex | None,
        scratch: Path,
        workers: MetaWorkers,
        *,
        quick: bool,
    ) -> None:
        self._client = client
        self._reference = reference
        self._image = image
        self._min_layer_size = modes.min_layer_size
        self._options = prepare.Options(discover=modes.v1 or modes.v2)
        self._index = index
        self._scratch = scratch
        self._workers = workers
        self._quick = quick

    def answers(
        self,
        layers: tuple[Descriptor, ...],
        chain: list[Digest],
        on_layer: Callable[[LayerAnswer], None],
    ) -> tuple[LayerAnswer, ...]:
        """In image order; `on_layer` is told of each in that order as soon as it is known."""
        known: dict[Digest, LayerAnswer] = {}
        answers = []
        for layer, target in zip(layers, chain, strict=True):
            if layer.digest not in known:
                known[layer.digest] = self._answer(layer, target)
            answers.append(known[layer.digest])
            on_layer(answers[-1])
        return tuple(answers)

    def _answer(self, layer: Descriptor, target: Digest) -> LayerAnswer:
        answer = LayerAnswer(layer.digest, layer.size, layer.media_type, None)
        # Any namespace and key will do: only what the labels say is of interest.
        decision = prepare.decide("", self._labels(layer, target), namespace="any", options=self._options)
        if isinstance(decision, prepare.Defer):
            return replace(answer, why=decision.reason)
        chosen = ztoc_of(self._index, layer.digest, layer.size, self._min_layer_size)
        if isinstance(chosen, Declined):
            return replace(answer, why=_why_without(self._index, layer, chosen))
        span = chosen.annotations.get(sociindex.SPAN_SIZE, "")
        answer = replace(
            answer,
            ztoc=chosen.digest,
            ztoc_size=chosen.size,
            span_size=int(span) if span.isascii() and span.isdecimal() and len(span) < 20 else None,
        )
        if self._quick:
            return answer
        try:
            spans, files = self._try(layer, chosen)
        except (SociError, OSError) as error:
            return replace(answer, why=f"its ztoc cannot be used: {error}")
        return replace(answer, spans=spans, files=files)

    def _labels(self, layer: Descriptor, target: Digest) -> dict[str, str]:
        """What `soci pull`, and CRI with annotations, say of a layer."""
        labels = {
            prepare.TARGET: str(target),
            prepare.IMAGE_REF: str(self._reference),
            prepare.MANIFEST_DIGEST: str(self._image.manifest),
            prepare.LAYER_DIGEST: str(layer.digest),
        }
        if self._image.explicit is not None:
            labels[prepare.INDEX_DIGEST] = str(self._image.explicit)
        return labels

    def _try(self, layer: Descriptor, chosen: Descriptor) -> tuple[int, int]:
        """Fetch the ztoc, build the layer's EROFS image as the daemon does, throw both away; spans and files."""
        directory = self._scratch / layer.digest.hex
        content = ContentStore(directory / "content")
        ztocs.fetch(self._client, content, self._reference, chosen)
        path = content.path(chosen.digest)
        built = self._workers.build(
            MetaRequest(
                ztoc_path=str(path),
                ztoc_digest=str(chosen.digest),
                layer_digest=str(layer.digest),
                directory=str(directory),
                layer_size=layer.size,
                lowers=(),
            )
        )
        spans = span_table(ztoc.decode_spans(path.read_bytes()))
        check_sizes(spans)
        shutil.rmtree(directory)
        return len(spans), built.entries


def _why_without(index: SociIndex | None, layer: Descriptor, declined: Declined) -> str:
    """A layer without a ztoc: the daemon's reason, and the likely cause."""
    if index is None or index.ztoc_for(layer.digest) is not None:
        return declined.reason
    compression = oci.layer_compression(layer.media_type)
    if oci.is_nondistributable(layer.media_type):
        cause = "non-distributable layers get none"
    elif compression == "zstd":
        cause = "zstd is not indexed"
    elif layer.size < _USUAL_MIN_LAYER_SIZE:
        cause = f"{layer.size} bytes is less than the usual --min-layer-size {_USUAL_MIN_LAYER_SIZE}"
    else:
        cause = "it was left out when the index was made; make the index again"
    return f"the index has no ztoc for it: {cause}"
