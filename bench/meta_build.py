"""meta-build: CPU from a decoded table of contents to meta.erofs, 100,000 entries."""

import gc
import random
import time
from collections.abc import Iterator

from bench.result import Result, smaller_is_better
from soci_snapshotter.formats.erofs import build_meta
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.formats.tree import build_tree, implicit_directories

NAMES = ("meta-build",)

TARGET_S = 1.0

_ENTRIES = 100_000


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """CPU seconds of tree and image in one thread; the peer is the second that the project allows itself."""
    entries, size = layer_entries(_ENTRIES)
    runs = []
    image = b""
    gc.disable()  # as the worker does
    try:
        for _ in range(1 if smoke else 7):
            started = time.process_time()
            tree = build_tree(entries)
            implicit_directories(tree)
            image = build_meta(tree, data_size=size, uuid=b"\1" * 16, inherited={}, bottom=False)
            runs.append({"ours": time.process_time() - started, "peer": TARGET_S})
    finally:
        gc.enable()
    yield smaller_is_better(
        names[0],
        f"meta.erofs of {_ENTRIES:,} decoded entries, tree included; peer is no program but the limit of 1 s",
        "CPU s",
        runs,
        target=1.0,
        notes={"bytes per entry": round(len(image) / _ENTRIES, 1)},
    )


def layer_entries(count: int) -> tuple[list[Entry], int]:
    """A layer of packages: of 13 entries 1 is a directory, 1 a symbolic link, 11 are files, nearly each with
    a time of its own (the worst case for reading times). And the tar's size.
    """
    chance = random.Random(1)
    entries: list[Entry] = []
    offset = 512
    while len(entries) < count:
        number = len(entries) // 13
        directory = b"usr/lib/python3/dist-packages/pkg%04d/" % number
        if number % 3 == 0:
            directory += b"sub%d/" % number
        for place in range(13):
            size = chance.randrange(1, 20_000) if place > 1 else 0
            kind = ("dir", "symlink")[place] if place < 2 else "reg"
            name = directory if kind == "dir" else directory + b"module_name_%d_%d.py" % (number, place)
            stamp = (
                1 + chance.randrange(28),
                chance.randrange(24),
                chance.randrange(60),
                chance.randrange(60),
            )
            entries.append(
                Entry(
                    name=name,
                    type=kind,
                    offset=offset,
                    size=size,
                    linkname=b"module_0.py" if kind == "symlink" else b"",
                    mode=0o755 if kind == "dir" else 0o644,
                    uid=0,
                    gid=0,
                    uname=b"root",
                    gname=b"root",
                    mod_time="2023-11-{:02}T{:02}:{:02}:{:02}Z".format(*stamp),
                    devmajor=0,
                    devminor=0,
                    records=(),
                )
            )
            offset += 512 + -(-size // 512) * 512
    return entries[:count], offset
