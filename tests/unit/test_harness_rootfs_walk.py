"""The comparison of two root filesystems finds every kind of difference, and nothing where there is none."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness.rootfs_walk import differences, walk

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes device nodes and sets owners")


def _make(root: Path) -> None:
    (root / "dir").mkdir(parents=True)
    (root / "dir/file").write_bytes(b"content")
    (root / "dir/other").write_bytes(b"content")
    (root / "dir/twin").hardlink_to(root / "dir/file")
    (root / "dir/third").hardlink_to(root / "dir/file")
    (root / "link").symlink_to("dir/file")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    os.mkfifo(root / "fifo")
    os.setxattr(root / "dir/file", "user.kept", b"value")
    os.setxattr(root / "dir/file", "user.empty", b"")
    with open(os.path.join(os.fsencode(root), b"odd\xff\nname"), "wb") as odd:
        odd.write(b"x")
    for directory, names, files in os.walk(os.fsencode(root), topdown=False):
        for name in [*names, *files, b"."]:
            path = os.path.join(directory, name)
            os.utime(path, ns=(0, 1_700_000_000_123_456_789), follow_symlinks=False)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal trees made one after the other."""
    left, right = tmp_path / "left", tmp_path / "right"
    for root in (left, right):
        _make(root)
    return left, right


def _found(trees: tuple[Path, Path]) -> set[tuple[bytes, str]]:
    left, right = trees
    return {(each.path, each.field) for each in differences(os.fsencode(left), os.fsencode(right))}


def test_equal_trees_have_no_difference(trees: tuple[Path, Path]) -> None:
    """Inode numbers, change times and the order on disk do not count."""
    assert _found(trees) == set()


def test_a_walk_sees_every_entry_in_order(trees: tuple[Path, Path]) -> None:
    """The root, then each name in byte order, children right after their directory."""
    paths = [path for path, _ in walk(os.fsencode(trees[0]))]
    assert paths == [
        b"",
        b"dir",
        b"dir/file",
        b"dir/other",
        b"dir/third",
        b"dir/twin",
        b"fifo",
        b"link",
        b"null",
        b"odd\xff\nname",
    ]


def _retype(root: Path) -> None:
    (root / "fifo").unlink()
    os.mknod(root / "fifo", 0o140644)
    os.utime(root / "fifo", ns=(0, 1_700_000_000_123_456_789))
    _reset(root)


