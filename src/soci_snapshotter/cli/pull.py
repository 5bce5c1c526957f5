"""`soci pull REF`: get an image ready to run, fetching only what the snapshotter asks for."""

from __future__ import annotations

import click

from ..formats import digest as digests
from ..formats.oci import parse_platform
from .context import Globals, host_platform, image_reference
from .progress import reporting
from .pulling import Pulled, PullOptions, pull
from .registries import RegistryFlags, open_registry, registry_options


@click.command(name="pull")
@click.argument("ref")
@click.option("--platform", "-p", help="os/arch[/variant]; default: this machine's.")
@click.option("--soci-index-digest", help="Use this SOCI index instead of looking for one.")
@click.option(
    "--snapshotter",
    envvar="CONTAINERD_SNAPSHOTTER",
    default="soci",
    show_default=True,
    show_envvar=True,
    help="The snapshotter, as containerd's configuration names it.",
)
@click.option(
    "--max-concurrent-downloads",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Layers fetched at once, when they are fetched.",
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@registry_options
@click.pass_obj
def pull_command(
    flags: Globals,
    *,
    ref: str,
    platform: str | None,
    soci_index_digest: str | None,
    snapshotter: str,
    max_concurrent_downloads: int,
    quiet: bool,
    registry: RegistryFlags,
) -> None:
    """Pull the image REF into containerd; a lazy snapshotter mounts layers before their bytes are here."""
    reference = image_reference(ref)
    options = PullOptions(
        snapshotter=snapshotter,
        platform=parse_platform(platform) if platform else host_platform(),
        soci_index=digests.parse(soci_index_digest) if soci_index_digest else None,
        max_concurrent_downloads=max_concurrent_downloads,
    )
    with (
        flags.containerd() as client,
        open_registry(registry, reference) as remote,
    ):
        with reporting(quiet=quiet) as report:
            pulled = pull(client, remote, reference, options, report)
        if not quiet:
            print(_summary(str(reference), pulled))


def _summary(name: str, pulled: Pulled) -> str:
    return (
        f"{name}: {pulled.lazy} lazy, {pulled.local} local, {pulled.existing} existing, "
        f"{pulled.fetched} bytes of layers fetched, {pulled.seconds:.1f} s"
    )
