"""The tree a container sees, from its layers' tables of contents: what each path is, and which layer holds it.

Layers are laid over each other as overlayfs does: the topmost wins, whiteouts and opaque directories hide what
is below, a directory over a directory merges. Within a layer the last entry of a path wins, and a hard link is
its target's data. What formats.tree would refuse is let pass or left out: such a layer is never lazy, and only
a lazy one has anything to prefetch.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from soci_snapshotter.formats.toc import Entry

MAX_LINKS: Final = 40
"""Symbolic links followed in one lookup: Linux's MAXSYMLINKS."""

MAX_PATH: Final = 4095
"""Bytes of a name or a link's target: PATH_MAX without its NUL. Ordinary unpacking makes no longer ones."""

MAX_IMPLICIT: Final = 1 << 18
"""Directories that no entry names. Builders name theirs; a hostile name of 4 KiB makes 2,000 of 232 bytes."""

_File: TypeAlias = "tuple[int, Entry]"
_Children: TypeAlias = "dict[bytes, _Children | _File]"


@dataclass(frozen=True, slots=True)
class Found:
    """What a path is. `path` has no symbolic links, no leading slash (b"" is the root); `layer` counts from the
    lowest, 0. A directory has neither layer nor entry: several layers may make it up.
    """

    path: bytes
    layer: int = -1
    entry: Entry | None = None

    @property
    def is_directory(self) -> bool:
        """True for a directory."""
        return self.entry is None

    @property
    def is_regular(self) -> bool:
        """True for a file that has data."""
        return self.entry is not None and self.entry.type == "reg"


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a path leads nowhere. `at`: what it came to, links followed; empty for a loop."""

    at: bytes
    loop: bool = False


class MergedTree:
    """The tree of all layers, lowest first; None stands for a layer whose contents are not known."""

    def __init__(self, layers: Sequence[Iterable[Entry] | None]) -> None:
        self._root: _Children = {}
        self._implicit = 0
        for number, entries in enumerate(layers):
            if entries is not None:
                self._apply(number, entries if isinstance(entries, (list, tuple)) else list(entries))

    def resolve(self, path: bytes) -> Found | Lost:
        """Follow `path` from the root as the kernel does: symbolic links too, `..` never above the root."""
        found, _ = self._resolve(path)
        return found

    def lookup(self, path: bytes) -> Found | None:
        """The same, None for what leads nowhere."""
        found, _ = self._resolve(path)
        return found if isinstance(found, Found) else None

    def walk(self, path: bytes = b"") -> Iterator[Found]:
        """Every entry that is no directory at or under `path`. Links met on the way are not followed."""
        found, children = self._resolve(path)
        if children is None:
            if isinstance(found, Found):
                yield found
            return
        assert isinstance(found, Found)  # noqa: S101 - children come with Found only
        stack = [(found.path, children)]
        while stack:
            at, children = stack.pop()
            for name, child in children.items():
                here = at + b"/" + name if at else name
                if isinstance(child, dict):
                    stack.append((here, child))
                else:
                    yield Found(here, *child)

    def glob(self, pattern: bytes) -> list[Found]:
        """What `pattern` matches, links followed, each once: `*`, `?`, `[a-z]`, `[!a-z]` within a name (names
        that begin with a dot too), `**` as a whole component for any number of directories. At the end `**`
        gives the directories before it, which stand for all that is under them.
        """
        level: dict[bytes, Found] = {b"": Found(b"")}
        parts = [part for part in pattern.split(b"/") if part not in (b"", b".")]
        everything = parts[-1:] == [b"**"]
        while parts[-1:] == [b"**"]:
            parts.pop()
        for part in parts:
            following: dict[bytes, Found] = {}
            for directory in level.values():
                for found in self._matches(directory, part):
                    following[found.path] = found
            level = following
        return [found for found in level.values() if found.is_directory or not everything]

    def _matches(self, directory: Found, part: bytes) -> Iterator[Found]:
        if not directory.is_directory:
            return
        if part == b"**":
            yield from self._directories(directory)
            return
        if not is_pattern(part):
            names: Iterable[bytes] = (part,)
        else:
            _, children = self._resolve(directory.path)
            part = part.replace(b"[^", b"[!")  # Go's and the shell's other way to say it
            names = [name for name in children or () if fnmatchcase(name, part)]
        for name in names:
            found = self.lookup(directory.path + b"/" + name)
            if found is not None:
                yield found

    def _directories(self, top: Found) -> Iterator[Found]:
        """`top` and all directories under it."""
        _, children = self._resolve(top.path)
        stack = [(top.path, children or {})]
        while stack:
            at, children = stack.pop()
            yield Found(at)
            for name, child in children.items():
                if isinstance(child, dict):
                    stack.append((at + b"/" + name if at else name, child))

    def _resolve(self, path: bytes) -> tuple[Found | Lost, _Children | None]:
        todo = path.split(b"/")[::-1]
        names: list[bytes] = []
        parents = [self._root]
        links = 0
        while todo:
            part = todo.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if names:
                    names.pop()
                    parents.pop()
                continue
            child = parents[-1].get(part)
            if isinstance(child, dict):
                names.append(part)
                parents.append(child)
                continue
            if child is None:
                return _lost(names, part, todo), None
            layer, entry = child
            if entry.type == "symlink":
                links += 1
                target = entry.linkname
                if links > MAX_LINKS:
                    return Lost(b"", loop=True), None
                if not target or len(target) > MAX_PATH:
                    return _lost(names, part, todo), None
                if target.startswith(b"/"):
                    names, parents = [], [self._root]
                todo += target.split(b"/")[::-1]
                continue
            if any(todo):  # a file is no directory; only slashes may follow it
                return _lost(names, part, todo), None
            return Found(b"/".join([*names, part]), layer, entry), None
        return Found(b"/".join(names)), parents[-1]

    def _apply(self, number: int, entries: Sequence[Entry]) -> None:
        for entry in entries:  # first: a whiteout hides what is below its layer, wherever it stands in it
            if b".wh." in entry.name:
                self._hide(_components(entry.name))
        heads = {b"": self._root}  # the directory that a name's part before its last slash means, as spelled
        for entry in entries:
            head, _, base = entry.name.rstrip(b"/").rpartition(b"/")
            children = heads.get(head)
            if children is None or base in (b"", b".", b".."):
                parts = _components(entry.name)
                if not parts:
                    continue
                base = parts.pop()
                directory = self._directory(number, parts)
                if directory is None:
                    continue
                children = directory
                if entry.name.rstrip(b"/").endswith(b"/" + base):
                    heads[head] = children
            if base.startswith(b".wh."):
                continue
            if entry.type == "dir":
                if not isinstance(children.get(base), dict):
                    children[base] = {}
                continue
            if isinstance(children.get(base), dict):
                heads = {b"": self._root}
            self._put(number, entry, children, base)

    def _put(self, number: int, entry: Entry, children: _Children, base: bytes) -> None:
        children.pop(base, None)  # first: a link to its own name, or into what it replaces, has no target
        if entry.type == "hardlink":
            target = self._own(number, _components(entry.linkname))
            if target is not None:
                children[base] = target
        elif entry.type != "char" or entry.devmajor or entry.devminor:  # device 0:0 is overlayfs's whiteout
            children[base] = (number, entry)

    def _own(self, number: int, parts: list[bytes]) -> _File | None:
        """The entry of layer `number` at this path, which leads through no link; None for a lower layer's."""
        where: _Children | _File | None = self._root
        for part in parts:
            where = where.get(part) if isinstance(where, dict) else None
        return where if isinstance(where, tuple) and where[0] == number else None

    def _directory(self, number: int, parts: list[bytes]) -> _Children | None:
        """The directory at this path, made if need be; it hides a lower layer's file or link. None where this
        layer's own link is in the way, or too many were made.
        """
        children = self._root
        for part in parts:
            child = children.get(part)
            if not isinstance(child, dict):
                if child is not None and child[0] == number and child[1].type == "symlink":
                    return None
                self._implicit += 1
                if self._implicit > MAX_IMPLICIT:
                    return None
                child = children[part] = {}
            children = child
        return children

    def _hide(self, parts: list[bytes]) -> None:
        """Act on a whiteout, given what is below its layer."""
        if not parts or not parts[-1].startswith(b".wh."):
            return
        where: _Children | _File | None = self._root
        for part in parts[:-1]:
            where = where.get(part) if isinstance(where, dict) else None
        if isinstance(where, dict):
            if parts[-1] == b".wh..wh..opq":
                where.clear()
            else:
                where.pop(parts[-1][4:], None)


def _lost(names: list[bytes], part: bytes, todo: list[bytes]) -> Lost:
    return Lost(b"/".join([*names, part, *filter(None, reversed(todo))]))


def is_pattern(path: bytes) -> bool:
    """True when `glob` would match anything but the literal path."""
    return any(special in path for special in (b"*", b"?", b"["))


def _components(path: bytes) -> list[bytes]:
    """A tar's name as unpacking cleans it: slashes and `.` dropped, `..` taking back what is before it.
    None for one too long to be unpacked.
    """
    parts: list[bytes] = []
    if len(path) > MAX_PATH:
        return parts
    for part in path.split(b"/"):
        if part == b"..":
            del parts[-1:]
        elif part not in (b"", b"."):
            parts.append(part)
    return parts
