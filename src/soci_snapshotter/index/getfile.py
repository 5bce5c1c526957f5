"""One file out of a layer that is not unpacked: only the spans it lies in are read, verified and inflated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import Integrity, Invalid, NotFound, Unsupported
from ..formats import zinfo
from ..formats.digest import Buffer
from ..formats.toc import Entry
from ..formats.zinfo import SpanTable
from ..formats.ztoc import Compression, Ztoc
from ..linux.inflate import inflate_chunks

ReadLayer = Callable[[int, int], Iterable[bytes]]
"""The layer's bytes from an offset on, so many of them, in pieces; called with a size above 0."""

# Linux follows so many symbolic links in one path and then says ELOOP (path_resolution(7)).
MAX_LINKS = 40
# PATH_MAX without its NUL, as in formats.tree.
MAX_PATH = 4095

# A span of up to so many compressed bytes is read once and held; a larger one is read twice, first for its digest.
_HELD = 16 << 20

_SPARSE = b"GNU.sparse."


class Contents:
    """The names in one layer, as unpacking it would leave them; more forgiving than formats.tree about the rest.

    Names match with and without `./` and leading or trailing slashes. A hard link means what its target was when
    the link was made.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        self._at: dict[bytes, int] = {}
        # Hard links, and whose content they have.
        self._same: dict[int, int] = {}
        # Directories that took the place of something else: what was below the name before is gone.
        self._born: dict[bytes, int] = {}
        for index, entry in enumerate(entries):
            path = b"/".join(_parts(entry.name))
            if entry.type == "hardlink":
                target = self._at.get(b"/".join(_parts(entry.linkname)))
                if target is not None:
                    self._same[index] = self._same.get(target, target)
            elif entry.type == "dir" and path in self._at and entries[self._at[path]].type != "dir":
                self._born[path] = index
            self._at[path] = index

    def find(self, path: bytes) -> Entry:
        """The regular file at `path`, symbolic links followed within the layer.

        NotFound, or Invalid for what is no file and for links in a circle; both name path and obstacle.
        """
        shown = _shown(path)
        if len(path) > MAX_PATH:
            raise Invalid(f"{shown}...: a path has at most {MAX_PATH} bytes")
        found, end = self._walk(path)
        if found is None:
            below = end + b"/"
            if not end or any(name.startswith(below) for name in self._at):
                raise Invalid(f"{shown} is a directory; name a file in it")
            to = "" if end == b"/".join(_parts(path)) else f" (it leads to {_shown(end)})"
            raise NotFound(f"{shown} is not in this layer{to}; see the names with: soci ztoc info")
        if found.type == "dir":
            raise Invalid(f"{shown} is a directory; name a file in it")
        if found.type != "reg":
            raise Invalid(f"{shown} is a {_KINDS.get(found.type, found.type)}, which has no content")
        if any(key.startswith(_SPARSE) for key, _ in found.records):
            raise Unsupported(f"{shown} is stored as a sparse file, which a ztoc cannot describe")
        return found

    def _walk(self, path: bytes) -> tuple[Entry | None, bytes]:
        """What is at the end of `path`, and the path without links that leads there."""
        shown = _shown(path)
        todo = list(reversed(_parts(path)))
        at: list[bytes] = []
        links = 0
        index: int | None = None
        while todo:
            part = todo.pop()
            if part == b"..":
                del at[-1:]
                index = self._lookup(at)
                continue
            at.append(part)
            index = self._lookup(at)
            if index is None:
                continue  # a directory without an entry of its own, or the end will show that there is nothing
            entry = self._entry(index)
            if entry.type in {"symlink", "hardlink"}:
                links += 1
                if links > MAX_LINKS:
                    raise Invalid(f"{shown} leads through more than {MAX_LINKS} links; they go in a circle")
                beyond = self._lookup([*at, *reversed(todo)]) if todo else None
                if beyond is not None and beyond > index:
                    return self._entry(beyond), b"/".join(
                        at
                    )  # unpacked through the link, but listed under its name
                if len(entry.linkname) > MAX_PATH:
                    raise NotFound(f"{shown} leads to a link with a target of {len(entry.linkname)} bytes")
                at = _base(entry, at)
                todo.extend(reversed(_parts(entry.linkname)))
                index = None
            elif todo and entry.type != "dir":
                raise NotFound(f"{shown}: {_shown(b'/'.join(at))} is no directory")
        return (None if index is None else self._entry(index)), b"/".join(at)

    def _entry(self, index: int) -> Entry:
        return self._entries[self._same.get(index, index)]

    def _lookup(self, parts: Sequence[bytes]) -> int | None:
        index = self._at.get(b"/".join(parts))
        if index is not None and self._born:
            for depth in range(1, len(parts)):
                if self._born.get(b"/".join(parts[:depth]), -1) > index:
                    return None
        return index


def _base(link: Entry, at: list[bytes]) -> list[bytes]:
    """Where the target of the link at `at` begins.

    A hard link that is left had no target before it; what it names counts from the layer's root.
    """
    return [] if link.type == "hardlink" or link.linkname.startswith(b"/") else at[:-1]


_KINDS = {"char": "character device", "block": "block device", "fifo": "named pipe"}


def read_file(ztoc: Ztoc, data: bytes, entry: Entry, layer_size: int, read: ReadLayer) -> Iterator[bytes]:
    """The bytes of `entry`, in pieces of at most 4 MiB, all from spans that have their digests.

    `data` is the ztoc's file, of which `ztoc` is decoded; `layer_size` in bytes. Integrity, naming the span, for bytes
    that are not what the ztoc says. Memory: a piece, and a span's compressed bytes up to 16 MiB.
    """
    spans = zinfo.span_table(ztoc, layer_size)
    for span in spans.spans_for(entry.offset, entry.size):
        begin, end = spans.uncompressed_range(span)
        skip = max(entry.offset - begin, 0)
        stop = min(entry.offset + entry.size, end) - begin
        at = 0
        for piece in _inflated(spans, span, data, _verified(spans, span, read)):
            wanted = piece[max(skip - at, 0) : max(stop - at, 0)]
            at += len(piece)
            if wanted:
                yield wanted
            if at >= stop:
                break


def _verified(spans: SpanTable, span: int, read: ReadLayer) -> Callable[[], Iterable[bytes]]:
    """The compressed bytes of a span, as often as they are asked for, once their digest has been checked."""
    start, end = spans.compressed_range(span)
    first, last = spans.digest_range(span)
    hasher = hashlib.sha256()
    held: list[bytes] = []
    at = start
    pieces = read(start, end - start) if end > start else ()
    for piece in pieces:
        hasher.update(piece[max(first - at, 0) : max(last - at, 0)])
        at += len(piece)
        if end - start <= _HELD:
            held.append(piece)
    if at != end:
        raise Integrity(f"span {span}: the layer has {at - start} of its {end - start} bytes")
    if f"sha256:{hasher.hexdigest()}" != spans.digest(span):
        raise Integrity(
            f"span {span}: the layer's bytes have the digest sha256:{hasher.hexdigest()}, not "
            f"{spans.digest(span)}; pull the image again"
        )
    return (lambda: held) if end - start <= _HELD else (lambda: read(start, end - start))


def _inflated(
    spans: SpanTable, span: int, data: bytes, source: Callable[[], Iterable[bytes]]
) -> Iterator[bytes]:
    if spans.compression is Compression.UNCOMPRESSED:
        yield from source()
        return
    begin, end = spans.uncompressed_range(span)
    position = spans.window_position(span)
    window: Buffer | None = None if position is None else data[position : position + zinfo.WINDOW]
    try:
        yield from inflate_chunks(
            source(),
            window=window,
            bits=spans.bits(span),
            expected=end - begin,
            last=spans.is_last(span),
            whole_member=span == 0 and spans.implied_header,
        )
    except Integrity as error:
        raise Integrity(f"span {span}: {error}") from None


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in {b"", b"."}]


def _shown(path: bytes) -> str:
    return path[:200].decode("utf-8", "backslashreplace").__repr__()
