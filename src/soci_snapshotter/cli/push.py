"""`soci push REF`: put the SOCI indexes of an image beside it in its registry."""

from __future__ import annotations

import contextlib
import sys
import threading
from dataclasses import dataclass, replace

import click

from ..errors import NotFound, Remote
from ..formats import oci
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.reference import Reference
from ..formats.sociindex import INDEX_V1
from ..index.images import LocalImage, find_images
from ..index.outputs import Blob
from ..index.places import ContainerdContent, ImageContent
from ..index.push import CONCURRENT_UPLOADS, is_converted, push, push_image
from ..index.sinks import Store
from ..policy.discovery import candidates
from ..registry.client import RegistryClient
from ..registry.referrers import index_tag as tag_of
from ..store.artifacts import Artifacts
from .context import Bytes, Globals, image_reference, wanted_platforms
from .progress import Meter, Task, metering
from .registries import RegistryFlags, open_registry, registry_options

_SHORT = 12


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
    type=click.IntRange(min=0),
    default=CONCURRENT_UPLOADS,
    show_default=True,
    help="Blobs sent at once; 0 is the default.",
)
@click.option(
    "--chunk-size",
    type=Bytes(zero=True),
    default=0,
    metavar="BYTES",
    help="Send larger blobs in pieces of this size; 0 does so above 256 MiB, or where the registry wants it.",
)
@click.option(
    "--index-tag",
    is_flag=True,
    help="Name the index by a tag too, sha256-<hex of the manifest>.soci, for registries that list no referrers.",
)
@click.option(
    "--snapshotter",
    envvar="CONTAINERD_SNAPSHOTTER",
    show_envvar=True,
    help="Taken as the Go tool takes it; a push asks no snapshotter.",
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
    chunk_size: int,
    index_tag: bool,
    snapshotter: str | None,
    quiet: bool,
    registry: RegistryFlags,
) -> None:
    """Push the SOCI index of the image REF, made by `soci create`, to the image's registry.

    An image made by `soci convert` has its indexes inside and is pushed whole, whatever platforms are named.
    """
    del snapshotter
    wanted = wanted_platforms(platforms, everything=all_platforms)
    reference = image_reference(ref)
    with (
        flags.artifacts() as artifacts,
        flags.containerd() as client,
        open_registry(registry, reference) as remote,
        metering(quiet=quiet) as meter,
    ):
        sending = _Sending(max_concurrent_uploads or CONCURRENT_UPLOADS, chunk_size, index_tag)
        pushing = _Pushing(remote, reference, sending, quiet, meter)
        root = client.images.get(str(reference)).target
        content = ContainerdContent(client)
        if is_converted(content, root):
            pushing.image(content, root)
            return
        store = flags.store(client)
        pushed = 0
        missing: list[NotFound] = []
        for image in find_images(client, str(reference), wanted, implied=not platforms):
            try:
                index = _index_of(flags, artifacts, store, image)
            except NotFound as error:  # with several platforms, one may have been too small to index
                missing.append(error)
                continue
            pushed += 1
            if pushing.wanted(image.descriptor, index, existing_index):
                pushing.index(store, index, image.descriptor)
        if not pushed and missing:
            raise missing[0]


@dataclass(frozen=True, slots=True)
class _Sending:
    """How blobs go: so many at once, larger ones in pieces of `chunk` bytes (0 for the default); the tag wanted."""

    uploads: int
    chunk: int
    tag: bool


class _Pushing:
    """One command's uploads: a bar per blob on a terminal, a line per result on stdout."""

    def __init__(
        self, remote: RegistryClient, reference: Reference, sending: _Sending, quiet: bool, meter: Meter
    ) -> None:
        self._remote = remote
        self._reference = reference
        self._sending = sending
        self._quiet = quiet
        self._meter = meter
        self._lock = threading.Lock()
        self._tasks: dict[Digest, Task] = {}

    def wanted(self, image: Descriptor, index: Digest, existing: str) -> bool:
        """What --existing-index says about the indexes that are there already. Pushing one again changes nothing."""
        if existing == "allow":
            return True
        found = self._found(image)
        if found and existing == "skip":
            self._say(f"skipped: {self._reference} has the SOCI index {found[0]} already")
            return False
        others = [digest for digest in found if digest != index]
        if others:
            print(
                f"soci: warning: {self._reference} has another SOCI index already: {others[0]}",
                file=sys.stderr,
            )
        return True

    def _found(self, image: Descriptor) -> list[Digest]:
        try:
            listed = self._remote.referrers(self._reference, image.digest, INDEX_V1, pushing=True)
        except Remote:
            if not self._sending.tag:
                raise
            listed = []  # the registry that the tag is for
        found = [entry.digest for entry in listed]
        if self._sending.tag:
            with contextlib.suppress(NotFound):
                named = replace(self._reference, tag=tag_of(image.digest), digest=None)
                found.append(self._remote.resolve(named).digest)
        return list(candidates(found))

    def index(self, store: Store, index: Digest, image: Descriptor) -> None:
        """Push a v1 index of the image."""
        tag = tag_of(image.digest) if self._sending.tag else None
        push(
            self._remote,
            self._reference,
            store,
            index,
            uploads=self._sending.uploads,
            progress=self._progress,
            tag=tag,
            piece=self._sending.chunk,
        )
        self._result(index, f"pushed {index} for {image.digest}" + (f", as {tag}" if tag else ""))

    def image(self, content: ImageContent, root: Descriptor) -> None:
        """Push a whole converted image."""
        push_image(
            self._remote,
            self._reference,
            content,
            root,
            uploads=self._sending.uploads,
            progress=self._progress,
            piece=self._sending.chunk,
        )
        self._result(root.digest, f"pushed {root.digest} as {self._reference}, with its SOCI indexes")

    def _progress(self, blob: Blob, count: int) -> None:
        """Called from the uploading threads; a negative count takes back what has to be sent again."""
        with self._lock:
            task = self._tasks.get(blob.digest)
            if task is None:
                label = blob.digest.hex[:_SHORT]
                task = self._tasks[blob.digest] = self._meter.task(label, blob.descriptor.size, "pushing")
        task.advance(count)

    def _result(self, digest: Digest, text: str) -> None:
        print(digest if self._quiet else text, flush=True)

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(text, flush=True)


def _index_of(flags: Globals, artifacts: Artifacts, store: Store, image: LocalImage) -> Digest:
    """The newest v1 index of the image that this store has."""
    records = artifacts.of_image(image.descriptor.digest, store.name, flags.namespace)
    candidates = [record.digest for record in records if record.media_type == INDEX_V1]
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
