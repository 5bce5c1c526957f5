"""The reader of the classic filesystem against another reader of the same image, and damaged images."""

import random
import stat
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.erofs_reader import Image

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats import fusetree
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.erofsread import Chunks, MetaImage
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree


def entry(name: bytes, kind: str = "reg", **fields: object) -> Entry:
    """An entry with plain attributes."""
    plain = Entry(name, kind, 512, 0, b"", 0o644, 0, 0, b"", b"", "2023-11-14T22:13:20Z", 0, 0, ())
    return plain._replace(**fields)


def built(entries: list[Entry]) -> bytes:
    """A meta.erofs of them, their data one behind the other."""
    placed, offset = [], 512
    for item in entries:
        placed.append(item._replace(offset=offset))
        offset += 512 + -(-item.size // 512) * 512
    tree = build_tree(placed)
    return build_meta(tree, data_size=(1 << 41) - 512, uuid=b"u" * 16, inherited={}, bottom=False)


def reader(image: bytes, chunks: Chunks | None = None) -> MetaImage:
    """Ours, over bytes in memory."""
    return MetaImage(lambda at, size: image[at : at + size], len(image), chunks or Chunks(1 << 20), 1)


def same(image: bytes, ours: MetaImage) -> int:
    """Compare every path both ways; how many there are."""
    theirs = Image(image)
    stack, seen = [(theirs.root, theirs.root)], 0
    assert ours.root == theirs.root
    while stack:
        nid, parent = stack.pop()
        want, inode = theirs.inode(nid), ours.inode(nid)
        names = theirs.entries(want)
        listed = list(ours.entries(nid, inode, 0))
        assert {item.name: item.nid for item in listed} == names
        assert [item.name for item in listed] == sorted(names)
        assert (names[b"."], names[b".."]) == (nid, parent)
        for cut in range(0, len(listed), 1 + len(listed) // 5):  # a listing goes on where it stopped
            after = ours.entries(nid, inode, listed[cut].next)
            assert [item.name for item in after] == [item.name for item in listed[cut + 1 :]]
        for absent in (b"\xff" * 255, b"\1", b"m", b"terabytf"):
            assert ours.lookup(nid, inode, absent) == names.get(absent, 0)
        for item in listed:
            assert ours.lookup(nid, inode, item.name) == item.nid
            if item.name in {b".", b".."}:
                continue
            seen += 1
            want, found = theirs.inode(item.nid), ours.inode(item.nid)
            assert found[2:4] == (want.mode, want.size)
            assert found[5:] == (want.uid, want.gid, *want.mtime, want.nlink)
            assert found.rdev == want.rdev
            assert ours.xattrs(item.nid, found) == want.xattrs
            if want.chunks:
                assert ours.data_at(item.nid, found) == want.chunks[0][1] * 512
            if stat.S_ISLNK(want.mode):
                assert ours.target(item.nid, found) == want.data
            if stat.S_ISDIR(want.mode):
                stack.append((item.nid, nid))
    return seen


names = st.binary(min_size=1, max_size=255).filter(
    lambda n: b"/" not in n and n not in {b".", b".."} and not n.startswith(b".wh.") and b"\0" not in n
)
xattrs = st.dictionaries(
    st.sampled_from([b"user.a", b"security.b", b"security.capability"]), st.binary(max_size=3000)
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_both_readers_see_the_same(data: st.DataObject) -> None:
    """Names of all lengths, links of all lengths, xattrs, sizes over a terabyte, devices."""
    entries: list[Entry] = []
    for name in data.draw(st.sets(names, max_size=40)):
        kind = data.draw(st.sampled_from(["reg", "dir", "symlink", "fifo", "char"]))
        records = tuple((b"SCHILY.xattr." + k, v) for k, v in data.draw(xattrs).items())
        owner = data.draw(st.integers(0, 2**32 - 1))
        target = data.draw(st.binary(min_size=1, max_size=4095).filter(lambda n: b"\0" not in n))
        size = data.draw(st.integers(0, 1 << 34)) if kind == "reg" else 0
        fields = {
            "size": size,
            "linkname": target if kind == "symlink" else b"",
            "devmajor": 8,
            "devminor": 300,
        }
        path = b"d/" + name if data.draw(st.booleans()) else name
        if name != b"d":
            entries.append(entry(path, kind, uid=owner, gid=owner ^ 1, records=records, **fields))
    entries.append(entry(b"terabytes", size=(1 << 40) + 1))
    image = built(entries)
    assert same(image, reader(image)) >= len(entries)


def test_many_names_over_many_chunks() -> None:
    """A directory of 40,000 names, inodes across the ends of chunks, and room for two chunks only."""
    draw = random.Random(3)
    sizes = [draw.randrange(10**6) for _ in range(40_000)]
    entries = [entry(b"d/%x" % draw.getrandbits(64), size=size) for size in sizes]
    entries += [
        entry(b"d%d/x" % number, records=((b"SCHILY.xattr.user.k", b"v" * number),)) for number in range(900)
    ]
    image = built(entries)
    assert same(image, reader(image, Chunks(2 << 16))) == 40_000 + 1800 + 1


def test_hard_links_share_an_inode_and_whiteouts_are_devices() -> None:
    """What overlayfs and `find -samefile` go by."""
    entries = [entry(b"a"), entry(b"b", "hardlink", linkname=b"a"), entry(b".wh.gone")]
    image = reader(built(entries))
    root = image.inode(image.root)
    a, b, gone = (image.lookup(image.root, root, name) for name in (b"a", b"b", b"gone"))
    assert a == b
    assert image.inode(a).links == 2
    assert (stat.S_IFMT(image.inode(gone).mode), image.inode(gone).rdev) == (stat.S_IFCHR, 0)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_image_is_an_error_or_another_tree(data: st.DataObject) -> None:
    """Any byte changed or the end cut off: Integrity, or an answer; never another exception or an endless list."""
    records = ((b"SCHILY.xattr.user.k", b"v"),)
    entries = [entry(b"d/%d" % number, size=number, records=records) for number in range(60)]
    entries.append(entry(b"l", "symlink", linkname=b"t" * 700))
    whole = bytearray(built(entries))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(1024, len(whole) - 8))
        struct.pack_into("<I", whole, at, data.draw(st.integers(0, 2**32 - 1)))
    image = bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    try:
        ours = reader(image)
        stack = [(ours.root, 0)]
        while stack:
            nid, depth = stack.pop()
            inode = ours.inode(nid)
            for number, item in enumerate(ours.entries(nid, inode, 0)):
                if number > 200 or depth > 2:
                    break
                child = ours.inode(item.nid)
                ours.xattrs(item.nid, child)
                ours.lookup(nid, inode, item.name)
                if stat.S_ISLNK(child.mode):
                    ours.target(item.nid, child)
                if stat.S_ISREG(child.mode) and child.size:
                    ours.data_at(item.nid, child)
                if stat.S_ISDIR(child.mode) and item.name not in {b".", b".."}:
                    stack.append((item.nid, depth + 1))
    except Integrity:
        pass


def test_listings_fit_the_room_and_go_on() -> None:
    """READDIR and READDIRPLUS in buffers of all sizes give each name once, with the nodes LOOKUP gives."""
    entries = [entry(b"n" * (1 + number % 200) + b"%d" % number, size=number) for number in range(300)]
    image = reader(built(entries))
    node = fusetree.node_of(7, image.root)
    root = image.inode(image.root)
    for plus, room in ((False, 4096), (True, 4096), (True, 65536), (False, 300)):
        cookie, got = 0, {}
        while True:
            body = struct.pack("=QQI20x", 0, cookie, room)
            answer = fusetree.listing(image, node, root, body, plus=plus)
            assert len(answer) <= room
            if not answer:
                break
            at = 0
            while at < len(answer):
                start = at + (128 if plus else 0)
                ino, cookie, length, kind = struct.unpack_from("=QQII", answer, start)
                name = answer[start + 24 : start + 24 + length]
                if plus and name not in {b".", b".."}:
                    child = image.lookup(image.root, root, name)
                    want = fusetree.entry(fusetree.node_of(7, child), image.inode(child))
                    assert answer[at : at + 128] == want
                    assert (kind, ino) == (8, 7 << 32 | child)
                got[name] = got.get(name, 0) + 1
                at = start + (24 + length + 7) // 8 * 8
        assert got == dict.fromkeys([b".", b"..", *(item.name for item in entries)], 1)


def test_another_file_is_no_image() -> None:
    """Too short, and without the magic."""
    for data in (b"", bytes(5000)):
        with pytest.raises(Integrity):
            reader(data)
