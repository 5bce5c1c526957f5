"""containerd's snapshots service: one named snapshotter, built in or proxied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..errors import NotFound
from .calls import LONG_CALL_TIMEOUT_S, Caller
from .stubs import snapshots_pb2, snapshots_pb2_grpc
from .types import Mount, SnapshotInfo, mount_from

_KINDS = {snapshots_pb2.VIEW: "view", snapshots_pb2.ACTIVE: "active", snapshots_pb2.COMMITTED: "committed"}


class Snapshots:
    """The snapshotter called `name` in containerd. Safe for threads.

    The lifecycle: `prepare` a key over a parent, write into its mounts, `commit` it under a name. A remote
    snapshotter may answer `prepare` with AlreadyExists instead: the committed snapshot of the name in the
    label `containerd.io/snapshot.ref` is there now, without anybody having written anything.
    """

    def __init__(self, caller: Caller, name: str) -> None:
        self._caller = caller
        self._stub = snapshots_pb2_grpc.SnapshotsStub(caller.channel)
        self.name = name

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] | None = None) -> list[Mount]:
        """Make a writable snapshot over `parent` (a committed one, "" for none)."""
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=self.name, key=key, parent=parent, labels=labels or {}
        )
        answer = self._caller.unary(
            self._stub.Prepare, request, self._what(key), timeout_s=LONG_CALL_TIMEOUT_S
        )
        return [mount_from(message) for message in answer.mounts]

    def view(self, key: str, parent: str = "") -> list[Mount]:
        """Make a read-only snapshot of `parent`."""
        request = snapshots_pb2.ViewSnapshotRequest(snapshotter=self.name, key=key, parent=parent)
        answer = self._caller.unary(self._stub.View, request, self._what(key))
        return [mount_from(message) for message in answer.mounts]

    def mounts(self, key: str) -> list[Mount]:
        """How to mount an active snapshot or a view."""
        request = snapshots_pb2.MountsRequest(snapshotter=self.name, key=key)
        answer = self._caller.unary(self._stub.Mounts, request, self._what(key))
        return [mount_from(message) for message in answer.mounts]

    def commit(self, name: str, key: str, labels: Mapping[str, str] | None = None) -> None:
        """Make the active snapshot `key` a committed one called `name`."""
        request = snapshots_pb2.CommitSnapshotRequest(
            snapshotter=self.name, name=name, key=key, labels=labels or {}
        )
        self._caller.unary(self._stub.Commit, request, self._what(key), timeout_s=LONG_CALL_TIMEOUT_S)

    def stat(self, key: str) -> SnapshotInfo:
        """Kind, parent and labels; NotFound when there is no such snapshot."""
        request = snapshots_pb2.StatSnapshotRequest(snapshotter=self.name, key=key)
        return _info(self._caller.unary(self._stub.Stat, request, self._what(key)).info)

    def exists(self, key: str) -> bool:
        """True when there is such a snapshot."""
        try:
            self.stat(key)
        except NotFound:
            return False
        return True

    def find(self, *filters: str) -> Iterator[SnapshotInfo]:
        """Every snapshot of the namespace that matches one of the filters."""
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=self.name, filters=filters)
        for answer in self._caller.stream(self._stub.List, request, f"snapshotter {self.name}"):
            yield from (_info(message) for message in answer.info)

    def remove(self, key: str) -> None:
        """Remove a snapshot without children."""
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=self.name, key=key)
        self._caller.unary(self._stub.Remove, request, self._what(key))

    def _what(self, key: str) -> str:
        return f"{self.name} snapshot {key}"


def _info(message: snapshots_pb2.Info) -> SnapshotInfo:
    kind = _KINDS.get(message.kind, "unknown")
    return SnapshotInfo(message.name, message.parent, kind, dict(message.labels))
