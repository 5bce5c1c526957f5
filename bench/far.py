"""A registry 10 ms and 500 Mbit/s away, and what of a lazy layer is here: for the benches over such a link."""

import contextlib
import http.client
import time
from dataclasses import dataclass
from pathlib import Path

from harness.proxy import Link, Proxy
from harness.treework import treework

from bench.bulk import Blob
from bench.node import OURS, Node
from soci_snapshotter.formats import zinfo, ztoc
from soci_snapshotter.formats.digest import parse

LINK = Link(0.010, 62.5e6)
"""Round trip in seconds, bytes per second."""

RATE = 62.5e6

_LEAST_SHARE = 0.95
"""Of its rate that a plain download must get, or the link is not what it says."""


def plain_share(proxy: Proxy, repository: str, blob: Blob) -> float:
    """The share of the link's rate that a plain GET of the blob gets, the best of three. RuntimeError if that is too
    little.
    """
    share = max(_plain(proxy, f"/v2/{repository}/blobs/{blob.digest}") for _ in range(3))
    if share < _LEAST_SHARE:
        raise RuntimeError(f"the link gives a plain download {share:.0%} of its rate: is the machine busy?")
    return round(share, 3)


def _plain(proxy: Proxy, path: str) -> float:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        started, size = time.monotonic(), 0
        while piece := response.read(1 << 20):
            size += len(piece)
    return size / (time.monotonic() - started) / RATE


@dataclass(frozen=True)
class Place:
    """4 KiB in the middle of a span: of which file, at which offset in it, and the span's compressed bytes."""

    span: int
    name: str
    offset: int
    compressed: int


class LazyLayer:
    """A layer that a node of ours pulled lazily, by its ztoc and its marks."""

    def __init__(self, node: Node, blob: Blob) -> None:
        root = node.daemons[OURS].root
        self._directory = next((root / "layers" / parse(blob.digest).hex).iterdir())
        stored = root / "content" / "blobs" / "sha256" / self._directory.name
        self._ztoc = ztoc.decode(stored.read_bytes())
        self._table = zinfo.span_table(self._ztoc, blob.size)

    @property
    def present(self) -> bytes:
        """One byte per span, 1 where its bytes are here (store.layerfiles)."""
        try:
            return (self._directory / "spans.live").read_bytes()[-len(self._table) :]
        except FileNotFoundError:  # complete: it needs no marks any more
            return b"\x01" * len(self._table)

    @property
    def fetched(self) -> int:
        """Compressed bytes of the spans that are here."""
        return sum(self._size(span) for span, here in enumerate(self.present) if here)

    def places(self) -> list[Place]:
        """One for each span whose middle lies well within a file."""
        files = iter(
            sorted((each.offset, each.size, each.name) for each in self._ztoc.entries if each.type == "reg")
        )
        found: list[Place] = []
        offset, size, name = next(files)
        for span in range(len(self._table)):
            start, end = self._table.uncompressed_range(span)
            middle = (start + end) // 2 & ~4095
            while offset + size <= middle + 8192:
                following = next(files, None)
                if following is None:
                    return found
                offset, size, name = following
            if offset <= middle:
                within = (middle - offset) & ~4095
                if start <= offset + within and offset + within + 4096 <= end:
                    found.append(Place(span, name.decode(), within, self._size(span)))
        return found

    def _size(self, span: int) -> int:
        start, end = self._table.compressed_range(span)
        return end - start


def read_place(root: Path, place: Place) -> float:
    """Seconds of opening the file and reading those 4 KiB."""
    return treework("one", root, place.offset, names=place.name.encode() + b"\0").seconds


def plain_ranges(proxy: Proxy, repository: str, blob: Blob, sizes: list[int]) -> list[float]:
    """Seconds of a GET of so many bytes each, over a connection that is kept open: what nobody can do without."""
    took = []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", proxy.port)) as connection:
        for number, size in enumerate(sizes):
            first = number * size
            started = time.monotonic()
            path = f"/v2/{repository}/blobs/{blob.digest}"
            connection.request("GET", path, headers={"Range": f"bytes={first}-{first + size - 1}"})
            connection.getresponse().read()
            took.append(time.monotonic() - started)
    return took[1:] or took
