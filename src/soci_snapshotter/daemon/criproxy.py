"""The CRI's ImageService on our socket: every call goes on to containerd, and the logins of pulls are kept in memory.

kubelet is told of it with `--image-service-endpoint`. Calls of any version and any method pass byte for byte, with
their headers, deadlines and statuses; only the requests PullImage and RemoveImage are read. Nothing is written to
disk: a restarted daemon learns a login with the next pull.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError

from soci_snapshotter.containerd.calls import socket_path
from soci_snapshotter.containerd.stubs import cri_images_pb2 as pb
from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import dockerconfig, reference
from soci_snapshotter.formats.dockerconfig import Login
from soci_snapshotter.formats.reference import Reference

_log = logging.getLogger(__name__)

# v1alpha2 (containerd before 1.6, kubelet before 1.26) has v1's messages, field by field.
_SERVICES = ("/runtime.v1.ImageService/", "/runtime.v1alpha2.ImageService/")
# kubelet's own limit of a message; containerd's is the same.
MAX_MESSAGE = 16 << 20
# A pull holds its thread until containerd is done, and containerd calls our snapshots service meanwhile: with threads
# of that service it could wait for itself. As many pulls as this at once; a node's kubelet does 1 by default.
_PULLS = 128
_OTHERS = 16
# Images on a node: kubelet's garbage collection keeps some hundred.
_IMAGES = 4096
# Logins of one image: pods of several owners may have it.
_LOGINS = 4
# After containerd's restart it is tried again this soon; gRPC's own patience grows to two minutes.
_RECONNECT_MS = 2000
# Nobody waits for a year.
_FOREVER = 365 * 86400.0
# Headers that belong to one connection, not to the call.
_OWN_HEADERS = frozenset({"user-agent", "content-type", "te"})

_Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class _Given:
    """A login with the server address it was given for, "" for the reference's own; `proven` by a pull."""

    login: Login
    server: str
    proven: bool = False

    def same(self, other: _Given) -> bool:
        """The same login for the same registry."""
        return (self.login, self.server) == (other.login, other.server)


@dataclass(frozen=True, slots=True)
class Pull:
    """A pull under way with a login."""

    reference: Reference
    given: _Given


@dataclass(slots=True)
class _Kept:
    """What is known of one image reference; newest login first. `identity` is what PullImage answered."""

    reference: Reference
    logins: tuple[_Given, ...] = ()
    identity: str = ""

    def add(self, given: _Given) -> None:
        """As the newest. Those that no pull has proven take no place from the others."""
        known = (given, *(each for each in self.logins if not each.same(given)))
        proven = [each for each in known if each.proven][:_LOGINS]
        others = [each for each in known if not each.proven][:_LOGINS]
        self.logins = tuple(each for each in known if each in (proven if each.proven else others))


