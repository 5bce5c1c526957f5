"""Large layers, the same on every machine, for the benches of index building; kept under the cache.

A layer is 20,000 files in 1.25 GB of tar, 500 MB compressed: a mean of 62 KB, most files of a few KB and some of
many MB, as in an image of compilers and numeric libraries. Of ten files four are text, five are machine code or
tables, and one does not compress.
"""

import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, cast

from harness import trees

from bench.content import Content

FILES, TAR_SIZE = 20_000, 1_240_000_000
"""Of a whole layer; the bytes are content, without headers and padding."""

COMPRESSORS = ("gzip", "pigz", "gzip", "pigz")
"""What makes the layers 0 to 3: one stream, or (pigz) blocks that end at a byte each 128 KiB."""

_VERSION = 1  # of what is made here; another one makes the layers again

_PART_FILES, _PART_FILE, _REPEATS = 2000, 32 << 10, 100
"""Files in what repeats, bytes of each (whole blocks), and how often it comes."""

_SIGMA = 2.2
"""Of the log-normal sizes: half of the files under a tenth of the mean."""


Member = tuple[tarfile.TarInfo, bytes | None]
"""A header, and a regular file's bytes."""


@dataclass(frozen=True)
class Blob:
    """A gzip layer on disk: its digests, sizes in bytes, and how many regular files it has."""

    path: str
    digest: str
    diff_id: str
    size: int
    tar_size: int
    files: int


def cache() -> Path:
    """Where layers are kept from one run to the next: .cache of the checkout, or $XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) / "soci-snapshotter" if base else Path(__file__).resolve().parent.parent / ".cache"
    return root / "bench"


def layer(number: int, *, smoke: bool = False) -> Blob:
    """Layer `number`, made when it is not there yet (a minute). `smoke`: a hundredth of it."""
    share = 100 if smoke else 1
    return kept(f"layer{number}", lambda blob: make(blob, number, FILES // share, TAR_SIZE // share), smoke)


def repetitive(*, smoke: bool = False) -> Blob:
    """A tar of 6.6 GB with 200,000 files whose blob is small: what repeats is compressed once."""
    return kept("repetitive", lambda blob: _make_repetitive(blob, 2 if smoke else _REPEATS), smoke)


def kept(name: str, make: Callable[[Path], Blob], smoke: bool) -> Blob:
    """The layer `name` from the cache, or made there first; `smoke` has another name."""
    home = cache() / f"{name}-{_VERSION}{'-smoke' if smoke else ''}"
    record = home / "layer.json"
    if not record.exists():
        home.mkdir(parents=True, exist_ok=True)
        partial = home / "layer.json.part"
        partial.write_text(json.dumps(asdict(make(home / "blob"))))
        partial.rename(record)  # only now the blob counts
    return Blob(**json.loads(record.read_text()) | {"path": str(home / "blob")})


def _make_repetitive(target: Path, repeats: int) -> Blob:
    """Equal gzip members, each with so many whole entries of the tar, and one with the tar's end."""
    part = bytearray()
    for number in range(_PART_FILES):
        info = header(f"usr/share/part/file_{number:04}.txt", tarfile.REGTYPE, 0o644, _PART_FILE)
        part += info.tobuf(tarfile.USTAR_FORMAT)
        part += (b"entry %04d of a table " % number * (_PART_FILE // 16))[:_PART_FILE]
    end = bytes(1024)
    piece = gzip.compress(part, 6, mtime=0)
    plain = hashlib.sha256()
    with open(target, "wb") as out:
        for _ in range(repeats):
            out.write(piece)
            plain.update(part)
        out.write(gzip.compress(end, mtime=0))
        plain.update(end)
    with open(target, "rb") as blob:
        digest = hashlib.file_digest(blob, "sha256").hexdigest()
    size, diff_id = len(part) * repeats + len(end), f"sha256:{plain.hexdigest()}"
    return Blob(str(target), f"sha256:{digest}", diff_id, target.stat().st_size, size, _PART_FILES * repeats)


def make(target: Path, number: int, files: int, size: int) -> Blob:
    """A layer of so many files and bytes of content; `number` decides what is drawn and who compresses."""
    return pack(target, _members(number, files, size), COMPRESSORS[number % len(COMPRESSORS)])


def pack(target: Path, members: Iterable[Member], compressor: str) -> Blob:
    """A tar of the members, compressed by GNU gzip or pigz into `target`."""
    files = 0
    with open(target, "wb") as out:
        process = subprocess.Popen([compressor, "-n", "-c"], stdin=subprocess.PIPE, stdout=out)
        if process.stdin is None:
            raise RuntimeError("no pipe")
        with process.stdin as pipe:
            sink = _Tee(pipe)
            out_file = cast(IO[bytes], sink)  # of which a stream needs write alone
            with tarfile.open(
                fileobj=out_file, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20
            ) as archive:
                for info, content in members:
                    archive.addfile(info, None if content is None else io.BytesIO(content))
                    files += info.isreg()
        if process.wait():
            raise RuntimeError(f"{compressor}: exit {process.returncode}")
    with open(target, "rb") as blob:
        digest = hashlib.file_digest(blob, "sha256").hexdigest()
    diff_id = f"sha256:{sink.hash.hexdigest()}"
    return Blob(str(target), f"sha256:{digest}", diff_id, target.stat().st_size, sink.size, files)


class _Tee:
    """Writes on, and hashes what goes through."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        self._out.write(data)
        return len(data)


def _members(number: int, files: int, size: int) -> Iterator[Member]:
    draw = random.Random(f"layer {number}")
    content = Content(draw)
    weights = [draw.lognormvariate(0, _SIGMA) for _ in range(files)]
    scale = size / sum(weights)
    paths = (path for path, _ in trees.entries(files, seed=number + 1))
    return members(
        ((path, int(weight * scale)) for path, weight in zip(paths, weights, strict=True)), content
    )


def members(files: Iterable[tuple[str, int]], content: Content) -> Iterator[Member]:
    """Files of (path, bytes) with their directories, each before what is in it."""
    known: set[str] = set()
    for path, length in files:
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            parent = "/".join(parts[:depth])
            if parent not in known:
                known.add(parent)
                yield header(parent, tarfile.DIRTYPE, 0o755, 0), None
        yield header(path, tarfile.REGTYPE, 0o644, length), content.take(length)


def header(name: str, kind: bytes, mode: int, size: int) -> tarfile.TarInfo:
    """A header of root's; times differ from directory to directory."""
    found = tarfile.TarInfo(name)
    # Each directory's package was built at another time.
    found.mtime = 1_700_000_000 + len(name.rpartition("/")[0]) * 7919
    found.type, found.mode, found.size, found.uname, found.gname = kind, mode, size, "root", "root"
    return found
