"""walk, stat, read-*: a layer with all its bytes here, against the same tree unpacked; both under overlayfs.

One registry, one containerd, one peer, and a daemon of ours for each way of serving: lazily (EROFS over FUSE
over data.tar, what a container keeps that started before the layer was complete), complete- (EROFS over
data.tar), classic- (our FUSE filesystem), loop- (EROFS over a loop device). Every run takes all sides in turn,
from cold caches. Nothing comes from the registry meanwhile, or the bench fails.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.coldcache import drop_caches, filesystem_type
from harness.daemon import CONFIG
from harness.treework import names_below, treework

from bench import bulk, layers
from bench.node import OURS, Node, site
from bench.peers import Peer, peer
from bench.result import Result, Skipped, rotated, smaller_is_better
from soci_snapshotter.daemon import config as configs
from soci_snapshotter.errors import Config as ConfigError

_SETTLE_S, _COMPLETE_S = 120, 60
"""How long spans may still come after every file was read; how long the proof may take after that."""

_BACKGROUND = "[background_fetch]\nsilence_period_msec = 1000\n"
"""What no file needs, such as the tar's end, comes soon after the files."""

_RANDOM_READS = 4000


@dataclass(frozen=True)
class Work:
    """What is done to a tree: its words for a reader, and seconds of it below a root."""

    what: str
    on: str
    run: Callable[[Path, bytes], float]


WORKS = {
    "walk": Work("every name, by readdir(3)", "many", lambda root, _: treework("walk", root).seconds),
    "stat": Work("lstat of every entry", "many", lambda root, _: treework("stat", root).seconds),
    "read-small": Work(
        "every file, in order of names", "many", lambda root, names: treework("read", root, names=names).seconds
    ),
    "read-sequential": Work(
        "every library, from beginning to end", "libraries",
        lambda root, names: treework("read", root, names=names).seconds,
    ),
    "read-random": Work(
        f"{_RANDOM_READS} reads of 4 KiB at random places of all libraries", "libraries",
        lambda root, names: treework("random", root, _RANDOM_READS, names=names).seconds,
    ),
}  # fmt: skip

VARIANTS = {
    "": (OURS, ""),
    "complete-": (OURS, ""),
    "classic-": ("classic", 'mount_method = "classic"\n'),
    "loop-": ("loop", 'mount_method = "loop"\n'),
}
"""By prefix: the daemon, and its configuration beside what all have."""

TARGETS = {
    "walk": 1.8, "stat": 1.4, "read-small": 1.0, "read-sequential": 0.9, "read-random": 0.9,
    "complete-walk": 1.8, "complete-stat": 1.4, "complete-read-small": 0.9, "complete-read-sequential": 0.9,
    "complete-read-random": 0.9,
    "classic-walk": 0.25, "classic-stat": 0.25, "classic-read-small": 0.25,
    "loop-walk": 1.8, "loop-stat": 1.4, "loop-read-small": 0.9, "loop-read-sequential": 0.9,
}  # fmt: skip

NAMES = tuple(TARGETS)


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """The benches of `names`, first those on the many files, then those on the libraries."""
    against = peer()
    for tree, make in (("many", layers.many_files), ("libraries", layers.libraries)):
        chosen = [name for name in names if WORKS[_work(name)].on == tree]
        if chosen:
            yield from _tree(make(smoke=smoke), chosen, against, 1 if smoke else 5)


