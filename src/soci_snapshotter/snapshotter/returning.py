"""Brings back the lazy layers of a migrated root: rows that stand for layers which nobody has mounted yet.

They return in the background, one after the other, and at once when somebody asks for a path; the start waits for
none. What cannot be lazy again is pulled whole: containerd has its reference, and will not unpack it. A layer that cannot
return now (its registry is away) makes that call UNAVAILABLE, and is tried again.

Stands between the snapshotter and whoever makes lazy layers: numbers below 0 (store.pending) never reach the latter.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from types import TracebackType

from ..errors import Invalid, NotFound, Precondition, Remote, SociError
from ..policy import prepare as policy
from ..policy.lazy import Declined, Failed, LazyLayer, LazyLower, LazyRequest, LocalLower, Lower, Usage
from ..store.pending import Pending, PendingRows, mount_of, snapshot_of
from ..store.snapshots import SnapshotStore
from .directories import Directories
from .ports import LazyLayers

_log = logging.getLogger(__name__)

WAIT_SECONDS = 30.0
"""What a call waits for a layer: the Go daemon's mount_timeout_sec. The layer goes on returning."""
_FIRST_PAUSE = 2.0  # after a pass that left some: doubled each time, to
_LAST_PAUSE = 60.0
_STOP_SECONDS = 5.0
_LOOK_SECONDS = 0.2  # how soon the end is noticed
_REMOVE = "remove the image and pull it again"
_ANY_MODE = policy.Options(discover=True, whole=True)


def returning(
    lazy: LazyLayers, store: SnapshotStore, path: bytes, directories: Directories
) -> Returning | None:
    """Who brings the pending rows of `store`, whose file is `path`, back with `lazy`; None when there are none."""
    rows = PendingRows(path)
    if rows.all():
        return Returning(lazy, store, rows, directories)
    rows.close()
    return None


