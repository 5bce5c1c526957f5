"""Reads a bbolt file: the key-value store that Go programs keep their metadata in.

Two meta pages say where the tree begins; the valid one with the higher transaction number counts, so that a torn write of
one leaves the state before it. A bucket is a B+ tree of pages, or one page inside its parent's value. All numbers are
little-endian here, though bbolt writes the machine's own order. Facts from bbolt's sources, internal/common (page, meta,
bucket, inode) and db.go.

The file is not to be trusted. No page is read twice, and the entries of a page do not overlap: reading costs no more than
the file is long, whatever its pages point to.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, TypeAlias, Union

from soci_snapshotter.errors import Integrity

_MAGIC: Final = 0xED0CDAED
_VERSION: Final = 2
_BRANCH: Final = 0x01
_LEAF: Final = 0x02
_IS_BUCKET: Final = 0x01
_MIN_PAGE_BITS: Final = 10  # where bbolt looks for a second meta page: 1 KiB ...
_MAX_PAGE_BITS: Final = 24  # ... to 16 MiB
_MAX_KEY: Final = 32768  # bbolt's MaxKeySize
_FIRST_DATA_PAGE: Final = 2  # behind the two meta pages

_PAGE = struct.Struct("<QHHI")  # id, flags, count, overflow
_META = struct.Struct("<IIIIQQQQQQ")  # ..., root, sequence, freelist, high water mark, transaction, checksum
_BUCKET = struct.Struct("<QQ")  # root page or 0, sequence
_LEAF_ELEMENT = struct.Struct("<IIII")  # flags, position from here, size of key, of value
_BRANCH_ELEMENT = struct.Struct("<IIQ")  # position from here, size of key, page

_FNV_OFFSET: Final = 0xCBF29CE484222325
_FNV_PRIME: Final = 0x100000001B3
_64_BITS: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket: `sequence` is the last number it gave out (NextSequence); entries in the order of their keys."""

    sequence: int
    entries: dict[bytes, Value] = field(default_factory=dict)

    def bucket(self, key: bytes) -> Bucket | None:
        """The bucket in it with this key, None when there is none."""
        found = self.entries.get(key)
        return found if isinstance(found, Bucket) else None

    def value(self, key: bytes) -> bytes | None:
        """The bytes under this key, None when there are none."""
        found = self.entries.get(key)
        return found if isinstance(found, bytes) else None


Value: TypeAlias = Union[bytes, Bucket]  # noqa: UP007 - evaluated at run time, where Bucket is a class of its own


@dataclass(frozen=True, slots=True)
class Database:
    """A whole file. `transaction` counts the writes that were committed."""

    transaction: int
    root: Bucket


@dataclass(frozen=True, slots=True)
class _Meta:
    page_size: int
    root: int
    sequence: int
    pages: int  # no page from this number on is in use
    transaction: int


def read(data: bytes) -> Database:
    """Everything in a bbolt file. Raises Integrity, naming the page."""
    view = memoryview(data)
    meta = _meta(view)
    return Database(meta.transaction, _Reader(view, meta).database())


HEAD_BYTES: Final = (1 << _MAX_PAGE_BITS) + 4096
"""What of a file has both meta pages, whatever its page size."""


def transaction(head: bytes) -> int:
    """`Database.transaction` from a file's first HEAD_BYTES. Raises Integrity when neither meta page is whole."""
    return _meta(memoryview(head)).transaction


def checksum(data: bytes | memoryview) -> int:
    """FNV-1a, 64 bits: what ends a meta page."""
    value = _FNV_OFFSET
    for byte in data:
        value = ((value ^ byte) * _FNV_PRIME) & _64_BITS
    return value


def _meta(view: memoryview) -> _Meta:
    first = _meta_at(view, 0)
    if first is not None:
        second = _meta_at(view, first.page_size)
        return second if second is not None and second.transaction > first.transaction else first
    for bits in range(_MIN_PAGE_BITS, _MAX_PAGE_BITS + 1):
        second = _meta_at(view, 1 << bits)
        if second is not None and second.page_size == 1 << bits:
            return second
    raise Integrity("not a bbolt database, or both its meta pages are damaged")


def _meta_at(view: memoryview, offset: int) -> _Meta | None:
    """The meta page at this offset, None when it is not one or was not written whole."""
    start = offset + _PAGE.size
    if start + _META.size > len(view):
        return None
    magic, version, page_size, _, root, sequence, _, pages, transaction, stated = _META.unpack_from(
        view, start
    )
    if magic != _MAGIC or version != _VERSION:
        return None
    if stated != checksum(view[start : start + _META.size - 8]):
        return None
    if page_size.bit_count() != 1 or not 1 << _MIN_PAGE_BITS <= page_size <= 1 << _MAX_PAGE_BITS:
        return None
    return _Meta(page_size, root, sequence, pages, transaction)


