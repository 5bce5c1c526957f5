"""Building ztocs in several processes: one layer each, because most of the work is pure Python and inflate.

Workers are spawned, never forked (gRPC's threads do not survive a fork). Each opens the
layer's place for itself and leaves the ztoc in a file; only a few words travel back. A worker that is
killed, for want of memory say, is noticed, and ends the command with an error; a worker never outlives the command.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from ..errors import Integrity, Remote, SociError, Unsupported
from ..formats.digest import Digest
from ..formats.oci import Descriptor
from ..formats.ztoc import Compression
from .build import write_ztoc
from .places import Place


@dataclass(frozen=True, slots=True)
class Job:
    """One layer to index. span_size in uncompressed bytes; the ztoc is written to `output`."""

    place: Place
    layer: Descriptor
    diff_id: Digest
    compression: Compression
    span_size: int
    build_tool: str
    output: Path


@dataclass(frozen=True, slots=True)
class Built:
    """What became of a job: the ztoc's digest and its size in bytes, and where it is."""

    layer: Digest
    digest: Digest
    size: int
    output: Path


@dataclass(frozen=True, slots=True)
class Refused:
    """A layer that no ztoc can describe, and why; the others are not harmed by it."""

    layer: Digest
    why: str


Outcome = Built | Refused
Told = Callable[[Digest, int], None]
"""Is told of each piece of a layer that was read: the layer, and the piece's size in (compressed) bytes."""

# Bytes of a layer between two words about it from a worker: a few a second.
_TELL_EVERY = 8 << 20

# Both reach the whole process group (Ctrl-C, a service's stop). The parent decides, and ends its workers.
_PARENTS = {signal.SIGINT, signal.SIGTERM}


def build_all(
    jobs: Sequence[Job], workers: int, told: Told = lambda _layer, _count: None
) -> Iterator[Outcome]:
    """Run the jobs, at most `workers` at once, and yield outcomes as they come; the first error ends it all.

    A single job runs in this process: a worker's start (0.3 s) would be all it adds.
    """
    if len(jobs) == 1 or workers == 1:
        for job in jobs:
            yield run(job, told)
        return
    # The longest first would be best, but sizes are the caller's to sort by.
    waiting = list(reversed(jobs))
    pool: list[_Worker] = []
    try:
        for _ in range(min(workers, len(jobs))):
            pool.append(_Worker())
            pool[-1].give(waiting.pop())
        while pool:
            ready = multiprocessing.connection.wait([worker.connection for worker in pool])
            for worker in pool:
                if worker.connection not in ready:
                    continue
                answer = worker.take()
                if isinstance(answer, _Read):
                    told(answer.layer, answer.count)
                    continue
                yield answer
                if waiting:
                    worker.give(waiting.pop())
                else:
                    worker.dismiss()
            pool = [worker for worker in pool if worker.job is not None]
    finally:
        for worker in pool:
            worker.kill()


def run(job: Job, told: Told) -> Outcome:
    """Build one ztoc in this process.

    Raises Integrity when the layer's bytes are not what its digest, or its DiffID, says; OSError for a full disk.
    """
    digest = job.layer.digest
    with job.place.open() as content:
        try:
            built = write_ztoc(
                _counted(content.read(job.layer), digest, told),
                job.output,
                compression=job.compression,
                span_size=job.span_size,
                build_tool=job.build_tool,
                expected=digest,
            )
        except Unsupported as error:
            return Refused(digest, str(error).removeprefix(f"layer {digest}: "))
        except SociError as error:
            if digest in str(error):
                raise
            raise type(error)(f"layer {digest}: {error}") from None
    if built.diff_id != job.diff_id:
        raise Integrity(
            f"layer {digest}: its tar's digest is {built.diff_id}, the image config says {job.diff_id}"
        )
    return Built(digest, built.digest, built.size, job.output)


def _counted(pieces: Iterator[bytes], layer: Digest, told: Told) -> Iterator[bytes]:
    untold = 0
    for piece in pieces:
        yield piece
        untold += len(piece)
        if untold >= _TELL_EVERY:
            told(layer, untold)
            untold = 0
    told(layer, untold)


@dataclass(frozen=True, slots=True)
class _Read:
    layer: Digest
    count: int


class _Worker:
    """A spawned process that runs jobs until its pipe is closed."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.job: Job | None = None
        # Its start unblocks SIGINT behind our back (multiprocessing/resource_tracker.py), so it comes first.
        resource_tracker.ensure_running()
        # Blocked from its first instruction on, until _serve ignores them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
        try:
            try:
                self.process.start()
            finally:
                theirs.close()  # so that the worker's death is an end of file here
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:  # what was blocked has come
            self.kill()
            raise

    def give(self, job: Job) -> None:
        self.job = job
        self.connection.send(job)

    def take(self) -> Outcome | _Read:
        try:
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            layer = self.job.layer.digest if self.job else "?"
            raise Remote(
                f"layer {layer}: the process indexing it ended (exit {self.process.exitcode}); "
                f"check the kernel's log for want of memory"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        if not isinstance(answer, (Built, Refused, _Read)):
            raise TypeError(f"worker answered {type(answer).__name__}")
        return answer

    def dismiss(self) -> None:
        self.job = None
        self.connection.close()
        self.process.join()

    def kill(self) -> None:
        self.connection.close()
        if self.process.pid is not None:
            self.process.kill()
            self.process.join()


def _serve(connection: Connection) -> None:
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        answer: Outcome | Exception
        try:
            answer = run(job, lambda layer, count: connection.send(_Read(layer, count)))
        except (SociError, OSError) as error:
            answer = error
        except Exception as error:  # a bug: its name must reach the parent, which would wait for ever
            answer = RuntimeError(f"layer {job.layer.digest}: {type(error).__name__}: {error}")
        connection.send(answer)


def _end_with_parent() -> None:
    """A killed parent can tell nobody; its end closes this pipe, also while the worker waits for a registry."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
