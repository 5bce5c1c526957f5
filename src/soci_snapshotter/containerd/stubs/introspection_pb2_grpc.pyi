from collections.abc import Iterator

import grpc
from google.protobuf import empty_pb2

from soci_snapshotter.containerd.stubs import introspection_pb2

class IntrospectionStub:
    def __init__(self, channel: grpc.Channel) -> None: ...
    Plugins: grpc.UnaryUnaryMultiCallable[introspection_pb2.PluginsRequest, introspection_pb2.PluginsResponse]
    Server: grpc.UnaryUnaryMultiCallable[empty_pb2.Empty, introspection_pb2.ServerResponse]

class IntrospectionServicer:
    def Plugins(self, request: introspection_pb2.PluginsRequest, context: grpc.ServicerContext) -> introspection_pb2.PluginsResponse: ...
    def Server(self, request: empty_pb2.Empty, context: grpc.ServicerContext) -> introspection_pb2.ServerResponse: ...

def add_IntrospectionServicer_to_server(servicer: IntrospectionServicer, server: grpc.Server) -> None: ...
