"""The versions of containerd as test parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from harness import containerds
from harness.containerdrig import containerd_rig
from harness.containerds import RELEASES, Unavailable
from harness.daemon import CONFIG
from harness.lazyrig import Rig

# A test says when bytes come: the daemon fetches none by itself.
QUIET = CONFIG + "[background_fetch]\ndisable = true\n"
# A version built from source takes its time, once.
_BUILT = [each.name for each in RELEASES.values() if each.module]


def versions(*quick: str, only: tuple[str, ...] = tuple(RELEASES)) -> list[object]:
    """All versions, or `only` some; those that are not `quick` run in make test-full alone."""
    return [
        pytest.param(
            name,
            marks=[
                *([] if name in quick else [pytest.mark.slow]),
                pytest.mark.timeout(1800 if name in _BUILT else 420),
            ],
        )
        for name in only
    ]


@contextmanager
def node(name: str, *, config: str = QUIET, text: str = "", extra: str = "") -> Iterator[Rig]:
    """A node with this version; the test is skipped, with the reason, where it cannot be had."""
    try:
        bin_dir = containerds.binaries(name)
    except Unavailable as error:
        pytest.skip(str(error))
    with containerd_rig(RELEASES[name].major, bin_dir, config=config, text=text, extra=extra) as rig:
        yield rig
