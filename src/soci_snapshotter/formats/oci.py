"""OCI image manifests, indexes, configs and descriptors (opencontainers/image-spec v1.1), and Docker's.

Field order in the structs is the order in which Go tools write the keys (FORMATS.md 5); `encode` keeps it.
Values from the network are bounded and checked here; fields nobody asks for are dropped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct, field

from soci_snapshotter.errors import Integrity, Invalid, NotFound, Unsupported
from soci_snapshotter.formats.digest import Buffer, Digest
from soci_snapshotter.formats.jsonfmt import decode, encode
from soci_snapshotter.formats.platforms import Platform, matching, parse_platform

__all__ = [
    "CONFIG",
    "CONFIG_LIMIT",
    "DOCKER_CONFIG",
    "DOCKER_INDEX",
    "DOCKER_MANIFEST",
    "EMPTY_JSON",
    "EMPTY_JSON_DIGEST",
    "INDEX",
    "INDEX_TYPES",
    "MANIFEST",
    "MANIFEST_LIMIT",
    "MANIFEST_TYPES",
    "Descriptor",
    "ImageConfig",
    "Index",
    "Manifest",
    "Platform",
    "RunConfig",
    "chain_id",
    "chain_ids",
    "decode_config",
    "decode_manifest",
    "encode",
    "is_nondistributable",
    "layer_compression",
    "parse_platform",
    "select_platform",
]

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
_DOCKER_SCHEMA1 = "application/vnd.docker.distribution.manifest.v1"

MANIFEST_TYPES = (MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (INDEX, DOCKER_INDEX)

# What registries must accept at least (distribution-spec, "Pushing Manifests"); more cannot be relied on.
MANIFEST_LIMIT = 4 << 20
# Configs have no such rule; containerd and Docker take 8 MiB and more. Real ones stay under 100 KiB.
CONFIG_LIMIT = 8 << 20

# The config of every artifact that needs none; its digest is FORMATS.md 5's 44136fa3...
EMPTY_JSON = b"{}"
EMPTY_JSON_DIGEST = Digest("sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a")

# A Go int64; sizes beyond it cannot be written by any other tool.
_Size = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class Descriptor(Struct, frozen=True, omit_defaults=True):
    """A typed link to content: media type, digest and size in bytes."""

    media_type: str = field(name="mediaType")
    digest: Digest
    size: _Size
    urls: tuple[str, ...] = ()
    annotations: dict[str, str] = {}
    data: bytes = b""
    platform: Platform | None = None
    artifact_type: str = field(name="artifactType", default="")


class Manifest(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """One image (or artifact): a config and its layers, lowest first."""

    schema_version: int = field(name="schemaVersion")
    media_type: str = field(name="mediaType", default="")
    artifact_type: str = field(name="artifactType", default="")
    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


class Index(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """A list of manifests, usually one per platform."""

    schema_version: int = field(name="schemaVersion")
    media_type: str = field(name="mediaType", default="")
    artifact_type: str = field(name="artifactType", default="")
    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    annotations: dict[str, str] = {}


class RootFS(Struct, frozen=True):
    """`diff_ids`: digests of the uncompressed layers, lowest first."""

    type: str = "layers"
    diff_ids: tuple[Digest, ...] = ()


class RunConfig(Struct, frozen=True):
    """How the image's container is started (image-spec, config.md); Docker writes null for what is empty."""

    # Early Dockers wrote a lone string for a list of one.
    entrypoint: tuple[str, ...] | str = field(name="Entrypoint", default=())
    cmd: tuple[str, ...] | str = field(name="Cmd", default=())
    env: tuple[str, ...] = field(name="Env", default=())
    working_dir: str = field(name="WorkingDir", default="")

    @property
    def argv(self) -> tuple[str, ...]:
        """The program and its arguments when the user names none: the entrypoint, then the command."""
        parts = (self.entrypoint, self.cmd)
        return tuple(
            word for part in parts for word in ((part,) if isinstance(part, str) and part else tuple(part))
        )


