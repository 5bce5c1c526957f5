"""In which order an image's SOCI index is looked for (FORMATS.md 7)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from soci_snapshotter.formats.digest import Digest


class Source(Enum):
    """One way to learn of an index."""

    EXPLICIT = "explicit"
    """The label names its digest: used even when a pull mode is off; nothing else is tried."""
    V2 = "v2"
    """An annotation of the image manifest; a dangling one does not fall through to v1."""
    V1 = "v1"
    """The registry's referrers of the right type (`candidates` orders them)."""
    TAG = "tag"
    """A tag made of the manifest's digest (docs/adr/0020): for registries that list no referrers."""


def sources(explicit: str | None, *, v1: bool, v2: bool, tag: bool = False) -> tuple[Source, ...]:
    """The sources to try, first to last; empty when every mode is off and no digest was named.

    `tag` is a part of v1: without it, it counts for nothing.
    """
    if explicit:
        return (Source.EXPLICIT,)
    return (
        *((Source.V2,) if v2 else ()),
        *((Source.V1,) if v1 else ()),
        *((Source.TAG,) if v1 and tag else ()),
    )


def candidates(listed: Iterable[Digest]) -> tuple[Digest, ...]:
    """In which order the v1 indexes of one manifest are tried, the smallest digest first.

    Registries list them in any order, one in another each time, and nothing in an index tells its age: this way all
    nodes take the same one, whichever registry or mirror they ask.
    """
    return tuple(sorted(set(listed)))
