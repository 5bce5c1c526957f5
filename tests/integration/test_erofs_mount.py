"""meta.erofs mounted by the kernel, against what an independent reader of the tar expects."""

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from soci_snapshotter.errors import Unsupported
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.tree import build_tree, implicit_directories
from soci_snapshotter.formats.ztoc import decode
from soci_snapshotter.linux import fusedev, mounts
from soci_snapshotter.serve.erofs_mounts import ErofsMounts, Stack, mount_layer, probe
from soci_snapshotter.serve.flatfiles import FuseServer

pytestmark = pytest.mark.root

VECTORS = Path(__file__).parent.parent / "vectors"
CASES = ["gnu6-edge1", "pigz-edge3", "multi2-edge3", "none-edge3-span1m", "go-one", "go-empty"]
TYPES = {
    tarfile.REGTYPE: stat.S_IFREG,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def tar_of(case: str) -> bytes:
    """The layer's tar, padded to a block."""
    (blob,) = (VECTORS / case).glob("layer.tar*")
    data = blob.read_bytes()
    tar = gzip.decompress(data) if blob.suffix == ".gz" else data
    return tar + bytes(-len(tar) % 512)


def expected(tar: bytes) -> dict[str, tuple]:
    """Path to (mode, uid, gid, ns, xattrs, rdev, content or target) by tarfile; the last wins."""
    found: dict[str, tuple] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        for member in archive:
            name = os.path.normpath(member.name).lstrip("/")
            if member.islnk():
                found[name] = found[os.path.normpath(member.linkname).lstrip("/")]
                continue
            mtime = int(Decimal(member.pax_headers.get("mtime", str(member.mtime))) * 10**9)
            mtime = max(mtime, 0)  # as containerd unpacks
            kind = TYPES[member.type]
            content: object = None
            if member.isreg():
                file = archive.extractfile(member)
                assert file is not None
                content = hashlib.sha256(file.read()).hexdigest()
            elif member.issym():
                content = member.linkname
            xattrs = {
                key[13:]: value.encode("utf-8", "surrogateescape")
                for key, value in member.pax_headers.items()
                if key.startswith("SCHILY.xattr.")
            }
            mode = kind | (0o777 if member.issym() else member.mode & 0o7777)
            device = os.makedev(member.devmajor, member.devminor) if member.ischr() or member.isblk() else 0
            found[name] = (mode, member.uid, member.gid, mtime, xattrs, device, content)
    return found


def shown(top: Path) -> dict[str, tuple]:
    """The same of a mounted tree."""
    found = {}
    for directory, directories, files in os.walk(top):
        for name in directories + files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            xattrs = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            found[os.path.relpath(path, top)] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_mtime_ns,
                xattrs,
                status.st_rdev,
                content,
            )
    return found


def write_meta(case: str, tar: bytes, path: Path, *, bottom: bool = True) -> list[str]:
    """Write meta.erofs; the directories without entries."""
    tree = build_tree(decode((VECTORS / case / "ztoc.bin").read_bytes()).entries)
    path.write_bytes(build_meta(tree, data_size=len(tar), uuid=b"v" * 16, inherited={}, bottom=bottom))
    return [os.fsdecode(name) for name in implicit_directories(tree)]


@contextmanager
def mounted(meta: Path, device: bytes, target: Path, *, directio: bool = True) -> Iterator[Path]:
    """An EROFS mount for the time of the block."""
    target.mkdir()
    mount_layer(os.fsencode(meta), device, os.fsencode(target), directio)
    try:
        yield target
    finally:
        mounts.unmount(os.fsencode(target))


