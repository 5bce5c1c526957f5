"""The benches' own measuring program (treework.c), built once into .cache/bin with the C compiler."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_SOURCE = Path(__file__).parent / "treework.c"
_BINARY = Path(__file__).parent.parent / ".cache" / "bin" / "treework"


@dataclass(frozen=True)
class Work:
    """What one run did: seconds by its own clock (without exec), how many entries or reads, how many bytes."""

    seconds: float
    things: int
    bytes: int


def treework(what: str, root: Path, *numbers: int, names: bytes = b"") -> Work:
    """Walk, stat, read, random or one below `root`; `names` are NUL-terminated paths relative to it, for the reads."""
    command = [str(_program()), what, str(root), *map(str, numbers)]
    done = subprocess.run(command, input=names, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.decode()}")
    seconds, things, size = done.stdout.split()
    return Work(float(seconds), int(things), int(size))


def names_below(root: Path, *, at_least: int = 0) -> bytes:
    """Every regular file of `at_least` bytes below `root`, in order of names, as treework takes them."""
    size = ["-size", f"+{at_least - 1}c"] if at_least else []
    find = ["find", ".", "-xdev", "-type", "f", *size, "-print0"]
    found = subprocess.run(find, cwd=root, check=True, capture_output=True).stdout
    return b"".join(name + b"\0" for name in sorted(found.split(b"\0")) if name)


def _program() -> Path:
    if not _BINARY.exists() or _BINARY.stat().st_mtime < _SOURCE.stat().st_mtime:
        _BINARY.parent.mkdir(parents=True, exist_ok=True)
        partial = _BINARY.with_suffix(".part")
        subprocess.run(["cc", "-O2", "-o", str(partial), str(_SOURCE)], check=True)
        partial.rename(_BINARY)
    return _BINARY
