"""Small OCI images out of directories, files or exact layer blobs, written as an OCI layout by hand.

By hand, because tests need layers whose bytes stay exactly as they were made: the vectors' blobs, a tar with
odd entries, gzip members made by a certain tool. skopeo and ctr then carry the layout to a registry or a
containerd.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .containerd import Containerd

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
TAR_LAYER = "application/vnd.oci.image.layer.v1.tar"
ZSTD_LAYER = "application/vnd.oci.image.layer.v1.tar+zstd"

# The name by which `ctr image import` knows an image (an annotation of the layout's index.json).
_IMAGE_NAME = "io.containerd.image.name"
_REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True)
class Layer:
    """One layer blob, exactly as it will be stored, with the digest of its uncompressed tar."""

    blob: bytes
    diff_id: str
    media_type: str = GZIP_LAYER

    @property
    def digest(self) -> str:
        """sha256 of the blob."""
        return _sha256(self.blob)


@dataclass(frozen=True)
class Image:
    """One platform's image in a layout: descriptors as dicts of their JSON fields."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    layers: list[dict[str, Any]]
    platform: dict[str, str] = field(default_factory=lambda: {"os": "linux", "architecture": "amd64"})


@dataclass(frozen=True)
class Layout:
    """An OCI layout on disk with one named image, `target` being its index or its only manifest."""

    path: Path
    target: dict[str, Any]
    images: list[Image]

    @property
    def digest(self) -> str:
        """The digest that a pull of the tag resolves to."""
        return str(self.target["digest"])


def layer_from_blob(blob: bytes | Path, media_type: str | None = None) -> Layer:
    """A layer with these exact bytes; gzip is recognised, and all its members count for the DiffID."""
    data = blob if isinstance(blob, bytes) else blob.read_bytes()
    zipped = data[:2] == b"\x1f\x8b"
    tar = gzip.decompress(data) if zipped else data
    return Layer(data, _sha256(tar), media_type or (GZIP_LAYER if zipped else TAR_LAYER))


def layer_from_tar(tar: bytes, compress: str = "gzip") -> Layer:
    """A layer out of a tar's bytes; `compress` is gzip or pigz (the programs), python, zstd or none."""
    if compress == "none":
        return Layer(tar, _sha256(tar), TAR_LAYER)
    if compress == "python":
        return Layer(gzip.compress(tar, 6, mtime=0), _sha256(tar))
    command = {"gzip": ["gzip", "-n"], "pigz": ["pigz", "-n"], "zstd": ["zstd", "-q"]}[compress]
    blob = subprocess.run([*command, "-c"], input=tar, stdout=subprocess.PIPE, check=True).stdout
    return Layer(blob, _sha256(tar), ZSTD_LAYER if compress == "zstd" else GZIP_LAYER)


def layer_from_dir(directory: Path, compress: str = "gzip") -> Layer:
    """A layer out of a directory's content, sorted by name, PAX with xattrs, as GNU tar writes it."""
    command = ["tar", "-C", str(directory), "--sort=name", "--format=pax", "--xattrs", "--xattrs-include=*"]
    command += ["--numeric-owner", "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"]
    tar = subprocess.run([*command, "-cf", "-", "."], stdout=subprocess.PIPE, check=True).stdout
    return layer_from_tar(tar, compress)


def write_layout(
    path: Path,
    layers: Sequence[Layer],
    *,
    name: str = "test:latest",
    architecture: str = "amd64",
    command: Sequence[str] = ("/bin/sh",),
    config: Mapping[str, Any] | None = None,
) -> Layout:
    """Write an image of one platform. `name` is what ctr import records and skopeo's source tag."""
    path.mkdir(parents=True, exist_ok=True)
    image = _write_image(path, layers, architecture, command, config or {})
    return _finish(path, image.manifest, [image], name)


def write_multi_layout(
    path: Path,
    platforms: Mapping[str, Sequence[Layer]],
    *,
    name: str = "test:latest",
    command: Sequence[str] = ("/bin/sh",),
) -> Layout:
    """Write an image index; `platforms` maps an architecture (linux) to its layers."""
    path.mkdir(parents=True, exist_ok=True)
    images = [_write_image(path, layers, arch, command, {}) for arch, layers in platforms.items()]
    manifests = [{**image.manifest, "platform": image.platform} for image in images]
    document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}
    return _finish(path, _put(path, _json(document), INDEX), images, name)


def push(layout: Layout, destination: str, *, user: str | None = None) -> None:
    """skopeo copy the layout to `destination` (host:port/repository:tag), bytes and digests unchanged."""
    command = ["skopeo", "copy", "-q", "--all", "--preserve-digests"]
    # A scratch registry's certificate is never one that skopeo knows.
    command += ["--dest-tls-verify=false"]
    if user is not None:
        command += ["--dest-creds", user]
    command += [f"oci:{layout.path}", f"docker://{destination}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def load(layout: Layout, containerd: Containerd, *, namespace: str = "default", unpack: bool = False) -> None:
    """Import the layout into containerd under the name it was written with, every platform of it."""
    archive = layout.path.with_name(layout.path.name + ".tar")
    subprocess.run(["tar", "-C", str(layout.path), "-cf", str(archive), "."], check=True)
    try:
        options = ["--all-platforms"] if len(layout.images) > 1 else []
        if not unpack:
            options.append("--no-unpack")
        containerd.ctr("images", "import", *options, str(archive), namespace=namespace)
    finally:
        archive.unlink()


def shell_rootfs(
    directory: Path, programs: Sequence[str] = ("dash", "cat", "ls", "stat", "sha256sum")
) -> Path:
    """A root filesystem with these programs of the host and the libraries they need; dash is also /bin/sh."""
    for name in programs:
        found = shutil.which(name)
        if found is None:
            raise RuntimeError(f"{name} is not installed here")
        _copy_into(directory, Path(found), Path("bin") / name)
        for library in _libraries(found):
            _copy_into(directory, library, library.relative_to("/"))
    if "dash" in programs:
        (directory / "bin/sh").symlink_to("dash")
    for name in ("proc", "sys", "dev", "etc", "tmp"):
        (directory / name).mkdir(exist_ok=True)
    (directory / "tmp").chmod(0o1777)
    return directory


def _copy_into(directory: Path, source: Path, target: Path) -> None:
    destination = directory / target
    if not destination.exists():
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, destination)


def _libraries(program: str) -> list[Path]:
    """What ldd lists: `name => /path (address)`, and the loader without an arrow."""
    output = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    words = [word for line in output.splitlines() for word in line.split()]
    return sorted({Path(word) for word in words if word.startswith("/")})


def _write_image(
    path: Path, layers: Sequence[Layer], architecture: str, command: Sequence[str], config: Mapping[str, Any]
) -> Image:
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": list(command), "Env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        **config,
    }
    config_descriptor = _put(path, _json(document), CONFIG)
    layer_descriptors = [_put(path, layer.blob, layer.media_type) for layer in layers]
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": config_descriptor,
        "layers": layer_descriptors,
    }
    platform = {"os": "linux", "architecture": architecture}
    return Image(_put(path, _json(manifest), MANIFEST), config_descriptor, layer_descriptors, platform)


def _finish(path: Path, target: dict[str, Any], images: list[Image], name: str) -> Layout:
    (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    named = {**target, "annotations": {_IMAGE_NAME: name, _REF_NAME: name}}
    (path / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": [named]}))
    return Layout(path, target, images)


def _put(path: Path, data: bytes, media_type: str) -> dict[str, Any]:
    digest = _sha256(data)
    blob = path / "blobs" / "sha256" / digest.partition(":")[2]
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _json(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
