"""Go programs of the harness, each built once into .cache/bin."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_HARNESS = Path(__file__).parent
_CACHE = _HARNESS.parent / ".cache" / "bin"


def build_go(name: str) -> Path:
    """The program whose source is harness/<name>, built anew when that has changed."""
    source, binary = _HARNESS / name, _CACHE / name
    sources = [source / "main.go", source / "go.mod"]
    if not binary.exists() or binary.stat().st_mtime < max(each.stat().st_mtime for each in sources):
        _CACHE.mkdir(parents=True, exist_ok=True)
        go = shutil.which("go") or "/usr/local/go/bin/go"
        subprocess.run(["nice", go, "build", "-o", str(binary), "."], cwd=source, check=True)
    return binary
