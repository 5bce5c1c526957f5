"""`soci rebuild-db`: find again, from the stores' content, what indexes there are."""

from __future__ import annotations

import click

from ..index.holdings import Blobs, ContainerdBlobs
from ..index.rebuild import rebuild
from .catalogs import opened
from .context import Globals


@click.command(name="rebuild-db")
@click.pass_obj
def rebuild_db_command(flags: Globals) -> None:
    """Make the list of SOCI indexes anew: after an image was pulled with one, or the list was lost."""
    with opened(flags) as here:
        listed = {store.name for store in here.stores}
        sources: list[Blobs] = []
        if here.client is not None and ContainerdBlobs.name not in listed:
            sources.append(ContainerdBlobs(here.client))  # images are there even if no index is looked for
        done = rebuild(here.artifacts, here.stores, sources, here.names, flags.namespace)
    print(
        f"{done.found} indexes found: {done.added} added to the list, {done.removed} that are gone taken off it"
    )
