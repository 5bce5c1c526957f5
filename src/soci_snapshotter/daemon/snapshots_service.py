"""The gRPC edge of containerd's snapshots service: messages to values, errors to status codes."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import grpc
from google.protobuf import empty_pb2, timestamp_pb2

from ..containerd.stubs import snapshots_pb2 as pb
from ..containerd.stubs import types_pb2
from ..containerd.stubs.snapshots_pb2_grpc import SnapshotsServicer
from ..errors import Invalid, SociError
from ..snapshotter.mounts import Mount
from ..snapshotter.snapshotter import Snapshotter
from ..store.snapshots import Snapshot

_log = logging.getLogger(__name__)

_NAMESPACE_HEADER = "containerd-namespace"
# Snapshots in one List message, which with the largest of them stays below gRPC's 4 MiB.
_BATCH = 100
_BATCH_BYTES = 1 << 20
# containerd's own store holds no longer keys (bbolt), and labels of 4 KiB each.
_MAX_KEY = 32 << 10
_MAX_LABELS = 1 << 20
# A status message travels in an HTTP/2 header, which peers limit to 8 KiB or more.
_MAX_MESSAGE = 2048
_NANO = 1_000_000_000


class SnapshotsService(SnapshotsServicer):
    """Serves one Snapshotter; the requests' field `snapshotter` is containerd's name for it and not read."""

    def __init__(self, snapshotter: Snapshotter) -> None:
        self._snapshotter = snapshotter

    def Prepare(  # noqa: N802 - the API's names
        self, request: pb.PrepareSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.PrepareSnapshotResponse:
        """An active snapshot, or ALREADY_EXISTS for a lazy one."""
        with _statuses(context):
            made = self._snapshotter.prepare(
                _named(request.key), request.parent, _labels(request.labels), namespace=_namespace(context)
            )
            return pb.PrepareSnapshotResponse(mounts=_mounts(made))

    def View(  # noqa: N802
        self, request: pb.ViewSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.ViewSnapshotResponse:
        """A read-only snapshot."""
        with _statuses(context):
            made = self._snapshotter.view(_named(request.key), request.parent, _labels(request.labels))
            return pb.ViewSnapshotResponse(mounts=_mounts(made))

    def Mounts(self, request: pb.MountsRequest, context: grpc.ServicerContext) -> pb.MountsResponse:  # noqa: N802
        """The mounts of an active or view snapshot."""
        with _statuses(context):
            return pb.MountsResponse(mounts=_mounts(self._snapshotter.mounts(request.key)))

    def Commit(  # noqa: N802
        self, request: pb.CommitSnapshotRequest, context: grpc.ServicerContext
    ) -> empty_pb2.Empty:
        """Turn an active snapshot into a committed one."""
        with _statuses(context):
            labels, name = _labels(request.labels), _named(request.name)
            self._snapshotter.commit(request.key, name, labels, parent=request.parent)
            return empty_pb2.Empty()

    def Remove(  # noqa: N802
        self, request: pb.RemoveSnapshotRequest, context: grpc.ServicerContext
    ) -> empty_pb2.Empty:
        """Forget a snapshot."""
        with _statuses(context):
            self._snapshotter.remove(request.key)
            return empty_pb2.Empty()

    def Stat(  # noqa: N802
        self, request: pb.StatSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.StatSnapshotResponse:
        """One snapshot."""
        with _statuses(context):
            return pb.StatSnapshotResponse(info=_info(self._snapshotter.stat(request.key)))

    def Update(  # noqa: N802
        self, request: pb.UpdateSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.UpdateSnapshotResponse:
        """Change labels."""
        with _statuses(context):
            info = request.info
            row = self._snapshotter.update(info.name, _labels(info.labels), tuple(request.update_mask.paths))
            return pb.UpdateSnapshotResponse(info=_info(row))

    def List(  # noqa: N802
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ListSnapshotsResponse]:
        """The snapshots that some filter matches, in batches."""
        with _statuses(context):
            batch: list[pb.Info] = []
            room = _BATCH_BYTES
            for row in self._snapshotter.walk(tuple(request.filters)):
                info = _info(row)
                room -= info.ByteSize()
                if len(batch) == _BATCH or (batch and room < 0):
                    yield pb.ListSnapshotsResponse(info=batch)
                    batch, room = [], _BATCH_BYTES - info.ByteSize()
                batch.append(info)
            if batch:
                yield pb.ListSnapshotsResponse(info=batch)

    def Usage(self, request: pb.UsageRequest, context: grpc.ServicerContext) -> pb.UsageResponse:  # noqa: N802
        """What a snapshot takes on disk."""
        with _statuses(context):
            usage = self._snapshotter.usage(request.key)
            return pb.UsageResponse(size=usage.size, inodes=usage.inodes)

    def Cleanup(self, request: pb.CleanupRequest, context: grpc.ServicerContext) -> empty_pb2.Empty:  # noqa: N802
        """Remove what removed snapshots left."""
        del request
        with _statuses(context):
            self._snapshotter.cleanup()
            return empty_pb2.Empty()


@contextmanager
def _statuses(context: grpc.ServicerContext) -> Iterator[None]:
    """Turn errors into statuses: ours by their own code, anything else INTERNAL with a trace in the log."""
    try:
        yield
    except SociError as error:
        context.abort(grpc.StatusCode[error.grpc_code], str(error)[:_MAX_MESSAGE])
    except OSError as error:
        _log.warning("snapshot call failed", extra={"error": str(error)})
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.UNKNOWN
        context.abort(code, str(error)[:_MAX_MESSAGE])
    except Exception as error:
        _log.exception("snapshot call failed")
        context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}"[:_MAX_MESSAGE])


def _named(key: str) -> str:
    if not key:
        raise Invalid("a snapshot needs a key")
    if "\0" in key:
        raise Invalid(f"snapshot {key[:160]!r}: a key has no NUL in it")
    if len(key.encode()) > _MAX_KEY:
        raise Invalid(f"snapshot {key[:160]!r}...: a key has at most {_MAX_KEY} bytes")
    return key


def _labels(labels: Mapping[str, str]) -> dict[str, str]:
    size = sum(len(name.encode()) + len(value.encode()) for name, value in labels.items())
    if size > _MAX_LABELS:
        raise Invalid(f"labels of {size} bytes: a snapshot has at most {_MAX_LABELS}")
    return dict(labels)


def _namespace(context: grpc.ServicerContext) -> str:
    """The namespace header, "" when containerd (before 1.7) does not send it on to us."""
    for name, value in context.invocation_metadata():
        if name == _NAMESPACE_HEADER:
            return value if isinstance(value, str) else value.decode("utf-8", "replace")
    return ""


def _mounts(made: Iterable[Mount]) -> list[types_pb2.Mount]:
    return [types_pb2.Mount(type=m.type, source=m.source, options=m.options) for m in made]


def _info(row: Snapshot) -> pb.Info:
    return pb.Info(
        name=row.key,
        parent=row.parent,
        kind=row.kind.name,
        created_at=_timestamp(row.created),
        updated_at=_timestamp(row.updated),
        labels=row.labels,
    )


def _timestamp(nanoseconds: int) -> timestamp_pb2.Timestamp:
    return timestamp_pb2.Timestamp(seconds=nanoseconds // _NANO, nanos=nanoseconds % _NANO)
