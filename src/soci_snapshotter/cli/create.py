"""`soci create REF`: index an image that is in containerd."""

from __future__ import annotations

import click

from ..errors import Invalid
from ..formats.sociindex import INDEX_V1
from ..index.create import (
    DEFAULT_MIN_LAYER_SIZE,
    DEFAULT_SPAN_SIZE,
    CreatedIndex,
    CreateOptions,
    create,
)
from ..index.images import LocalImage, find_images
from ..index.sinks import Store
from ..index.workers import Built
from ..store.artifacts import Artifacts, IndexRecord, now_ns
from .context import Bytes, Globals, image_reference, wanted_platforms


@click.command(name="create")
@click.argument("ref")
@click.option("--platform", "-p", "platforms", multiple=True, help="os/arch[/variant]; may be repeated.")
@click.option("--all-platforms", is_flag=True, help="Every platform that was pulled.")
@click.option(
    "--span-size",
    type=Bytes(),
    default=DEFAULT_SPAN_SIZE,
    show_default=True,
    help="Uncompressed bytes between checkpoints.",
)
@click.option(
    "--min-layer-size",
    type=Bytes(zero=True),
    default=DEFAULT_MIN_LAYER_SIZE,
    show_default=True,
    help="Smaller layers get no ztoc and are pulled whole.",
)
@click.pass_obj
def create_command(
    flags: Globals,
    *,
    ref: str,
    platforms: tuple[str, ...],
    all_platforms: bool,
    span_size: int,
    min_layer_size: int,
) -> None:
    """Make the SOCI index (v1) of the image REF, which stays as it is."""
    wanted = wanted_platforms(platforms, everything=all_platforms)
    name = str(image_reference(ref))
    options = CreateOptions(span_size=span_size, min_layer_size=min_layer_size)
    with flags.artifacts() as artifacts, flags.containerd() as client:
        store = flags.store(client)
        images = find_images(client, name, wanted)
        refused = []
        for image in images:
            try:
                created = create(client, store, image, options, _print_built)
            except Invalid as error:
                # With several platforms one may have nothing to index; only if none has, that is an error.
                refused.append(error)
                continue
            _record(flags, artifacts, store, created)
            _print_created(image, created)
        if len(refused) == len(images):
            raise refused[0]
        for refusal in refused:
            print(f"skipped: {refusal}")


def _record(flags: Globals, artifacts: Artifacts, store: Store, created: CreatedIndex) -> None:
    record = IndexRecord(
        digest=created.digest,
        store=store.name,
        namespace=flags.namespace,
        image_digest=created.image.descriptor.digest,
        image_name=created.image.name,
        platform=str(created.image.platform),
        media_type=INDEX_V1,
        size=created.size,
        created_ns=now_ns(),
    )
    # containerd collects an index once a newer one has taken its label.
    artifacts.add(record, only=store.name == "containerd")


def _print_built(built: Built) -> None:
    print(f"layer {built.layer} -> ztoc {built.digest} ({built.size} bytes)", flush=True)


def _print_created(image: LocalImage, created: CreatedIndex) -> None:
    for skipped in created.skipped:
        print(f"layer {skipped.layer.digest} skipped: {skipped.why}")
    print(f"index {created.digest} ({image.platform}): {len(created.ztocs)} of {_count(image)} layers")


def _count(image: LocalImage) -> int:
    return len(image.manifest.layers)
