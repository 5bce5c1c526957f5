"""The SOCI index: an OCI image manifest whose layers are ztocs (FORMATS.md 5).

Version 1 is written, versions 1 and 2 are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from soci_snapshotter.errors import Integrity, Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Buffer, Digest
from soci_snapshotter.formats.oci import Descriptor, Manifest

INDEX_V1 = "application/vnd.amazon.soci.index.v1+json"
INDEX_V2 = "application/vnd.amazon.soci.index.v2+json"
ZTOC = "application/octet-stream"
PREFETCH = "application/vnd.amazon.soci.prefetch.v1+json"

LAYER_DIGEST = "com.amazon.soci.image-layer-digest"
LAYER_MEDIA_TYPE = "com.amazon.soci.image-layer-mediaType"
SPAN_SIZE = "com.amazon.soci.span-size"
DISABLE_XATTRS = "com.amazon.soci.disable-xattrs"
BUILD_TOOL = "com.amazon.soci.build-tool-identifier"
# v2's links between an image manifest and its SOCI index, both ways.
INDEX_DIGEST = "com.amazon.soci.index-digest"
MANIFEST_DIGEST = "com.amazon.soci.image-manifest-digest"

_VERSIONS = {INDEX_V1: 1, INDEX_V2: 2}


@dataclass(frozen=True, slots=True)
class ZtocDescriptor:
    """A ztoc (digest, size in bytes) and the layer it describes; span_size in uncompressed bytes."""

    digest: Digest
    size: int
    layer_digest: Digest
    layer_media_type: str
    span_size: int
    disable_xattrs: bool = False

    def descriptor(self) -> Descriptor:
        """As it stands in the index."""
        annotations = {
            LAYER_DIGEST: str(self.layer_digest),
            LAYER_MEDIA_TYPE: self.layer_media_type,
            SPAN_SIZE: str(self.span_size),
        }
        if self.disable_xattrs:
            annotations[DISABLE_XATTRS] = "true"
        return Descriptor(ZTOC, self.digest, self.size, annotations=annotations)


@dataclass(frozen=True, slots=True)
class PrefetchDescriptor:
    """A prefetch artifact (digest, size in bytes) and the layer whose spans it lists."""

    digest: Digest
    size: int
    layer_digest: Digest

    def descriptor(self) -> Descriptor:
        """As it stands in the index."""
        return Descriptor(
            PREFETCH, self.digest, self.size, annotations={LAYER_DIGEST: str(self.layer_digest)}
        )


@dataclass(frozen=True, slots=True)
class SociIndex:
    """A decoded SOCI index: `version` 1 or 2, its ztocs by the digest of the layer they describe."""

    version: int
    build_tool: str
    subject: Descriptor | None
    ztocs: Mapping[Digest, Descriptor]
    prefetch: Mapping[Digest, Descriptor]

    def ztoc_for(self, layer_digest: Digest) -> Descriptor | None:
        """The ztoc of this layer, None when the layer has none (a sparse index)."""
        return self.ztocs.get(layer_digest)


def build(
    subject: Descriptor | None,
    layers: Sequence[ZtocDescriptor],
    build_tool: str,
    prefetch: Sequence[PrefetchDescriptor] = (),
) -> bytes:
    """An index: version 1 for the image manifest `subject`, version 2 (bundled with its image) without one.

    `layers` in image order, a repeated layer repeated. Invalid when there is no ztoc at all: such an index would say
    nothing.
    """
    if not layers:
        image = f"no layer of {subject.digest}" if subject else "no layer"
        raise Invalid(f"{image} has a ztoc: nothing to index")
    entries = [layer.descriptor() for layer in layers] + [entry.descriptor() for entry in prefetch]
    kind = INDEX_V2 if subject is None else INDEX_V1
    manifest = Manifest(
        schema_version=2,
        media_type=oci.MANIFEST,
        config=Descriptor(kind, oci.EMPTY_JSON_DIGEST, len(oci.EMPTY_JSON)),
        layers=tuple(entries),
        subject=None if subject is None else Descriptor(subject.media_type, subject.digest, subject.size),
        annotations={BUILD_TOOL: build_tool},
    )
    return oci.encode(manifest)


def decode(data: Buffer) -> SociIndex:
    """Decode a SOCI index manifest. Integrity when it is malformed or another kind of manifest."""
    manifest = oci.decode_manifest(data)
    if not isinstance(manifest, Manifest) or manifest.config.media_type not in _VERSIONS:
        raise Integrity("SOCI index: not a SOCI index manifest (its config's media type says so)")
    ztocs: dict[Digest, Descriptor] = {}
    prefetch: dict[Digest, Descriptor] = {}
    for position, entry in enumerate(manifest.layers):
        kind = {ZTOC: ztocs, PREFETCH: prefetch}.get(entry.media_type)
        layer = entry.annotations.get(LAYER_DIGEST)
        if kind is None or layer is None:
            continue  # a later version's addition
        # The first wins, as in the Go tool: a repeated layer repeats its descriptor.
        kind.setdefault(_layer_digest(layer, position), entry)
    return SociIndex(
        version=_VERSIONS[manifest.config.media_type],
        build_tool=manifest.annotations.get(BUILD_TOOL, ""),
        subject=manifest.subject,
        ztocs=MappingProxyType(ztocs),
        prefetch=MappingProxyType(prefetch),
    )


def _layer_digest(text: str, position: int) -> Digest:
    try:
        return digests.parse(text)
    except Invalid as error:
        raise Integrity(f"SOCI index: layers[{position}].annotations[{LAYER_DIGEST}]: {error}") from None
