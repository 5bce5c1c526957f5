"""cold-sequential, cold-random: bytes that are not here yet, the background fetch off."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from harness.treework import treework

from bench import layers
from bench.coldrig import LEAST_SHARE, REPOSITORY, ROUND_TRIPS, Rig, far_libraries, reads, result
from bench.far import LINK, RATE, LazyLayer, plain_ranges
from bench.node import NO_BACKGROUND, OURS
from bench.result import Result

NAMES = ("cold-sequential", "cold-random")


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """The benches of `names`, over one rig."""
    with far_libraries(smoke=smoke) as rig:
        for name in names:
            yield (_sequential if name == "cold-sequential" else _random)(rig, 1 if smoke else 3)


def _sequential(rig: Rig, runs: int) -> Result:
    measured = []
    for _ in range(runs):
        with rig.place.node({OURS: NO_BACKGROUND}, rig.against) as node:
            seconds, received = _read_large(rig, rig.mounted(node, OURS))
            other = received / RATE
            if rig.against.lazy:
                other, _ = _read_large(rig, rig.mounted(node, rig.against.name))
            measured.append({"ours": seconds, "peer": other})
    return result(
        rig, "cold-sequential", "first read of 256 MiB; peer is the link's time for the bytes that came",
        measured, LEAST_SHARE,
    )  # fmt: skip


def _read_large(rig: Rig, root: Path) -> tuple[float, int]:
    before = rig.proxy.received
    work = treework("read", root, names=layers.LARGE_FILE.encode() + b"\0")
    return work.seconds, rig.proxy.received - before


def _random(rig: Rig, runs: int) -> Result:
    measured: list[dict[str, float]] = []
    over: list[float] = []
    plain: list[float] = []
    for _ in range(runs):
        with rig.place.node({OURS: NO_BACKGROUND}, rig.against) as node:
            root = rig.mounted(node, OURS)
            took, allowed = reads(LazyLayer(node, rig.blob), root)
            other = statistics.median(allowed)
            sizes = [int((most - ROUND_TRIPS * LINK.round_trip) * RATE) for most in allowed[:6]]
            plain += plain_ranges(rig.proxy, REPOSITORY, rig.blob, sizes)
            over += [one / most for one, most in zip(took, allowed, strict=True)]
            if rig.against.lazy:
                other_root = rig.mounted(node, rig.against.name)
                other = statistics.median(reads(LazyLayer(node, rig.blob), other_root, marks=False)[0])
            measured.append({"ours": statistics.median(took), "peer": other})
    return result(
        rig, "cold-random",
        "median of 4 KiB reads of absent spans; peer is the span's transfer and 3 round trips",
        measured, 1.0, {
            "share_within": round(sum(each <= 1 for each in over) / len(over), 3),
            "plain_range_s": round(statistics.median(plain), 4),
        },
    )  # fmt: skip
