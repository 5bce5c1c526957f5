"""In which order an image's SOCI index is looked for (FORMATS.md 7)."""

from __future__ import annotations

from enum import Enum


class Source(Enum):
    """One way to learn of an index."""

    EXPLICIT = "explicit"
    """The label names its digest: used even when a pull mode is off; nothing else is tried."""
    V2 = "v2"
    """An annotation of the image manifest; a dangling one does not fall through to v1."""
    V1 = "v1"
    """The registry's referrers, the first of the right type."""


def sources(explicit: str | None, *, v1: bool, v2: bool) -> tuple[Source, ...]:
    """The sources to try, first to last; empty when every mode is off and no digest was named."""
    if explicit:
        return (Source.EXPLICIT,)
    return (*((Source.V2,) if v2 else ()), *((Source.V1,) if v1 else ()))
