from collections.abc import Iterator

import grpc
from google.protobuf import empty_pb2

from soci_snapshotter.containerd.stubs import version_pb2

class VersionStub:
    def __init__(self, channel: grpc.Channel) -> None: ...
    Version: grpc.UnaryUnaryMultiCallable[empty_pb2.Empty, version_pb2.VersionResponse]

class VersionServicer:
    def Version(self, request: empty_pb2.Empty, context: grpc.ServicerContext) -> version_pb2.VersionResponse: ...

def add_VersionServicer_to_server(servicer: VersionServicer, server: grpc.Server) -> None: ...
