"""The tree against what containerd's unpack was seen to do."""

import pytest

from soci_snapshotter.errors import Integrity, SociError, Unsupported
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import WHITEOUT, Directory, Tree, build_tree, implicit_directories


def entries(*members: tuple) -> list[Entry]:
    """(name, type, fields) triples at offsets as a tar has them."""
    made, offset = [], 512
    for name, kind, *rest in members:
        plain = Entry(name, kind, offset, 0, b"", 0o644, 0, 0, b"", b"", "2023-11-14T22:13:20Z", 0, 0, ())
        made.append(plain._replace(**(rest[0] if rest else {})))
        offset += 512 + -(-made[-1].size // 512) * 512
    return made


def paths(tree: Tree) -> dict[bytes, int]:
    """Every path to its inode (directories too)."""
    found: dict[bytes, int] = {}
    stack: list[tuple[bytes, Directory]] = [(b"", tree.root)]
    while stack:
        prefix, directory = stack.pop()
        for name, child in directory.children.items():
            if isinstance(child, Directory):
                found[prefix + name] = child.inode
                stack.append((prefix + name + b"/", child))
            else:
                found[prefix + name] = child
    return found


def xattr(name: str, value: bytes = b"1") -> dict:
    """The field for one xattr."""
    return {"records": ((b"SCHILY.xattr." + name.encode(), value),)}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([(b"./a/", "dir"), (b"/a/b", "reg")], {b"a": 0, b"a/b": 1}),
        ([(b"./", "dir"), (b"", "reg"), (b"a", "reg")], {b"a": 2}),
        ([(b"a", "reg"), (b"a", "reg")], {b"a": 1}),
        (
            [(b"a/", "dir"), (b"a/b", "reg"), (b"a", "reg"), (b"a", "dir"), (b"a/c", "reg")],
            {b"a": 3, b"a/c": 4},
        ),
        ([(b"a/", "dir"), (b"a/b", "reg"), (b"a", "dir")], {b"a": 2, b"a/b": 1}),
        ([(b"a", "reg"), (b"a/", "dir"), (b"a/b", "reg")], {b"a": 1, b"a/b": 2}),
        ([(b".wh.a", "reg"), (b"a", "reg"), (b".wh.b", "reg")], {b"a": 1, b"b": WHITEOUT}),
        ([(b"a", "reg"), (b"b", "hardlink", {"linkname": b"./a"}), (b"a", "reg")], {b"a": 2, b"b": 0}),
        (
            [(b"a", "reg"), (b"b", "hardlink", {"linkname": b"a"}), (b"c", "hardlink", {"linkname": b"/b"})],
            {b"a": 0, b"b": 0, b"c": 0},
        ),
    ],
)  # fmt: skip
def test_the_last_entry_wins_as_in_an_unpack(members: list, expected: dict) -> None:
    """Names are normalised, duplicates replaced or merged, links bound to the inode of that moment."""
    assert paths(build_tree(entries(*members))) == expected


@pytest.mark.parametrize(
    ("members", "error", "field"),
    [
        ([(b"a/../b", "reg")], Integrity, "name"),
        ([(b"../b", "reg")], Integrity, "name"),
        ([(b"a//b", "reg")], Integrity, "name"),
        ([(b"a\0b", "reg")], Integrity, "name"),
        ([(b"n" * 256, "reg")], Integrity, "name"),
        ([(b"n/" * 2048 + b"x", "reg")], Integrity, "name"),
        ([(b"a", "reg"), (b"a/b", "reg")], Integrity, "name"),
        ([(b"a", "symlink", {"linkname": b"t"}), (b"a/b", "reg")], Unsupported, "name"),
        ([(b"a", "hardlink", {"linkname": b"a"})], Integrity, "linkname"),
        ([(b"a", "reg"), (b"a", "hardlink", {"linkname": b"a"})], Integrity, "linkname"),
        ([(b"a", "hardlink", {"linkname": b"b"}), (b"b", "reg")], Integrity, "linkname"),
        ([(b"a/", "dir"), (b"b", "hardlink", {"linkname": b"a"})], Integrity, "linkname"),
        ([(b"a", "symlink", {"linkname": b""})], Integrity, "linkname"),
        ([(b"a", "reg", xattr("trusted.overlay.opaque", b"y"))], Integrity, "records"),
        ([(b"a", "reg", xattr("user."))], Integrity, "records"),
        ([(b"a", "reg", {"records": ((b"GNU.sparse.major", b"1"),)})], Unsupported, "records"),
        ([(b"a", "reg", {"mod_time": "yesterday"})], Integrity, "mod_time"),
        ([(b"a", "reg", {"mod_time": "2023-02-30T00:00:00Z"})], Integrity, "mod_time"),
        ([(b"a", "reg", {"size": -1})], Integrity, "size"),
        ([(b"a", "reg", {"size": 2**42})], Unsupported, "EROFS"),
        ([(b"a", "reg", {"offset": 513})], Unsupported, "offset"),
        ([(b"a", "reg", {"size": 9999}), (b"b", "reg", {"offset": 1024})], Unsupported, "offset"),
        ([(b"a", "door")], Integrity, "type"),
        ([(b".wh.", "reg")], Integrity, "name"),
        ([(b".wh...", "reg")], Integrity, "name"),
        ([(b"a", "reg"), (b".wh.a", "reg")], Unsupported, "name"),
    ],
)  # fmt: skip
def test_what_cannot_be_trusted_or_served_is_refused(
    members: list, error: type[SociError], field: str
) -> None:
    """The error has the right class and names the field."""
    with pytest.raises(error, match=field):
        build_tree(entries(*members))


