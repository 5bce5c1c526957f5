"""containerd's leases: what is created under one is kept from garbage collection until the lease goes."""

from __future__ import annotations

import datetime
import secrets

from ..errors import NotFound
from .calls import Caller
from .stubs import leases_pb2, leases_pb2_grpc

# When this program dies, its lease must go too. The value is containerd's own client's.
_EXPIRES_AFTER = datetime.timedelta(hours=24)
_EXPIRE_LABEL = "containerd.io/gc.expire"


class Leases:
    """The leases service. Safe for threads."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = leases_pb2_grpc.LeasesStub(caller.channel)

    def create(self) -> str:
        """Make a lease that ends by itself after 24 hours; return its id."""
        identity = f"soci-{secrets.token_hex(8)}"
        expires = datetime.datetime.now(datetime.UTC) + _EXPIRES_AFTER
        labels = {_EXPIRE_LABEL: expires.strftime("%Y-%m-%dT%H:%M:%SZ")}
        request = leases_pb2.CreateRequest(id=identity, labels=labels)
        return self._caller.unary(self._stub.Create, request, f"lease {identity}").lease.id

    def add_snapshot(self, identity: str, snapshotter: str, key: str) -> None:
        """Keep an existing snapshot as long as the lease; NotFound when there is no such lease."""
        resource = leases_pb2.Resource(id=key, type=f"snapshots/{snapshotter}")
        request = leases_pb2.AddResourceRequest(id=identity, resource=resource)
        self._caller.unary(self._stub.AddResource, request, f"lease {identity}")

    def delete(self, identity: str, *, collect: bool = False) -> None:
        """End a lease, if it is there; with `collect`, wait for the garbage collection that follows."""
        request = leases_pb2.DeleteRequest(id=identity, sync=collect)
        try:
            self._caller.unary(self._stub.Delete, request, f"lease {identity}")
        except NotFound:
            pass
