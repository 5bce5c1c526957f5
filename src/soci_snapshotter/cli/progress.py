"""How a pull shows itself: bars on a terminal, a line per layer elsewhere, or nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from ..formats.digest import Digest
from ..formats.oci import Descriptor
from .pulling import Report

# Enough of a digest to tell layers apart by eye.
_SHORT = 12


class QuietReport:
    """Shows nothing."""

    def resolved(self, name: str, target: Digest, layers: Sequence[Descriptor]) -> None:
        """See pulling.Report."""

    def received(self, layer: Descriptor, count: int) -> None:
        """See pulling.Report."""

    def unpacking(self, layer: Descriptor) -> None:
        """See pulling.Report."""

    def done(self, position: int, layer: Descriptor, how: str) -> None:
        """See pulling.Report."""


class LineReport(QuietReport):
    """One plain line for the image and one per finished layer: for logs and pipes."""

    def resolved(self, name: str, target: Digest, layers: Sequence[Descriptor]) -> None:
        """See pulling.Report."""
        print(f"{name} {target}: {len(layers)} layers", flush=True)

    def done(self, position: int, layer: Descriptor, how: str) -> None:
        """See pulling.Report."""
        del position
        print(f"layer {layer.digest}: {how}", flush=True)


class BarReport(QuietReport):
    """A bar per layer on a terminal. The same layer twice in an image has one bar for its bytes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: list[TaskID] = []
        self._first: dict[Digest, TaskID] = {}

    def resolved(self, name: str, target: Digest, layers: Sequence[Descriptor]) -> None:
        """See pulling.Report."""
        self._progress.console.print(f"{name} {target}", highlight=False)
        for layer in layers:
            label = layer.digest.hex[:_SHORT]
            task = self._progress.add_task(label, total=layer.size or 1, state="waiting")
            self._tasks.append(task)
            self._first.setdefault(layer.digest, task)

    def received(self, layer: Descriptor, count: int) -> None:
        """See pulling.Report."""
        self._progress.update(self._first[layer.digest], advance=count, state="fetching")

    def unpacking(self, layer: Descriptor) -> None:
        """See pulling.Report."""
        self._progress.update(self._first[layer.digest], state="unpacking")

    def done(self, position: int, layer: Descriptor, how: str) -> None:
        """See pulling.Report."""
        completed = layer.size or 1 if how == "local" else None
        self._progress.update(self._tasks[position], completed=completed, state=how)


@contextlib.contextmanager
def reporting(*, quiet: bool) -> Iterator[Report]:
    """The report that suits stdout: nothing with `quiet`, bars on a terminal, else lines."""
    if quiet:
        yield QuietReport()
    elif not sys.stdout.isatty():
        yield LineReport()
    else:
        columns = (
            TextColumn("{task.description}"),
            TextColumn("{task.fields[state]:<9}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
        )
        with Progress(*columns, console=Console()) as progress:
            yield BarReport(progress)
