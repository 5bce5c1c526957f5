"""The soak's verdict: what counts as growth."""

from dataclasses import replace

import pytest
from harness.soak import Note, grown

FLAT = Note(40_000, 3_400, 23, 8, 0, 0, 0, 2_500)


def test_what_is_flat() -> None:
    """Noise is no growth: a little memory more, a file of rows that found its size, one odd note among many."""
    noisy = [FLAT, replace(FLAT, daemon_kb=45_000), replace(FLAT, disk_kb=5_000)] * 3
    assert grown(noisy) == []
    assert grown([*noisy, replace(FLAT, daemon_fds=99, mounts=9)]) == []
    assert grown([replace(FLAT, mounts=4), FLAT, FLAT]) == []


@pytest.mark.parametrize("name", ["keeper_fds", "mounts", "layers", "snapshots"])
def test_what_is_counted_may_not_grow(name: str) -> None:
    """One descriptor, mount or directory more at each rest is named."""
    notes = [replace(FLAT, **{name: getattr(FLAT, name) + n}) for n in range(9)]
    assert grown(notes) == [f"{name} grew from {getattr(FLAT, name) + 1} to {getattr(FLAT, name) + 7}"]


def test_memory_and_disk_that_grow() -> None:
    """More than a part and an amount is growth."""
    notes = [
        replace(FLAT, daemon_kb=40_000 + 3_000 * n, disk_kb=2_500 + 1_000 * n, daemon_fds=23 + 3 * n)
        for n in range(9)
    ]
    assert [text.split()[0] for text in grown(notes)] == ["daemon_kb", "daemon_fds", "disk_kb"]
