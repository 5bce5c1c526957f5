"""cold-*, background-fill: bytes that are not here yet, from a registry 10 ms and 500 Mbit/s away.

One layer of 1.5 GB of libraries, 645 MB compressed; a fresh containerd and daemon for every run. There is neither a
prefetch artifact nor anything learned.
"""

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.coldcache import drop_caches
from harness.proxy import Proxy
from harness.treework import treework

from bench import layers
from bench.bulk import Blob
from bench.far import LINK, RATE, LazyLayer, plain_share, read_place
from bench.node import EAGER_BACKGROUND, NO_BACKGROUND, OURS, Node, Site, site
from bench.peers import Peer, peer
from bench.result import Result, Skipped, smaller_is_better

NAMES = ("cold-sequential", "cold-random", "cold-random-background", "background-fill")

LEAST_SHARE = 0.8
"""Of the link's rate, for sequential reads and for the background fetch."""

_ROUND_TRIPS, _SLOWER = 3, 1.5
"""What a read may wait beside its span's transfer; how much slower its median may be beside the background fetch."""

_READS, _PAUSE_S = 25, 0.15
"""Reads of one run, and what lies between them: no read-ahead of one is in the way of the next."""

_BACKGROUND_S = 120
"""After that time the background fetch is not running at all, or not ending."""


@dataclass(frozen=True)
class _Rig:
    place: Site
    proxy: Proxy
    blob: Blob
    chain: str
    against: Peer
    share: float

    def mounted(self, node: Node, snapshotter: str) -> Path:
        suffix = "" if snapshotter == OURS else f"-{snapshotter}"
        node.pull(snapshotter, f"{self.proxy.host}/bench/libraries{suffix}:1")
        drop_caches()
        return node.mount(snapshotter, self.chain, f"cold-{snapshotter}")


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """The benches of `names`; against another lazy peer only those that can be asked of it."""
    blob, against = layers.libraries(smoke=smoke), peer()
    with site() as place, place.far(LINK) as proxy:
        chain = place.image("bench/libraries", [blob], against)
        rig = _Rig(place, proxy, blob, chain, against, plain_share(proxy, "bench/libraries", blob))
        for name in names:
            bench = {"cold-sequential": _sequential, "background-fill": _fill, "cold-random": _random}.get(
                name, _beside_background
            )
            try:
                yield bench(rig, 1 if smoke else 3)
            except Skipped as why:
                print(f"{name}: skipped: {why}", flush=True)


def _sequential(rig: _Rig, runs: int) -> Result:
    measured = []
    for _ in range(runs):
        with rig.place.node({OURS: NO_BACKGROUND}, rig.against) as node:
            seconds, received = _read_large(rig, rig.mounted(node, OURS))
            other = received / RATE
            if rig.against.lazy:
                other, _ = _read_large(rig, rig.mounted(node, rig.against.name))
            measured.append({"ours": seconds, "peer": other})
    return _result(
        rig, "cold-sequential", "first read of 256 MiB; peer is the link's time for the bytes that came",
        measured, LEAST_SHARE,
    )  # fmt: skip


def _read_large(rig: _Rig, root: Path) -> tuple[float, int]:
    before = rig.proxy.received
    work = treework("read", root, names=layers.LARGE_FILE.encode() + b"\0")
    return work.seconds, rig.proxy.received - before


def _random(rig: _Rig, runs: int) -> Result:
    measured, over = [], []
    for _ in range(runs):
        with rig.place.node({OURS: NO_BACKGROUND}, rig.against) as node:
            root = rig.mounted(node, OURS)
            took, allowed = _reads(LazyLayer(node, rig.blob), root)
            other = statistics.median(allowed)
            over += [one / most for one, most in zip(took, allowed, strict=True)]
            if rig.against.lazy:
                other_root = rig.mounted(node, rig.against.name)
                other = statistics.median(_reads(LazyLayer(node, rig.blob), other_root, marks=False)[0])
            measured.append({"ours": statistics.median(took), "peer": other})
    return _result(
        rig, "cold-random",
        "median of 4 KiB reads of absent spans; peer is the span's transfer and 3 round trips",
        measured, 1.0, {"share_within": round(sum(each <= 1 for each in over) / len(over), 3)},
    )  # fmt: skip


