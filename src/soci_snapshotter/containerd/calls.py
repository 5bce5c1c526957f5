"""The plumbing of every call to containerd: the channel, the headers, and gRPC's errors turned into ours."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from ..errors import AlreadyExists, Integrity, Invalid, NotFound, Precondition, Remote, SociError, Unsupported

# Headers by which containerd knows whom a call is for (containerd api/services, pkg/namespaces and leases).
_NAMESPACE = "containerd-namespace"
_LEASE = "containerd-lease"

# containerd's own client and server allow 16 MiB; its content reads come in pieces of 1 MiB.
_MAX_MESSAGE = 16 << 20

# A metadata call takes milliseconds, but may wait for garbage collection, which holds containerd's database.
CALL_TIMEOUT_S = 60.0
# Unpacking a layer of many GB onto a slow disk, or a snapshotter that fetches a whole layer in Prepare. The
# bound is there so that a hung containerd ends in an error at last.
LONG_CALL_TIMEOUT_S = 3600.0

_ERRORS: dict[grpc.StatusCode, type[SociError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.OUT_OF_RANGE: Invalid,
    grpc.StatusCode.FAILED_PRECONDITION: Precondition,
    grpc.StatusCode.DATA_LOSS: Integrity,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
}

# How gRPC begins the details when the socket is gone or closed; the rest is about its own innards.
_NO_CONNECTION = ("failed to connect to all addresses", "Socket closed", "recvmsg:")

_Answer = TypeVar("_Answer")


def socket_path(address: str) -> str:
    """The path in an address as containerd's tools write it: a path, or unix:// and a path."""
    return address.removeprefix("unix://")


def open_channel(address: str) -> grpc.Channel:
    """Connect to the socket. Raises Remote naming the address, what is wrong and what to check."""
    path = socket_path(address)
    # gRPC would say only "failed to connect to all addresses"; connect(2) knows why.
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(10)
        try:
            probe.connect(path)
        except OSError as error:
            raise Remote(_unreachable(path, error)) from None
    options = [
        ("grpc.max_receive_message_length", _MAX_MESSAGE),
        ("grpc.max_send_message_length", _MAX_MESSAGE),
        ("grpc.enable_http_proxy", 0),
    ]
    return grpc.insecure_channel("unix:" + os.path.abspath(path), options=options)


@dataclass(frozen=True, slots=True)
class Caller:
    """A channel, with the headers that go with every call on it."""

    channel: grpc.Channel
    address: str
    namespace: str
    lease: str | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The headers: the namespace, and the lease that what is created belongs to."""
        headers = ((_NAMESPACE, self.namespace),)
        return headers if self.lease is None else (*headers, (_LEASE, self.lease))

    def unary(
        self,
        method: Callable[..., _Answer],
        request: object,
        what: str,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> _Answer:
        """Call `method`; an error's message begins with `what`, which names the object ("image x")."""
        try:
            return method(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.RpcError as error:
            raise self.translate(error, what) from None

    def stream(self, method: Callable[..., Any], request: object, what: str) -> Iterator[Any]:
        """Call `method` and yield its answers; the call is cancelled when the caller stops early."""
        call = method(request, timeout=LONG_CALL_TIMEOUT_S, metadata=self.metadata)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.translate(error, what) from None
        finally:
            call.cancel()

    def translate(self, error: grpc.RpcError, what: str) -> SociError:
        """Our error for one of gRPC's, naming the object and what containerd said of it."""
        code, details = _status(error)
        kind = _ERRORS.get(code, Remote)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Remote(
                f"{what}: containerd at {self.address} did not answer in time: check its log and disk"
            )
        if details.startswith(_NO_CONNECTION):
            return Remote(f"{what}: containerd at {self.address} does not answer; check that it runs")
        if kind is Remote:
            return Remote(f"{what}: containerd at {self.address}: {details or code.name}")
        return kind(f"{what}: {details}")


def _status(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    # Every error a channel raises is also a grpc.Call; the base class alone does not say so.
    if isinstance(error, grpc.Call):
        return error.code(), (error.details() or "").strip()
    return grpc.StatusCode.UNKNOWN, str(error)


def _unreachable(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        why = "there is no such socket; check that containerd runs, and --address (CONTAINERD_ADDRESS)"
    elif error.errno in (errno.EACCES, errno.EPERM):
        why = "permission denied; run as root, or as a user who may open the socket"
    elif error.errno == errno.ECONNREFUSED:
        why = "nobody listens there; check that containerd runs (systemctl status containerd)"
    else:
        why = f"{error.strerror or error}; check --address (CONTAINERD_ADDRESS)"
    return f"containerd at {path}: {why}"
