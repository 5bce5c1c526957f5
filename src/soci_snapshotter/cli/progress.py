"""Progress of long work: bars with bytes and rate on stderr if that is a terminal, else nothing.

    with metering(quiet=quiet) as meter:
        task = meter.task("layer 0123456789ab", size, "indexing")
        task.advance(len(chunk))            # from any thread
        task.finish("done")
        meter.apply(step)                   # a policy.progress.Step from a worker process

What a command prints on stdout is printed above the bars when both are the same terminal.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..policy.progress import Step
from .pulling import Report

# Enough of a digest to tell layers apart by eye.
_SHORT = 12


class Task:
    """One bar. Safe for threads."""

    def __init__(self, progress: Progress | None, identity: TaskID, total: int | None) -> None:
        self._progress = progress
        self._identity = identity
        self._total = total

    def advance(self, count: int, state: str = "") -> None:
        """`count` more bytes are done; `state`, if given, is the word beside the label from now on."""
        if self._progress is not None:
            self._progress.update(self._identity, advance=count)
            self._tell(state)

    def reach(self, done: int, total: int | None = None, state: str = "") -> None:
        """`done` bytes in all are done, of `total` if that is news."""
        if self._progress is not None:
            self._total = total or self._total
            self._progress.update(self._identity, completed=done, total=total)
            self._tell(state)

    def finish(self, state: str = "done", *, full: bool = True) -> None:
        """The work is over; with `full` the bar is filled up, whatever was counted."""
        if self._progress is not None:
            total = self._total or 1
            self._progress.update(self._identity, completed=total if full else None, total=total, state=state)

    def _tell(self, state: str) -> None:
        if state and self._progress is not None:
            self._progress.update(self._identity, state=state)


class Meter:
    """The bars of one command; without a rich Progress it takes everything and shows nothing. Safe for threads."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._named: dict[str, Task] = {}

    @property
    def shown(self) -> bool:
        """True when somebody can see the bars."""
        return self._progress is not None

    def task(self, label: str, total: int | None = None, state: str = "") -> Task:
        """A new bar of `total` bytes; None when nobody knows how many there will be."""
        if self._progress is None:
            return Task(None, TaskID(0), total)
        # A bar of no bytes would never be full.
        size = None if total is None else total or 1
        return Task(self._progress, self._progress.add_task(escape(label), total=size, state=state), size)

    def apply(self, step: Step) -> None:
        """Show a worker's message; its first one makes the bar."""
        if self._progress is None:
            return
        with self._lock:
            known = self._named.get(step.task)
            if known is None:
                known = self._named[step.task] = self.task(step.task, step.total, step.state)
        known.reach(step.done, step.total, step.state)

    def say(self, text: str) -> None:
        """A line above the bars, for who watches them; nothing without bars."""
        if self._progress is not None:
            self._progress.console.print(escape(text), highlight=False)


@contextlib.contextmanager
def metering(*, quiet: bool = False) -> Iterator[Meter]:
    """Bars on stderr while the block lasts; none with `quiet` or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        yield Meter()
        return
    columns = (
        TextColumn("{task.description}"),
        TextColumn("{task.fields[state]:<9}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    # Rich would send stdout to the terminal even where it is a pipe.
    with Progress(
        *columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty(), redirect_stderr=True
    ) as progress:
        yield Meter(progress)


class PullReport:
    """A pull on bars; on stdout, if asked for, a line for the image and one per layer. See pulling.Report.

    The same layer twice in an image has one bar for its bytes.
    """

    def __init__(self, meter: Meter, *, lines: bool) -> None:
        self._meter = meter
        self._lines = lines
        self._tasks: list[Task] = []
        self._first: dict[Digest, Task] = {}

    def resolved(self, name: str, target: Digest, layers: Sequence[Descriptor]) -> None:
        """See pulling.Report."""
        if self._lines:
            print(f"{name} {target}: {len(layers)} layers", flush=True)
        else:
            self._meter.say(f"{name} {target}")
        for layer in layers:
            task = self._meter.task(layer.digest.hex[:_SHORT], layer.size, "waiting")
            self._tasks.append(task)
            self._first.setdefault(layer.digest, task)

    def received(self, layer: Descriptor, count: int) -> None:
        """See pulling.Report."""
        self._first[layer.digest].advance(count, "fetching")

    def unpacking(self, layer: Descriptor) -> None:
        """See pulling.Report."""
        self._first[layer.digest].advance(0, "unpacking")

    def done(self, position: int, layer: Descriptor, how: str) -> None:
        """See pulling.Report."""
        if self._lines:
            print(f"layer {layer.digest}: {how}", flush=True)
        # Of a lazy layer nothing came, and its bar says so.
        self._tasks[position].finish(how, full=how == "local")


@contextlib.contextmanager
def reporting(*, quiet: bool) -> Iterator[Report]:
    """The report of a pull: bars on stderr if that is a terminal; lines on stdout unless they would only repeat them."""
    with metering(quiet=quiet) as meter:
        yield PullReport(meter, lines=not quiet and not (meter.shown and sys.stdout.isatty()))