def _relink(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("dir/fil3")
    os.utime(root / "link", ns=(0, 1_700_000_000_123_456_789), follow_symlinks=False)
    _reset(root)


def _regroup(root: Path) -> None:
    """`third` leaves the group of `file` and joins `other`: counts change, and who is whose twin."""
    (root / "dir/third").unlink()
    (root / "dir/third").hardlink_to(root / "dir/other")
    os.setxattr(root / "dir/other", "user.kept", b"value")
    os.setxattr(root / "dir/other", "user.empty", b"")
    _reset(root)


def _redevice(root: Path) -> None:
    mode = (root / "null").stat().st_mode
    (root / "null").unlink()
    os.mknod(root / "null", mode, os.makedev(1, 5))
    os.utime(root / "null", ns=(0, 1_700_000_000_123_456_789))
    _reset(root)


def _rewrite(root: Path) -> None:
    (root / "dir/other").write_bytes(b"CONTENT")
    _reset(root)


def _reset(root: Path) -> None:
    """Gives the files and directories that an edit touched their time back."""
    for name in ("dir/other", "dir/file", "dir/third", "dir", "."):
        if (root / name).exists():
            os.utime(root / name, ns=(0, 1_700_000_000_123_456_789))


def _add(root: Path) -> None:
    (root / "dir/new").mkdir()
    os.utime(root / "dir/new", ns=(0, 0))
    _reset(root)


_TWINS = (b"dir/file", b"dir/third", b"dir/twin")

CHANGES: dict[str, tuple[Callable[[Path], object], set[tuple[bytes, str]]]] = {
    "type": (_retype, {(b"fifo", "type")}),
    "mode": (lambda root: (root / "dir").chmod(0o1777), {(b"dir", "mode")}),
    "owner": (lambda root: os.chown(root / "link", 5, -1, follow_symlinks=False), {(b"link", "uid")}),
    "group": (lambda root: os.chown(root / "null", -1, 3_000_000_000), {(b"null", "gid")}),
    "nanosecond": (
        lambda root: os.utime(root / "fifo", ns=(0, 1_700_000_000_123_456_788)),
        {(b"fifo", "mtime_ns")},
    ),
    "root's time": (lambda root: os.utime(root, ns=(0, 1)), {(b"", "mtime_ns")}),
    "symlink's time": (
        lambda root: os.utime(root / "link", ns=(0, 1), follow_symlinks=False),
        {(b"link", "mtime_ns")},
    ),
    "content": (_rewrite, {(b"dir/other", "content")}),
    "target": (_relink, {(b"link", "target")}),
    "device": (_redevice, {(b"null", "rdev")}),
    "xattr's value": (
        lambda root: os.setxattr(root / "dir/file", "user.kept", b"VALUE"),
        {(path, "xattrs") for path in _TWINS},
    ),
    "an empty xattr is not an absent one": (
        lambda root: os.removexattr(root / "dir/file", "user.empty"),
        {(path, "xattrs") for path in _TWINS},
    ),
    "security xattr": (
        lambda root: os.setxattr(root / "dir/other", "security.demo", b"1"),
        {(b"dir/other", "xattrs")},
    ),
    "directory's xattr": (
        lambda root: os.setxattr(root / "dir", "user.on-dir", b""),
        {(b"dir", "xattrs")},
    ),
    "symlink's xattr": (
        lambda root: os.setxattr(root / "link", "trusted.on-link", b"", follow_symlinks=False),
        {(b"link", "xattrs")},
    ),
    "hardlink group": (
        _regroup,
        {
            (b"dir/file", "links"),
            (b"dir/twin", "links"),
            (b"dir/other", "links"),
            (b"dir/third", "links"),
            (b"dir/other", "hard_link"),
            (b"dir/third", "hard_link"),
            (b"dir/other", "xattrs"),
        },
    ),
    "an entry more": (_add, {(b"dir/new", "presence"), (b"dir", "links")}),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("swapped", [False, True])
def test_each_kind_of_difference_is_found(trees: tuple[Path, Path], name: str, swapped: bool) -> None:
    """One change in one tree, in either: exactly the fields it changes are reported."""
    change, expected = CHANGES[name]
    change(trees[0] if swapped else trees[1])
    assert _found(trees) == expected


def test_size(trees: tuple[Path, Path]) -> None:
    """A longer file differs in size even where content is not read."""
    with (trees[1] / "dir/other").open("ab") as file:
        file.write(b"!")
    _reset(trees[1])
    left, right = map(os.fsencode, trees)
    found = {(each.path, each.field) for each in differences(left, right, content=False)}
    assert found == {(b"dir/other", "size")}


def test_a_file_that_cannot_be_read_is_reported_not_raised(tmp_path: Path) -> None:
    """The errno's name stands where the content's digest would: /proc/PID/mem gives EIO at offset 0."""
    plain, broken = tmp_path / "plain", tmp_path / "broken"
    for each in (plain, broken):
        each.mkdir()
        (each / "file").write_bytes(b"")
    subprocess.run(["mount", "--bind", f"/proc/{os.getpid()}/mem", str(broken / "file")], check=True)
    try:
        found = list(differences(os.fsencode(plain), os.fsencode(broken)))
    finally:
        subprocess.run(["umount", str(broken / "file")], check=True)
    assert [each.right for each in found if each.field == "content"] == ["EIO"]


def test_a_path_that_lstat_denies_is_an_entry(tmp_path: Path) -> None:
    """A path without an inode behind it is reported by the errno's name, not raised."""
    assert [entry.type for _, entry in walk(os.fsencode(tmp_path / "absent"))] == ["ENOENT"]
