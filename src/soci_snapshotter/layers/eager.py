"""Layers pulled whole: fetched in pieces, unpacked in workers as they come, the image's next layers ahead of time.

containerd asks for one layer after the other. The first that is asked for sets the image's further layers going, in
their order and within the limits; who asks for one of those later joins what is under way. A layer that nobody came
for goes again. Whatever fails leaves nothing behind.

    <root>/filling/<token>/{blob, data.tar, ztoc}     one layer under way; all of it goes at a start
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from soci_snapshotter.errors import Integrity, Remote, SociError
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.layers.download import LEAST_RATE, Download, Source
from soci_snapshotter.layers.lanes import Lane
from soci_snapshotter.layers.unpackers import Unpackers
from soci_snapshotter.layers.unpacking import Unpacked, UnpackRequest
from soci_snapshotter.policy.eager import MOST_DOWNLOADS, Eager

_log = logging.getLogger(__name__)

ABANDONED_SECONDS = 60.0  # containerd asks for the next layer at once; a pull that was given up never does
_UNPACK_SECONDS = 300.0  # beside the transfer: what a hung decompressor may hold up
RESERVE = 1 << 30
"""Bytes on the disk that a layer must leave to the containers that run."""


@dataclass(frozen=True, slots=True)
class Pull:
    """The image whose layers are pulled, and containerd's namespace that it is for."""

    reference: Reference
    manifest: Digest
    namespace: str


@dataclass(frozen=True, slots=True)
class Filled:
    """A layer that is here: `directory` has its data.tar and ztoc, as long as the caller holds it."""

    directory: Path
    layer: Descriptor
    unpacked: Unpacked


@dataclass(frozen=True, slots=True)
class Tools:
    """What makes the ztocs. `span_size` in bytes of the tar."""

    unpackers: Unpackers
    span_size: int
    build_tool: str


Keep = Callable[[Pull, Descriptor, Download], None]
"""Stores a blob elsewhere as it comes."""


class _Image:
    """What the layers of one pull share: their place in line."""

    def __init__(self, rules: Eager, downloads: Slots, unpacks: Slots) -> None:
        width = min(rules.downloads_per_image or MOST_DOWNLOADS, MOST_DOWNLOADS)
        self.downloads = Lane("download", width, downloads)
        # Unpacking takes a processor: more at once than there are only take memory.
        processors = len(os.sched_getaffinity(0)) + 1
        self.unpacks = Lane("unpack", min(rules.unpacks_per_image or processors, processors), unpacks)
        self.jobs: set[_Job] = set()


class _Job:
    """One layer of one image."""

    def __init__(self, image: _Image, pull: Pull, layer: Descriptor, directory: Path) -> None:
        self.image = image
        self.pull = pull
        self.layer = layer
        self.directory = directory
        self.users = 0
        self.done = threading.Event()
        self.result: Unpacked | None = None
        self.error: Exception | None = None
        self.download: Download | None = None


Slots = AbstractContextManager[object]
_Key = tuple[str, Digest]