def _tree(blob: bulk.Blob, names: list[str], against: Peer, runs: int) -> Iterator[Result]:
    variants = [variant for variant in VARIANTS if any(_variant(name) == variant for name in names)]
    for variant in list(variants):
        if problem := _unsupported(VARIANTS[variant][1]):
            print(f"{' '.join(name for name in names if _variant(name) == variant)}: skipped: {problem}")
            variants.remove(variant)
    daemons = {VARIANTS[each][0]: VARIANTS[each][1] + CONFIG + _BACKGROUND for each in variants}
    if not daemons:
        return
    with site() as place, place.far() as proxy:
        chain = place.image("bench/tree", [blob], against)
        with place.node(daemons, against) as node:
            roots = {"peer": _peer(node, against, proxy.host, chain)}
            listed = names_below(roots["peer"])
            for name in daemons:
                node.pull(name, f"{proxy.host}/bench/tree:1")
                roots[name] = node.mount(name, chain, name)
            for root in roots.values():
                treework("read", root, names=listed)
            _settle(lambda: proxy.received)
            before = proxy.received
            sides = {each: roots[VARIANTS[each][0]] for each in variants if each != "complete-"}
            if "complete-" in variants:
                try:
                    sides["complete-"] = _complete(node, chain)
                except Skipped as why:
                    print(
                        f"{' '.join(name for name in names if _variant(name) == 'complete-')}: skipped: {why}"
                    )
            for work in dict.fromkeys(map(_work, names)):
                wanted = {each: root for each, root in sides.items() if each + work in names}
                yield from _results(work, wanted, roots["peer"], listed, runs, against, blob)
            if proxy.received != before:
                raise RuntimeError("bytes came from the registry: not all spans were present")


def _results(
    work: str, sides: dict[str, Path], other: Path, names: bytes, runs: int, against: Peer, blob: bulk.Blob
) -> Iterator[Result]:
    run = WORKS[work].run

    def cold(root: Path) -> float:
        drop_caches()
        return run(root, names)

    actions = {"peer": partial(cold, other)} | {side: partial(cold, root) for side, root in sides.items()}
    measured = rotated(actions, runs) if sides else []
    for side in sides:
        yield smaller_is_better(
            against.named(side + work),
            WORKS[work].what,
            "s",
            [{"ours": each[side], "peer": each["peer"]} for each in measured],
            target=TARGETS[side + work],
            notes={
                "files": blob.files,
                "tar_bytes": blob.tar_size,
                "filesystem": filesystem_type(other.parent),
                "peer": against.name,
            },
        )


def _peer(node: Node, against: Peer, host: str, chain: str) -> Path:
    repository = f"bench/tree-{against.name}" if against.lazy else "bench/tree"
    node.pull(against.name, f"{host}/{repository}:1")
    return node.mount(against.name, chain, "peer")


def _settle(received: Callable[[], int]) -> None:
    """Until nothing has come from the registry for some seconds."""
    deadline, since, last = time.monotonic() + _SETTLE_S, time.monotonic(), received()
    while time.monotonic() < min(deadline, since + 4):
        time.sleep(0.2)
        if received() != last:
            since, last = time.monotonic(), received()


def _complete(node: Node, chain: str) -> Path:
    """A mount of the layer as a container gets it that starts now, once its bytes are proven and mounted locally."""
    deadline = time.monotonic() + _COMPLETE_S
    records = list(node.daemons[OURS].root.glob("layers/*/*/layer.json"))
    while not all(_is_local(json.loads(record.read_bytes())) for record in records):
        if time.monotonic() > deadline:
            raise Skipped(f"no local mount of a complete layer {_COMPLETE_S} s after its last byte")
        time.sleep(0.2)
    root = node.mount(OURS, chain, "complete")
    if node.layers("complete") == node.layers(OURS):
        raise RuntimeError("a new container still gets the lazy mount")
    return root


def _is_local(record: dict[str, object]) -> bool:
    """Whether the layer's DiffID is known and a mount of its own file is shown (store.layerfiles.LayerRecord)."""
    return bool(record.get("diff_id") and record.get("local"))


def _unsupported(text: str) -> str:
    """Why this version cannot be configured so, or nothing."""
    try:
        _, warnings = configs.parse(text.encode(), "config.toml")
    except ConfigError as problem:
        return str(problem)
    return "; ".join(warnings)


def _work(name: str) -> str:
    return next(work for work in WORKS if name == _variant(name) + work)


def _variant(name: str) -> str:
    return next(prefix for prefix in reversed(VARIANTS) if name.startswith(prefix))