class Pread:
    """A flat file over a local one."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size

    def read(self, unique: int, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)


@pytest.mark.parametrize("through_fuse", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_shows_what_the_tar_says(case: str, through_fuse: bool, tmp_path: Path) -> None:
    """Every path, type, mode, owner, time, xattr, device, link and byte, over a local file and FUSE."""
    tar = tar_of(case)
    implicit = write_meta(case, tar, tmp_path / "meta")
    (tmp_path / "data").write_bytes(tar)
    want = expected(tar)
    if through_fuse:
        with fusedev.connect() as connection, FuseServer(connection) as server:
            server.add(16, Pread(tmp_path / "data"))
            with mounted(tmp_path / "meta", server.path_of(16), tmp_path / "m") as top:
                found = shown(top)
    else:
        with mounted(
            tmp_path / "meta", os.fsencode(tmp_path / "data"), tmp_path / "m", directio=False
        ) as top:
            found = shown(top)
            if case == "gnu6-edge1":
                assert (top / "edge/hard-a").stat().st_nlink == 3
                names = len(
                    [path for path in (top / "edge").iterdir() if path.is_dir() and not path.is_symlink()]
                )
                assert (top / "edge").stat().st_nlink == 2 + names
    assert {path: value for path, value in found.items() if path not in implicit} == want
    assert set(found) - set(want) == set(implicit) - {""}


def test_whiteouts_act_under_overlayfs(tmp_path: Path) -> None:
    """edge2 above edge1: removed names are gone, opaque directories hide, a directory becomes a file."""
    with fusedev.connect() as connection, FuseServer(connection) as server:
        for node, (case, name) in enumerate([("gnu6-edge1", "low"), ("go-edge2-whiteouts", "high")], 16):
            tar = tar_of(case)
            (tmp_path / f"{name}.tar").write_bytes(tar)
            write_meta(case, tar, tmp_path / f"{name}.meta", bottom=name == "low")
            server.add(node, Pread(tmp_path / f"{name}.tar"))
        with (
            mounted(tmp_path / "low.meta", server.path_of(16), tmp_path / "low") as low,
            mounted(tmp_path / "high.meta", server.path_of(17), tmp_path / "high") as high,
        ):
            merged = tmp_path / "merged"
            merged.mkdir()
            mounts.mount(
                b"overlay",
                os.fsencode(merged),
                b"overlay",
                1,
                b"lowerdir=%b:%b" % tuple(map(os.fsencode, (high, low))),
            )
            try:
                edge = merged / "edge"
                names = os.listdir(edge)
                assert not {"tobedeleted.txt", "deldir", ".wh.deldir"} & set(names)
                assert sorted(os.listdir(edge / "opaque")) == ["new1", "sub"]
                assert os.listdir(edge / "opaque/sub") == ["new2"]
                assert (edge / "replaced").is_file()
                # In a directory of one layer overlayfs lists a whiteout that has no file (after an unpack too).
                assert not os.path.lexists(edge / "wh-in-new/nothing")
                assert (edge / "text-100k.txt").stat().st_size == 100_000
                assert (edge / "upper-only.txt").stat().st_size == 50_000
            finally:
                mounts.unmount(os.fsencode(merged))


def test_mounts_are_found_again(tmp_path: Path) -> None:
    """A mount is listed below its directory with 1 MiB of read-ahead, and gone after unmount."""
    tar = tar_of("go-one")
    write_meta("go-one", tar, tmp_path / "meta")
    (tmp_path / "data").write_bytes(tar)
    target = tmp_path / "m" / "1"
    target.mkdir(parents=True)
    table = ErofsMounts(Stack(directio=True), tmp_path / "m")
    before = set(os.listdir("/sys/class/bdi"))
    table.mount(tmp_path / "meta", os.fsencode(tmp_path / "data"), target)
    try:
        assert table.mounted() == {target}
        for name in set(os.listdir("/sys/class/bdi")) - before:
            assert Path(f"/sys/class/bdi/{name}/read_ahead_kb").read_text() == "1024\n"
    finally:
        table.unmount(target)
    assert table.mounted() == set()


def test_the_probe_leaves_nothing(tmp_path: Path) -> None:
    """It proves this disk, and leaves neither mount nor file."""
    before = len(mounts.mountinfo())
    assert probe(tmp_path) in {Stack(directio=True), Stack(directio=False)}
    assert os.listdir(tmp_path) == []
    assert len(mounts.mountinfo()) == before


def test_the_probe_refuses_memory() -> None:
    """tmpfs cannot back EROFS: one line that says so."""
    with pytest.raises(Unsupported, match="tmpfs") as caught:
        probe("/dev/shm")
    assert "\n" not in str(caught.value)
