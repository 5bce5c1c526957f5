"""containerd's filter expressions (pkg/filters of containerd): text to predicate.

    filters   = any of several filter strings may match; no filter string, or an empty one, matches everything
    filter    = selector *("," selector)            all must match
    selector  = field *("." field) [operator value] without an operator: the field is present
    field     = 1*(ALPHA / DIGIT / "_") / quoted
    operator  = "==" / "!=" / "~="                  ~= searches for a regular expression
    value     = quoted / 1*(printable except "," and space)
    quoted    = '"' Go string escapes '"'; after ~= also between two "/" or two "|"

Spaces may stand before any token but not before "." or "," and not at the end. An absent field is equal to
nothing, and compares as the empty text for != and ~=.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import Invalid

# Longer expressions than these are nobody's filter; they only feed the regular expression engine.
_MAX_FILTER = 64 * 1024
_MAX_REGEX = 4096

Lookup: TypeAlias = Callable[[tuple[str, ...]], str | None]
"""From a field path, such as ("labels", "a.b"), to the value, or None when absent."""

_SIMPLE = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_ESCAPE = re.compile(r"x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[0-3][0-7]{2}")


@dataclass(frozen=True)
class Selector:
    """One condition; `operator` is "" for mere presence."""

    path: tuple[str, ...]
    operator: str
    value: str
    regex: re.Pattern[str] | None = None

    def matches(self, lookup: Lookup) -> bool:
        """True when the object that `lookup` reads satisfies this condition."""
        found = lookup(self.path)
        if self.operator == "":
            return found is not None
        if self.operator == "==":
            return found == self.value
        if self.regex is not None:
            return self.regex.search(found or "") is not None
        return (found or "") != self.value


@dataclass(frozen=True)
class Filter:
    """Alternatives, each a conjunction of selectors."""

    alternatives: tuple[tuple[Selector, ...], ...]

    def matches(self, lookup: Lookup) -> bool:
        """True when every selector of some alternative matches."""
        return any(all(s.matches(lookup) for s in selectors) for selectors in self.alternatives)

    def required(self, path: tuple[str, ...]) -> str | None:
        """The one value that `path` must equal in whatever matches; None when there is no such value."""
        values = set()
        for selectors in self.alternatives:
            equal = [s.value for s in selectors if s.path == path and s.operator == "=="]
            values.add(equal[0] if equal else None)
        return values.pop() if len(values) == 1 else None


def parse(filters: Sequence[str]) -> Filter:
    """Parse the filters of one request. Raises Invalid, naming the filter and where it fails."""
    if not filters:
        return Filter(((),))
    return Filter(tuple(_Parser(text).parse() for text in filters))


class _Parser:
    def __init__(self, text: str) -> None:
        if len(text) > _MAX_FILTER:
            raise Invalid(f"filter of {len(text)} characters: at most {_MAX_FILTER} are allowed")
        self._text = text
        self._at = 0

    def parse(self) -> tuple[Selector, ...]:
        if not self._text:
            return ()
        selectors = [self._selector()]
        while self._at < len(self._text):
            if self._text[self._at] != ",":
                raise self._error("unexpected input")
            self._at += 1
            selectors.append(self._selector())
        return tuple(selectors)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._text.startswith(".", self._at):
            self._at += 1
            path.append(self._field())
        if self._at == len(self._text) or self._text[self._at] == ",":
            return Selector(tuple(path), "", "")
        self._spaces()
        match = _OPERATOR.match(self._text, self._at)
        if match is None or match[0] not in {"==", "!=", "~="}:
            raise self._error('expected "==", "!=" or "~="')
        self._at = match.end()
        start = self._at
        value = self._value(match[0] == "~=")
        regex = self._regex(value, start) if match[0] == "~=" else None
        return Selector(tuple(path), match[0], value, regex)

    def _field(self) -> str:
        self._spaces()
        if self._text.startswith('"', self._at):
            return self._quoted()
        match = _FIELD.match(self._text, self._at)
        if match is None:
            raise self._error(
                "expected a field name, quoted if it has other characters than letters and digits"
            )
        self._at = match.end()
        return match[0]

    def _value(self, any_quote: bool) -> str:
        self._spaces()
        first = self._text[self._at : self._at + 1]
        if first == '"' or (any_quote and first in {"/", "|"}):
            return self._quoted()
        if first in {"", ",", ".", "/", "|", "=", "!", "~"}:
            raise self._error("expected a value")
        start = self._at
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "," or char.isspace() or not char.isprintable():
                break
            self._at += 1
        return self._text[start : self._at]

    def _quoted(self) -> str:
        """Bytes first, because \\x and octal escapes name bytes, not characters."""
        quote, out = self._text[self._at], bytearray()
        self._at += 1
        while True:
            char = self._text[self._at : self._at + 1]
            if char in {"", "\n", "\0"}:
                raise self._error("quoted text is not terminated")
            self._at += 1
            if char == quote:
                return out.decode("utf-8", "surrogateescape")
            out += self._escape(quote) if char == "\\" else char.encode("utf-8", "surrogatepass")

    def _escape(self, quote: str) -> bytes:
        char = self._text[self._at : self._at + 1]
        if char and (char in _SIMPLE or char == quote):
            self._at += 1
            return bytes([_SIMPLE.get(char, ord(char))])
        match = _ESCAPE.match(self._text, self._at)
        if match is None:
            raise self._error("illegal escape")
        code = match[0]
        number = int(code, 8) if code[0].isdigit() else int(code[1:], 16)
        if code[0] in {"u", "U"} and (number > 0x10FFFF or 0xD800 <= number < 0xE000):
            raise self._error("escape is no character")
        self._at = match.end()
        return chr(number).encode() if code[0] in {"u", "U"} else bytes([number])

    def _regex(self, value: str, start: int) -> re.Pattern[str]:
        try:
            if len(value) > _MAX_REGEX:
                raise ValueError(f"longer than {_MAX_REGEX} characters")
            return re.compile(value)
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            self._at = start
            raise self._error(f"unusable regular expression: {error}") from None

    def _spaces(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _error(self, what: str) -> Invalid:
        shown = self._text if len(self._text) <= 200 else self._text[:200] + "..."
        return Invalid(f"filter {shown!r}: {what} at character {self._at + 1}")
