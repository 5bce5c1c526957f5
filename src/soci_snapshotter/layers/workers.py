"""A few worker processes for `meta_worker`, started when there is work and ended when there was none for a while."""

from __future__ import annotations

import select
import subprocess
import sys
import threading
import time
from types import TracebackType

import msgspec

from soci_snapshotter import errors
from soci_snapshotter.layers.meta import MetaRequest, MetaResult
from soci_snapshotter.layers.meta_worker import Answer, read_frame, write_frame

BUILD_SECONDS = (
    120.0  # 2 million entries, the most a ztoc may have, take 15 s; Prepare must not wait for ever
)
IDLE_SECONDS = 10.0  # an image's layers come within seconds; an idle Python costs 10 MB of the node's memory


class MetaWorkers:
    """Builds meta.erofs files in other processes; at most `limit` at once. A context manager, thread safe."""

    def __init__(self, limit: int) -> None:
        self._places = threading.BoundedSemaphore(limit)
        self._lock = threading.Lock()
        self._idle: list[tuple[float, subprocess.Popen[bytes]]] = []
        self._reaper: threading.Timer | None = None
        self._closed = False

    def __enter__(self) -> MetaWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            reaper, self._reaper = self._reaper, None
        if reaper is not None:
            reaper.cancel()
        for _, process in idle:
            _end(process)

    def warm(self) -> None:
        """Start one worker ahead, so that the first layer does not wait for an interpreter."""
        self._give_back(self._start())

    def build(self, request: MetaRequest) -> MetaResult:
        """Build in a worker. Raises what `meta.build` raises; SociError if the worker died."""
        with self._places:
            process = self._take()
            try:
                assert process.stdin is not None and process.stdout is not None  # noqa: S101 - made with pipes
                write_frame(process.stdin, request)
                _wait(process)
                frame = read_frame(process.stdout)
            except BaseException as error:
                _end(process)
                if isinstance(error, OSError):
                    raise errors.SociError(
                        f"layer {request.layer_digest}: the worker died: {error}"
                    ) from error
                raise
            if frame is None:
                _end(process)
                raise errors.SociError(
                    f"layer {request.layer_digest}: the worker died with {process.returncode}"
                )
            self._give_back(process)
        answer = msgspec.msgpack.decode(frame, type=Answer)
        if answer.result is not None:
            return answer.result
        name, text = answer.error or ("SociError", "the worker gave an empty answer")
        kind = getattr(errors, name, errors.SociError)
        raise kind(text)

    def _take(self) -> subprocess.Popen[bytes]:
        while True:
            with self._lock:
                process = self._idle.pop()[1] if self._idle else None
            if process is None:
                return self._start()
            if process.poll() is None:
                return process
            _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "soci_snapshotter.layers.meta_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=True,
            start_new_session=True,
        )

    def _give_back(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append((time.monotonic(), process))
                self._arm()
                return
        _end(process)

    def _arm(self) -> None:
        """Under the lock: see that somebody looks after idle workers."""
        if self._reaper is None and self._idle:
            self._reaper = threading.Timer(IDLE_SECONDS, self._reap)
            self._reaper.daemon = True
            self._reaper.start()

    def _reap(self) -> None:
        now = time.monotonic()
        with self._lock:
            self._reaper = None
            old = [process for since, process in self._idle if now - since >= IDLE_SECONDS]
            self._idle = [item for item in self._idle if now - item[0] < IDLE_SECONDS]
            self._arm()
        for process in old:
            _end(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    """Until the worker answers, which it does in one piece, or ends; one that takes too long is killed."""
    assert process.stdout is not None  # noqa: S101 - made with a pipe
    poll = select.poll()
    poll.register(process.stdout, select.POLLIN)
    if not poll.poll(BUILD_SECONDS * 1000):
        process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End of file ends it; a worker that does not see that is killed."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:  # a broken pipe: it is dead already
                pass
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