class EagerPulls:
    """All of the node's. Thread safe; a context manager that gives up what is under way."""

    def __init__(
        self,
        root: Path,
        rules: Eager,
        tools: Tools,
        source: Callable[[Reference, Digest, int], Source],
        *,
        request_seconds: float,
        keep: Keep | None = None,
        reserve: int = RESERVE,
    ) -> None:
        """`request_seconds`: what one request may take beside its transfer. `keep` is needed by rules.keep_blobs."""
        self.rules = rules
        self._tools = tools
        self._source = source
        self._seconds = request_seconds
        self._keep = keep if rules.keep_blobs else None
        self._reserve = reserve
        self._top = root / "filling"
        shutil.rmtree(self._top, ignore_errors=True)
        self._top.mkdir(mode=0o700)
        self._downloads = _slots(rules.downloads)
        self._unpacks = _slots(rules.unpacks)
        self._lock = threading.Lock()
        self._images: dict[_Key, _Image] = {}
        self._jobs: dict[_Key, _Job] = {}
        self._timers: set[threading.Timer] = set()
        self._closed = False

    def __enter__(self) -> EagerPulls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def give_up(self) -> None:
        """The daemon stops: whoever waits for a layer gets an error now."""
        self.close()
        self._tools.unpackers.close()

    def close(self) -> None:
        """Stop what is fetched; nothing is begun any more."""
        with self._lock:
            self._closed = True
            jobs, timers = list(self._jobs.values()), list(self._timers)
        for timer in timers:
            timer.cancel()
        for job in jobs:
            if job.download is not None:
                job.download.fail(Remote("the daemon is stopping"))

    @contextmanager
    def layer(self, pull: Pull, layer: Descriptor, ahead: Sequence[Descriptor] = ()) -> Iterator[Filled]:
        """The layer, pulled now or by whoever asked first; its files stay while the block lasts.

        `ahead`: layers of the same image that will be asked for next, in that order. Raises what went wrong, naming
        image and layer: Remote, Integrity, Unsupported, OSError.
        """
        job = self._join(pull, layer)
        for other in ahead:
            self._join(pull, other, using=False)
        try:
            job.done.wait()
            if job.error is not None:
                raise job.error
            assert job.result is not None  # noqa: S101 - one of the two is set
            yield Filled(job.directory, layer, job.result)
        finally:
            with self._lock:
                job.users -= 1
                last = not job.users
            if last:
                self._remove(job)

    def _join(self, pull: Pull, layer: Descriptor, *, using: bool = True) -> _Job:
        key = pull.reference.locator, layer.digest
        place = pull.reference.locator, pull.manifest
        with self._lock:
            if self._closed:
                raise Remote("the daemon is stopping")
            job = self._jobs.get(key)
            new = job is None
            if job is None:
                image = self._images.get(place)
                if image is None:
                    image = self._images[place] = _Image(self.rules, self._downloads, self._unpacks)
                job = _Job(image, pull, layer, self._top / secrets.token_hex(8))
                self._jobs[key] = job
                image.jobs.add(job)
            job.users += using
        if new:
            self._start(job)
        return job

    def _start(self, job: _Job) -> None:
        layer = job.layer
        try:
            job.directory.mkdir(mode=0o700)
            download = job.download = Download(
                self._source(job.pull.reference, layer.digest, layer.size),
                layer.size,
                job.directory / "blob",
                chunk=self.rules.chunk,
                seconds=self._seconds,
            )
        except (SociError, OSError) as error:
            self._finish(job, None, error)
            return
        for number in range(len(download)):
            job.image.downloads.add(lambda number=number: download.fetch(number))  # type: ignore[misc]
        job.image.unpacks.add(lambda: self._unpack(job, download))

    def _unpack(self, job: _Job, download: Download) -> None:
        result: Unpacked | None = None
        failure: Exception | None = None
        try:
            with self._kept(job, download):
                result = self._tools.unpackers.run(
                    self._request(job, download), download.progress(), self._time(download.size)
                )
        except (SociError, OSError) as error:
            failure = error
            if isinstance(error, Integrity):
                download.doubt()
        except Exception as error:
            _log.exception("unpacking a layer failed", extra={"layer": str(job.layer.digest)})
            failure = SociError(f"{type(error).__name__}: {error}")
        finally:
            download.close()
            download.path.unlink(missing_ok=True)
        self._finish(job, result, failure)

    @contextmanager
    def _kept(self, job: _Job, download: Download) -> Iterator[None]:
        """While the block unpacks the blob, another thread stores it where it is wanted whole."""
        errors: list[Exception] = []
        keep = self._keep
        if keep is None:
            yield
            return

        def store() -> None:
            try:
                keep(job.pull, job.layer, download)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=store, name="keep", daemon=True)
        thread.start()
        try:
            yield
        except (SociError, OSError) as error:
            download.fail(error)
            raise
        finally:
            thread.join()
        if errors:
            raise errors[0]

    def _request(self, job: _Job, download: Download) -> UnpackRequest:
        return UnpackRequest(
            blob=str(download.path),
            blob_size=download.size,
            layer_digest=str(job.layer.digest),
            directory=str(job.directory),
            span_size=self._tools.span_size,
            build_tool=self._tools.build_tool,
            decompressors=dict(self.rules.decompressors),
            reserve=self._reserve,
            keep_blob=self._keep is not None,
        )

    def _time(self, size: int) -> float:
        return self._seconds + _UNPACK_SECONDS + 2 * size / LEAST_RATE

    def _finish(self, job: _Job, result: Unpacked | None, error: Exception | None) -> None:
        job.result = result
        job.error = None if error is None else _named(error, job)
        job.done.set()
        with self._lock:
            wanted = job.users > 0
        if error is not None and not wanted:
            _log.warning("a layer could not be pulled ahead of time", extra={"error": str(job.error)})
            self._remove(job)
        elif not wanted:
            self._watch(job)

    def _watch(self, job: _Job) -> None:
        """Look later whether somebody came for it."""
        timer = threading.Timer(ABANDONED_SECONDS, lambda: self._look(job, timer))
        timer.daemon = True
        with self._lock:
            if self._closed:
                return
            self._timers.add(timer)
        timer.start()

    def _look(self, job: _Job, timer: threading.Timer) -> None:
        with self._lock:
            self._timers.discard(timer)
            gone = self._jobs.get((job.pull.reference.locator, job.layer.digest)) is not job
            busy = any(other.users or not other.done.is_set() for other in job.image.jobs)
        if gone:
            return
        if busy:
            self._watch(job)
        else:
            _log.info("nobody came for a layer", extra={"layer": str(job.layer.digest)})
            self._remove(job)

    def _remove(self, job: _Job) -> None:
        """Forget a job that is done and that nobody uses, and its files."""
        key = job.pull.reference.locator, job.layer.digest
        with self._lock:
            if job.users or not job.done.is_set() or self._jobs.get(key) is not job:
                return
            del self._jobs[key]
            job.image.jobs.discard(job)
            if not job.image.jobs:
                self._images = {place: image for place, image in self._images.items() if image.jobs}
        shutil.rmtree(job.directory, ignore_errors=True)


def _slots(limit: int | None) -> Slots:
    return nullcontext() if limit is None else threading.BoundedSemaphore(limit)


def _named(error: Exception, job: _Job) -> Exception:
    """The error with the names of image and layer."""
    name = f"image {job.pull.reference}: layer {job.layer.digest}"
    if isinstance(error, OSError):
        return OSError(error.errno, f"{name}: {error.strerror or error}")
    return type(error)(f"{name}: {str(error).removeprefix(f'layer {job.layer.digest}: ')}")
