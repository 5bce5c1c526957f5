"""A snapshots service without lazy layers on a unix socket, for the conformance suite.

    python -m harness.snapshot_server ROOT SOCKET

Prints one line when it serves; SIGTERM ends it.
"""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc

from soci_snapshotter.containerd.stubs.snapshots_pb2_grpc import add_SnapshotsServicer_to_server
from soci_snapshotter.daemon.snapshots_service import SnapshotsService
from soci_snapshotter.snapshotter.directories import overlay_options
from soci_snapshotter.snapshotter.snapshotter import Snapshotter


def main() -> None:
    root, socket = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with (
        Snapshotter(os.fsencode(root), overlay_options=overlay_options()) as snapshotter,
        ThreadPoolExecutor(16) as pool,
    ):
        server = grpc.server(pool)
        add_SnapshotsServicer_to_server(SnapshotsService(snapshotter), server)
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        print("serving", flush=True)
        signal.sigwait({signal.SIGTERM})
        server.stop(grace=5).wait()


if __name__ == "__main__":
    main()
