"""What a check of the node found, and how to mend it: values that `soci doctor` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad."""

    OK = "ok"
    WARNING = "warning"
    """Works, but not as well as it could, or only for some."""
    PROBLEM = "problem"
    """Lazy layers do not work on this node, or not for a client that is set up to use them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `mend`: what to do, a line each; commands and file content to be taken as they stand."""

    name: str
    level: Level
    found: str
    mend: tuple[str, ...] = ()


def ok(name: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(name, Level.OK, found)


def warning(name: str, found: str, *mend: str) -> Finding:
    """Something that could be better."""
    return Finding(name, Level.WARNING, found, mend)


def problem(name: str, found: str, *mend: str) -> Finding:
    """Something that must be mended."""
    return Finding(name, Level.PROBLEM, found, mend)


def healthy(findings: Iterable[Finding]) -> bool:
    """True when none is a problem."""
    return all(finding.level is not Level.PROBLEM for finding in findings)
