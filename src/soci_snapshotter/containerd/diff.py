"""containerd's differ: unpacks a layer that is in the content store onto a snapshot's mounts."""

from __future__ import annotations

from collections.abc import Iterable

from ..formats.oci import Descriptor
from .calls import LONG_CALL_TIMEOUT_S, Caller
from .stubs import diff_pb2, diff_pb2_grpc
from .types import Mount, descriptor_from, descriptor_to, mounts_to


class Diff:
    """The diff service. Safe for threads."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = diff_pb2_grpc.DiffStub(caller.channel)

    def apply(self, layer: Descriptor, mounts: Iterable[Mount]) -> Descriptor:
        """Unpack the layer; the answer's digest and size are the uncompressed tar's (its DiffID)."""
        request = diff_pb2.ApplyRequest(diff=descriptor_to(layer), mounts=mounts_to(mounts))
        answer = self._caller.unary(
            self._stub.Apply, request, f"unpacking layer {layer.digest}", timeout_s=LONG_CALL_TIMEOUT_S
        )
        return descriptor_from(answer.applied)
