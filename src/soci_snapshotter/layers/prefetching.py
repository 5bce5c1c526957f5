"""Prefetch artifacts: what an index says a start will read, fetched from the moment the layer is mounted."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from soci_snapshotter.errors import SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import prefetch
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.formats.sociindex import SociIndex
from soci_snapshotter.layers.reader import LayerReader
from soci_snapshotter.registry.client import RegistryClient

_log = logging.getLogger(__name__)

_THREADS = (
    4  # artifacts are small: round trips, one after another in an image of 30 layers, are what would cost
)


class Prefetcher:
    """Told of each prepared layer. A context manager; artifacts still to come are forgotten when it is left."""

    def __init__(self, client: RegistryClient, *, enabled: bool) -> None:
        self._client = client
        self._enabled = enabled
        self._executor = ThreadPoolExecutor(_THREADS, "prefetch")
        self.artifacts = 0
        """Artifacts that were followed."""
        self.failures = 0
        """Artifacts that could not be."""

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def prepared(self, reference: Reference, index: SociIndex, reader: LayerReader) -> None:
        """A layer of `index`'s image is mounted. Returns at once."""
        if not reader.missing():
            return
        reader.warm()
        artifact = index.prefetch.get(digests.parse(reader.name))
        if self._enabled and artifact is not None:
            self._executor.submit(self._follow, reference, artifact, reader)

    def _follow(self, reference: Reference, artifact: Descriptor, reader: LayerReader) -> None:
        try:
            ranges = prefetch.decode(self._client.fetch(reference, artifact, prefetch.MAX_SIZE))
            reader.fetch_listed(ranges)
            self.artifacts += 1
        except (SociError, OSError) as error:
            self.failures += 1
            _log.warning(
                "prefetch artifact cannot be used: the layer's spans come when they are read",
                extra={"layer": reader.name, "artifact": str(artifact.digest), "error": str(error)},
            )
        except Exception:
            self.failures += 1
            _log.exception("prefetch failed", extra={"layer": reader.name})