class CriLogins:
    """The logins of pulls by image reference: a source of logins. Thread safe."""

    dropped: Callable[[Login, str], None] | None = None
    """Told of a login that is forgotten, and of the repository that it was for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: OrderedDict[str, _Kept] = OrderedDict()

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        """Those of images of this repository, the last pulled first, for the host they were given for."""
        del fresh
        with self._lock:
            found = [
                given.login
                for kept in reversed(self._images.values())
                if kept.reference.repository == repository
                for given in kept.logins
                if dockerconfig.same_registry(given.server or kept.reference.host, host)
            ]
        yield from dict.fromkeys(found)  # one may have been given under several names of a registry

    def pulling(self, request: bytes) -> Pull | None:
        """Keep the login of a PullImageRequest; what `failed` and `pulled` are told then. None if it has none."""
        try:
            message = pb.PullImageRequest.FromString(request)
            named = reference.parse(message.image.image)
        except (DecodeError, Invalid):
            return None  # containerd will say what is wrong with it
        login = _login(message.auth)
        if login is None:
            return None
        pull = Pull(named, _Given(login, message.auth.server_address))
        with self._lock:
            kept = self._images.get(str(named))
            before = () if kept is None else kept.logins
            self._add(pull, proven=any(each.proven for each in before if each.same(pull.given)))
        return pull

    def pulled(self, pull: Pull, answer: bytes) -> None:
        """The pull succeeded: the login is good, and the answer says by which identity the image may be removed."""
        try:
            identity = pb.PullImageResponse.FromString(answer).image_ref
        except DecodeError:
            identity = ""
        with self._lock:  # another pull with the same login may have failed meanwhile
            kept = self._add(pull, proven=True)
            kept.identity = identity or kept.identity

    def failed(self, pull: Pull) -> None:
        """The pull failed: perhaps the login is wrong; kubelet tries others it has. One that pulled the image before
        stays: the registry may have been away."""
        key = str(pull.reference)
        with self._lock:
            kept = self._images.get(key)
            if kept is not None:
                kept.logins = tuple(each for each in kept.logins if each.proven or not each.same(pull.given))
                if not kept.logins:
                    del self._images[key]

    def _add(self, pull: Pull, *, proven: bool) -> _Kept:
        """Under the lock."""
        key = str(pull.reference)
        kept = self._images.setdefault(key, _Kept(pull.reference))
        kept.add(replace(pull.given, proven=proven))
        self._images.move_to_end(key)
        if len(self._images) > _IMAGES:
            self._images.popitem(last=False)
        return kept

    def removed(self, request: bytes) -> None:
        """The image of a RemoveImageRequest is gone, named by a reference or by its identity, and its other names."""
        try:
            name = pb.RemoveImageRequest.FromString(request).image.image
        except DecodeError:
            return
        try:
            key = str(reference.parse(name))
        except Invalid:
            key = name  # an identity
        with self._lock:
            kept = self._images.get(key)
            gone = {name} if kept is None else {name, kept.identity}
            keys = [k for k, v in self._images.items() if k == key or (v.identity and v.identity in gone)]
            forgotten = [self._images.pop(each) for each in keys]
        if self.dropped is not None:
            for image in forgotten:
                for given in image.logins:
                    self.dropped(given.login, image.reference.repository)


def _login(auth: pb.AuthConfig) -> Login | None:
    """In containerd's order (its ParseAuth); registry tokens, which it leaves out, last."""
    if auth.username:
        return Login(auth.username, auth.password)
    if auth.identity_token:
        return Login("", auth.identity_token)
    pair = dockerconfig.decode_auth(auth.auth) if auth.auth else None
    if pair is not None and pair[0]:
        return Login(*pair)
    return Login("", auth.registry_token, registry_token=True) if auth.registry_token else None


class CriProxy(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Add it to a server of gRPC (add_generic_rpc_handlers). A context manager."""

    def __init__(self, address: str, logins: CriLogins) -> None:
        """`address`: containerd's socket. It need not be there yet; calls are UNAVAILABLE until it is."""
        self._logins = logins
        self._channel = grpc.insecure_channel(
            "unix:" + socket_path(address),
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS),
            ],
        )
        self._pulls = ThreadPoolExecutor(_PULLS, "cri-pull")
        self._others = ThreadPoolExecutor(_OTHERS, "cri")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()  # ends the calls under way
        self._pulls.shutdown()
        self._others.shutdown()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """A handler for calls of the ImageService, whatever they are. On the wire one message is a stream of one."""
        method = details.method
        if not method.startswith(_SERVICES):
            return None
        name = method.rpartition("/")[2]

        def forward(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._forward(method, name, requests, context)

        forward.experimental_thread_pool = self._pulls if name == "PullImage" else self._others  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(forward)

    def _forward(
        self, method: str, name: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        pull: Pull | None = None
        removal = b""
        if name in ("PullImage", "RemoveImage"):
            first = next(requests, None)
            if first is not None and name == "PullImage":
                pull = self._logins.pulling(first)
            removal = first or b""
            requests = iter(() if first is None else (first,))
        # Whoever subscribes here is called at once when the call is over already.
        call: Any = self._channel.stream_stream(method, None, None)(
            requests, timeout=_time_left(context), metadata=_headers(context)
        )
        if not context.add_callback(call.cancel):
            call.cancel()
        done = False
        try:
            answer = b""
            for answer in call:
                yield answer
            context.set_trailing_metadata(_pairs(call.trailing_metadata()))
            done = True
            if pull is not None:
                self._logins.pulled(pull, answer)
            elif name == "RemoveImage":
                self._logins.removed(removal)
        except grpc.RpcError:
            context.set_trailing_metadata(_pairs(call.trailing_metadata()))
            context.set_code(call.code())
            context.set_details(call.details() or "")
        finally:
            if not done and pull is not None:
                self._logins.failed(pull)


def _time_left(context: grpc.ServicerContext) -> float | None:
    """Seconds; None without a deadline, which gRPC gives as one in the far future."""
    left = context.time_remaining()
    return left if left is not None and left < _FOREVER else None


def _headers(context: grpc.ServicerContext) -> _Metadata:
    return tuple(
        (key, value)
        for key, value in _pairs(context.invocation_metadata())
        if key not in _OWN_HEADERS and not key.startswith(("grpc-", ":"))
    )


def _pairs(metadata: Iterable[Any] | None) -> _Metadata:
    return tuple((key, value) for key, value in metadata or ())
