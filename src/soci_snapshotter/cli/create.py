"""`soci create REF`: index an image, in containerd, in an OCI layout, or straight in its registry."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from ..errors import Invalid
from ..formats.sociindex import INDEX_V1
from ..index.create import Indexed, soci_index
from ..index.layout_output import FORMATS, check_output, write_layout
from ..index.layouts import DIRECTORY, LayoutContent, listed, open_layout, root_of, whole
from ..index.outputs import Blob, distinct
from ..index.places import ContainerdContent, ContainerdPlace, RegistryContent, RegistryPlace
from ..index.publish import send
from ..index.push import CONCURRENT_UPLOADS
from ..store.artifacts import IndexRecord, now_ns
from .building import BuildFlags, Session, build_options, building, exclusive, summary
from .context import Globals, image_reference
from .registries import RegistryFlags, registry_access, registry_options


@click.command(name="create")
@click.argument("ref")
@click.argument("output", required=False, type=click.Path(path_type=Path))
@build_options
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default=None,
    help="Of OUTPUT, with --standalone; as REF is by default.",
)
@registry_options
@click.pass_obj
def create_command(
    flags: Globals,
    *,
    ref: str,
    output: Path | None,
    form: str | None,
    build: BuildFlags,
    registry: RegistryFlags,
) -> None:
    """Make the SOCI index (v1) of the image REF, which stays as it is.

    The index goes to the content store. With --standalone REF is an OCI layout, and the index is added to it, or to
    a copy at OUTPUT; with --from-registry it is pushed beside the image.
    """
    exclusive(flags, build)
    if output is not None and not build.standalone:
        raise Invalid(f"OUTPUT {str(output)!r} has a meaning with --standalone only")
    with building(build) as session:
        if build.standalone:
            _standalone(session, Path(ref), output, form)
        elif build.from_registry:
            _from_registry(session, ref, registry)
        else:
            _from_containerd(flags, session, ref)


def _from_containerd(flags: Globals, session: Session, ref: str) -> None:
    name = str(image_reference(ref))
    place = ContainerdPlace(flags.address, flags.namespace)
    with flags.artifacts() as artifacts, flags.containerd() as client:
        store = flags.store(client)
        session.reuse(artifacts, store, flags.namespace)
        root = client.images.get(name).target
        for indexed in session.index(place, ContainerdContent(client), name, root):
            blobs = soci_index(indexed, session.build_tool, version=1)
            store.publish(blobs, indexed.image.descriptor.digest)
            # containerd collects an index once a newer one has taken its label.
            artifacts.add(_record(flags, store.name, indexed, blobs[-1]), only=store.name == "containerd")
            session.result(summary(indexed, blobs[-1].digest), blobs[-1].digest)


def _record(flags: Globals, store: str, indexed: Indexed, index: Blob) -> IndexRecord:
    return IndexRecord(
        digest=index.digest,
        store=store,
        namespace=flags.namespace,
        image_digest=indexed.image.descriptor.digest,
        image_name=indexed.image.name,
        platform=str(indexed.image.platform),
        media_type=INDEX_V1,
        size=index.descriptor.size,
        created_ns=now_ns(),
    )


def _standalone(session: Session, path: Path, output: Path | None, form: str | None) -> None:
    place = open_layout(path)
    form = form or place.form
    if output is None and (place.form != DIRECTORY or form != DIRECTORY):
        raise Invalid(f"{path}: a tar cannot be added to; name the OUTPUT to write")
    target = output or path
    check_output(target, form)
    content = LayoutContent(place)
    blobs: list[Blob] = []
    roots = list(listed(place))
    for indexed in session.index(place, content, str(path), root_of(place)):
        own = soci_index(indexed, session.build_tool, version=1)
        blobs += own
        entry = msgspec.structs.replace(own[-1].descriptor, artifact_type=INDEX_V1)
        if entry.digest not in [root.digest for root in roots]:
            roots.append(entry)
        session.result(summary(indexed, entry.digest), entry.digest)
    kept = [] if target == path else whole(place)
    write_layout(target, form, [*kept, *distinct(blobs)], roots)


def _from_registry(session: Session, ref: str, registry: RegistryFlags) -> None:
    reference = image_reference(ref)
    place = RegistryPlace(registry_access(registry, reference), reference)
    with place.access.open() as client:
        root = client.resolve(reference)
        content = RegistryContent(client, reference)
        for indexed in session.index(place, content, str(reference), root):
            blobs = soci_index(indexed, session.build_tool, version=1)
            send(client, reference, blobs, tag=None, uploads=CONCURRENT_UPLOADS, progress=session.pushed)
            session.result(summary(indexed, blobs[-1].digest), blobs[-1].digest)
