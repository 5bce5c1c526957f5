"""idle-memory, memory-50: what all our processes hold together."""

import time
from collections.abc import Iterator
from pathlib import Path

from harness.treework import names_below, treework

from bench import bulk, layers
from bench.node import NO_BACKGROUND, OURS, Node, site
from bench.peers import Peer, peer
from bench.processes import pss_mb
from bench.result import Result, smaller_is_better

NAMES = ("idle-memory", "memory-50")

TARGET_MB = {"idle-memory": 80.0, "memory-50": 200.0}

_IDLE_S = 10
"""After the last work; a worker that builds images has ended by then, or counts."""

_LAYERS = 50

_READ_SHARE = 20
"""Of each layer's files a run reads one in so many, from each layer: 1.25 GB of 50 layers."""


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """PSS with an image pulled lazily and read; the peer is the limit itself, or the other snapshotter."""
    for name in names:
        if name == "idle-memory":
            blobs = [layers.many_files(smoke=smoke)]
        else:
            blobs = layers.fifty(3 if smoke else _LAYERS, smoke=smoke)
        yield _bench(name, blobs, peer(), 1 if smoke else 3)


def _bench(name: str, blobs: list[bulk.Blob], against: Peer, runs: int) -> Result:
    measured: list[dict[str, float]] = []
    with site() as place, place.far() as proxy:
        chain = place.image("bench/memory", blobs, against)
        with place.node({OURS: NO_BACKGROUND}, against) as node:
            node.pull(OURS, f"{proxy.host}/bench/memory:1")
            node.mount(OURS, chain, "memory")
            unread = _ours(node)
            trees = node.layers("memory")
            if against.lazy:
                node.pull(against.name, f"{proxy.host}/bench/memory-{against.name}:1")
                node.mount(against.name, chain, "memory-peer")
                trees += node.layers("memory-peer")
            peak = unread
            for number in range(runs):
                for tree in trees:
                    _read_part(tree, number)
                    peak = max(peak, _ours(node), key=lambda each: sum(each.values()))
                time.sleep(_IDLE_S if runs > 1 else 0)
                marks = [each for each in (against.root, against.socket) if each]
                other = sum(pss_mb([], marks).values()) if against.lazy else TARGET_MB[name]
                measured.append({"ours": sum(_ours(node).values()), "peer": other})
            notes: dict[str, float | str] = {key: round(value, 1) for key, value in _ours(node).items()}
    return smaller_is_better(
        against.named(name),
        f"PSS of daemon, keeper and workers together with {len(blobs)} lazy layers of "
        f"{blobs[0].files:,} files mounted, as more and more is read",
        "MB",
        measured,
        target=1.0,
        worst=True,
        notes={
            **notes,
            "before_any_read_mb": round(sum(unread.values()), 1),
            "peak_between_reads_mb": round(sum(peak.values()), 1),
            "peak_by_process": ", ".join(f"{name}: {value:.1f}" for name, value in peak.items()),
            "bytes_fetched": proxy.received,
        },
    )


def _read_part(tree: Path, number: int) -> None:
    names = names_below(tree).split(b"\0")[:-1]
    share = len(names) // _READ_SHARE
    part = names[number * share : (number + 1) * share]
    treework("read", tree, names=b"".join(name + b"\0" for name in part))


def _ours(node: Node) -> dict[str, float]:
    return pss_mb([node.daemons[OURS].pid], [node.base / OURS])
