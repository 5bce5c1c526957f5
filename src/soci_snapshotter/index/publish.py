"""Sending what was made straight to a registry: blobs several at once, then manifests, the root under its tag last."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import Remote
from ..formats import oci
from ..formats.reference import Reference
from ..registry.client import RegistryClient
from .outputs import Blob
from .parallel import run_all

_DOCUMENTS = frozenset(oci.MANIFEST_TYPES + oci.INDEX_TYPES)


def send(
    client: RegistryClient,
    target: Reference,
    blobs: Iterable[Blob],
    *,
    tag: str | None,
    uploads: int,
    progress: Callable[[Blob, int], None] = lambda _blob, _count: None,
    mount_from: str = "",
    piece: int = 0,
    tag_suffices: bool = False,
) -> None:
    """Push the blobs, each after those it names; the last is the root, under `tag` if there is one.

    `piece` and `tag_suffices`: see RegistryClient.

    What the repository has is not sent again; what `mount_from`, another repository of the same registry, has is
    taken from there. `progress` gets a negative count for bytes that have to go again. Raises Remote for a registry
    that refuses; nothing names a blob that is not there, at any time.
    """
    listed = list(blobs)
    documents = [blob for blob in listed if blob.descriptor.media_type in _DOCUMENTS]
    _send_blobs(
        client,
        target,
        [blob for blob in listed if blob not in documents],
        uploads,
        progress,
        mount_from,
        piece,
    )
    for blob in documents:
        data = b"".join(blob.pieces())
        last = blob is documents[-1]
        client.push_manifest(
            target,
            data,
            blob.descriptor.media_type,
            tag if last else None,
            tag_suffices=last and tag_suffices,
        )


def _send_blobs(
    client: RegistryClient,
    target: Reference,
    blobs: Sequence[Blob],
    uploads: int,
    progress: Callable[[Blob, int], None],
    mount_from: str,
    piece: int,
) -> None:
    def one(blob: Blob, stopped: Callable[[], bool]) -> None:
        client.push_blob(
            target,
            blob.descriptor,
            lambda: _until(stopped, blob),
            lambda count: progress(blob, count),
            mount_from=mount_from,
            piece=piece,
        )

    run_all([functools.partial(one, blob) for blob in blobs], uploads)


def _until(stopped: Callable[[], bool], blob: Blob) -> Iterator[bytes]:
    for piece in blob.pieces():
        if stopped():
            raise Remote(f"blob {blob.digest}: upload stopped")
        yield piece
