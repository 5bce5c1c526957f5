"""Lists and infos on stdout: columns as Go's text/tabwriter sets them, durations as Go writes them, JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

# What the Go tool passes to tabwriter: no column narrower, and so much space after its widest cell.
_MIN_WIDTH = 8
_PADDING = 4

_SECOND_NS = 10**9


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print left-aligned columns. Each cell is padded, the last one too, as scripts may expect by now."""
    lines = [[_printable(cell) for cell in row] for row in (header, *rows)]
    widths = [
        max(_MIN_WIDTH, *(len(cell) + _PADDING for cell in column)) for column in zip(*lines, strict=True)
    ]
    for line in lines:
        print("".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def print_json(document: object) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2, ensure_ascii=False))


def age(created_ns: int, now_ns: int) -> str:
    """How long ago, in whole seconds, as Go writes a duration: `1h2m3s ago`; `n/a` for 0."""
    if created_ns == 0:
        return "n/a"
    elapsed = now_ns - created_ns
    seconds = (abs(elapsed) + _SECOND_NS // 2) // _SECOND_NS
    sign = "-" if elapsed < 0 and seconds else ""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    text = f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"
    return f"{sign}{text} ago"


def rfc3339(created_ns: int) -> str | None:
    """The time in UTC, with as much of a fraction as there is; None for 0."""
    if created_ns == 0:
        return None
    seconds, nanoseconds = divmod(created_ns, _SECOND_NS)
    whole = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
    fraction = f".{nanoseconds:09d}".rstrip("0") if nanoseconds else ""
    return f"{whole}{fraction}Z"


def _printable(cell: str) -> str:
    """Names and platforms come from images: none may move the cursor or end a line."""
    return "".join(character if character.isprintable() else "?" for character in cell)
