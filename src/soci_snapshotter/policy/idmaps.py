"""Id mappings of a user namespace, as containerd's labels uidmapping and gidmapping say them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import Invalid
from .prepare import GID_MAPPING, UID_MAPPING

_RANGE = re.compile(r"([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,10})", re.ASCII)
_IDS = (1 << 32) - 1  # the last id means none (user_namespaces(7))
_MOST_RANGES = 340  # what the kernel takes in one map (user_namespaces(7))


@dataclass(frozen=True, slots=True)
class Range:
    """`size` ids: those from `inside` on in the container are those from `outside` on out here."""

    inside: int
    outside: int
    size: int


@dataclass(frozen=True, slots=True)
class IdMap:
    """The mapping of one snapshot. Ids that no range names have no owner inside."""

    users: tuple[Range, ...]
    groups: tuple[Range, ...]

    @property
    def root(self) -> tuple[int, int]:
        """User and group, out here, of the container's root."""
        return _outside(self.users, 0) or 0, _outside(self.groups, 0) or 0

    def owner(self, user: int, group: int) -> tuple[int, int]:
        """Who owns out here what `user` and `group` own in the container; its root where they are not mapped."""
        root_user, root_group = self.root
        mapped_user, mapped_group = _outside(self.users, user), _outside(self.groups, group)
        return (
            root_user if mapped_user is None else mapped_user,
            root_group if mapped_group is None else mapped_group,
        )


def lines(ranges: Sequence[Range]) -> bytes:
    """The text for /proc/<pid>/uid_map (user_namespaces(7))."""
    return b"".join(b"%d %d %d\n" % (each.inside, each.outside, each.size) for each in ranges)


def id_map(labels: Mapping[str, str]) -> IdMap | None:
    """The mapping that the labels ask for; None without both labels' text.

    Raises Invalid naming the label: one of the two alone, what is no mapping, ranges that overlap, no root in it.
    """
    users, groups = labels.get(UID_MAPPING, ""), labels.get(GID_MAPPING, "")
    if not users and not groups:
        return None
    return IdMap(_ranges(UID_MAPPING, users), _ranges(GID_MAPPING, groups))


def _ranges(label: str, text: str) -> tuple[Range, ...]:
    if not text:
        raise Invalid(f"label {label} is missing: user and group ids are mapped together")
    found = []
    for part in text.split(",", _MOST_RANGES):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise Invalid(f"label {label}: {part[:80]!r} is not <inside>:<outside>:<size>")
        each = Range(*(int(number) for number in match.groups()))
        if not each.size or max(each.inside, each.outside) + each.size > _IDS:
            raise Invalid(f"label {label}: {part[:80]!r} maps no ids, or ids beyond 32 bits")
        found.append(each)
    for side in ("inside", "outside"):
        ends = sorted((getattr(each, side), getattr(each, side) + each.size) for each in found)
        if any(end > following for (_, end), (following, _) in pairwise(ends)):
            raise Invalid(f"label {label}: ranges overlap {side}")
    if _outside(found, 0) is None:
        raise Invalid(f"label {label}: the container's root, id 0, is not mapped")
    return tuple(found)


def _outside(ranges: Sequence[Range], number: int) -> int | None:
    for each in ranges:
        if each.inside <= number < each.inside + each.size:
            return each.outside + number - each.inside
    return None
