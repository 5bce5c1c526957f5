"""Proving at start what this kernel and this disk can do. Version numbers are not read: what counts is bytes."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from soci_snapshotter.errors import Config, SociError, Unsupported
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree
from soci_snapshotter.linux import fusedev, loopdev, mounts
from soci_snapshotter.serve.flatfiles import FIRST_NODE, FuseServer
from soci_snapshotter.serve.layer_mounts import METHODS, LayerMounts, Method, Stack

_CONTENT = b"".join(b"%07d\n" % number for number in range(64)) * 3  # 3 blocks of 512 bytes
_SIZE = 512 + len(_CONTENT)
_UNMOUNT = mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW


def probe(root: Path | str, method: Method | None = None) -> Stack:
    """The best way to mount layers that works under overlayfs on the root's own filesystem, or just `method`.

    Config when not root, Unsupported when nothing works, each in one line with what to do. Leaves nothing
    behind.
    """
    if os.geteuid() != 0:
        raise Config("root is needed to mount filesystems: run as root")
    directory = Path(tempfile.mkdtemp(prefix="probe-", dir=root))
    failures = []
    try:
        for name in METHODS if method is None else (method,):
            for directio in (True, False) if name == "file" else (False,):
                try:
                    return _proven(directory, Stack(name, directio))
                except Unsupported as problem:
                    failures.append(str(problem))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    raise Unsupported(f"{root}: {failures[-1]}")


class _Flat:
    """The probe's data as a flat file."""

    size = _SIZE

    def read(self, _unique: int, offset: int, size: int) -> bytes:
        return (bytes(512) + _CONTENT)[offset : offset + size]


def _proven(directory: Path, stack: Stack) -> Stack:
    """Read the same bytes over a local file, as of a complete layer, and over a flat file. Unsupported says why not."""
    entry = Entry(b"probe", "reg", 512, len(_CONTENT), b"", 0o644, 0, 0, b"", b"", "", 0, 0, ())
    uuid = os.urandom(16)
    image = build_meta(build_tree([entry]), data_size=_SIZE, uuid=uuid, inherited={}, bottom=True)
    base = Path(tempfile.mkdtemp(dir=directory))
    for path, value in ((base / "meta", image), (base / "data", bytes(512) + _CONTENT)):
        with open(path, "wb") as file:
            file.write(value)
            file.flush()
            os.fsync(file.fileno())
    with fusedev.connect() as connection, FuseServer(connection) as server:
        server.add(FIRST_NODE, _Flat())
        layers = LayerMounts(stack, base / "m", server, base / "run")
        layers.load(fresh=True)
        try:
            for device in (os.fsencode(base / "data"), server.path_of(FIRST_NODE)):
                _read_through(base, layers, device, stack)
        finally:
            layers.detach()
    if stack.method != "loop":
        return stack
    with loopdev.attached(os.fsencode(base / "data")) as loop:
        return Stack("loop", loop.direct)  # what it could do on this disk by itself


def _read_through(base: Path, layers: LayerMounts, device: bytes, stack: Stack) -> None:
    place = Path(tempfile.mkdtemp(dir=base))
    lower, upper, work, merged = (place / name for name in ("lower", "upper", "work", "merged"))
    for path in (lower, upper, work, merged):
        path.mkdir()
    with _mounted(layers, base / "meta", device, lower, stack):
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        try:
            mounts.mount(b"overlay", os.fsencode(merged), b"overlay", 0, os.fsencode(options))
        except OSError as problem:
            raise Unsupported(
                f"overlayfs does not mount over {stack.text} ({problem.strerror}): use ext4 or xfs for the root"
            ) from None
        try:
            with open(merged / "probe", "rb") as file:
                read = os.pread(file.fileno(), 700, 512) + os.pread(file.fileno(), 512, 0)
        except OSError as problem:
            raise Unsupported(
                f"{stack.text}: 512-byte blocks cannot be read ({problem.strerror}): use another disk"
            ) from None
        finally:
            mounts.unmount(os.fsencode(merged), _UNMOUNT)
        if read != _CONTENT[512:1212] + _CONTENT[:512]:
            raise Unsupported(f"{stack.text} gives wrong bytes: use another kernel")


@contextmanager
def _mounted(layers: LayerMounts, meta: Path, device: bytes, target: Path, stack: Stack) -> Iterator[None]:
    try:
        layers.mount(meta, device, target)
    except SociError as problem:
        raise Unsupported(f"{stack.text}: {problem}") from None
    except OSError as problem:
        raise Unsupported(_failure(problem, stack)) from None
    try:
        yield
    finally:
        layers.unmount(target)


def _failure(problem: OSError, stack: Stack) -> str:
    if problem.errno == errno.EPERM:
        return "mounting is not permitted: CAP_SYS_ADMIN in the initial user namespace is needed"
    if stack.method == "classic":
        return f"{stack.text} cannot be mounted ({problem}): Linux 5.12 or newer is needed"
    if problem.errno == errno.ENODEV:
        return "this kernel has no EROFS: `modprobe erofs`, or a kernel with CONFIG_EROFS_FS"
    if stack.method == "loop":
        return (
            f"{stack.text} cannot be mounted ({problem}): Linux 6.4 or newer is needed, for 512-byte blocks"
        )
    return (
        f"EROFS cannot be mounted from a file with 512-byte blocks ({problem.strerror}): Linux 6.12 or "
        "newer with CONFIG_EROFS_FS_BACKED_BY_FILE is needed, and a root on a disk filesystem (not tmpfs)"
    )
