"""The EROFS writer against an independent reader."""

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.erofs_reader import Image

from soci_snapshotter.errors import Integrity, Unsupported
from soci_snapshotter.formats.erofs import Inherited, build_meta
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree, implicit_directories

TYPES = {
    "reg": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "char": stat.S_IFCHR,
}


def entry(name: bytes, kind: str = "reg", offset: int = 512, **fields: object) -> Entry:
    """An entry with plain attributes."""
    plain = Entry(name, kind, offset, 0, b"", 0o644, 0, 0, b"", b"", "2023-11-14T22:13:20Z", 0, 0, ())
    return plain._replace(**fields)


def image(
    entries: list[Entry],
    *,
    data_size: int = 1 << 30,
    inherited: dict[bytes, Inherited] | None = None,
    bottom: bool = False,
) -> Image:
    """Built and read back."""
    built = build_meta(
        build_tree(entries), data_size=data_size, uuid=b"u" * 16, inherited=inherited or {}, bottom=bottom
    )
    return Image(built)


names = st.binary(min_size=1, max_size=255).filter(
    lambda n: b"/" not in n and b"\0" not in n and n not in {b".", b".."} and not n.startswith(b".wh.")
)
xattrs = st.dictionaries(
    st.binary(min_size=1, max_size=40).filter(lambda n: b"\0" not in n), st.binary(max_size=900), max_size=4
)
files = st.tuples(
    st.lists(names, min_size=1, max_size=4),
    st.sampled_from(sorted(TYPES)),
    st.integers(0, 0o7777),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**42),
    st.binary(min_size=1, max_size=4095).filter(lambda n: b"\0" not in n),
    st.integers(0, 10**9 - 1),
    xattrs,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(files, max_size=30))
def test_whatever_is_written_is_read_back(drawn: list) -> None:
    """Paths, modes, owners, sizes, times, devices, link targets, xattrs and addresses survive the format."""
    entries, expected, offset = [], {}, 512
    for parts, kind, mode, owner, size, target, nanoseconds, attributes in drawn:
        path = b"/".join(parts)
        heads = [b"/".join(parts[:n]) for n in range(1, len(parts))]
        if (
            path in expected
            or any(expected.get(head, "dir") != "dir" for head in heads)
            or sum(map(len, parts)) > 900
        ):
            continue
        if any(known.startswith(path + b"/") for known in expected):
            continue
        expected[path] = kind
        size = size if kind == "reg" and offset + size < 2**40 else 0
        entries.append(
            Entry(
                path, kind, offset, size, target, mode, owner, owner ^ 1, b"", b"",
                f"2001-09-09T01:46:40.{nanoseconds:09}Z", 5, 70000,
                tuple((b"SCHILY.xattr.security." + key, value) for key, value in attributes.items()),
            )
        )  # fmt: skip
        offset += 512 + -(-size // 512) * 512
    found = image(entries, data_size=(1 << 41) - 512).walk()
    implicit = set(implicit_directories(build_tree(entries)))
    assert set(found) == {e.name for e in entries} | implicit
    for e in entries:
        inode = found[e.name]
        assert stat.S_IFMT(inode.mode) == TYPES[e.type]
        assert stat.S_IMODE(inode.mode) == (0o777 if e.type == "symlink" else e.mode)
        assert (inode.uid, inode.gid) == (e.uid, e.gid)
        assert inode.mtime == (1_000_000_000, int(e.mod_time[20:29]))
        assert inode.xattrs == {key[13:]: value for key, value in e.records}
        if e.type == "reg":
            assert inode.size == e.size
            blocks = [(1, e.offset // 512 + (n << 31)) for n in range(-(-e.size // 2**40))]
            assert inode.chunks == blocks
        elif e.type == "symlink":
            assert inode.data == e.linkname
        elif e.type == "char":
            assert inode.rdev == (70000 & 0xFF) | 5 << 8 | (70000 >> 8) << 20


def test_a_directory_of_forty_thousand_names() -> None:
    """Directory blocks stand alone, in byte order, and hold every name."""
    entries = [entry(b"d/%d" % n, offset=512 * (n + 1)) for n in range(40_000)]
    found = image(entries).walk()
    assert set(found) == {b"", b"d", *(e.name for e in entries)}


def test_links_are_counted() -> None:
    """Hard links share an inode with their count; a directory counts its directories."""
    entries = [entry(b"a"), entry(b"b", "hardlink", 1024, linkname=b"a"), entry(b"d/e/", "dir", 1536)]
    found = image(entries).walk()
    assert found[b"a"].nid == found[b"b"].nid
    assert (found[b"a"].nlink, found[b"d"].nlink, found[b""].nlink) == (2, 3, 3)


@pytest.mark.parametrize("bottom", [False, True])
def test_whiteouts_and_opaque_marks(bottom: bool) -> None:
    """They become 0:0 devices and trusted.overlay.opaque=y, and vanish in a bottom layer."""
    entries = [entry(b"d/", "dir"), entry(b"d/.wh.x", offset=1024), entry(b"d/.wh..wh..opq", offset=1536)]
    found = image(entries, bottom=bottom).walk()
    assert (b"d/x" in found) is not bottom
    assert found[b"d"].xattrs == ({} if bottom else {b"trusted.overlay.opaque": b"y"})
    if not bottom:
        assert (stat.S_IFMT(found[b"d/x"].mode), found[b"d/x"].rdev) == (stat.S_IFCHR, 0)


def test_directories_without_entry_inherit() -> None:
    """Attributes and xattrs come from what the caller found below."""
    below = Inherited(0o1777, 1, 2, -5, 6, ((b"user.k", b""),))
    found = image([entry(b"tmp/x")], inherited={b"tmp": below}).walk()
    tmp = found[b"tmp"]
    assert (stat.S_IMODE(tmp.mode), tmp.uid, tmp.gid, tmp.mtime, tmp.xattrs) == (
        0o1777,
        1,
        2,
        (-5, 6),
        {b"user.k": b""},
    )
    assert stat.S_IMODE(found[b""].mode) == 0o755


def test_data_beyond_the_tar_is_refused() -> None:
    """A file may not point behind the end of device 1."""
    with pytest.raises(Integrity):
        image([entry(b"a", size=513)], data_size=1024)


def test_two_tebibytes_are_refused() -> None:
    """Block addresses have 32 bits."""
    with pytest.raises(Unsupported):
        image([], data_size=2**41)
    with pytest.raises(Unsupported):
        image([entry(b"a", size=2**41)], data_size=2**40)