def _beside_background(rig: _Rig, runs: int) -> Result:
    if rig.against.lazy:
        raise Skipped("another snapshotter's background fetch cannot be asked to begin now")
    measured = []
    for _ in range(runs):
        with rig.place.node({OURS: NO_BACKGROUND}) as node:
            root = rig.mounted(node, OURS)
            quiet, _ = _reads(LazyLayer(node, rig.blob), root)
        with rig.place.node({OURS: EAGER_BACKGROUND}) as node:
            root = rig.mounted(node, OURS)
            layer = LazyLayer(node, rig.blob)
            _wait_for_background(rig, layer)
            before, began = layer.fetched, time.monotonic()
            busy, _ = _reads(layer, root)
            share = (layer.fetched - before) / (time.monotonic() - began) / RATE
            measured.append(
                {"ours": statistics.median(busy), "peer": statistics.median(quiet), "share": share}
            )
    return _result(
        rig, "cold-random-background",
        "median of 4 KiB reads of absent spans while the background fetch runs; peer is without it",
        [{"ours": each["ours"], "peer": each["peer"]} for each in measured],
        round(1 / _SLOWER, 3), {"link_share": round(statistics.median(each["share"] for each in measured), 3)},
    )  # fmt: skip


def _reads(layer: LazyLayer, root: Path, *, marks: bool = True) -> tuple[list[float], list[float]]:
    """Seconds of reads of absent spans, and what each may take; in no order, and no two of neighbours."""
    places = [each for each in layer.places() if each.span % 3 == 1]
    random.Random(1).shuffle(places)
    took: list[float] = []
    allowed: list[float] = []
    for place in places:
        if len(took) == _READS:
            break
        if marks and layer.present[place.span]:
            continue
        took.append(read_place(root, place))
        allowed.append(place.compressed / RATE + _ROUND_TRIPS * LINK.round_trip)
        time.sleep(_PAUSE_S)
    if not took:
        raise Skipped("no span was absent any more")
    return took, allowed


def _wait_for_background(rig: _Rig, layer: LazyLayer) -> None:
    """Until some spans are here that nobody read."""
    deadline, before = time.monotonic() + _BACKGROUND_S / 8, layer.fetched
    while layer.fetched <= before + rig.blob.size // 100:
        if time.monotonic() > deadline:
            raise Skipped("no background fetch was seen")
        time.sleep(0.01)


def _fill(rig: _Rig, runs: int) -> Result:
    if rig.against.lazy:
        raise Skipped("another snapshotter's background fetch cannot be asked to begin now")
    measured = []
    for _ in range(runs):
        with rig.place.node({OURS: EAGER_BACKGROUND}) as node:
            rig.mounted(node, OURS)
            layer = LazyLayer(node, rig.blob)
            _wait_for_background(rig, layer)
            began, first, deadline = time.monotonic(), rig.proxy.received, time.monotonic() + _BACKGROUND_S
            while not all(layer.present) and time.monotonic() < deadline:
                time.sleep(0.01)
            if not all(layer.present):
                raise Skipped(f"the background fetch did not end in {_BACKGROUND_S} s")
            took = time.monotonic() - began
            measured.append({"ours": took, "peer": (rig.proxy.received - first) / RATE})
    return _result(
        rig, "background-fill",
        "from the first span in the background to the last; peer is the link's time for the bytes that came",
        measured, LEAST_SHARE,
    )  # fmt: skip


def _result(
    rig: _Rig, name: str, what: str, runs: list[dict[str, float]], target: float,
    notes: dict[str, float | str] | None = None,
) -> Result:  # fmt: skip
    link: dict[str, float | str] = {"link": "10ms,500mbit", "plain_download_share": rig.share}
    if rig.against.lazy:
        what, target = what.partition(";")[0], 1.0
    return smaller_is_better(
        rig.against.named(name), what, "s", runs, target=target, notes=link | (notes or {})
    )
