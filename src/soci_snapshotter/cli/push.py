"""`soci push REF`: put the SOCI indexes of an image beside it in its registry."""

from __future__ import annotations

import sys

import click

from ..errors import NotFound
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.reference import Reference
from ..formats.sociindex import INDEX_V1
from ..index.images import LocalImage, find_images
from ..index.push import CONCURRENT_UPLOADS, push
from ..index.sinks import Store
from ..registry.client import RegistryClient
from ..store.artifacts import Artifacts
from .context import Globals, image_reference, wanted_platforms
from .registries import RegistryFlags, open_registry, registry_options


@click.command(name="push")
@click.argument("ref")
@click.option("--platform", "-p", "platforms", multiple=True, help="os/arch[/variant]; may be repeated.")
@click.option("--all-platforms", is_flag=True, help="Every platform that was pulled.")
@click.option(
    "--existing-index",
    type=click.Choice(["warn", "skip", "allow"]),
    default="warn",
    show_default=True,
    help="What to do when the registry has a SOCI index for the image already.",
)
@click.option(
    "--max-concurrent-uploads",
    type=click.IntRange(min=1),
    default=CONCURRENT_UPLOADS,
    show_default=True,
    help="Blobs sent at once.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print the digests only.")
@registry_options
@click.pass_obj
def push_command(
    flags: Globals,
    *,
    ref: str,
    platforms: tuple[str, ...],
    all_platforms: bool,
    existing_index: str,
    max_concurrent_uploads: int,
    quiet: bool,
    registry: RegistryFlags,
) -> None:
    """Push the SOCI index of the image REF, made by `soci create`, to the image's registry."""
    wanted = wanted_platforms(platforms, everything=all_platforms)
    reference = image_reference(ref)
    with (
        flags.artifacts() as artifacts,
        flags.containerd() as client,
        open_registry(registry, reference) as remote,
    ):
        store = flags.store(client)
        pushed = 0
        missing: list[NotFound] = []
        for image in find_images(client, str(reference), wanted):
            try:
                index = _index_of(flags, artifacts, store, image)
            except NotFound as error:  # with several platforms, one may have been too small to index
                missing.append(error)
                continue
            pushed += 1
            if not _wanted(remote, reference, image.descriptor, index, existing_index):
                continue
            sent = push(remote, reference, store, index, uploads=max_concurrent_uploads)
            print(sent.digest if quiet else f"pushed {sent.digest} for {image.descriptor.digest}")
        if not pushed and missing:
            raise missing[0]


def _index_of(flags: Globals, artifacts: Artifacts, store: Store, image: LocalImage) -> Digest:
    """The newest index of the image that this store has."""
    records = artifacts.of_image(image.descriptor.digest, store.name, flags.namespace)
    candidates = [record.digest for record in records]
    labelled = store.index_of(image.descriptor.digest)
    if labelled is not None and labelled not in candidates:
        candidates.append(labelled)
    for digest in candidates:
        try:
            store.get(digest, oci.MANIFEST_LIMIT)
        except NotFound:
            continue  # collected since
        return digest
    raise NotFound(f"{image.name} has no SOCI index in the {store.name} store; make one with: soci create")


def _wanted(
    remote: RegistryClient, reference: Reference, image: Descriptor, index: Digest, existing: str
) -> bool:
    """What --existing-index says about an index that is there already."""
    if existing == "allow":
        return True
    others = [
        found.digest for found in remote.referrers(reference, image.digest, INDEX_V1) if found.digest != index
    ]
    if not others:
        return True
    if existing == "skip":
        print(f"skipped: {reference} has the SOCI index {others[0]} already")
        return False
    print(f"soci: warning: {reference} has another SOCI index already: {others[0]}", file=sys.stderr)
    return True
