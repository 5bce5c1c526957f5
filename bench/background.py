"""cold-random-background, background-fill: the background fetch, beside demand reads and alone.

Another snapshotter's background fetch cannot be asked to begin now, so that these are ours alone.
"""

import statistics
import time
from collections.abc import Iterator

from bench.coldrig import LEAST_SHARE, Rig, far_libraries, reads, result
from bench.far import RATE, LazyLayer
from bench.node import EAGER_BACKGROUND, NO_BACKGROUND, OURS
from bench.peers import peer
from bench.result import Result, Skipped

NAMES = ("cold-random-background", "background-fill")

_SLOWER = 1.5
"""How much slower a read's median may be beside the background fetch."""

_BACKGROUND_S = 120
"""After that time the background fetch is not running at all, or not ending."""


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """The benches of `names`, over one rig."""
    if peer().lazy:
        raise Skipped("another snapshotter's background fetch cannot be asked to begin now")
    with far_libraries(smoke=smoke) as rig:
        for name in names:
            yield (_fill if name == "background-fill" else _beside)(rig, 1 if smoke else 3)


def _beside(rig: Rig, runs: int) -> Result:
    measured = []
    for _ in range(runs):
        with rig.place.node({OURS: NO_BACKGROUND}) as node:
            root = rig.mounted(node, OURS)
            quiet, _ = reads(LazyLayer(node, rig.blob), root)
        with rig.place.node({OURS: EAGER_BACKGROUND}) as node:
            root = rig.mounted(node, OURS)
            layer = LazyLayer(node, rig.blob)
            _wait_for_background(rig, layer)
            before, began = layer.fetched, time.monotonic()
            busy, _ = reads(layer, root)
            share = (layer.fetched - before) / (time.monotonic() - began) / RATE
            measured.append(
                {"ours": statistics.median(busy), "peer": statistics.median(quiet), "share": share}
            )
    return result(
        rig, "cold-random-background",
        "median of 4 KiB reads of absent spans while the background fetch runs; peer is without it",
        [{"ours": each["ours"], "peer": each["peer"]} for each in measured],
        round(1 / _SLOWER, 3), {"link_share": round(statistics.median(each["share"] for each in measured), 3)},
    )  # fmt: skip


def _wait_for_background(rig: Rig, layer: LazyLayer) -> None:
    """Until some spans are here that nobody read."""
    deadline, before = time.monotonic() + _BACKGROUND_S / 8, layer.fetched
    while layer.fetched <= before + rig.blob.size // 100:
        if time.monotonic() > deadline:
            raise Skipped("no background fetch was seen")
        time.sleep(0.01)


def _fill(rig: Rig, runs: int) -> Result:
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
    return result(
        rig, "background-fill",
        "from the first span in the background to the last; peer is the link's time for the bytes that came",
        measured, LEAST_SHARE,
    )  # fmt: skip
