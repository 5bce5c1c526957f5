from collections.abc import Iterator

import grpc
from google.protobuf import empty_pb2

from soci_snapshotter.containerd.stubs import diff_pb2

class DiffStub:
    def __init__(self, channel: grpc.Channel) -> None: ...
    Apply: grpc.UnaryUnaryMultiCallable[diff_pb2.ApplyRequest, diff_pb2.ApplyResponse]
    Diff: grpc.UnaryUnaryMultiCallable[diff_pb2.DiffRequest, diff_pb2.DiffResponse]

class DiffServicer:
    def Apply(self, request: diff_pb2.ApplyRequest, context: grpc.ServicerContext) -> diff_pb2.ApplyResponse: ...
    def Diff(self, request: diff_pb2.DiffRequest, context: grpc.ServicerContext) -> diff_pb2.DiffResponse: ...

def add_DiffServicer_to_server(servicer: DiffServicer, server: grpc.Server) -> None: ...
