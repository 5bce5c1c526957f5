"""`soci index`: list, show and remove SOCI indexes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import msgspec

from ..errors import Invalid, SociError
from ..formats import digest as digests
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor, parse_platform
from ..formats.sociindex import INDEX_V2, LAYER_MEDIA_TYPE, SociIndex
from ..index.catalog import ListedIndex
from ..store.artifacts import now_ns
from .catalogs import AliasedGroup, Opened, opened
from .context import Globals
from .tables import age, print_json, print_table, rfc3339

_HEADER = ("DIGEST", "SIZE", "IMAGE REF", "PLATFORM", "MEDIA TYPE", "MANIFEST VERSION", "CREATED")


@click.group(name="index", cls=AliasedGroup)
def index_command() -> None:
    """Manage SOCI indexes."""


@click.command(name="list")
@click.option("--ref", help="Only indexes of this image.")
@click.option("--quiet", "-q", is_flag=True, help="Print the digests only.")
@click.option("--platform", "-p", "platforms", multiple=True, help="os/arch[/variant]; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def list_command(
    flags: Globals, *, ref: str | None, quiet: bool, platforms: tuple[str, ...], as_json: bool
) -> None:
    """List the SOCI indexes there are, newest first."""
    if quiet and as_json:
        raise Invalid("--quiet and --json exclude each other")
    wanted = [parse_platform(platform) for platform in platforms]
    with opened(flags) as here:
        if ref:
            listed = here.of_image(ref, wanted)
        else:
            texts = [str(platform) for platform in wanted]
            listed = [one for one in here.catalog.indexes() if not texts or one.record.platform in texts]
        if quiet:
            for one in listed:
                print(one.digest)
            return
        names = here.image_names()
    if as_json:
        print_json([_summary(one, names.get(one.record.image_digest, ())) for one in listed])
        return
    now = now_ns()
    print_table(
        _HEADER,
        [
            (
                one.digest,
                str(one.record.size),
                name,
                one.record.platform,
                oci.MANIFEST,
                one.version,
                age(one.record.created_ns, now),
            )
            for one in listed
            # As the Go tool has it: a row for each name of the image, one without a name if there is none.
            for name in names.get(one.record.image_digest) or ("",)
        ],
    )


@click.command(name="info")
@click.argument("digest")
@click.option("--json", "as_json", is_flag=True, help="Print what the index means, not its manifest.")
@click.pass_obj
def info_command(flags: Globals, *, digest: str, as_json: bool) -> None:
    """Show the manifest of the SOCI index DIGEST."""
    wanted = digests.parse(digest)
    with opened(flags) as here:
        data, index = here.catalog.index(wanted)
        if as_json:
            print_json(_details(here, wanted, data, index))
            return
    print(msgspec.json.format(data, indent=2).decode())


@click.command(name="remove")
@click.argument("digest", nargs=-1)
@click.option("--ref", help="Remove all indexes of this image.")
@click.pass_obj
def remove_command(flags: Globals, *, digest: tuple[str, ...], ref: str | None) -> None:
    """Remove the SOCI indexes DIGEST..., and of their ztocs those that no other index needs."""
    if digest and ref:
        raise Invalid("give either digests or --ref, not both")
    # None at all is no error: scripts remove what a list printed, and it may have been empty.
    failed: list[SociError] = []
    with opened(flags) as here:
        texts: Sequence[str] = [one.digest for one in here.of_image(ref)] if ref else digest
        names = here.image_names()
        for text in dict.fromkeys(texts):
            try:
                removed = here.catalog.remove(digests.parse(text))
            except SociError as error:
                failed.append(error)
                continue
            _warn_of_images(removed[0], names.get(removed[0].record.image_digest, ()))
    if failed:
        raise type(failed[0])("; ".join(str(error) for error in failed))


def _warn_of_images(removed: ListedIndex, names: Sequence[str]) -> None:
    if removed.record.media_type == INDEX_V2:
        for name in names:
            print(
                f"soci: warning: image {name} still names the index {removed.digest}: pushing it will miss that",
                file=sys.stderr,
            )


def _summary(one: ListedIndex, names: Sequence[str]) -> dict[str, object]:
    record = one.record
    return {
        "digest": record.digest,
        "size": record.size,
        "image_refs": list(names),
        "image_digest": record.image_digest,
        "platform": record.platform,
        "media_type": oci.MANIFEST,
        "artifact_type": record.media_type,
        "manifest_version": one.version,
        "created_at": rfc3339(record.created_ns),
        "content_stores": list(one.stores),
        "namespace": record.namespace,
    }


def _details(here: Opened, digest: Digest, data: bytes, index: SociIndex) -> dict[str, object]:
    listed = next((one for one in here.catalog.indexes() if one.digest == digest), None)
    names = here.image_names()
    known = {} if listed is None else _summary(listed, names.get(listed.record.image_digest, ()))
    return {
        "digest": digest,
        "size": len(data),
        "media_type": oci.MANIFEST,
        "manifest_version": f"v{index.version}",
        **known,
        "build_tool": index.build_tool,
        "ztocs": [_part(layer, blob) for layer, blob in index.ztocs.items()],
        "prefetch_artifacts": [_part(layer, blob) for layer, blob in index.prefetch.items()],
    }


def _part(layer: Digest, blob: Descriptor) -> dict[str, object]:
    part: dict[str, object] = {"digest": blob.digest, "size": blob.size, "layer_digest": layer}
    if media_type := blob.annotations.get(LAYER_MEDIA_TYPE):
        part["layer_media_type"] = media_type
    return part


index_command.add_command(list_command)
index_command.add_command(info_command)
index_command.add_command(remove_command)
