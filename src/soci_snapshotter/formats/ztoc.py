"""The ztoc: a layer's table of contents and its checkpoints, as bytes and as values (FORMATS.md, 1).

Somebody else pushed it, so nothing in it is believed: sizes are bounded, offsets checked, vectors and
strings held against the file's length before anything is allocated. Writing is in ztoc_writer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats.flatbuf import Table, read_string, u32
from soci_snapshotter.formats.toc import MAX_ARCHIVE_SIZE, MAX_ENTRIES, Entry, EntryReader

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from soci_snapshotter.formats.toc import Mapped, Outline

__all__ = [
    "MAX_ARCHIVE_SIZE",
    "VERSION",
    "Compression",
    "Contents",
    "Entry",
    "Ztoc",
    "decode",
    "decode_spans",
    "locate_contents",
]

VERSION: Final = "0.9"
"""What every known tool writes into `version`."""

_DIGEST: Final = re.compile(rb"sha256:[0-9a-f]{64}")


class Compression(IntEnum):
    """compression_algorithm, as stored."""

    GZIP = 1
    UNCOMPRESSED = 2


@dataclass(frozen=True, slots=True)
class Ztoc:
    """A decoded ztoc. Sizes in bytes; `checkpoints` is the blob that `zinfo.span_table` reads."""

    version: str
    build_tool: str
    compressed_size: int
    uncompressed_size: int
    compression: Compression
    max_span_id: int
    span_digests: list[str]
    checkpoints: bytes | memoryview
    checkpoints_offset: int
    entries: list[Entry]


@dataclass(frozen=True, slots=True)
class Contents:
    """Where a ztoc's table of contents is, to read some of its entries out of a mapped file.

    For a ztoc that `decode` accepted: entries are in the tar's order, so that they can be searched.
    """

    start: int
    """Byte of the ztoc where the vector of entries begins."""
    count: int
    uncompressed_size: int

    def offset(self, data: Buffer, number: int) -> int:
        """Where in the tar the data of entry `number` begins."""
        with memoryview(data) as view:
            at = self.start + 4 * number
            return Table(view, at + u32(view, at)[0], "metadata").scalar(2, "q", "uncompressed_offset")

    def first_after(self, data: Buffer, position: int) -> int:
        """The first entry whose data begins after byte `position` of the tar; `count` if there is none."""
        low, high = 0, self.count
        while low < high:
            middle = (low + high) // 2
            if self.offset(data, middle) > position:
                high = middle
            else:
                low = middle + 1
        return low

    def reader(self, data: Mapped) -> EntryReader:
        """What reads entries, for a short time: it remembers."""
        return EntryReader(data, self.uncompressed_size)

    def entries(self, reader: EntryReader, first: int, stop: int) -> list[Entry]:
        """Entries first..stop-1. Integrity if they are not what `decode` would take."""
        return reader.read(self.start + 4 * first, stop - first)

    def read(self, data: Mapped, first: int, stop: int) -> list[Entry]:
        """The same, once."""
        return self.entries(self.reader(data), first, stop)

    def outlines(self, reader: EntryReader, first: int, stop: int) -> list[Outline]:
        """The same, in outline, of a table that was decoded before."""
        return reader.outlines(self.start + 4 * first, stop - first)


def locate_contents(data: Buffer) -> Contents:
    """Where the table of contents is; Integrity as from `decode`."""
    with memoryview(data) as view:
        root = Table(view, u32(view, 0)[0], "ztoc")
        size = root.scalar(3, "q", "uncompressed_archive_size")
        start, count = root.table(4, "toc").vector(0, 4, "metadata") if root.where(4, 4, "toc") else (0, 0)
        return Contents(start, count, size)


def decode(data: Buffer) -> Ztoc:
    """The whole ztoc, each entry checked. Integrity, naming the field, for anything that does not hold."""
    return _decode(data, with_entries=True)


def decode_spans(data: Buffer) -> Ztoc:
    """The same without looking at the table of contents: `entries` is empty. For a restart, over a mapped
    file.
    """
    return _decode(data, with_entries=False)


def _decode(data: Buffer, *, with_entries: bool) -> Ztoc:
    # Released at once, lest the frames of an exception keep a mapped file from being closed.
    with memoryview(data) as whole, whole.cast("B") as view:
        return _read(view, data, with_entries=with_entries)


def _read(view: memoryview, data: Buffer, *, with_entries: bool) -> Ztoc:
    if len(view) < 8:
        raise Integrity(f"ztoc: {len(view)} bytes is too short to be one")
    root = Table(view, u32(view, 0)[0], "ztoc")
    compressed = root.scalar(2, "q", "compressed_archive_size")
    uncompressed = root.scalar(3, "q", "uncompressed_archive_size")
    for field, size in (("compressed_archive_size", compressed), ("uncompressed_archive_size", uncompressed)):
        if not 0 <= size <= MAX_ARCHIVE_SIZE:
            raise Integrity(f"ztoc: {field} is {size}, not within 0..{MAX_ARCHIVE_SIZE}")
    info = root.table(5, "compression_info")
    algorithm = info.scalar(0, "b", "compression_algorithm", default=Compression.GZIP)
    if algorithm not in (Compression.GZIP, Compression.UNCOMPRESSED):
        raise Integrity(
            f"ztoc: compression_algorithm is {algorithm}; known are 1 (gzip) and 2 (uncompressed)"
        )
    max_span_id = info.scalar(1, "i", "max_span_id")
    digests = _span_digests(info)
    if len(digests) != max_span_id + 1:
        raise Integrity(f"ztoc: span_digests has {len(digests)} elements, but max_span_id is {max_span_id}")
    where, length = info.vector(3, 1, "checkpoints")
    entries: list[Entry] = []
    if with_entries and root.where(4, 4, "toc"):
        start, count = root.table(4, "toc").vector(0, 4, "metadata")
        if count > MAX_ENTRIES:
            raise Integrity(f"ztoc: metadata has {count} entries, more than {MAX_ENTRIES}")
        entries = EntryReader(data if isinstance(data, bytes) else bytes(view), uncompressed).read(
            start, count
        )
    return Ztoc(
        version=root.text(0, "version"),
        build_tool=root.text(1, "build_tool_identifier"),
        compressed_size=compressed,
        uncompressed_size=uncompressed,
        compression=Compression(algorithm),
        max_span_id=max_span_id,
        span_digests=digests,
        checkpoints=view[where : where + length],
        checkpoints_offset=where,
        entries=entries,
    )


def _span_digests(info: Table) -> list[str]:
    start, count = info.vector(2, 4, "span_digests")
    seen: dict[int, str] = {}  # a string named twice is stored once, so a small file cannot fill the memory
    digests = []
    for i in range(count):
        at = start + 4 * i
        target = at + u32(info.data, at)[0]
        text = seen.get(target)
        if text is None:
            raw = read_string(info.data, target, f"span_digests[{i}]", limit=71)
            if not _DIGEST.fullmatch(raw):
                raise Integrity(f"ztoc: span_digests[{i}] is {raw[:80]!r}, not sha256:<64 hex digits>")
            text = seen[target] = raw.decode()
        digests.append(text)
    return digests
