"""What a directory without an entry of its own takes from the layers below.

An ordinary unpack makes such a directory in the upper layer with the mode, owner, times and xattrs that the nearest
lower layer has for the path (containerd's archive apply with its parents option); overlayfs then shows those. A layer
with tmp/x and no tmp/ must not turn /tmp into 0755.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping, Sequence

from soci_snapshotter.formats.erofs import Inherited
from soci_snapshotter.linux.syscalls import open_in_root

DEFAULT = Inherited(mode=0o755, uid=0, gid=0, mtime_s=0, mtime_ns=0, xattrs=())
"""Where no lower layer has the directory: what containerd's apply makes, at the epoch rather than at the pull's time."""

_WRITER_VERSION = (
    b"1"  # part of the hash: a change of what the EROFS writer emits must not meet files of the old one
)


def look_up(path: bytes, lowers: Sequence[bytes]) -> Inherited:
    """The attributes that directory `path` (relative, no leading slash, b"" = the root) inherits.

    `lowers` are directories, topmost first. Symbolic links are followed inside each lower layer, as the ordinary
    unpack does; the first layer where the path is something else than a directory hides those below it.
    """
    for lower in lowers:
        try:
            fd = open_in_root(lower, path or b".", os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        except OSError:  # a file, a whiteout or a link loop stands there: replaced, nothing is inherited
            return DEFAULT
        try:
            return _attributes(fd, with_xattrs=path != b"")
        finally:
            os.close(fd)
    return DEFAULT


def _attributes(fd: int, *, with_xattrs: bool) -> Inherited:
    status = os.fstat(fd)
    name = f"/proc/self/fd/{fd}"
    xattrs = []
    if with_xattrs:
        for key in sorted(os.listxattr(name)):
            if not key.startswith("trusted."):  # opaque marks and the like belong to the lower layer alone
                xattrs.append((os.fsencode(key), os.getxattr(name, key)))
    seconds, nanoseconds = divmod(status.st_mtime_ns, 1_000_000_000)
    return Inherited(
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_s=seconds,
        mtime_ns=nanoseconds,
        xattrs=tuple(xattrs),
    )


def look_up_all(paths: Iterable[bytes], lowers: Sequence[bytes]) -> dict[bytes, Inherited]:
    """`look_up` for each of `paths`."""
    return {path: look_up(path, lowers) for path in paths}


def meta_hash(inherited: Mapping[bytes, Inherited], *, bottom: bool) -> str:
    """h of meta-<h>.erofs: 16 hex digits over everything that shapes the file besides the ztoc itself."""
    digest = hashlib.sha256(_WRITER_VERSION + (b"b" if bottom else b"u"))
    for path in sorted(inherited):
        digest.update(repr((path, inherited[path])).encode())
    return digest.hexdigest()[:16]


def meta_uuid(ztoc_digest: str, hash_text: str) -> bytes:
    """The EROFS UUID of (ztoc, h), 16 bytes: equal images get equal ones, and never zeros (overlayfs needs that)."""
    return hashlib.sha256(f"{ztoc_digest} {hash_text}".encode()).digest()[:16]
