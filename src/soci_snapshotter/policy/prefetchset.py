"""Which spans hold the files somebody wants at hand when a container starts: paths to spans, by layer.

Exact: a span is listed when it holds a byte of a wanted file, and only then. (The Go tool lists the span of
the byte after the file as well, compares names as spelled in the tar and follows no link.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from soci_snapshotter.formats.prefetch import SpanRange, normalize
from soci_snapshotter.policy.mergedtree import MAX_LINKS, Found, Lost, MergedTree, is_pattern

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from soci_snapshotter.formats.digest import Digest
    from soci_snapshotter.formats.toc import Entry
    from soci_snapshotter.formats.zinfo import SpanTable


@dataclass(frozen=True, slots=True)
class LayerContents:
    """One layer. `entries`: its tar's members in order, None when nobody read them. `spans`: None without a
    ztoc, and then the layer is fetched whole anyway.
    """

    digest: Digest
    entries: Sequence[Entry] | None
    spans: SpanTable | None


class Wanted(NamedTuple):
    """A path, or a glob of MergedTree.glob; absolute, relative to the root or `./`, all the same.

    Everything under a directory is meant by it. The lowest priority is fetched first.
    """

    path: bytes
    priority: int = 0


@dataclass(frozen=True, slots=True)
class PrefetchPlan:
    """`spans`: what formats.prefetch.encode takes, by layer, lowest first; no layer without any.

    `files` with data were found in them, of `size` bytes together, each counted once. `warnings`: one line each.
    """

    spans: Mapping[Digest, tuple[SpanRange, ...]]
    warnings: tuple[str, ...]
    files: int
    size: int


@dataclass(slots=True)
class _Collected:
    """Ranges by layer, and the files they are of (layer and offset: hard links are one)."""

    layers: Sequence[LayerContents]
    ranges: dict[int, list[SpanRange]] = field(default_factory=dict)
    files: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, found: Found, priority: int) -> bool:
        """False when the file's layer has no ztoc. What has no data needs no span."""
        entry = found.entry
        if entry is None or entry.type != "reg" or entry.size <= 0:
            return True
        spans = self.layers[found.layer].spans
        if spans is None:
            return False
        needed = spans.spans_for(entry.offset, entry.size)
        if needed:
            self.files[found.layer, entry.offset] = entry.size
            self.ranges.setdefault(found.layer, []).append(SpanRange(needed[0], needed[-1], priority))
        return True


def merged(layers: Sequence[LayerContents]) -> MergedTree:
    """The tree of these layers, lowest first."""
    return MergedTree([layer.entries for layer in layers])


def plan(
    layers: Sequence[LayerContents], wanted: Iterable[Wanted], tree: MergedTree | None = None
) -> PrefetchPlan:
    """The spans of the files that `wanted` means in the image of these layers, lowest first.

    `tree`: what `merged(layers)` gave, if the caller has it. A path that leads nowhere, or only into layers
    without a ztoc, is a warning.
    """
    tree = merged(layers) if tree is None else tree
    collected = _Collected(layers)
    warnings: dict[str, None] = {}
    for path, priority in wanted:
        for warning in _collect(tree, path, priority, collected):
            warnings.setdefault(warning)
    spans: dict[Digest, tuple[SpanRange, ...]] = {}
    for number in sorted(collected.ranges):  # a layer that the image repeats has one artifact
        digest = layers[number].digest
        spans[digest] = normalize([*spans.get(digest, ()), *collected.ranges[number]])
    return PrefetchPlan(spans, tuple(warnings), len(collected.files), sum(collected.files.values()))


def _collect(tree: MergedTree, path: bytes, priority: int, collected: _Collected) -> Iterator[str]:
    """Add what `path` means to `collected`; what cannot be had, as warnings."""
    top = tree.resolve(path)
    if isinstance(top, Found):  # a file may be named `[id].js`, so the literal name goes first
        matches = [top]
    elif is_pattern(path):
        matches = tree.glob(path)
        if not matches:
            yield f"{shown(path)}: matches nothing, in {_layers(collected)}"
    else:
        matches = []
        yield _why(path, top, _layers(collected))
    outside: dict[int, list[Found]] = {}
    for match in matches:
        for found in tree.walk(match.path):
            if not collected.add(found, priority):
                outside.setdefault(found.layer, []).append(found)
    for number, files in outside.items():
        what = shown(files[0].path) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        digest = collected.layers[number].digest
        yield f"{shown(path)}: not prefetched, in layer {digest}, which has no ztoc: {what}"


def _why(path: bytes, lost: Lost, layers: str) -> str:
    if lost.loop:
        return f"{shown(path)}: a loop of symbolic links, or more than {MAX_LINKS} of them"
    if shown(lost.at) == shown(path):
        return f"{shown(path)}: in {layers}"
    return f"{shown(path)}: leads to {shown(lost.at)}, in {layers}"


def _layers(collected: _Collected) -> str:
    unread = sum(layer.entries is None for layer in collected.layers)
    return f"no layer whose contents are known ({unread} have no ztoc)" if unread else "no layer"


def shown(path: bytes) -> str:
    """A path for one line of text: absolute, `.` and doubled slashes dropped, odd bytes escaped."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    text = "/" + b"/".join(parts).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:200])
