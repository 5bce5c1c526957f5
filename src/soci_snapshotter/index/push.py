"""Push a SOCI index: its ztocs several at once, the empty config, then the index manifest that names them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Manifest
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.urls import Repo

# What `soci push --max-concurrent-uploads` says by default.
CONCURRENT_UPLOADS = 3


class Source(Protocol):
    """Where the blobs are (index.sinks.Store)."""

    def get(self, digest: Digest, limit: int) -> bytes:
        """A blob of at most `limit` bytes, checked."""

    def read(self, descriptor: Descriptor) -> Iterator[bytes]:
        """A blob's bytes in pieces."""


def push(
    client: RegistryClient,
    repo: Repo,
    source: Source,
    index: Digest,
    *,
    uploads: int = CONCURRENT_UPLOADS,
    progress: Callable[[Descriptor, int], None] | None = None,
) -> Descriptor:
    """Push the index manifest `index` and all it names; `progress(blob, bytes)` is told of each piece sent.

    Raises NotFound for a blob missing in `source`, Remote for a registry that refuses. The manifest goes last, so
    that nobody finds an index whose ztocs are not there.
    """
    data = source.get(index, oci.MANIFEST_LIMIT)
    manifest = oci.decode_manifest(data)
    if not isinstance(manifest, Manifest):
        raise Integrity(f"{index} is no SOCI index")
    blobs = {entry.digest: entry for entry in (manifest.config, *manifest.layers)}
    stop = threading.Event()

    def send(blob: Descriptor) -> None:
        if not stop.is_set():
            told = None if progress is None else lambda count: progress(blob, count)
            client.push_blob(repo, blob, lambda: source.read(blob), told)

    with ThreadPoolExecutor(max(1, uploads), "push") as pool:
        futures = [pool.submit(send, blob) for blob in blobs.values()]
        try:
            for future in futures:
                future.result()
        except BaseException:
            stop.set()
            raise
    return client.push_manifest(repo, data, manifest.media_type or oci.MANIFEST)
