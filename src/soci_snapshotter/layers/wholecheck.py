"""A whole tar against a table of contents, for bytes that came with another one. (layers.checking does it by spans.)"""

from __future__ import annotations

import os
from collections.abc import Iterator

from soci_snapshotter.errors import Condemned
from soci_snapshotter.formats.tarcheck import compare, compare_end, read_headers
from soci_snapshotter.formats.tree import BLOCK, Clock
from soci_snapshotter.formats.ztoc import Entry, Ztoc

_PIECE = 1 << 20  # headers this near to each other are read at once, with the small files between them


def check_whole(table: Ztoc, path: str, tar_size: int) -> None:
    """Compare every header of the tar at `path`, of `tar_size` bytes, with `table`. Raises Condemned naming the entry and
    the field, OSError.
    """
    clock = Clock()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        start, ended = 0, False
        for group in _groups(table.entries):
            _compare(group, _read(fd, start, group[-1].offset), start, clock)
            start = _after(group[-1])
        headers = read_headers(start, _read(fd, start, max(start, table.uncompressed_size)))
        difference = compare_end(headers, 0)
        if difference is not None:
            raise Condemned(f"the table of contents is not the tar's: {difference}")
        ended = headers.ended
    finally:
        os.close(fd)
    if not ended and tar_size > table.uncompressed_size:
        raise Condemned(f"the tar goes on after {table.uncompressed_size} bytes, where the table ends")


def _compare(group: list[Entry], chunks: Iterator[bytes], start: int, clock: Clock) -> None:
    difference = compare(group, read_headers(start, chunks), clock)
    if difference is not None:
        raise Condemned(f"the table of contents is not the tar's: {difference}")


def _groups(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Entries whose headers are read together: one at least, no more than _PIECE from the first to the last."""
    group: list[Entry] = []
    for entry in entries:
        if group and entry.offset - group[0].offset > _PIECE:
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _read(fd: int, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        data = os.pread(fd, min(_PIECE, stop - start), start)
        if not data:
            return
        yield data
        start += len(data)


def _after(entry: Entry) -> int:
    """Where the next entry's headers begin."""
    return entry.offset + (-(-entry.size // BLOCK) * BLOCK if entry.type == "reg" else 0)
