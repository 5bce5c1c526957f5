"""How the FUSE connection outlives this process: the keeper has it, and the service manager's descriptor store."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from soci_snapshotter.daemon.systemd import DescriptorStore, Inherited
from soci_snapshotter.linux.fusedev import Connection
from soci_snapshotter.serve import keeper_client
from soci_snapshotter.serve.keeper import DEADLINE

_log = logging.getLogger(__name__)


def _nothing() -> None:
    pass


class Survival:
    """One start of the daemon: acquire() first; then let_go(), or end() for a stop that unmounts.

    `deadline`: seconds that readers wait for a daemon. `on_abort()` is called, on a FUSE thread, when the connection
    was aborted while this daemon served it.
    """

    def __init__(
        self,
        found: Inherited | None = None,
        *,
        deadline: float = DEADLINE,
        on_abort: Callable[[], None] = _nothing,
    ) -> None:
        self._found = found or Inherited()
        self._store = DescriptorStore(self._found)
        self._deadline = deadline
        self.on_abort = on_abort
        self._connection: Connection | None = None
        self._watch: keeper_client.Watch | None = None
        self._run_dir = Path()

    def acquire(self, run_dir: Path) -> Connection:
        """The connection, see keeper_client.acquire; stored and watched over from now on."""
        stored = self._found.stored
        connection = keeper_client.acquire(run_dir, deadline=self._deadline, stored=stored)
        if connection is stored:
            _log.warning("the keeper was gone: the FUSE connection comes from systemd's descriptor store")
        elif stored is not None:
            stored.close()
        _log.info("FUSE connection", extra={"fresh": connection.fresh, "device": connection.device})
        self._store.keep(connection)
        self._run_dir, self._connection = run_dir, connection
        self._watch = keeper_client.Watch(run_dir, connection, self._deadline)
        self._watch.__enter__()
        return connection

    def let_go(self) -> None:
        """Close our descriptors; whoever else has them keeps the connection for the next daemon."""
        if self._watch is not None:
            self._watch.close()
        if self._connection is not None:
            self._connection.close()

    def end(self) -> None:
        """Nobody is to have the connection after this process: it ends with it."""
        if self._watch is not None:
            self._watch.close()
        self._store.forget()
        keeper_client.stop(self._run_dir)
