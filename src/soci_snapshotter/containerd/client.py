"""A client of containerd: the services that pulling, indexing and pushing need, over its unix socket."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from google.protobuf.empty_pb2 import Empty

from ..errors import Remote
from .calls import Caller, open_channel, socket_path
from .content import Content
from .diff import Diff
from .images import Images
from .leases import Leases
from .snapshots import Snapshots
from .stubs import introspection_pb2, introspection_pb2_grpc, version_pb2_grpc
from .types import Plugin

DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
DEFAULT_NAMESPACE = "default"


class ContainerdClient:
    """A context manager: the connection lives inside the `with`. Safe for threads, not across fork.

    Raises Remote on entry, naming the socket and what to check, when containerd cannot be reached. Every
    method of its services raises our errors, naming the object.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.address = socket_path(address)
        self.namespace = namespace
        self._caller: Caller | None = None

    def __enter__(self) -> ContainerdClient:
        self._caller = Caller(open_channel(self.address), self.address, self.namespace)
        return self

    def __exit__(self, *_: object) -> None:
        if self._caller is not None:
            self._caller.channel.close()
            self._caller = None

    @property
    def content(self) -> Content:
        """Blobs by digest."""
        return Content(self._connected())

    @property
    def images(self) -> Images:
        """Image records by name."""
        return Images(self._connected())

    @property
    def leases(self) -> Leases:
        """Leases; `lease()` is the usual way to have one."""
        return Leases(self._connected())

    @property
    def diff(self) -> Diff:
        """Unpacking layers."""
        return Diff(self._connected())

    def snapshots(self, snapshotter: str) -> Snapshots:
        """The snapshotter of that name."""
        return Snapshots(self._connected(), snapshotter)

    @contextlib.contextmanager
    def lease(self) -> Iterator[ContainerdClient]:
        """A client on the same connection; what it creates is kept at least until the `with` ends."""
        caller = self._connected()
        identity = self.leases.create()
        leased = ContainerdClient(self.address, self.namespace)
        leased._caller = dataclasses.replace(caller, lease=identity)
        try:
            yield leased
        finally:
            # A containerd that died must not hide the error that ended the block; the lease expires.
            with contextlib.suppress(Remote):
                self.leases.delete(identity)

    def keep_snapshot(self, snapshotter: str, key: str) -> None:
        """Put a snapshot that exists already under this client's lease; a no-op without one."""
        lease = self._connected().lease
        if lease is not None:
            self.leases.add_snapshot(lease, snapshotter, key)

    def version(self) -> str:
        """containerd's version as it says it, e.g. `1.6.20~ds1`."""
        caller = self._connected()
        stub = version_pb2_grpc.VersionStub(caller.channel)
        return caller.unary(stub.Version, Empty(), "version").version

    def snapshotter_plugins(self) -> list[Plugin]:
        """The snapshotters the running containerd knows; a proxied one exports its `address`."""
        caller = self._connected()
        stub = introspection_pb2_grpc.IntrospectionStub(caller.channel)
        request = introspection_pb2.PluginsRequest(filters=["type==io.containerd.snapshotter.v1"])
        answer = caller.unary(stub.Plugins, request, "plugins")
        return [
            Plugin(plugin.type, plugin.id, dict(plugin.exports), plugin.init_err.message)
            for plugin in answer.plugins
        ]

    def _connected(self) -> Caller:
        if self._caller is None:
            raise Remote(f"containerd at {self.address}: the client is closed")
        return self._caller
