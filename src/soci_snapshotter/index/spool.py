"""What building a ztoc puts aside: little stays in memory, the rest is in files that have no name.

They lie in the directory of the result, which needs that room anyway, and are gone with their process.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IN_MEMORY: Final = 1 << 20
"""Bytes: a small layer's checkpoints need no file."""


class Spool:
    """Byte strings in the order of their coming, to be read in either direction. For one thread."""

    def __init__(self, directory: Path | None = None) -> None:
        """None: where temporary files go."""
        self._directory = directory
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=os.fspath(directory) if directory else None)  # noqa: SIM115
        self._ends = array("Q")
        self.size = 0
        """Bytes so far."""

    def close(self) -> None:
        """Throw it away."""
        # A full disk was reported when it was met; closing would try again to write what is left.
        with contextlib.suppress(OSError):
            self._file.close()

    def append(self, data: bytes) -> None:
        """One more. OSError, naming the directory, when there is no room."""
        with naming(self._directory or tempfile.gettempdir()):
            self._file.write(data)
        self.size += len(data)
        self._ends.append(self.size)

    def __iter__(self) -> Iterator[bytes]:
        """From the first to the last."""
        with naming(self._directory or tempfile.gettempdir()):
            self._file.seek(0)  # writes what is buffered
        start = 0
        for end in self._ends:
            yield self._file.read(end - start)
            start = end

    def __reversed__(self) -> Iterator[bytes]:
        """From the last to the first."""
        starts = array("Q", [0]) + self._ends[:-1]
        for start, end in zip(reversed(starts), reversed(self._ends), strict=False):
            with naming(self._directory or tempfile.gettempdir()):
                self._file.seek(start)
            yield self._file.read(end - start)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Gives an OSError of the body the path that Python leaves out for writes."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
