"""Worker processes for `unpack_worker`: one a layer while it is unpacked, kept a moment for the next."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable
from types import TracebackType

import msgspec

from soci_snapshotter import errors
from soci_snapshotter.layers.meta_worker import read_frame, write_frame
from soci_snapshotter.layers.unpack_worker import AVAILABLE, Answer
from soci_snapshotter.layers.unpacking import Unpacked, UnpackRequest

IDLE_SECONDS = 10.0  # an image's layers follow one another within these; an idle Python takes 20 MB


class Unpackers:
    """Runs unpack requests in other processes. A context manager, thread safe; leaving it kills what runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._running: set[subprocess.Popen[bytes]] = set()
        self._reaper: threading.Timer | None = None
        self._closed = False

    def __enter__(self) -> Unpackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill what runs; nothing is started any more."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            running = list(self._running)
            reaper, self._reaper = self._reaper, None
        if reaper is not None:
            reaper.cancel()
        for process in running:
            process.kill()  # whoever waits for it gets an error, and ends it
        for process in idle:
            _end(process)

    def run(self, request: UnpackRequest, available: Iterable[int], seconds: float) -> Unpacked:
        """Unpack in a worker. `available` yields how many bytes of the blob are here, until all are.

        Raises what `unpack` raises and what `available` raises; SociError for a worker that died, or that took more
        than `seconds`.
        """
        process = self._take()
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        watchdog = threading.Timer(seconds, stop)
        watchdog.daemon = True
        watchdog.start()
        try:
            answer = _ask(process, request, available)
        except BaseException:
            self._drop(process)
            raise
        finally:
            watchdog.cancel()
        if answer is None or answer.result is None:
            self._drop(process)
            if answer is not None:
                raise _error(answer)
            if late.is_set():
                raise errors.SociError(f"not unpacked within {seconds:.0f} s")
            raise errors.SociError(f"the process unpacking it died (exit {process.returncode})")
        self._give_back(process)
        return answer.result

    def _take(self) -> subprocess.Popen[bytes]:
        while True:
            with self._lock:
                if self._closed:
                    raise errors.Remote("the daemon is stopping")
                process = self._idle.pop() if self._idle else None
            if process is None:
                process = subprocess.Popen(
                    [sys.executable, "-m", "soci_snapshotter.layers.unpack_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    close_fds=True,
                    start_new_session=True,
                )
            elif process.poll() is not None:
                _end(process)
                continue
            with self._lock:
                self._running.add(process)
                if self._closed:
                    process.kill()
            return process

    def _drop(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.discard(process)
        process.kill()
        _end(process)

    def _give_back(self, process: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.discard(process)
            if not self._closed:
                self._idle.append(process)
                if self._reaper is not None:
                    self._reaper.cancel()
                self._reaper = threading.Timer(IDLE_SECONDS, self._reap)
                self._reaper.daemon = True
                self._reaper.start()
                return
        _end(process)

    def _reap(self) -> None:
        with self._lock:
            idle, self._idle, self._reaper = self._idle, [], None
        for process in idle:
            _end(process)


def _ask(process: subprocess.Popen[bytes], request: UnpackRequest, available: Iterable[int]) -> Answer | None:
    assert process.stdin is not None and process.stdout is not None  # noqa: S101 - made with pipes
    try:
        write_frame(process.stdin, request)
        for count in available:
            process.stdin.write(AVAILABLE.pack(count))
            process.stdin.flush()
    except BrokenPipeError:  # it failed, or died: its answer says which
        pass
    frame = read_frame(process.stdout)
    return None if frame is None else msgspec.msgpack.decode(frame, type=Answer)


def _error(answer: Answer) -> Exception:
    name, text = answer.error or ("SociError", "the worker gave an empty answer")
    if name == "OSError":
        number, _, words = text.partition(" ")
        return OSError(int(number), words.removeprefix(f"[Errno {number}] "))
    kind = getattr(errors, name, errors.SociError)
    return kind(text) if issubclass(kind, errors.SociError) else errors.SociError(text)


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
