"""Eager filling, decided: which layers are pulled whole and by whom, in which pieces, how many at once.

The Go daemon has two such ways. A local layer is one of an image that has an index, but no ztoc for this layer or one
that is not to be used: it is filled here, and left to containerd when that fails. A parallel pull is of an image
without an index (or of every image, when it is the primary mode): its failure is the pull's.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import Invalid

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(gb|mb|kb|b|)\s*", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "b": 1, "kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30}
_MOST_SIZE = 1 << 40  # bytes: more than any layer that can be served

MOST_DOWNLOADS = 64
"""Requests at once where the configuration sets no limit: more connections to one registry bring nothing."""

GZIP, ZSTD = "gzip", "zstd"
ALGORITHMS = (GZIP, ZSTD)
"""What an external decompressor can be named for."""


class Way(enum.Enum):
    """Who makes a layer that is not lazy."""

    LOCAL = "local"
    """We do; if that fails, containerd."""
    PARALLEL = "parallel"
    """We do; if that fails, nobody."""
    DEFER = "defer"
    """containerd."""


@dataclass(frozen=True)
class Eager:
    """What [pull_modes.parallel_pull_unpack] says. Limits: None for none; sizes in bytes.

    `chunk`: bytes of a layer fetched by one request, None for the whole layer. `keep_blobs`: the layers as they came
    go to containerd's content store. `decompressors`: by algorithm, the program's absolute path and its arguments.
    """

    primary: bool = False
    fallback: bool = False
    downloads: int | None = None
    downloads_per_image: int | None = 3
    unpacks: int | None = None
    unpacks_per_image: int | None = 1
    chunk: int | None = None
    keep_blobs: bool = False
    decompressors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def without_index(self) -> Way:
        """Who makes the layers of an image that has no index."""
        return Way.PARALLEL if self.primary or self.fallback else Way.DEFER


def parse_size(text: str) -> int | None:
    """Bytes of a string like `8mb` (kb = 1024 b); None when it is empty or 0. Raises Invalid."""
    if not text:
        return None
    match = _SIZE.fullmatch(text)
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else -1
    if not 0 <= size <= _MOST_SIZE:
        raise Invalid(f"{text[:40]!r} is no size; write one like 8mb")
    return size or None


def limit(number: int) -> int | None:
    """A limit from the configuration: what is not positive is none."""
    return number if number > 0 else None


def chunks(size: int, chunk: int | None) -> list[tuple[int, int]]:
    """The byte ranges, end exclusive, in which a layer of `size` bytes is fetched."""
    step = chunk or max(size, 1)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def algorithm_of(head: bytes) -> str | None:
    """The compression of a layer by its first four bytes; None for a tar as it is (RFC 1952, RFC 8878).

    A zstd layer may begin with a skippable frame.
    """
    if head[:2] == b"\x1f\x8b":
        return GZIP
    if head[:4] == b"\x28\xb5\x2f\xfd" or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
        return ZSTD
    return None
