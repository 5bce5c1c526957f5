"""Sending what was made straight to a registry: blobs several at once, then manifests, the root under its tag last."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..formats import oci
from ..formats.reference import Reference
from ..registry.client import RegistryClient
from .outputs import Blob

_DOCUMENTS = frozenset(oci.MANIFEST_TYPES + oci.INDEX_TYPES)


def send(
    client: RegistryClient,
    target: Reference,
    blobs: Iterable[Blob],
    *,
    tag: str | None,
    uploads: int,
    progress: Callable[[Blob, int], None] = lambda _blob, _count: None,
) -> None:
    """Push the blobs, each after those it names; the last is the root, under `tag` if there is one.

    What the repository has is not sent again. Raises Remote for a registry that refuses; nothing names a blob that
    is not there, at any time.
    """
    listed = list(blobs)
    documents = [blob for blob in listed if blob.descriptor.media_type in _DOCUMENTS]
    _send_blobs(client, target, [blob for blob in listed if blob not in documents], uploads, progress)
    for blob in documents:
        data = b"".join(blob.pieces())
        last = blob is documents[-1]
        client.push_manifest(target, data, blob.descriptor.media_type, tag if last else None)


def _send_blobs(
    client: RegistryClient,
    target: Reference,
    blobs: Sequence[Blob],
    uploads: int,
    progress: Callable[[Blob, int], None],
) -> None:
    stop = threading.Event()

    def one(blob: Blob) -> None:
        if not stop.is_set():
            client.push_blob(target, blob.descriptor, blob.pieces, lambda count: progress(blob, count))

    with ThreadPoolExecutor(max(1, uploads), "push") as pool:
        futures = [pool.submit(one, blob) for blob in blobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise
