"""The reader of bbolt files against bbolt's own reading of files that bbolt wrote, and against damage of every kind."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import bbolt
from soci_snapshotter.formats.bbolt import Bucket

_VECTORS = Path(__file__).parents[1] / "vectors/bbolt"
_NAMES = [
    "empty",
    "inline",
    "nested",
    "overflow",
    "freelist",
    "no-freelist",
    "torn-1024",
    "torn-4096",
    "snapshots",
]
_PAGE = struct.Struct("<QHHI")
_META_SIZE = 64


def _vector(name: str) -> bytes:
    return gzip.decompress((_VECTORS / f"{name}.db.gz").read_bytes())


def _expected(name: str) -> object:
    return json.loads(gzip.decompress((_VECTORS / f"{name}.json.gz").read_bytes()))


def _as_json(bucket: Bucket) -> dict[str, object]:
    entries = bucket.entries.items()
    return {
        "sequence": bucket.sequence,
        "values": {key.hex(): value.hex() for key, value in entries if isinstance(value, bytes)},
        "buckets": {key.hex(): _as_json(value) for key, value in entries if isinstance(value, Bucket)},
    }


def _meta(
    page_size: int = 1024, root: int = 3, pages: int = 4, transaction: int = 0, checksum: int | None = None
) -> bytes:
    """A meta page of a file made here."""
    body = struct.pack("<IIIIQQQQQ", 0xED0CDAED, 2, page_size, 0, root, 0, 2, pages, transaction)
    stated = bbolt.checksum(body) if checksum is None else checksum
    return (_PAGE.pack(0, 4, 0, 0) + body + struct.pack("<Q", stated)).ljust(page_size, b"\0")


def _leaf(number: int, *entries: tuple[int, bytes, bytes], overflow: int = 0) -> bytes:
    """A leaf page with (flags, key, value) entries."""
    headers, data = b"", b""
    for index, (flags, key, value) in enumerate(entries):
        position = 16 * (len(entries) - index) + len(data)
        headers += struct.pack("<IIII", flags, position, len(key), len(value))
        data += key + value
    return (_PAGE.pack(number, 2, len(entries), overflow) + headers + data).ljust(
        1024 * (overflow + 1), b"\0"
    )


def _branch(number: int, *children: tuple[bytes, int]) -> bytes:
    headers, data = b"", b""
    for index, (key, child) in enumerate(children):
        headers += struct.pack("<IIQ", 16 * (len(children) - index) + len(data), len(key), child)
        data += key
    return (_PAGE.pack(number, 1, len(children), 0) + headers + data).ljust(1024, b"\0")


def _file(*pages: bytes) -> bytes:
    """Two meta pages, an unused page 2, and `pages` from 3 on, where the root is."""
    body = b"".join(pages)
    count = 3 + len(body) // 1024
    return _meta(pages=count) + _meta(pages=count, transaction=1) + bytes(1024) + body


@pytest.mark.parametrize("name", _NAMES)
def test_reads_what_bbolt_reads(name: str) -> None:
    """Every bucket, sequence, key and value of a file is what bbolt itself found in it, torn meta pages included."""
    assert _as_json(bbolt.read(_vector(name)).root) == _expected(name)


def test_keys_are_in_order() -> None:
    """A bucket's entries come in the order of their keys, over all its pages."""
    many = bbolt.read(_vector("overflow")).root.bucket(b"many")
    assert many is not None
    assert list(many.entries) == sorted(many.entries)
    assert len(many.entries) == 600


def test_the_later_meta_page_counts() -> None:
    """Whichever of the two meta pages has the higher transaction number is believed, if it is whole."""
    old, new = _leaf(3, (0, b"k", b"old")), _leaf(4, (0, b"k", b"new"))
    for first, second, transaction, said in (
        (_meta(root=3, pages=5, transaction=8), _meta(root=4, pages=5, transaction=9), 9, b"new"),
        (_meta(root=4, pages=5, transaction=10), _meta(root=3, pages=5, transaction=9), 10, b"new"),
        (_meta(root=3, pages=5, transaction=8), _meta(root=4, pages=5, transaction=9, checksum=1), 8, b"old"),
        (
            _meta(root=4, pages=5, transaction=10, checksum=1),
            _meta(root=3, pages=5, transaction=9),
            9,
            b"old",
        ),
    ):
        found = bbolt.read(first + second + bytes(1024) + old + new)
        assert (found.transaction, found.root.value(b"k")) == (transaction, said)


@pytest.mark.parametrize("page_size", [1024, 4096, 65536])
def test_finds_the_second_meta_page_without_the_first(page_size: int) -> None:
    """With page 0 destroyed the other meta page is found, whatever the size of pages."""
    leaf = _leaf(3, (0, b"k", b"v")).ljust(page_size, b"\0")
    data = b"\xff" * page_size + _meta(page_size, transaction=1) + bytes(page_size) + leaf
    assert bbolt.read(data).root.entries == {b"k": b"v"}


def test_no_database() -> None:
    """What has no valid meta page is refused: nothing, zeros, text, a cut file, another version."""
    whole = _file(_leaf(3))
    other = bytearray(_meta() + _meta())
    for start in (20, 1024 + 20):
        other[start] = 3
    for data in (b"", bytes(8192), b"# a text\n" * 1000, whole[:79], bytes(other)):
        with pytest.raises(Integrity, match="not a bbolt database"):
            bbolt.read(data)


_IS_BUCKET = 1
_MALFORMED = {
    "a page of another number": (_leaf(9), "page 3: is no page"),
    "a page of no tree": (_PAGE.pack(3, 0x10, 0, 0).ljust(1024, b"\0"), "page 3: is no page"),
    "a run over the end": (_leaf(3)[:12] + struct.pack("<I", 2**32 - 1) + bytes(1008), "runs over the end"),
    "more entries than fit": (_PAGE.pack(3, 2, 0xFFFF, 0).ljust(1024, b"\0"), "do not fit"),
    "a child that is itself": (_branch(3, (b"a", 3)), "page 3: is in two places"),
    "a child in the meta pages": (_branch(3, (b"a", 1)), "page 1: the file has no such page"),
    "a child behind the end": (_branch(3, (b"a", 2**63)), "no such page"),
    "no children": (_branch(3), "without children"),
    "a bucket that is its parent": (_leaf(3, (_IS_BUCKET, b"a", struct.pack("<QQ", 3, 0))), "in two places"),
    "a short bucket": (_leaf(3, (_IS_BUCKET, b"a", bytes(15))), "is cut short"),
    "a short inline bucket": (_leaf(3, (_IS_BUCKET, b"a", bytes(16 + 15))), "inline bucket is cut short"),
    "an inline branch": (
        _leaf(3, (_IS_BUCKET, b"a", bytes(16) + _branch(0, (b"a", 4))[:64])),
        "an inline bucket: is no leaf",
    ),
    "an inline bucket in one": (
        _leaf(3, (_IS_BUCKET, b"a", bytes(16) + _leaf(0, (_IS_BUCKET, b"b", bytes(32)))[:80])),
        "inside an inline bucket",
    ),
    "keys out of order": (_leaf(3, (0, b"b", b""), (0, b"a", b"")), "not in order"),
    "a key twice": (_leaf(3, (0, b"a", b""), (0, b"a", b"")), "not in order"),
    "an empty key": (_leaf(3, (0, b"", b"x")), "out of place"),
    "a long key": (_leaf(3, (0, b"k" * 32769, b""), overflow=40), "out of place"),
}


@pytest.mark.parametrize("name", _MALFORMED)
def test_malformed_pages(name: str) -> None:
    """Each way a page can be wrong is an error that names the page."""
    page, message = _MALFORMED[name]
    with pytest.raises(Integrity, match=message):
        bbolt.read(_file(page))


def test_two_buckets_cannot_share_pages() -> None:
    """A page that two buckets name is refused: nested sharing could make a small file endless."""
    shared = struct.pack("<QQ", 4, 0)
    root = _leaf(3, (_IS_BUCKET, b"a", shared), (_IS_BUCKET, b"b", shared))
    with pytest.raises(Integrity, match="page 4: is in two places"):
        bbolt.read(_file(root, _leaf(4, (0, b"k", b"v"))))


def test_entries_cannot_overlap() -> None:
    """Entries that share bytes are refused: 65,535 of them could each name a whole page run."""
    page = bytearray(_leaf(3, (0, b"a", b"x" * 100), (0, b"b", b"y" * 100)))
    page[36:40] = struct.pack("<I", 16 + 1)  # the second's data: inside the first's
    with pytest.raises(Integrity, match="out of place"):
        bbolt.read(_file(bytes(page)))


def test_thousands_of_levels() -> None:
    """Buckets nested as deep as a file has pages are read: there is no recursion to run out of."""
    depth = 2000
    pages = [
        _leaf(number, (_IS_BUCKET, b"a", struct.pack("<QQ", number + 1, number)))
        for number in range(3, 3 + depth)
    ]
    bucket: Bucket | None = bbolt.read(_file(*pages, _leaf(3 + depth, (0, b"k", b"v")))).root
    for _ in range(depth):
        assert bucket is not None
        bucket = bucket.bucket(b"a")
    assert bucket is not None
    assert bucket.entries == {b"k": b"v"}


@given(
    st.sampled_from(["inline", "nested", "snapshots", "freelist"]),
    st.lists(st.tuples(st.integers(0, 2**31), st.binary(min_size=1, max_size=16)), min_size=1, max_size=6),
    st.none() | st.integers(0, 2**16),
)
def test_mutated_files(name: str, changes: list[tuple[int, bytes]], length: int | None) -> None:
    """A file with bytes changed anywhere, or cut, is read or refused; never anything else, and it ends."""
    data = bytearray(_vector(name))
    for place, change in changes:
        start = place % len(data)
        data[start : start + len(change)] = change
    try:
        bbolt.read(bytes(data[:length]))
    except Integrity:
        pass


@given(st.binary(max_size=4096), st.integers(2, 6), st.integers(0, 8))
def test_arbitrary_pages_behind_a_valid_meta_page(body: bytes, root: int, pages: int) -> None:
    """Arbitrary pages that a valid meta page points to are read or refused."""
    try:
        bbolt.read(_meta(root=root, pages=pages) + _meta(checksum=0) + bytes(1024) + body)
    except Integrity:
        pass


@given(st.dictionaries(st.binary(min_size=1, max_size=20), st.binary(max_size=20), max_size=12))
def test_what_is_written_is_read(entries: dict[bytes, bytes]) -> None:
    """Any entries in a page come out as they went in."""
    leaf = _leaf(3, *((0, key, value) for key, value in sorted(entries.items())))
    assert bbolt.read(_file(leaf)).root.entries == entries
