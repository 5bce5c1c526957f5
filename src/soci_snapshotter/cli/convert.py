"""`soci convert SRC DST`: an image with its SOCI indexes inside (v2), in containerd, as a layout, or in a registry."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import Invalid
from ..formats.oci import Descriptor, Index
from ..formats.reference import Reference
from ..formats.sociindex import INDEX_V2
from ..index.convert import ConvertedImage, convert, parts
from ..index.layout_output import FORMATS, check_output, write_layout
from ..index.layouts import ARCHIVE, LayoutContent, open_layout, root_of
from ..index.outputs import distinct
from ..index.places import (
    ContainerdContent,
    ContainerdPlace,
    ImageContent,
    Place,
    RegistryContent,
    RegistryPlace,
)
from ..index.publish import send
from ..index.push import CONCURRENT_UPLOADS
from ..index.sinks import ContainerdStore
from ..store.artifacts import Artifacts, IndexRecord, now_ns
from .building import BuildFlags, Session, build_options, building, exclusive, summary
from .context import Globals, image_reference
from .registries import RegistryFlags, registry_access, registry_options


@click.command(name="convert")
@click.argument("src")
@click.argument("dst")
@build_options
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default=ARCHIVE,
    show_default=True,
    help="Of DST, with --standalone.",
)
@registry_options
@click.pass_obj
def convert_command(
    flags: Globals, *, src: str, dst: str, form: str, build: BuildFlags, registry: RegistryFlags
) -> None:
    """Make of the image SRC the image DST, which has its SOCI indexes (v2) inside and runs everywhere SRC does.

    SRC and DST are images in containerd; with --standalone, OCI layouts; with --from-registry, images in registries.
    """
    exclusive(flags, build)
    with building(build) as session:
        if build.standalone:
            _standalone(session, build, Path(src), Path(dst), form)
        elif build.from_registry:
            _from_registry(session, build, image_reference(src), tagged(dst), registry)
        else:
            _from_containerd(flags, session, build, src, tagged(dst))


def tagged(text: str) -> Reference:
    """DST as a reference with a tag; Invalid otherwise, because a name without one would hide what it replaces."""
    reference = image_reference(text)
    if reference.digest is not None or ":" not in text.rpartition("/")[2]:
        raise Invalid(f"DST {text!r}: want a tag, as in registry/repository:tag, and no digest")
    return reference


def _convert(
    session: Session,
    build: BuildFlags,
    place: Place,
    content: ImageContent,
    name: str,
    root: Descriptor | Index,
) -> ConvertedImage:
    indexed = session.index(place, content, name, root)
    asked = True if build.platforms else (False if build.all_platforms else None)
    converted = convert(content, root, indexed, session.build_tool, asked=asked)
    for image, (descriptor, _, _) in zip(indexed, converted.platforms, strict=True):
        session.say(summary(image, descriptor.digest))
    return converted


def _from_containerd(flags: Globals, session: Session, build: BuildFlags, src: str, dst: Reference) -> None:
    name = str(image_reference(src))
    place = ContainerdPlace(flags.address, flags.namespace)
    with flags.artifacts() as artifacts, flags.containerd() as client:
        store = flags.store(client)
        session.reuse(artifacts, store, flags.namespace)
        content = ContainerdContent(client)
        converted = _convert(session, build, place, content, name, client.images.get(name).target)
        # The image is containerd's in any case; the daemon's own store gets what it would fetch.
        if store.name != ContainerdStore.name:
            for blobs in converted.soci:
                store.publish(blobs, None)
        ContainerdStore(client).publish_image(converted.own, str(dst))
        _record(flags, artifacts, store.name, converted, str(dst))
        session.result(f"image {dst} -> {converted.root.digest}", converted.root.digest)


def _record(flags: Globals, artifacts: Artifacts, store: str, converted: ConvertedImage, name: str) -> None:
    for descriptor, manifest, platform in converted.platforms:
        record = IndexRecord(
            digest=descriptor.digest,
            store=store,
            namespace=flags.namespace,
            image_digest=manifest,
            image_name=name,
            platform=str(platform),
            media_type=INDEX_V2,
            size=descriptor.size,
            created_ns=now_ns(),
        )
        artifacts.add(record, only=False)


def _standalone(session: Session, build: BuildFlags, src: Path, dst: Path, form: str) -> None:
    check_output(dst, form)
    place = open_layout(src)
    content = LayoutContent(place)
    converted = _convert(session, build, place, content, str(src), root_of(place))
    write_layout(
        dst, form, [*parts(content, converted), *distinct(converted.own)], [converted.root.descriptor]
    )
    session.result(f"image {dst} -> {converted.root.digest}", converted.root.digest)


def _from_registry(
    session: Session, build: BuildFlags, src: Reference, dst: Reference, registry: RegistryFlags
) -> None:
    access = registry_access(registry, src)
    target = access if dst.host == src.host else registry_access(registry, dst)
    place = RegistryPlace(access, src)
    with access.open() as client, target.open() as destination:
        content = RegistryContent(client, src)
        converted = _convert(session, build, place, content, str(src), client.resolve(src))
        blobs = [*parts(content, converted), *distinct(converted.own)]
        send(
            destination,
            dst,
            blobs,
            tag=dst.tag,
            uploads=CONCURRENT_UPLOADS,
            progress=session.pushed,
            mount_from=src.repository if src.host == dst.host else "",
        )
        session.result(f"image {dst} -> {converted.root.digest}", converted.root.digest)
