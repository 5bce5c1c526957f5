"""Which layers are emptied for the quota: a playbook."""

from __future__ import annotations

from soci_snapshotter.policy.eviction import Idle, choose

OLD, MIDDLE, NEW = Idle("old", 1.0, 30), Idle("middle", 2.0, 30), Idle("new", 3.0, 30)


def test_nothing_below_the_quota_or_without_one() -> None:
    """No quota is no limit, and the quota itself is still allowed."""
    assert choose([OLD, NEW], used=10**15, quota=0) == []
    assert choose([OLD, NEW], used=100, quota=100) == []


def test_the_longest_unused_go_until_there_is_room() -> None:
    """Oldest first, whatever the order they come in, and no more than it takes to get clearly below."""
    assert choose([NEW, OLD, MIDDLE], used=101, quota=100) == ["old"]
    assert choose([NEW, OLD, MIDDLE], used=125, quota=100) == ["old", "middle"]
    assert choose([NEW, OLD, MIDDLE], used=500, quota=100) == ["old", "middle", "new"]


def test_empty_layers_are_not_chosen() -> None:
    """What has no bytes frees none."""
    assert choose([Idle("empty", 0.0, 0), NEW], used=101, quota=100) == ["new"]
