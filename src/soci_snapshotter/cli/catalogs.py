"""Opening the catalogue for the commands that list, show, remove and find again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import click
from click.core import ParameterSource

from ..containerd.client import ContainerdClient
from ..errors import NotFound, Remote
from ..formats.digest import Digest
from ..formats.oci import Platform
from ..index.catalog import Catalog, ListedIndex
from ..index.holdings import Blobs, ContainerdBlobs, DirectoryBlobs
from ..index.imagenames import ImageNames
from ..store.artifacts import Artifacts
from .context import Globals, image_reference


class AliasedGroup(click.Group):
    """A group whose commands `list` and `remove` are also `ls` and `rm`, as in the Go tool."""

    _ALIASES: ClassVar[Mapping[str, str]] = {"ls": "list", "rm": "remove"}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click."""
        return super().get_command(ctx, self._ALIASES.get(cmd_name, cmd_name))


@dataclass(frozen=True, slots=True)
class Opened:
    """What a command works on. `names` and `client` are None when there is no containerd and none is needed."""

    artifacts: Artifacts
    catalog: Catalog
    stores: Sequence[Blobs]
    client: ContainerdClient | None
    names: ImageNames | None

    def image_names(self) -> Mapping[Digest, Sequence[str]]:
        """The names of image manifests; without containerd, those that were recorded."""
        if self.names is not None:
            return self.names.by_manifest()
        recorded = {one.record.image_digest: one.record.image_name for one in self.catalog.indexes()}
        return {digest: [name] for digest, name in recorded.items() if name}

    def of_image(self, ref: str, platforms: Sequence[Platform] = ()) -> list[ListedIndex]:
        """The indexes of the image `ref`, of these platforms if there are any.

        An image that containerd does not have is known by the name its index was made with. NotFound when it has
        no such platform, or there is neither image nor index of it.
        """
        name = str(image_reference(ref))
        listed = self.catalog.indexes()
        wanted = {str(platform.normalized()) for platform in platforms}
        try:
            if self.names is None:
                raise NotFound(f"no SOCI index of an image {name} here")
            manifests = self.names.manifests(name)
        except NotFound:
            found = [one for one in listed if one.record.image_name == name]
            if not found:
                raise
            return [one for one in found if not wanted or one.record.platform in wanted]
        if missing := wanted - {str(manifest.platform) for manifest in manifests if manifest.platform}:
            raise NotFound(f"image {name}: no image for platform {', '.join(sorted(missing))}")
        digests = {
            manifest.digest for manifest in manifests if not wanted or str(manifest.platform) in wanted
        }
        return [one for one in listed if one.record.image_digest in digests]


@contextlib.contextmanager
def opened(flags: Globals) -> Iterator[Opened]:
    """The catalogue of both stores, or of the one that --content-store names if it was given.

    Remote when containerd cannot be reached, unless only the soci store was asked for.
    """
    chosen = _chosen_store(flags)
    with contextlib.ExitStack() as stack:
        artifacts = stack.enter_context(flags.artifacts())
        client = None
        try:
            client = stack.enter_context(flags.containerd())
        except Remote:
            if chosen != DirectoryBlobs.name:
                raise
        stores: list[Blobs] = []
        if client is not None and chosen != DirectoryBlobs.name:
            stores.append(ContainerdBlobs(client))
        if chosen != ContainerdBlobs.name:
            stores.append(DirectoryBlobs(flags.root))
        names = None if client is None else ImageNames(client)
        yield Opened(artifacts, Catalog(artifacts, stores, flags.namespace), stores, client, names)


def _chosen_store(flags: Globals) -> str | None:
    source = click.get_current_context().find_root().get_parameter_source("content_store")
    return None if source is ParameterSource.DEFAULT else flags.content_store
