"""Floor 6. The ten verbs of containerd's snapshots service as use cases; no gRPC, no HTTP."""