@dataclass(frozen=True, slots=True)
class _Page:
    name: str
    flags: int
    count: int
    body: memoryview  # header and all pages it runs over
    inline: bool = False  # in a bucket's value


class _Reader:
    """One reading of one file: what was seen before is refused."""

    def __init__(self, view: memoryview, meta: _Meta) -> None:
        self._view = view
        self._meta = meta
        self._seen: set[int] = set()

    def database(self) -> Bucket:
        """The root bucket with everything in it; a list of what is still to be read stands in for recursion."""
        root = Bucket(self._meta.sequence)
        waiting = [(root, self._pages(self._meta.root))]
        while waiting:
            bucket, leaves = waiting.pop()
            last = b""
            for leaf in leaves:
                for flags, key, value in _leaf_elements(leaf):
                    if key <= last:
                        raise Integrity(f"{leaf.name}: its keys are not in order")
                    last = key
                    if not flags & _IS_BUCKET:
                        bucket.entries[key] = bytes(value)
                        continue
                    inner, pages = self._bucket(leaf, value)
                    bucket.entries[key] = inner
                    waiting.append((inner, pages))
        return root

    def _bucket(self, leaf: _Page, value: memoryview) -> tuple[Bucket, Iterator[_Page]]:
        if len(value) < _BUCKET.size:
            raise Integrity(f"{leaf.name}: a bucket is cut short")
        root, sequence = _BUCKET.unpack_from(value)
        if root:
            return Bucket(sequence), self._pages(root)
        if leaf.inline:  # bbolt keeps buckets inline only when they hold no others
            raise Integrity(f"{leaf.name}: a bucket inside an inline bucket")
        body = value[_BUCKET.size :]
        if len(body) < _PAGE.size:
            raise Integrity(f"{leaf.name}: an inline bucket is cut short")
        _, flags, count, _ = _PAGE.unpack_from(body)
        return Bucket(sequence), iter([_Page(f"{leaf.name}, an inline bucket", flags, count, body, True)])

    def _pages(self, root: int) -> Iterator[_Page]:
        """The leaves of a tree, left to right."""
        waiting = [root]
        while waiting:
            page = self._page(waiting.pop())
            if page.flags == _BRANCH:
                waiting += reversed(_children(page))
            else:
                yield page

    def _page(self, number: int) -> _Page:
        name = f"bbolt page {number}"
        size, pages = self._meta.page_size, self._meta.pages
        start = number * size
        if not _FIRST_DATA_PAGE <= number < pages or start + size > len(self._view):
            raise Integrity(f"{name}: the file has no such page")
        identity, flags, count, overflow = _PAGE.unpack_from(self._view, start)
        end = start + (overflow + 1) * size
        if identity != number or flags not in {_BRANCH, _LEAF}:
            raise Integrity(f"{name}: is no page of a tree")
        if number + overflow >= pages or end > len(self._view):
            raise Integrity(f"{name}: runs over the end of the file")
        for each in range(number, number + overflow + 1):
            if each in self._seen:
                raise Integrity(f"bbolt page {each}: is in two places")
            self._seen.add(each)
        return _Page(name, flags, count, self._view[start:end])


def _leaf_elements(page: _Page) -> Iterator[tuple[int, bytes, memoryview]]:
    if page.flags != _LEAF:
        raise Integrity(f"{page.name}: is no leaf")
    end = _headers_end(page, _LEAF_ELEMENT.size)
    for start in range(_PAGE.size, end, _LEAF_ELEMENT.size):
        flags, position, key_size, value_size = _LEAF_ELEMENT.unpack_from(page.body, start)
        key, end = _placed(page, start + position, key_size, value_size, end)
        yield flags, key, page.body[end - value_size : end]


def _children(page: _Page) -> list[int]:
    end = _headers_end(page, _BRANCH_ELEMENT.size)
    if not page.count:
        raise Integrity(f"{page.name}: a branch without children")
    children = []
    for start in range(_PAGE.size, end, _BRANCH_ELEMENT.size):
        position, key_size, child = _BRANCH_ELEMENT.unpack_from(page.body, start)
        _, end = _placed(page, start + position, key_size, 0, end)
        children.append(child)
    return children


def _headers_end(page: _Page, element: int) -> int:
    end = _PAGE.size + page.count * element
    if end > len(page.body):
        raise Integrity(f"{page.name}: {page.count} entries do not fit")
    return end


def _placed(page: _Page, start: int, key_size: int, value_size: int, earliest: int) -> tuple[bytes, int]:
    """The key at `start` and where its value ends. bbolt writes entries one behind the other, from `earliest` on."""
    end = start + key_size + value_size
    if not 0 < key_size <= _MAX_KEY or start < earliest or end > len(page.body):
        raise Integrity(f"{page.name}: an entry is out of place")
    return bytes(page.body[start : start + key_size]), end
