"""Ztocs on their way from the registry into the content store."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from soci_snapshotter.errors import Integrity, Remote
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.layers.ahead import ZtocsAhead
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.store.content import ContentStore

ZTOC_LIMIT = 512 << 20  # 16,000 checkpoints of 32 KiB: a 64 GiB layer at the default span size
_TRIES = 3  # connections break; each request has its own retries below this


def fetch(
    client: RegistryClient,
    content: ContentStore,
    reference: Reference,
    ztoc: Descriptor,
    ahead: ZtocsAhead | None = None,
) -> None:
    """Put a ztoc into the store piece by piece: its size is the pusher's word, and memory is the node's.

    `ahead` may have it already.

    Integrity for a size that could not be a ztoc's and for other bytes than the digest says, Remote when the registry
    does not give it in time.
    """
    if not 0 < ztoc.size <= ZTOC_LIMIT:
        raise Integrity(f"ztoc {ztoc.digest}: {ztoc.size} bytes; the limit is {ZTOC_LIMIT}")
    data = ahead.take(ztoc.digest) if ahead is not None else None
    if data is not None:
        content.put_stream((data,), ztoc.digest, ztoc.size)
        return
    deadline = time.monotonic() + client.options.request_timeout
    for left in reversed(range(_TRIES)):
        try:
            with client.open_blob(reference, ztoc) as pieces:
                content.put_stream(_until(pieces, deadline, ztoc), ztoc.digest, ztoc.size)
            return
        except Remote:
            if not left or time.monotonic() > deadline:
                raise


def _until(pieces: Iterable[bytes], deadline: float, ztoc: Descriptor) -> Iterator[bytes]:
    """`pieces`, until the deadline: a drip of bytes must not hold up a Prepare for ever."""
    for piece in pieces:
        if time.monotonic() > deadline:
            raise Remote(f"ztoc {ztoc.digest}: not here in time; check the registry")
        yield piece