@pytest.mark.parametrize(
    ("text", "records", "time"),
    [
        ("2023-11-14T22:13:20Z", (), (1_700_000_000, 0)),
        ("2023-11-14T22:13:20.000000001Z", (), (1_700_000_000, 1)),
        ("2023-11-15T00:13:20.5+02:00", (), (1_700_000_000, 500_000_000)),
        ("1969-12-31T23:59:58.5Z", (), (0, 0)),
        ("0000-01-01T00:00:00Z", (), (0, 0)),
        ("2262-04-11T23:47:16.854775807Z", (), (9_223_372_036, 854_775_807)),
        ("2262-04-11T23:47:16.854775808Z", (), (0, 0)),
        ("", ((b"mtime", b"12.25"),), (12, 250_000_000)),
        ("", ((b"mtime", b"999999999999"),), (0, 0)),
        ("", (), (0, 0)),
    ],
)
def test_times_are_what_an_unpack_sets(text: str, records: tuple, time: tuple) -> None:
    """Any zone, nanoseconds, the raw record as last resort; outside 1970 to 2262 the epoch."""
    assert build_tree(entries((b"a", "reg", {"mod_time": text, "records": records}))).times == [time]


def test_a_hard_link_gives_its_attributes_to_the_inode() -> None:
    """chown, chmod, utimes and setxattr of a link reach the shared inode, and chown drops capabilities."""
    cap = (b"SCHILY.xattr.security.capability", b"c"), (b"SCHILY.xattr.user.a", b"")
    link = {"linkname": b"a", "mode": 0o600, "uid": 7, "mod_time": "1970-01-01T00:00:03Z", **xattr("user.b")}
    tree = build_tree(entries((b"a", "reg", {"records": cap}), (b"b", "hardlink", link)))
    assert (tree.inodes[0].mode, tree.inodes[0].uid, tree.times[0]) == (0o600, 7, (3, 0))
    assert tree.xattrs == {0: {b"user.a": b"", b"user.b": b"1"}}


def test_xattrs_stay_where_an_unpack_leaves_them() -> None:
    """user.* on files and directories, security.* everywhere, unknown classes nowhere; directories merge."""
    tree = build_tree(
        entries(
            (b"l", "symlink", {"linkname": b"x", **xattr("user.a")}),
            (b"f", "fifo", xattr("security.a", b"")),
            (b"r", "reg", xattr("whatever")),
            (b"d", "dir", xattr("user.a")),
            (b"d", "dir", xattr("user.b")),
        )
    )
    assert tree.xattrs[1] == {b"security.a": b""}
    assert tree.xattrs[4] == {b"user.a": b"1", b"user.b": b"1"}
    assert 0 not in tree.xattrs and 2 not in tree.xattrs


def test_implicit_directories_are_named() -> None:
    """Every parent that first appears without an entry, the root first, an entry later or not."""
    tree = build_tree(entries((b"a/b/c", "reg"), (b"a/", "dir"), (b"d/", "dir"), (b"e/.wh.x", "reg")))
    assert implicit_directories(tree) == [b"", b"a", b"a/b", b"e"]


def test_parents_cannot_outgrow_the_table() -> None:
    """A table of deep names without parents is refused before it takes the memory."""
    with pytest.raises(Unsupported, match="parents"):
        build_tree(entries(*((b"%d/" % n + b"a/" * 2000 + b"x", "reg") for n in range(100))))
