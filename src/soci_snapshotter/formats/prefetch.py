"""The prefetch artifact: which spans of a layer to fetch before anybody reads (FORMATS.md, 6).

Also the list of paths that `--prefetch-files-json` names. An artifact comes from a registry and is bounded
and checked; whether its spans exist in the layer is for whoever has the layer's ztoc.
"""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import Meta, Struct, field

from soci_snapshotter.errors import Integrity, Invalid
from soci_snapshotter.formats import jsonfmt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from soci_snapshotter.formats.digest import Buffer

VERSION: Final = "1.0"
"""The only one known tools write and read."""

MAX_RANGES: Final = 1 << 16
"""Ranges in one artifact. A layer of 2 TiB, the largest that can be served, has 524,288 spans of 4 MiB; an
eighth of them as islands is beyond any list of what a start reads."""

MAX_SIZE: Final = 8 << 20
"""Bytes of an artifact: MAX_RANGES of the longest ranges that can be written take 5.2 MB."""

MAX_PATHS: Final = 1 << 18
"""Paths in one list: half the files of the largest layers seen. A directory or a glob says it in one line."""

MAX_LIST: Final = 32 << 20
"""Bytes of a list: MAX_PATHS paths of 100 bytes and their quotes fit."""

# Unicode's White_Space, which the Go tool trims from paths; str.strip() would take U+001C to U+001F as well.
_SPACE: Final = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


class SpanRange(NamedTuple):
    """Spans start..end of a layer, inclusive, numbered from 0. The lowest priority is fetched first."""

    start: int
    end: int
    priority: int = 0


# Go's types: a span's number is an int32, a priority an int.
_Span = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Priority = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _Range(Struct, frozen=True, omit_defaults=True):
    start: _Span = field(name="start_span")
    end: _Span = field(name="end_span")
    priority: _Priority = 0


class _Artifact(Struct, frozen=True):
    version: str
    prefetch_spans: Annotated[tuple[_Range, ...], Meta(max_length=MAX_RANGES)] | None = None  # null: Go's nil


_PathList = tuple[str | None, ...] | None


def encode(ranges: Iterable[SpanRange]) -> bytes:
    """The artifact that asks for `ranges`, normalised: the bytes the Go tool writes for the same ranges.

    Invalid for none, for a range that no artifact can hold, and for more than MAX_RANGES.
    """
    wanted = normalize(ranges)
    if not wanted:
        raise Invalid("prefetch artifact: no spans to prefetch; without any there is no artifact")
    if len(wanted) > MAX_RANGES:
        raise Invalid(
            f"prefetch artifact: {len(wanted)} separate ranges of spans, more than {MAX_RANGES}; "
            "ask for whole directories, or index with larger spans"
        )
    for start, end, priority in wanted:
        if start < 0 or end >= 2**31 or not -(2**63) <= priority < 2**63:
            raise Invalid(f"prefetch artifact: spans {start}..{end}, priority {priority} cannot be written")
    return jsonfmt.encode(_Artifact(VERSION, tuple(_Range(*item) for item in wanted)))


def decode(data: Buffer) -> tuple[SpanRange, ...]:
    """The ranges of an artifact as they stand there; possibly none. Integrity when it is none, or hostile."""
    artifact: _Artifact = _decode(data, _Artifact, "prefetch artifact", MAX_SIZE)
    if artifact.version != VERSION:
        raise Integrity(f"prefetch artifact: version {artifact.version[:80]!r}; known is {VERSION}")
    spans = artifact.prefetch_spans or ()
    for i, item in enumerate(spans):
        if item.start > item.end:
            raise Integrity(
                f"prefetch artifact: prefetch_spans[{i}] ends at span {item.end}, before its start {item.start}"
            )
    return tuple(SpanRange(item.start, item.end, item.priority) for item in spans)


def normalize(ranges: Iterable[SpanRange]) -> tuple[SpanRange, ...]:
    """The same spans, each once, at the most urgent priority asked for: sorted, none overlapping, neighbors
    of one priority joined.
    """
    rising = sorted(ranges)
    if any(item.start > item.end for item in rising):
        raise Invalid("prefetch: a range of spans ends before it starts")
    edges = sorted({item.start for item in rising} | {item.end + 1 for item in rising})
    result: list[SpanRange] = []
    active: list[tuple[int, int]] = []  # (priority, end) of ranges begun, the most urgent on top
    taken = 0
    for edge, following in itertools.pairwise(edges):
        while taken < len(rising) and rising[taken].start <= edge:
            heapq.heappush(active, (rising[taken].priority, rising[taken].end))
            taken += 1
        while active and active[0][1] < edge:
            heapq.heappop(active)
        if not active:
            continue
        priority = active[0][0]
        if result and result[-1].end == edge - 1 and result[-1].priority == priority:
            result[-1] = result[-1]._replace(end=following - 1)
        else:
            result.append(SpanRange(edge, following - 1, priority))
    return tuple(result)


def decode_list(data: Buffer) -> tuple[bytes, ...]:
    """The paths in a `--prefetch-files-json` file: a JSON array of strings, as the Go tool reads it (null
    for an empty array or string). Invalid when it is anything else, or too long.
    """
    try:
        texts: _PathList = _decode(data, _PathList, "list of paths", MAX_LIST)
    except Integrity as error:
        raise Invalid(f'{error}; want a JSON array of strings: ["/bin/sh", "/etc/app"]') from None
    return paths(text or "" for text in texts or ())


def _decode(data: Buffer, kind: Any, what: str, limit: int) -> Any:  # noqa: ANN401 - a union has no type
    """Straight into `kind`: the first element of another shape ends it, so no flood of empty objects is
    held.
    """
    if len(data) > limit:
        raise Integrity(f"{what}: {len(data)} bytes, more than the {limit} allowed")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Integrity(f"{what}: {error}") from None


def paths(texts: Iterable[str]) -> tuple[bytes, ...]:
    """Paths as the user gave them, trimmed as the Go tool does, empty ones left out; bytes as in a tar.

    Invalid for more than MAX_PATHS.
    """
    found = tuple(
        trimmed.encode("utf-8", "surrogateescape") for text in texts if (trimmed := text.strip(_SPACE))
    )
    if len(found) > MAX_PATHS:
        raise Invalid(f"{len(found)} paths to prefetch, more than {MAX_PATHS}; name directories or globs")
    return found
