"""HTTP fields of byte ranges, authentication challenges, links and retry times (RFC 9110, RFC 8288).

Byte ranges are half open here, `[start, end)`, as everywhere in this program; HTTP writes the last byte.
What a peer sent raises Integrity when it cannot be understood; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import MappingProxyType

from soci_snapshotter.errors import Integrity, Invalid

# A field longer than this is an attack or a bug; http.client itself stops at 64 KiB a line.
_FIELD_LIMIT = 16 << 10

_RANGE = re.compile(r"bytes=([0-9]{1,19})-([0-9]{1,19})", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII | re.IGNORECASE)
_SECONDS = re.compile(r"[0-9]{1,9}", re.ASCII)
_LINK = re.compile(r"\s*<([^<>]*)>\s*((?:;[^,]*)?)(?:,|$)")
_REL_NEXT = re.compile(r";\s*rel\s*=\s*(?:\"(?:[^\"]*\s)?next(?:\s[^\"]*)?\"|next)\s*(?:;|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes [start, end) asked for; never empty, because HTTP cannot say that."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise Invalid(f"byte range [{self.start}, {self.end}) is empty or negative")

    def __str__(self) -> str:
        return f"bytes={self.start}-{self.end - 1}"


@dataclass(frozen=True, slots=True)
class ContentRange:
    """Bytes [start, end) that a 206 carries, of `total` (None: the server does not know)."""

    start: int
    end: int
    total: int | None

    def __str__(self) -> str:
        return f"bytes {self.start}-{self.end - 1}/{'*' if self.total is None else self.total}"


def parse_range(text: str) -> Range:
    """Parse a Range field of one closed range, the only form this program sends; Integrity otherwise."""
    found = _RANGE.fullmatch(text)
    if not found or int(found[1]) > int(found[2]):
        raise Integrity(f"Range: {_shown(text)} is not one closed range of bytes")
    return Range(int(found[1]), int(found[2]) + 1)


def parse_content_range(text: str) -> ContentRange:
    """Parse the Content-Range of a 206; Integrity when it is malformed or contradicts itself."""
    found = _CONTENT_RANGE.fullmatch(text.strip())
    if not found:
        raise Integrity(f"Content-Range: {_shown(text)} is not 'bytes first-last/total'")
    start, end = int(found[1]), int(found[2]) + 1
    total = None if found[3] == "*" else int(found[3])
    if start >= end or (total is not None and end > total):
        raise Integrity(f"Content-Range: {_shown(text)} contradicts itself")
    return ContentRange(start, end, total)


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge of a WWW-Authenticate field: lower case scheme, parameters by lower case name."""

    scheme: str
    params: Mapping[str, str]


# RFC 9110 5.6.2 and 11.2. A scheme is a token that is followed by a space, a comma or the end; a parameter is
# a token followed by "=". A token68 ("Negotiate abc=") is skipped: no scheme served here has one.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - RFC 9110's word for it
_PARAM = re.compile(rf'({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))\s*(?=,|$)')
_SCHEME = re.compile(rf"({_TOKEN})(?=[ ,]|$) *")
_TOKEN68 = re.compile(r"[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_SEPARATOR = re.compile(r"[\s,]*")


def parse_challenges(field: str) -> list[Challenge]:
    """Parse a WWW-Authenticate field (several joined by commas too); Integrity when it is malformed.

    Of a repeated parameter the first counts: a proxy that appends must not change what the registry said.
    """
    if len(field) > _FIELD_LIMIT:
        raise Integrity(f"WWW-Authenticate: {len(field)} characters, more than {_FIELD_LIMIT}")
    challenges: list[Challenge] = []
    params: dict[str, str] = {}
    position = _skip(field, 0)
    while position < len(field):
        if challenges and (found := _PARAM.match(field, position)):
            value = found[3] if found[2] is None else re.sub(r"\\(.)", r"\1", found[2])
            params.setdefault(found[1].lower(), value)
        elif found := _SCHEME.match(field, position):
            params = {}
            challenges.append(Challenge(found[1].lower(), MappingProxyType(params)))
            token = None if _PARAM.match(field, found.end()) else _TOKEN68.match(field, found.end())
            if token and field[found.end() - 1] == " ":
                found = token
        else:
            raise Integrity(f"WWW-Authenticate: cannot be read at {_shown(field[position:])}")
        position = _skip(field, found.end())
    return challenges


def parse_next_link(field: str) -> str | None:
    """The target of the link with relation `next` in a Link field, as it stands there; None without one."""
    if len(field) > _FIELD_LIMIT:
        raise Integrity(f"Link: {len(field)} characters, more than {_FIELD_LIMIT}")
    for found in _LINK.finditer(field):
        if _REL_NEXT.search(found[2]):
            return found[1]
    return None


def parse_retry_after(field: str, now: float) -> float | None:
    """Seconds from `now` (Unix time) that a Retry-After field asks to wait; None when it is unusable."""
    text = field.strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _skip(field: str, position: int) -> int:
    found = _SEPARATOR.match(field, position)
    return found.end() if found else position


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:80] + "...")
