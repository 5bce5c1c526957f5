"""The layers that the data plane's benches read, made once like those of bench.bulk.

`many_files`: 70,000 small files, 40,000 of them in one directory (as an icon theme or a node_modules cache has).
`libraries`: 1.5 GB in shared objects, one of them of 256 MiB, as numeric frameworks have. Members are in order of
names in each directory, as every builder of images writes them.
"""

import gzip
import hashlib
import io
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

from harness import trees

from bench import bulk
from bench.content import LIBRARIES, Content

MANY, IN_ONE_DIRECTORY = 70_000, 40_000
LARGE_FILE, LARGE_SIZE = "usr/local/lib/engine/libengine_kernels.so", 256 << 20
"""What cold-sequential reads."""

_LIBRARIES_SIZE = 1_500_000_000
_LIBRARIES = 1500
_LIBRARY_SIGMA = 1.8  # of the log-normal sizes: most under 200 KB, some over 50 MB
_EAGER_FILES, _EAGER_SIZE = 25_000, 490_000_000  # of each of three layers, a third of 600 MB compressed
_PARTS, _PART_FILES, _PART_FILE = 10, 2000, 25_000  # 20,000 files, 500 MB


def many_files(*, smoke: bool = False) -> bulk.Blob:
    """70,000 small files (smoke: 1,400), 540 MB; half under 2.7 KB."""
    share = 50 if smoke else 1
    return bulk.kept("many", lambda target: _many(target, MANY // share, IN_ONE_DIRECTORY // share), smoke)


def libraries(*, smoke: bool = False) -> bulk.Blob:
    """1.5 GB of libraries (smoke: 30 MB), about 600 MB compressed."""
    return bulk.kept("libraries", lambda target: _libraries(target, 50 if smoke else 1), smoke)


def eager(number: int, *, smoke: bool = False) -> bulk.Blob:
    """One of three layers of together 75,000 files and 600 MB compressed (smoke: a fiftieth)."""
    share = 50 if smoke else 1

    def make(target: Path) -> bulk.Blob:
        return bulk.make(target, 10 + number, _EAGER_FILES // share, _EAGER_SIZE // share)

    return bulk.kept(f"eager{number}", make, smoke)


def fifty(count: int, *, smoke: bool = False) -> list[bulk.Blob]:
    """`count` layers of 20,000 files and 500 MB each (smoke: 200 files), all different, each of few bytes."""
    files = _PART_FILES // (100 if smoke else 1)
    parts: list[tuple[bytes, bytes]] = []

    def make(target: Path, number: int) -> bulk.Blob:
        if not parts:
            parts.extend(_part(part, files) for part in range(_PARTS))
        return _joined(target, number, parts, files * _PARTS)

    return [
        bulk.kept(f"fifty{number}", lambda target, number=number: make(target, number), smoke)  # type: ignore[misc]
        for number in range(count)
    ]


def _many(target: Path, files: int, in_one: int) -> bulk.Blob:
    draw = random.Random("many files")
    paths = dict(trees.entries(files - in_one, seed=7))
    for number in range(in_one):
        size = min(int(draw.lognormvariate(7.9, 1.45)), 400_000)  # as harness.trees
        paths[f"usr/share/index/objects/{draw.getrandbits(64):016x}{number % 100:02}.json"] = size
    ordered = sorted(paths.items(), key=lambda item: item[0].split("/"))
    return bulk.pack(target, bulk.members(ordered, Content(draw)), "pigz")


def _libraries(target: Path, share: int) -> bulk.Blob:
    draw = random.Random("libraries")
    count = _LIBRARIES // share
    weights = [draw.lognormvariate(0, _LIBRARY_SIGMA) for _ in range(count)]
    scale = (_LIBRARIES_SIZE - LARGE_SIZE) / share / sum(weights)
    paths = {
        f"usr/local/lib/{draw.choice(('engine', 'numeric', 'tensors', 'codecs'))}/lib_{number:04}.so": int(
            w * scale
        )
        for number, w in enumerate(weights)
    }
    paths[LARGE_FILE] = LARGE_SIZE // share
    ordered = sorted(paths.items(), key=lambda item: item[0].split("/"))
    return bulk.pack(target, bulk.members(ordered, Content(draw, LIBRARIES)), "pigz")


def _part(number: int, files: int) -> tuple[bytes, bytes]:
    """A piece of a tar, plain and compressed: a directory with `files` files."""
    plain = io.BytesIO()
    line = b"%08d,%02d,0.125,none\n"

    def members() -> Iterator[tuple[tarfile.TarInfo, io.BytesIO | None]]:
        name = f"usr/share/part{number:02}"
        yield bulk.header(name, tarfile.DIRTYPE, 0o755, 0), None
        for each in range(files):
            info = bulk.header(f"{name}/table_{each:05}.csv", tarfile.REGTYPE, 0o644, _PART_FILE)
            yield info, io.BytesIO((line % (each, number) * (_PART_FILE // 20))[:_PART_FILE])

    for info, content in members():
        plain.write(info.tobuf(tarfile.USTAR_FORMAT))
        if content is not None:
            data = content.read()
            plain.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return plain.getvalue(), gzip.compress(plain.getvalue(), 6, mtime=0)


def _joined(target: Path, number: int, parts: list[tuple[bytes, bytes]], files: int) -> bulk.Blob:
    """A first member that no other layer has, then every part, then the tar's end."""
    first = bulk.header(f"layer_{number:02}", tarfile.DIRTYPE, 0o755, 0).tobuf(tarfile.USTAR_FORMAT)
    pieces = [(first, gzip.compress(first, mtime=0)), *parts]
    pieces.append((bytes(1024), gzip.compress(bytes(1024), mtime=0)))
    blob, plain = hashlib.sha256(), hashlib.sha256()
    with open(target, "wb") as out:
        for content, packed in pieces:
            plain.update(content)
            blob.update(packed)
            out.write(packed)
    size = sum(len(content) for content, _ in pieces)
    digests = f"sha256:{blob.hexdigest()}", f"sha256:{plain.hexdigest()}"
    return bulk.Blob(str(target), *digests, target.stat().st_size, size, files)
