"""A tree of many small files, the same on every machine: what /usr/lib/python3 and /usr/share look like.

Made as a tar stream (members in the order a tree walk gives), so that it becomes a layer without touching a
disk and unpacks the same way everywhere. Sizes and depths follow what Debian's Python packages show: half
of the files under 3 KB, a mean near 9 KB, some 15 files to a directory.
"""

import hashlib
import io
import random
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MTIME = 1_700_000_000

_WORDS = (
    b"import return self class value none true false index data frame array shape dtype float "
    b"def for in if else try except raise with as from lambda yield assert print range len sum"
).split()

_SIZE_MU, _SIZE_SIGMA = 7.9, 1.45
"""Log-normal: median e^7.9 = 2.7 KB, mean 7.7 KB; above the bound below a file is cut."""

_MAX_FILE = 400_000


@dataclass(frozen=True)
class Tree:
    """How many files and directories a tree has, and the sum of its files' bytes."""

    files: int
    directories: int
    size: int


def entries(count: int, seed: int = 1) -> Iterator[tuple[str, int]]:
    """`count` files as (path, size in bytes), grouped by directory, parents before children."""
    draw = _random(seed)
    made = 0
    package = 0
    while made < count:
        package += 1
        depths = ["usr/lib/python3/dist-packages" if package % 3 else "usr/share", f"package_{package:03}"]
        for level in range(draw.randint(1, 4)):
            if level:
                depths.append(draw.choice(("core", "tests", "_impl", "data", "locale", "util")) + str(level))
            for number in range(min(draw.randint(5, 40), count - made)):
                suffix = draw.choice((".py", ".py", ".cpython-311.pyc", ".pyi", ".json", ".txt"))
                name = f"{draw.choice(_WORDS).decode()}_{number:02}{suffix}"
                size = min(int(draw.lognormvariate(_SIZE_MU, _SIZE_SIGMA)), _MAX_FILE)
                yield "/".join([*depths, name]), size
                made += 1


def write_tar(target: Path, count: int, seed: int = 1) -> Tree:
    """Writes the tree as an uncompressed tar: every directory has its entry, before what is in it."""
    text = _text(seed)
    draw = _random(seed + 1)
    known: set[str] = set()
    files = size = 0
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for path, length in entries(count, seed):
            for parent in _parents(path):
                if parent not in known:
                    known.add(parent)
                    archive.addfile(_member(parent, tarfile.DIRTYPE, 0o755, 0))
            start = draw.randrange(len(text) - length)
            content = text[start : start + length]
            archive.addfile(_member(path, tarfile.REGTYPE, 0o644, length), io.BytesIO(content))
            files += 1
            size += length
    return Tree(files, len(known), size)


def layer(tar: Path, compressor: str = "pigz") -> tuple[bytes, str]:
    """The tar compressed by GNU gzip or pigz, and its DiffID."""
    with open(tar, "rb") as source:
        diff_id = hashlib.file_digest(source, "sha256").hexdigest()
        source.seek(0)
        blob = subprocess.run([compressor, "-n", "-c"], stdin=source, capture_output=True, check=True).stdout
    return blob, f"sha256:{diff_id}"


def _random(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311  the same numbers everywhere is what is wanted


def _parents(path: str) -> Iterator[str]:
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth])


def _member(name: str, kind: bytes, mode: int, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.mtime = kind, mode, size, _MTIME
    return member


def _text(seed: int) -> bytes:
    """A megabyte that compresses about as source code does, to a third or a quarter."""
    draw = _random(seed + 2)
    lines = []
    length = 0
    while length < (1 << 20) + _MAX_FILE:
        line = b" " * (4 * draw.randint(0, 3)) + b" ".join(draw.choices(_WORDS, k=draw.randint(2, 9)))
        line += b" = %d\n" % draw.randrange(10**6)
        lines.append(line)
        length += len(line)
    return b"".join(lines)