class ImageConfig(Struct, frozen=True):
    """What this program needs of an image config; it is never written."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = field(name="os.version", default="")
    os_features: tuple[str, ...] = field(name="os.features", default=())
    rootfs: RootFS = RootFS()
    config: RunConfig = RunConfig()

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        """Digests of the uncompressed layers, lowest first."""
        return self.rootfs.diff_ids

    @property
    def platform(self) -> Platform:
        """The platform the config names, as it stands there."""
        return Platform(self.architecture, self.os, self.os_version, self.os_features, self.variant)


class _Shape(Struct, frozen=True):
    """Just enough of a document to tell a manifest from an index."""

    media_type: str = field(name="mediaType", default="")
    config: Raw = Raw()
    layers: Raw = Raw()
    manifests: Raw = Raw()
    fs_layers: Raw = field(name="fsLayers", default=Raw())

    def has(self, name: str) -> bool:
        """True when the field is there and not null."""
        return bytes(getattr(self, name)) not in (b"", b"null")


def decode_manifest(data: Buffer) -> Manifest | Index:
    """Decode a manifest or index, OCI or Docker schema 2, of at most MANIFEST_LIMIT bytes.

    Raises Integrity for anything malformed or ambiguous (both at once: CVE-2021-41190), Unsupported
    for Docker schema 1 and other kinds.
    """
    if len(data) > MANIFEST_LIMIT:
        raise Integrity(f"manifest: {len(data)} bytes, more than the {MANIFEST_LIMIT} allowed")
    try:
        shape = msgspec.json.decode(data, type=_Shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Integrity(f"manifest: {error}") from None
    if shape.media_type.startswith(_DOCKER_SCHEMA1) or shape.has("fs_layers"):
        raise Unsupported(
            "manifest: Docker schema 1 is not supported; push the image again with a current tool"
        )
    if shape.media_type and shape.media_type not in MANIFEST_TYPES + INDEX_TYPES:
        raise Unsupported(
            f"manifest: media type {shape.media_type[:200]!r} is no image manifest and no index"
        )
    if shape.has("manifests") and (shape.has("layers") or shape.has("config")):
        raise Integrity("manifest: both an index and an image manifest")
    is_index = shape.has("manifests") or shape.media_type in INDEX_TYPES
    if is_index and shape.media_type in MANIFEST_TYPES:
        raise Integrity(f"manifest: media type {shape.media_type} but it lists manifests")
    decoded: Manifest | Index
    if is_index:
        decoded = decode(data, Index, "index", MANIFEST_LIMIT)
    else:
        decoded = decode(data, Manifest, "manifest", MANIFEST_LIMIT)
    if decoded.schema_version != 2:
        raise Integrity(f"manifest: schemaVersion {decoded.schema_version}, want 2")
    return decoded


def decode_config(data: Buffer) -> ImageConfig:
    """Decode an image config of at most CONFIG_LIMIT bytes; Integrity when it is none."""
    config = decode(data, ImageConfig, "image config", CONFIG_LIMIT)
    if config.rootfs.type != "layers":
        raise Integrity(f"image config: rootfs type {config.rootfs.type[:80]!r}, want 'layers'")
    return config


def select_platform(index: Index, platform: Platform) -> Descriptor:
    """The manifest of `index` that runs best on `platform`: its own, else one it is compatible with.

    Falls back to a sole manifest without a platform. Raises NotFound that lists what there is.
    """
    images = [
        entry for entry in index.manifests if entry.media_type in MANIFEST_TYPES and not entry.artifact_type
    ]
    for wanted in matching(platform):
        for entry in images:
            if entry.platform is not None and entry.platform.normalized().same_as(wanted):
                return entry
    unnamed = [entry for entry in images if entry.platform is None]
    if len(unnamed) == 1 and len(images) == 1:
        return unnamed[0]
    present = ", ".join(sorted({str(entry.platform) for entry in images if entry.platform})) or "none"
    raise NotFound(f"no image for platform {platform}; the index has: {present}")


def chain_ids(diff_ids: Iterable[Digest]) -> list[Digest]:
    """The chain ID of each layer with those below it (image-spec, "Layer ChainID"), lowest first."""
    chain: list[Digest] = []
    for diff_id in diff_ids:
        if not chain:
            chain.append(diff_id)
        else:
            joined = f"{chain[-1]} {diff_id}".encode()
            chain.append(Digest("sha256:" + hashlib.sha256(joined).hexdigest()))
    return chain


def chain_id(diff_ids: Sequence[Digest]) -> Digest:
    """The chain ID of a whole stack of layers, lowest first. Invalid when there are none."""
    if not diff_ids:
        raise Invalid("no chain ID without layers")
    return chain_ids(diff_ids)[-1]


# Layer media types and how their blobs are compressed. Non-distributable ones ("foreign") are layers too.
_LAYERS = {
    "application/vnd.oci.image.layer.v1.tar": "",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}


def layer_compression(media_type: str) -> str | None:
    """`gzip`, `zstd` or `` (none) for a layer's media type; None when it is no layer type."""
    return _LAYERS.get(media_type)


def is_nondistributable(media_type: str) -> bool:
    """True for layers a registry may not hand out (Windows base layers); they are never indexed."""
    return ".nondistributable." in media_type or ".foreign." in media_type
