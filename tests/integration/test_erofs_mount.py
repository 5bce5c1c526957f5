"""meta.erofs mounted in every way, against what an independent reader of the tar expects."""

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
from harness.containerd import unmount_below

from soci_snapshotter.errors import Unsupported
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.tree import build_tree, implicit_directories
from soci_snapshotter.formats.ztoc import decode
from soci_snapshotter.linux import fusedev, mounts
from soci_snapshotter.serve.flatfiles import FuseServer
from soci_snapshotter.serve.layer_mounts import METHODS, LayerMounts, Method, Stack
from soci_snapshotter.serve.probe import probe

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
def mounter(method: Method, base: Path) -> Iterator[tuple[FuseServer, LayerMounts]]:
    """A FUSE server and what mounts over it, gone with the block."""
    with fusedev.connect() as connection, FuseServer(connection) as server:
        found = LayerMounts(Stack(method, directio=True), base / "m", server, base / "run")
        found.load(fresh=True)
        try:
            yield server, found
        finally:
            found.detach()
            unmount_below(base)  # what a test that failed left


@contextmanager
def mounted(layers: LayerMounts, meta: Path, device: bytes, target: Path) -> Iterator[Path]:
    """A mount for the time of the block."""
    target.mkdir(parents=True, exist_ok=True)
    layers.mount(meta, device, target)
    try:
        yield target
    finally:
        layers.unmount(target)


class Pread:
    """A flat file over a local one."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size

    def read(self, unique: int, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)


@pytest.mark.parametrize("through_fuse", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_shows_what_the_tar_says(
    case: str, method: Method, through_fuse: bool, tmp_path: Path
) -> None:
    """Every path, type, mode, owner, time, xattr, device, link and byte, over a local file and FUSE."""
    tar = tar_of(case)
    implicit = write_meta(case, tar, tmp_path / "meta")
    (tmp_path / "data").write_bytes(tar)
    want = expected(tar)
    with mounter(method, tmp_path) as (server, layers):
        server.add(16, Pread(tmp_path / "data"))
        device = server.path_of(16) if through_fuse else os.fsencode(tmp_path / "data")
        with mounted(layers, tmp_path / "meta", device, tmp_path / "m/1") as top:
            found = shown(top)
            assert shown(top) == found  # from the caches
            if case == "gnu6-edge1":
                status = (top / "edge/hard-a").stat()
                assert status.st_nlink == 3
                same = [entry.name for entry in os.scandir(top / "edge") if entry.inode() == status.st_ino]
                assert len(same) == 2  # as readdir says, too; the third is elsewhere
                names = [path for path in (top / "edge").iterdir() if path.is_dir() and not path.is_symlink()]
                assert (top / "edge").stat().st_nlink == 2 + len(names)
    assert {path: value for path, value in found.items() if path not in implicit} == want
    assert set(found) - set(want) == set(implicit) - {""}


@pytest.mark.parametrize("method", METHODS)
def test_whiteouts_act_under_overlayfs(method: Method, tmp_path: Path) -> None:
    """edge2 above edge1: removed names are gone, opaque directories hide, a directory becomes a file."""
    with mounter(method, tmp_path) as (server, layers):
        for node, (case, name) in enumerate([("gnu6-edge1", "low"), ("go-edge2-whiteouts", "high")], 16):
            tar = tar_of(case)
            (tmp_path / f"{name}.tar").write_bytes(tar)
            write_meta(case, tar, tmp_path / f"{name}.meta", bottom=name == "low")
            server.add(node, Pread(tmp_path / f"{name}.tar"))
        with (
            mounted(layers, tmp_path / "low.meta", server.path_of(16), tmp_path / "low") as low,
            mounted(layers, tmp_path / "high.meta", server.path_of(17), tmp_path / "high") as high,
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


@pytest.mark.parametrize("method", METHODS)
def test_mounts_are_found_again(method: Method, tmp_path: Path) -> None:
    """A mount is listed below its directory; gone after unmount, with its loop devices."""
    tar = tar_of("go-one")
    write_meta("go-one", tar, tmp_path / "meta")
    (tmp_path / "data").write_bytes(tar)
    target = tmp_path / "m" / "1"
    with mounter(method, tmp_path) as (_, layers):
        with mounted(layers, tmp_path / "meta", os.fsencode(tmp_path / "data"), target):
            assert layers.mounted() == {target}
            assert len(loops_over(tmp_path)) == (2 if method == "loop" else 0)
        assert layers.mounted() == set()
        assert loops_over(tmp_path) == set()


def loops_over(directory: Path) -> set[str]:
    """Loop devices whose file is in `directory`."""
    found = set()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if path.read_text().startswith(f"{directory}/"):
                found.add(path.parent.parent.name)
        except OSError:  # somebody else's, which goes
            pass
    return found


@pytest.mark.parametrize("method", ["file", "loop"])
def test_read_ahead_is_a_mebibyte(method: Method, tmp_path: Path) -> None:
    """The filesystem's device asks for 1 MiB at once."""
    tar = tar_of("go-one")
    write_meta("go-one", tar, tmp_path / "meta")
    (tmp_path / "data").write_bytes(tar)
    before = set(os.listdir("/sys/class/bdi"))
    with (
        mounter(method, tmp_path) as (_, layers),
        mounted(layers, tmp_path / "meta", os.fsencode(tmp_path / "data"), tmp_path / "m/1"),
    ):
        if method == "loop":
            found = [Path(f"/sys/block/{name}/queue/read_ahead_kb") for name in loops_over(tmp_path)]
        else:
            new = set(os.listdir("/sys/class/bdi")) - before
            found = [Path(f"/sys/class/bdi/{name}/read_ahead_kb") for name in new if "erofs" in name]
        assert "1024\n" in [path.read_text() for path in found]


@pytest.mark.parametrize("method", [None, *METHODS])
def test_the_probe_leaves_nothing(method: Method | None, tmp_path: Path) -> None:
    """It proves this disk in the way asked for, and leaves neither mount nor file nor loop device."""
    assert probe(tmp_path, method).method == (method or "file")
    assert os.listdir(tmp_path) == []
    assert not any(entry.target.startswith(os.fsencode(tmp_path)) for entry in mounts.mountinfo())
    assert loops_over(tmp_path) == set()


def test_memory_cannot_back_erofs() -> None:
    """On tmpfs the way from files is refused in one line that says so, and another one is taken."""
    with pytest.raises(Unsupported, match="tmpfs") as caught:
        probe("/dev/shm", "file")
    assert "\n" not in str(caught.value)
    assert probe("/dev/shm").method in {"loop", "classic"}