class Returning:
    """Implements snapshotter.ports.LazyLayers over another one. A context manager: while it lasts, layers return."""

    def __init__(
        self, lazy: LazyLayers, store: SnapshotStore, rows: PendingRows, directories: Directories
    ) -> None:
        """`rows` is closed with the context."""
        self._lazy = lazy
        self._store = store
        self._rows = rows
        self._directories = directories
        self._lock = threading.Lock()
        self._flights: dict[int, Future[LazyLayer]] = {}
        self._back: dict[int, LazyLayer] = {}  # a caller may have read a row before it was settled
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="returning", daemon=True)

    def __enter__(self) -> Returning:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join()
        with self._lock:
            flying = list(self._flights.values())
        wait(
            flying, _STOP_SECONDS
        )  # what asks a registry may take longer; what it makes then has no row, and goes
        self._rows.close()

    # -- the port ------------------------------------------------------------------------------------------------

    def prepare(self, request: LazyRequest, *, must: bool = False) -> LazyLayer | Declined | Failed:
        """Make a layer; those below it return first."""
        self._below(request, WAIT_SECONDS)
        chain = tuple(self._settled(lower) for lower in request.parent_chain)
        return self._lazy.prepare(replace(request, parent_chain=chain), must=must)

    def serves(self, request: LazyRequest, mount_id: int, layer_key: str) -> str | None:
        """Whether a lazy snapshot may stand for `request`: a pending one must return for that."""
        if snapshot_of(mount_id) is None:
            return self._lazy.serves(request, mount_id, layer_key)
        try:
            back = self._wait(mount_id, WAIT_SECONDS)
        except SociError as error:
            return str(error)
        return self._lazy.serves(request, back.mount_id, back.layer_key)

    def committed(self, mount_id: int) -> None:
        """The snapshot of a prepared layer is committed."""
        self._lazy.committed(mount_id)

    def lowerdir(self, mount_id: int) -> bytes:
        """The path to hand out now. Raises Remote while a layer cannot return."""
        return self._lazy.lowerdir(self._number(mount_id))

    def usage(self, mount_id: int) -> Usage:
        """What a layer takes on disk; nothing while it is pending."""
        with self._lock:
            back = self._back.get(mount_id)
        if back is not None:
            return self._lazy.usage(back.mount_id)
        return Usage() if mount_id < 0 else self._lazy.usage(mount_id)

    def release(self, mount_ids: Sequence[int]) -> None:
        """Take back references. Nobody has one on a pending row: what returns without its row is released there."""
        if numbers := [number for number in mount_ids if snapshot_of(number) is None]:
            self._lazy.release(numbers)

    def returned(self, paths: frozenset[bytes]) -> None:
        """No active or view snapshot holds these lowerdirs any longer."""
        self._lazy.returned(paths)

    # -- who waits -----------------------------------------------------------------------------------------------

    def _number(self, mount_id: int) -> int:
        return mount_id if snapshot_of(mount_id) is None else self._wait(mount_id, WAIT_SECONDS).mount_id

    def _below(self, request: LazyRequest, seconds: float | None) -> None:
        """Have the layers below return, bottom first."""
        for lower in reversed(request.parent_chain):
            if isinstance(lower, LazyLower) and snapshot_of(lower.mount_id) is not None:
                self._wait(lower.mount_id, seconds)

    def _settled(self, lower: Lower) -> Lower:
        return LazyLower(self._number(lower.mount_id)) if isinstance(lower, LazyLower) else lower

    def _wait(self, mount_id: int, seconds: float | None) -> LazyLayer:
        """The layer of a pending row. Raises Remote when it does not return in time."""
        flight = self._flight(mount_id)
        end = math.inf if seconds is None else time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                return flight.result(min(left, _LOOK_SECONDS))
            except TimeoutError:
                if self._ending.is_set():
                    raise Remote("the daemon is stopping") from None
        key = self._key(-mount_id) or str(-mount_id)
        raise Remote(
            f"snapshot {key!r}, lazy under the Go daemon, is still returning: try again; is its registry slow?"
        )

    def _flight(self, mount_id: int) -> Future[LazyLayer]:
        """The try under way, or a new one; done at once for a layer that is back."""
        with self._lock:
            back = self._back.get(mount_id)
            flight = self._flights.get(mount_id)
            if back is None and flight is not None:
                return flight
            flight = Future()
            if back is None:
                self._flights[mount_id] = flight
        if back is not None:
            flight.set_result(back)
        else:  # a thread of its own: a call gives up on it, and a stopping daemon does not wait for a registry
            threading.Thread(target=self._fly, args=(mount_id, flight), name="return", daemon=True).start()
        return flight

    def _fly(self, mount_id: int, flight: Future[LazyLayer]) -> None:
        layer: LazyLayer | None = None
        try:
            layer = self._bring(-mount_id)
        except Exception as error:
            if not isinstance(error, SociError | OSError):
                _log.exception("a lazy layer did not return")
            failure = (
                error if isinstance(error, SociError) else Remote(f"a lazy layer did not return: {error}")
            )
        with self._lock:
            del self._flights[mount_id]
            if layer is not None:
                self._back[mount_id] = layer
        if layer is not None:
            flight.set_result(layer)
        else:
            flight.set_exception(failure)

    # -- one layer -----------------------------------------------------------------------------------------------

    def _bring(self, snapshot_id: int) -> LazyLayer:
        key = self._key(snapshot_id)
        if key is None:
            raise NotFound(f"snapshot {snapshot_id} was removed meanwhile")
        row = self._store.get(key)
        request = self._request(key, row.parent, row.labels)
        self._below(request, None)  # a failure there speaks for itself
        what = f"layer {request.layer_digest} of {request.image_ref}, lazy under the Go daemon"
        try:
            made = self.prepare(request, must=True)
        except (SociError, OSError) as error:
            raise Remote(f"{what}, cannot return now: {error}") from error
        if isinstance(made, Failed):
            raise Remote(f"{what}, cannot return now: {made.error}")
        if isinstance(made, Declined):
            raise Remote(f"{what}, cannot return now ({made.reason}); if that stays, {_REMOVE}")
        settled = False
        try:
            settled = self._rows.settle(snapshot_id, made)
        finally:
            if not settled:  # the next try makes a reference of its own
                self._lazy.release((made.mount_id,))
        if not settled:
            raise NotFound(f"snapshot {key!r} was removed meanwhile")
        self._lazy.committed(made.mount_id)
        _log.info("lazy layer returned", extra={"layer": request.layer_digest, "image": request.image_ref})
        return made

    def _key(self, snapshot_id: int) -> str | None:
        return next((row.key for row in self._rows.all() if row.id == snapshot_id), None)

    def _request(self, key: str, parent: str, labels: dict[str, str]) -> LazyRequest:
        """What the Go daemon was asked, by the labels it kept."""
        namespace = labels.get(policy.REMOTE_NAMESPACE, "")
        try:
            wanted = policy.decide(key, labels, namespace=namespace, options=_ANY_MODE)
        except (Invalid, Precondition) as error:
            raise Remote(
                f"lazy snapshot {key!r} of the Go daemon's does not return ({error}): {_REMOVE}"
            ) from None
        if not isinstance(wanted, policy.TryLazy):
            reason = wanted.reason if isinstance(wanted, policy.Defer) else "its labels name no target"
            raise Remote(f"lazy snapshot {key!r} of the Go daemon's does not return ({reason}): {_REMOVE}")
        top, chain = self._store.chain(parent)
        lowers: list[Lower] = []
        for link in chain:
            if link.condemned is not None:
                raise Remote(f"lazy snapshot {key!r} does not return ({link.condemned}): {_REMOVE}")
            local = LocalLower(self._directories.upper(link.id).encode())
            lowers.append(local if link.mount_id is None else LazyLower(link.mount_id))
        return LazyRequest.of(
            wanted,
            labels,
            parent_chain_id=policy.chain_id_of(top.key, top.labels) if top else "",
            parent_chain=tuple(lowers),
        )

    # -- the background ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._pass_or_report() and not self._ending.wait(pause):
            pause = min(2 * pause, _LAST_PAUSE)

    def _pass_or_report(self) -> bool:
        try:
            return self._pass()
        except OSError as error:  # a full or sick disk: tried again
            _log.warning("lazy layers do not return", extra={"error": str(error)})
            return False

    def _pass(self) -> bool:
        """Try each pending row once, but none above one that failed; whether all are back."""
        failed: set[int | None] = set()
        rows = self._rows.all()
        for row in rows:
            if row.parent_id in failed or not self._try(row):
                failed.add(row.id)
            if self._ending.is_set():
                return True
        if rows and not failed:
            _log.info("all lazy layers of the Go daemon's are back", extra={"layers": len(rows)})
        return not failed

    def _try(self, row: Pending) -> bool:
        flight = self._flight(mount_of(row.id))
        while not self._ending.is_set():
            try:
                flight.result(_LOOK_SECONDS)
            except TimeoutError:
                continue
            except NotFound:
                return True
            except SociError as error:
                _log.warning("a lazy layer did not return", extra={"snapshot": row.key, "error": str(error)})
                return False
            return True
        return False
