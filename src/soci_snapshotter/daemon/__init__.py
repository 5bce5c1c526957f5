"""Floor 7. soci-snapshotter-grpc: wiring, configuration, the gRPC edge, logs, restore."""
