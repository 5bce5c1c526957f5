"""The verbs of containerd's snapshots service.

containerd asks for a chain of snapshots, one a layer, bottom first. For each it calls Prepare with the target
chain ID as a label. A lazy layer is committed there and then, under a name of ours, and AlreadyExists tells
containerd to look for the committed snapshot with that label and parent; else it gets mounts, unpacks there
and calls Commit. Rows are in SnapshotStore, whose lock is never held while anything else is done.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

from ..errors import AlreadyExists, Integrity, NotFound, Precondition, Remote, SociError
from ..formats import snapfilter
from ..policy import prepare as policy
from ..policy.idmaps import IdMap, id_map
from ..policy.lazy import side_by_side
from ..policy.proof import Claim, claim_of
from ..store.snapshots import Kind, Link, Snapshot, SnapshotStore
from .directories import Directories
from .flight import Flights
from .idmaps import MappedMounts
from .mounts import Mount, Stack, mounts
from .ports import (
    Declined,
    Failed,
    LazyLayer,
    LazyLayers,
    LazyLower,
    LazyRequest,
    LocalLower,
    Lower,
    Usage,
    Way,
)
from .returning import returning

_log = logging.getLogger(__name__)

# Keys of log lines that users of the Go daemon count (its remote snapshot log monitor).
_LOG_REMOTE = "remote-snapshot-prepared"
_LOG_LOCAL = "local-snapshot-prepared"
_LOG_DEFER = "defer-snapshot-runtime"
# What the Go daemon says of a layer by how it was made.
_LABELS: Mapping[Way | None, Mapping[str, str]] = {
    None: {policy.REMOTE: "remote snapshot", policy.HAS_INDEX: "true"},
    Way.LOCAL: {policy.HAS_INDEX: "true"},
    Way.PARALLEL: {},
}


@dataclass(frozen=True, slots=True)
class _Tried:
    """What became of a try: `reason` why there is no snapshot, for the log; else `way` it was made, None for lazy."""

    reason: str | None = None
    way: Way | None = None


class Snapshotter:
    """Snapshots under `root` (metadata.sqlite, snapshots/). A context manager; every verb is thread safe.

    `lazy` makes lazy layers; without it every layer is left to containerd. Errors are those that containerd's
    own snapshotters give (NotFound, AlreadyExists, Invalid, Precondition), and Remote from a stack with a
    lazy layer that cannot be reached.
    """

    def __init__(
        self,
        root: bytes,
        *,
        lazy: LazyLayers | None = None,
        options: policy.Options | None = None,
        overlay_options: Sequence[str] = (),
        missed: str = "",
    ) -> None:
        """`missed`: what there is beside the root that only makes sense with rows of snapshots, if anything."""
        self._options = options or policy.Options()
        self._overlay_options = tuple(overlay_options)
        self._directories = Directories(root)
        self._mapped = MappedMounts(root)
        if not missed and (listed := self._directories.listed()):
            missed = f"{len(listed)} in {os.fsdecode(root)}/snapshots"
        path = os.path.join(root, b"metadata.sqlite")
        self._store = SnapshotStore(path, missed=missed)
        self._returning = None if lazy is None else returning(lazy, self._store, path, self._directories)
        self._lazy = self._returning or lazy
        self._flights: Flights[_Tried] = Flights()
        self._making_lock = threading.Lock()
        self._making: set[int] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Snapshotter:
        self._stack.enter_context(self._store)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def stat(self, key: str) -> Snapshot:
        """The snapshot with this key or name."""
        return self._store.get(key)

    def update(self, key: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> Snapshot:
        """Change labels: all of them, or those that the field mask `paths` names."""
        return self._store.update(key, labels, paths)

    def walk(self, filters: Sequence[str] = ()) -> Iterator[Snapshot]:
        """The snapshots that any of containerd's filters matches; raises Invalid before the first."""
        parsed = snapfilter.parse(filters)
        rows = self._store.walk(target=parsed.required(("labels", policy.TARGET)))
        return (row for row in rows if parsed.matches(_lookup(row)))

    def usage(self, key: str) -> Usage:
        """Of an active snapshot what it takes now, of a lazy one what is on disk now, else as committed."""
        row = self._store.get(key)
        if row.kind == Kind.ACTIVE:
            return self._directories.usage(row.id)
        if row.mount_id is not None and self._lazy is not None:
            return self._lazy.usage(row.mount_id)
        return row.usage

    def prepare(
        self, key: str, parent: str, labels: Mapping[str, str], *, namespace: str = ""
    ) -> tuple[Mount, ...]:
        """An active snapshot; or AlreadyExists when a committed one for the label snapshot.ref is there."""
        decision = policy.decide(key, labels, namespace=namespace, options=self._options)
        if isinstance(decision, policy.Ordinary):
            return self._create(Kind.ACTIVE, key, parent, labels)
        fields = {"key": key, "parent": parent}
        if isinstance(decision, policy.TryLazy):
            tried = self._try_lazy(key, parent, labels, decision)
            if tried.reason is None:
                word = _LOG_REMOTE if tried.way is None else _LOG_LOCAL
                _log.info("prepared snapshot", extra={**fields, word: "true"})
                raise AlreadyExists(f"target snapshot {decision.target!r} is prepared")
            reason = tried.reason
        else:
            reason = decision.reason
        made = self._create(Kind.ACTIVE, key, parent, labels)
        _log.info("leaving the layer to containerd", extra={**fields, "reason": reason, _LOG_DEFER: "true"})
        return made

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        """A read-only snapshot of `parent`."""
        return self._create(Kind.VIEW, key, parent, labels)

    def mounts(self, key: str) -> tuple[Mount, ...]:
        """The mounts of an active or view snapshot; Remote while one of its lazy layers cannot be reached."""
        row = self._store.get(key)
        if row.kind == Kind.COMMITTED:
            raise Precondition(f"snapshot {key!r} is committed: only active and view snapshots have mounts")
        top, chain = self._store.chain(row.parent)
        return self._give_mounts(row, chain, self._mapping(row.labels, top))

    def commit(self, key: str, name: str, labels: Mapping[str, str], *, parent: str = "") -> None:
        """Turn the active `key` into the committed `name`."""
        row = self._store.get(key)
        if row.kind != Kind.ACTIVE:
            raise Precondition(f"cannot commit snapshot {key!r}: it is not active")
        if parent and not row.parent and not side_by_side(row.labels):
            # It was unpacked on a bind mount: its whiteouts are lost.
            raise Precondition(
                f"cannot commit snapshot {key!r} on {parent!r}: nothing said at Prepare that it has a parent; take"
                " the capability rebase out of containerd's [proxy_plugins], or use containerd 2.4 or newer"
            )
        usage = self._directories.usage(row.id)
        _, returned = self._store.commit(key, name, labels, usage, parent)
        self._mapped.remove(row.id)
        self._tidy((), returned)

    def remove(self, key: str) -> None:
        """Forget a snapshot; its key can be used again at once. Its directory goes at cleanup."""
        removed = self._store.remove(key)
        self._mapped.remove(removed.snapshot.id)
        mount_id = removed.snapshot.mount_id
        self._tidy(() if mount_id is None else (mount_id,), removed.returned)

    def cleanup(self) -> None:
        """Remove the directories of snapshots that are no more, or that a crash left unborn."""
        listed, mapped = self._directories.listed(), self._mapped.listed()
        # In this order: a directory leaves _making only after its row is there.
        with self._making_lock:
            making = frozenset(self._making)
        keep = making | self._store.ids()
        self._directories.remove_others(listed, keep)
        self._mapped.remove_others(mapped, keep)

    def unmount_all(self) -> None:
        """Take down what is mounted for containers in user namespaces; it is mounted again when asked for.

        At a stop that unmounts, and at a start on a new FUSE connection: such mounts over an older one answer nothing.
        """
        self._mapped.remove_others(self._mapped.listed(), ())

    def returning(self) -> AbstractContextManager[object]:
        """While it lasts, lazy layers that came with a migrated root are brought back. After restore_mounts."""
        return self._returning or nullcontext()

    def lazy_rows(self) -> list[tuple[int, str]]:
        """(mount id, layer key) of every lazy snapshot: the references that a restart starts from."""
        return self._store.lazy_rows()

    def handed_out(self) -> frozenset[bytes]:
        """Every lazy lowerdir that an active or view snapshot was given and may still mount."""
        return self._store.handed_out()

    def claims(self, mount_ids: Sequence[int]) -> list[Claim]:
        """What the lazy snapshots on these mounts say of their layers; condemned ones are left out."""
        return [
            claim_of(
                row.labels,
                target=row.labels.get(policy.TARGET, ""),
                parent_chain_id=policy.chain_id_of(parent.key, parent.labels) if parent else "",
                image=row.labels.get(policy.IMAGE_REF, ""),
                snapshot=row.id,
            )
            for row, parent in self._store.on_mounts(mount_ids)
        ]

    def condemn(self, reasons: Mapping[int, str]) -> None:
        """These lazy snapshots (id -> why) turned out to be a lie: nothing new is built on them."""
        self._store.condemn(reasons)

    def _try_lazy(self, key: str, parent: str, labels: Mapping[str, str], wanted: policy.TryLazy) -> _Tried:
        """Whether a committed snapshot for the target exists now."""
        top, chain = self._store.chain(parent)
        lazy = self._lazy
        if lazy is None:
            return _Tried("this daemon makes no lazy layers")
        request = LazyRequest.of(
            wanted,
            labels,
            parent_chain_id=policy.chain_id_of(top.key, top.labels) if top else "",
            parent_chain=tuple(self._lower(link) for link in chain),
        )
        flight = (top.id if top else 0, wanted.target)
        return self._flights.run(flight, lambda: self._lazily(lazy, request, parent))

    def _lazily(self, lazy: LazyLayers, request: LazyRequest, parent: str) -> _Tried:
        there = self._store.find_target(parent, request.target)
        try:
            if there is not None:
                if there.mount_id is None or there.layer_key is None:
                    return _Tried()
                return _Tried(lazy.serves(request, there.mount_id, there.layer_key))
            layer = lazy.prepare(request)
        except Exception as error:
            # Whatever went wrong, the layer can still be unpacked; a trace only for what is our own fault.
            _log.warning(
                "failed to prepare remote snapshot",
                exc_info=not isinstance(error, SociError | OSError),
                extra={"layer": request.layer_digest, "error": str(error), _LOG_REMOTE: "false"},
            )
            return _Tried(f"the lazy try failed: {error}")
        if isinstance(layer, Declined):
            return _Tried(layer.reason)
        if isinstance(layer, Failed):
            raise layer.error
        try:
            self._commit_lazy(request, parent, layer)
        except AlreadyExists:
            self._tidy((layer.mount_id,), frozenset())
        except BaseException:
            self._tidy((layer.mount_id,), frozenset())
            raise
        else:
            lazy.committed(layer.mount_id)
        return _Tried(way=layer.way)

    def _commit_lazy(self, request: LazyRequest, parent: str, layer: LazyLayer) -> None:
        snapshot_id = self._store.reserve()
        labels = {
            **request.labels,
            policy.REMOTE_NAMESPACE: request.namespace,
            **_LABELS[layer.way],
            **layer.labels,
        }
        name = policy.lazy_key(snapshot_id, request.target)
        self._store.commit_lazy(snapshot_id, name, parent=parent, labels=labels, layer=layer)

    def _create(self, kind: Kind, key: str, parent: str, labels: Mapping[str, str]) -> tuple[Mount, ...]:
        top, chain = self._store.chain(parent)
        lowers = self._lowerdirs(chain)
        mapping = self._mapping(labels, top)
        with self._new_id() as snapshot_id:
            like = lowers[0] if lowers else None
            self._directories.make(snapshot_id, work=kind == Kind.ACTIVE, like=like, mapping=mapping)
            if mapping is not None:  # here, so that nothing is left where the kernel cannot
                self._mapped.lowerdirs(snapshot_id, mapping, lowers)
            given = _lazy_ones(chain, lowers)
            row = self._store.create(snapshot_id, key, parent=parent, kind=kind, labels=labels, given=given)
        return self._give_mounts(row, chain, mapping)

    def _mapping(self, labels: Mapping[str, str], top: Snapshot | None) -> IdMap | None:
        """How ids are mapped for a snapshot with these labels; None where they are not, or are already.

        A containerd that was not told of remap-ids copies the image's owners into a snapshot of its own, between the
        image's and the container's: no layer of an image, and its top belongs to the container's root.
        """
        mapping = id_map(labels)
        if mapping is None or top is None or top.mount_id is not None or policy.TARGET in top.labels:
            return mapping
        status = os.stat(self._directories.upper(top.id))
        copied = (status.st_uid, status.st_gid) == mapping.root != (0, 0)
        return None if copied else mapping

    @contextmanager
    def _new_id(self) -> Iterator[int]:
        """An id whose directory cleanup leaves alone until the row is there; on failure it goes at once."""
        snapshot_id = self._store.reserve()
        with self._making_lock:
            self._making.add(snapshot_id)
        try:
            yield snapshot_id
        except BaseException:
            self._mapped.remove(snapshot_id)
            self._directories.remove(snapshot_id)
            raise
        finally:
            with self._making_lock:
                self._making.discard(snapshot_id)

    def _give_mounts(self, row: Snapshot, chain: Sequence[Link], mapping: IdMap | None) -> tuple[Mount, ...]:
        """Note lazy lowerdirs as given before handing them out, and look again: none may go in between."""
        lowers = self._lowerdirs(chain)
        while self._store.give(row.id, _lazy_ones(chain, lowers)):
            lowers = self._lowerdirs(chain)
        if mapping is not None:
            lowers = self._mapped.lowerdirs(row.id, mapping, lowers)
            try:
                self._store.get(row.key)
            except NotFound:  # removed meanwhile, and its mounts before these
                self._mapped.remove(row.id)
                raise
        directories = self._directories
        texts = tuple(os.fsdecode(path) for path in lowers)
        rebased = not row.parent and side_by_side(row.labels)
        stack = Stack(row.kind, directories.upper(row.id), directories.work(row.id), texts, rebased)
        return mounts(stack, self._overlay_options)

    def _lower(self, link: Link) -> Lower:
        if link.mount_id is None:
            return LocalLower(self._directories.upper(link.id).encode())
        return LazyLower(link.mount_id)

    def _lowerdirs(self, chain: Sequence[Link]) -> list[bytes]:
        paths = []
        for link in chain:
            if link.condemned is not None:
                raise Integrity(f"{link.condemned}; remove the image and pull it again")
            lower = self._lower(link)
            if isinstance(lower, LocalLower):
                paths.append(lower.path)
            elif self._lazy is None:
                raise Remote(f"snapshot {link.id} is a lazy layer, and this daemon runs without lazy layers")
            else:
                paths.append(self._lazy.lowerdir(lower.mount_id))
        return paths

    def _tidy(self, mount_ids: Sequence[int], returned: frozenset[bytes]) -> None:
        """Tell the layers what nobody needs. The rows are gone: a failure is for the log, not the caller."""
        if self._lazy is None:
            return
        steps: list[Callable[[], None]] = []
        lazy = self._lazy
        if mount_ids:
            steps.append(lambda: lazy.release(mount_ids))
        if returned:
            steps.append(lambda: lazy.returned(returned))
        for step in steps:
            try:
                step()
            except (SociError, OSError) as error:
                _log.warning("cannot drop lazy layer", extra={"error": str(error)})


def _lazy_ones(chain: Sequence[Link], lowers: Sequence[bytes]) -> list[bytes]:
    return [path for link, path in zip(chain, lowers, strict=True) if link.mount_id is not None]


def _lookup(row: Snapshot) -> snapfilter.Lookup:
    """The fields that containerd's filters can name: kind, name, parent, labels.<label>."""

    def lookup(path: tuple[str, ...]) -> str | None:
        if path[0] == "kind":
            return row.kind.name.lower()
        if path[0] == "name":
            return row.key
        if path[0] == "parent":
            return row.parent
        if path[0] == "labels":
            return row.labels.get(".".join(path[1:]))
        return None

    return lookup
