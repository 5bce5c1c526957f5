"""containerd's content store: blobs by digest, with labels that say what they keep alive."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from ..errors import AlreadyExists, Integrity, Invalid, NotFound, Precondition, Remote
from ..formats import digest as digests
from ..formats.digest import Buffer, Digest
from ..formats.oci import Descriptor
from .calls import LONG_CALL_TIMEOUT_S, Caller
from .stubs import content_pb2, content_pb2_grpc
from .types import ContentInfo, time_from

# One write message: large enough to make the round trip per message (about 0.2 ms) cheap, well under the
# 16 MiB that a message may have.
_PIECE = 1 << 20
# Between two looks whether another client's upload of the same blob is over.
_LOCKED_PAUSE_S = 0.1


class _Locked(Remote):
    """Somebody else uploads under this ref just now."""


class Content:
    """The content service. Safe for threads."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = content_pb2_grpc.ContentStub(caller.channel)

    def info(self, digest: Digest) -> ContentInfo:
        """Size and labels of a blob; NotFound when it is not there."""
        request = content_pb2.InfoRequest(digest=digest)
        answer = self._caller.unary(self._stub.Info, request, f"content {digest}")
        return _info(answer.info)

    def exists(self, digest: Digest) -> bool:
        """True when the whole blob is there."""
        try:
            self.info(digest)
        except NotFound:
            return False
        return True

    def find(self, *filters: str) -> Iterator[ContentInfo]:
        """Every blob of the namespace that matches one of the filters (containerd's filter syntax)."""
        request = content_pb2.ListContentRequest(filters=filters)
        for answer in self._caller.stream(self._stub.List, request, "content"):
            yield from (_info(message) for message in answer.info)

    def read(self, digest: Digest, offset: int = 0, size: int = 0) -> Iterator[bytes]:
        """The blob's bytes from `offset`, `size` of them (0: to the end), in pieces of about 1 MiB.

        Nothing is checked against the digest: whoever needs certainty hashes what it reads, or uses `get`.
        """
        request = content_pb2.ReadContentRequest(digest=digest, offset=offset, size=size)
        # The answers' own offsets count from the blob's start or from `offset`, depending on the version.
        for answer in self._caller.stream(self._stub.Read, request, f"content {digest}"):
            yield answer.data

    def get(self, digest: Digest, limit: int) -> bytes:
        """The whole blob, at most `limit` bytes, checked against its digest."""
        size = self.info(digest).size
        if size > limit:
            raise Integrity(f"content {digest}: {size} bytes, more than the {limit} allowed")
        data = b"".join(self.read(digest))
        if not digest.matches(data):
            raise Integrity(
                f"content {digest}: containerd's copy has another digest; remove and pull it again"
            )
        return data

    def put(self, data: Buffer, labels: Mapping[str, str] | None = None) -> Digest:
        """Store a small blob under its sha256 digest, with these labels added if it is there already."""
        digest = digests.sha256(data)
        descriptor = Descriptor("application/octet-stream", digest, len(data))
        self.write(descriptor, lambda offset: (bytes(memoryview(data)[offset:]),), labels=labels)
        return digest

    def write(
        self,
        descriptor: Descriptor,
        source: Callable[[int], Iterable[Buffer]],
        *,
        ref: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> int:
        """Store the blob that `source(offset)` yields from that offset on; return how many bytes it yielded.

        `ref` names the upload: one that broke off continues where it stopped, and of two of the same ref one waits
        for the other. A blob that is there already is not read from the source; it gets the labels. containerd
        checks size and digest: Integrity when they differ.
        """
        name = f"blob {descriptor.digest}"
        ref = ref or f"soci-{descriptor.digest}"
        deadline = time.monotonic() + LONG_CALL_TIMEOUT_S
        try:
            while True:
                try:
                    with _Upload(self._caller, self._stub, ref, name) as upload:
                        return upload.run(descriptor, source, labels or {})
                except _Locked:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(_LOCKED_PAUSE_S)
        except AlreadyExists:
            if labels:
                self.update_labels(descriptor.digest, labels)
            return 0
        except Integrity:
            self.abort(ref)  # or the next try would continue behind the bad bytes
            raise

    def abort(self, ref: str) -> None:
        """Forget an upload that broke off; a no-op when there is none."""
        try:
            self._caller.unary(self._stub.Abort, content_pb2.AbortRequest(ref=ref), f"upload {ref}")
        except NotFound:
            pass

    def update_labels(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Set these labels (an empty value removes one) and leave the others."""
        request = content_pb2.UpdateRequest(
            info=content_pb2.Info(digest=digest, labels=labels),
            update_mask=FieldMask(paths=[f"labels.{key}" for key in labels]),
        )
        self._caller.unary(self._stub.Update, request, f"content {digest}")

    def delete(self, digest: Digest) -> None:
        """Remove a blob at once; NotFound when it is not there."""
        request = content_pb2.DeleteContentRequest(digest=digest)
        self._caller.unary(self._stub.Delete, request, f"content {digest}")


class _Upload:
    """One Write call, in lock step: a message, its answer, the next.

    Lock step keeps memory to one piece and lets the source's exceptions come out where they belong; gRPC's
    own iterator thread would swallow them.
    """

    def __init__(self, caller: Caller, stub: content_pb2_grpc.ContentStub, ref: str, name: str) -> None:
        self._caller = caller
        self._name = name
        self._ref = ref
        self._requests: queue.SimpleQueue[content_pb2.WriteContentRequest | None] = queue.SimpleQueue()
        self._call: Any = stub.Write(
            iter(self._requests.get, None), timeout=LONG_CALL_TIMEOUT_S, metadata=caller.metadata
        )
        self._answers: Iterator[content_pb2.WriteContentResponse] = iter(self._call)

    def __enter__(self) -> _Upload:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The end of our side lets containerd close the upload before anybody aborts or continues it.
        self._requests.put(None)
        if kind is not None and not issubclass(kind, Exception):
            self._call.cancel()  # Ctrl-C waits for nobody
            return
        try:
            for _answer in self._answers:
                pass
        except grpc.RpcError:
            pass  # it was raised where it happened

    def run(
        self, descriptor: Descriptor, source: Callable[[int], Iterable[Buffer]], labels: Mapping[str, str]
    ) -> int:
        size, digest = descriptor.size, descriptor.digest
        offset = self._ask(action=content_pb2.STAT, total=size, expected=digest).offset
        written = 0
        # containerd answers `size` at once when another namespace has the blob.
        if offset < size:
            for piece in _pieces(source(offset)):
                written += len(piece)
                if offset + written > size:
                    raise Integrity(f"{self._name}: more than the {size} bytes announced")
                self._ask(action=content_pb2.WRITE, offset=offset + written - len(piece), data=piece)
            if offset + written != size:
                raise Integrity(f"{self._name}: {offset + written} bytes of the {size} announced")
        try:
            self._ask(
                action=content_pb2.COMMIT, total=size, expected=digest, offset=offset + written, labels=labels
            )
        except (Invalid, Precondition) as error:  # containerd's words for a size or digest that differs
            raise Integrity(str(error)) from None
        return written

    def _ask(self, **fields: Any) -> content_pb2.WriteContentResponse:  # noqa: ANN401 - a message of fields
        self._requests.put(content_pb2.WriteContentRequest(ref=self._ref, **fields))
        try:
            return next(self._answers)
        except StopIteration:
            raise Remote(f"{self._name}: containerd ended the upload; check its log") from None
        except grpc.RpcError as error:
            told = self._caller.translate(error, self._name)
            # containerd's words (content/local/locks.go); the code alone also means that it is not there.
            if isinstance(told, Remote) and " locked for " in str(told):
                raise _Locked(str(told)) from None
            raise told from None


def _pieces(chunks: Iterable[Buffer]) -> Iterator[bytes]:
    """The same bytes in pieces of _PIECE (the last may be shorter)."""
    held: list[Buffer] = []
    length = 0
    for chunk in chunks:
        held.append(chunk)
        length += len(chunk)
        if length >= _PIECE:
            joined = b"".join(held)
            whole = length - length % _PIECE
            for start in range(0, whole, _PIECE):
                yield joined[start : start + _PIECE]
            held, length = [joined[whole:]], length - whole
    if length:
        yield b"".join(held)


def _info(message: content_pb2.Info) -> ContentInfo:
    return ContentInfo(
        digests.parse(message.digest), message.size, dict(message.labels), time_from(message.created_at)
    )
