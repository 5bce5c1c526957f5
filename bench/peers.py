"""Who we are measured against: overlayfs after a whole pull, or the snapshotter that the environment names.

BENCH_PEER_SOCKET   the socket it serves containerd's snapshots service on; it is running already
BENCH_PEER_NAME     what results call it; default "peer"
BENCH_PEER_CLI      a program with soci's `create` and `push`, for its own index; default: it reads ours
BENCH_PEER_ROOT     its --root, by which its processes are found; also given to the CLI
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

OVERLAYFS = "overlayfs"


@dataclass(frozen=True)
class Peer:
    """`name` is what containerd's configuration and the results call it; the rest is None for overlayfs."""

    name: str = OVERLAYFS
    socket: Path | None = None
    cli: str | None = None
    root: Path | None = None

    @property
    def lazy(self) -> bool:
        """Whether it is another lazy snapshotter, not containerd's own overlayfs."""
        return self.socket is not None

    def named(self, bench: str) -> str:
        """The result's name: another peer's results do not take the place of overlayfs's."""
        return f"{bench}-vs-{self.name}" if self.lazy else bench


def peer(environment: Mapping[str, str] = os.environ) -> Peer:
    """The peer of this run. RuntimeError for a name or socket that cannot be one."""
    socket = environment.get("BENCH_PEER_SOCKET")
    if not socket:
        return Peer()
    name = environment.get("BENCH_PEER_NAME", "peer")
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or name in {OVERLAYFS, "soci"}:
        raise RuntimeError(
            f"BENCH_PEER_NAME={name!r}: lower-case letters, digits and -, not overlayfs or soci"
        )
    if not Path(socket).is_socket():
        raise RuntimeError(f"BENCH_PEER_SOCKET={socket}: no socket; start the snapshotter first")
    root = environment.get("BENCH_PEER_ROOT")
    return Peer(name, Path(socket), environment.get("BENCH_PEER_CLI"), Path(root) if root else None)
