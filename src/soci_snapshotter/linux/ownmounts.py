"""Which mounts serve layers of this program: what runs from one must not be what serves it.

Only the mount table is asked, so the answer is right where it can be seen: in a container on a lazy image the layers'
mounts are out of sight, but the overlay names them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from soci_snapshotter.linux.mounts import MountInfo

_LAYER = re.compile(rb".*/m/[1-9][0-9]*")  # where a layer is mounted: <root>/m/<n>
_RELATIVE = re.compile(rb"(m/)?[1-9][0-9]*")  # containerd shortens long lists of lowerdirs to these
_OCTAL = re.compile(rb"\\([0-7]{3})")
_META = re.compile(rb".*/meta-[0-9a-f]+\.erofs")  # what an EROFS mount without a loop device is made from


def below(path: bytes, table: Iterable[MountInfo]) -> bytes | None:
    """Where the layer is mounted that `path` (absolute, links resolved) lies on, alone or below an overlay; else None."""
    entries = list(table)
    covering: MountInfo | None = None
    for entry in entries:  # of mounts on one place the last is seen
        inside = path == entry.target or path.startswith(entry.target.rstrip(b"/") + b"/")
        if inside and (covering is None or len(entry.target) >= len(covering.target)):
            covering = entry
    if covering is None:
        return None
    if _is_layer(covering):
        return covering.target
    if covering.fstype != b"overlay":
        return None
    layers = {entry.target for entry in entries if _is_layer(entry)}
    for lower in _lowerdirs(covering.super_options):
        named = _LAYER if lower.startswith(b"/") else _RELATIVE
        if named.fullmatch(lower) or any(_inside(lower, layer) for layer in layers):
            return lower
    return None


def _is_layer(entry: MountInfo) -> bool:
    if entry.fstype == b"erofs":
        return bool(_META.fullmatch(entry.source) or _LAYER.fullmatch(entry.target))
    return entry.fstype == b"fuse" and entry.source == b"soci"


def _inside(path: bytes, directory: bytes) -> bool:
    return path == directory or path.startswith(directory + b"/")


def _lowerdirs(options: bytes) -> list[bytes]:
    """Of an overlay's options: one lowerdir= of paths with colons between, or, since Linux 6.8, lowerdir+= each.

    The kernel writes commas, spaces and backslashes in octal (seq_show_option); a colon in a path has a backslash.
    """
    found = []
    for option in options.split(b","):
        key, _, value = option.partition(b"=")
        value = _OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), value)
        if key == b"lowerdir":
            found += [re.sub(rb"\\(.)", rb"\1", part) for part in re.split(rb"(?<!\\):", value) if part]
        elif key in {b"lowerdir+", b"datadir+"}:
            found.append(value)
    return [os.path.normpath(one) for one in found]
