"""Prometheus' text exposition format, version 0.0.4, with the names and types as they are given.

Written here because the usual library puts `_total` behind the name of every counter, which the Go daemon's have not:
an ADR says more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """A line: what follows the family's name (`_bucket`, say), the labels, the number."""

    suffix: str
    labels: Labels
    value: float
    bound: str = ""
    """The label `le` of a bucket."""


@dataclass(slots=True)
class Family:
    """A metric with its samples."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: list[Sample] = field(default_factory=list)

    def add(self, value: float, **labels: str) -> None:
        """One sample of a counter or a gauge."""
        self.samples.append(Sample("", tuple(labels.items()), value))

    def add_histogram(self, bounds: Sequence[int], slots: Sequence[int], total: float, **labels: str) -> None:
        """One histogram: values counted by bound, one slot more for those above all bounds, and their sum."""
        own = tuple(labels.items())  # one tuple for all of them: see _lines
        below = 0
        for bound, slot in zip((*map(str, bounds), "+Inf"), slots, strict=True):
            below += slot
            self.samples.append(Sample("_bucket", own, below, bound))
        self.samples += (Sample("_sum", own, total), Sample("_count", own, below))


def encode(families: Iterable[Family]) -> bytes:
    """The exposition. A family without samples is left out, as the Go library does."""
    return "".join(line for family in families if family.samples for line in _lines(family)).encode()


def _lines(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {_escape(family.help)}\n# TYPE {family.name} {family.kind}\n"
    name = family.name
    labels, text = None, ""
    for sample in family.samples:
        if sample.labels is not labels:  # 18 lines of a histogram have the same
            labels = sample.labels
            text = ",".join(f'{key}="{_escape(value, quote=True)}"' for key, value in labels)
        if sample.bound:
            yield f'{name}_bucket{{{text}{"," if text else ""}le="{sample.bound}"}} {sample.value}\n'
        else:
            yield (
                f"{name}{sample.suffix}{{{text}}} {sample.value}\n"
                if text
                else f"{name}{sample.suffix} {sample.value}\n"
            )


def _escape(text: str, *, quote: bool = False) -> str:
    """Backslash and newline, and the double quote within a label's value."""
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quote else text
