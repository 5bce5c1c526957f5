"""A lazy layer behind a registry 10 ms and 500 Mbit/s away: what the benches of cold and background reads share.

One layer of 1.5 GB of libraries, 645 MB compressed; a fresh containerd and daemon for every run. There is neither a
prefetch artifact nor anything learned.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.coldcache import drop_caches
from harness.proxy import Proxy

from bench import layers
from bench.bulk import Blob
from bench.far import LINK, RATE, LazyLayer, plain_share, read_place
from bench.node import OURS, Node, Site, site
from bench.peers import Peer, peer
from bench.result import Result, Skipped, smaller_is_better

REPOSITORY = "bench/libraries"

LEAST_SHARE = 0.8
"""Of the link's rate, for sequential reads and for the background fetch."""

ROUND_TRIPS = 3
"""What a read may wait beside its span's transfer."""

_READS, _PAUSE_S = 25, 0.15
"""Reads of one run, and what lies between them: no read-ahead of one is in the way of the next."""


@dataclass(frozen=True)
class Rig:
    """The layer's image in the registry, and how much of the link's rate a plain download got."""

    place: Site
    proxy: Proxy
    blob: Blob
    chain: str
    against: Peer
    share: float

    def mounted(self, node: Node, snapshotter: str) -> Path:
        """The image pulled by one of the snapshotters and mounted."""
        suffix = "" if snapshotter == OURS else f"-{snapshotter}"
        node.pull(snapshotter, f"{self.proxy.host}/{REPOSITORY}{suffix}:1")
        drop_caches()
        self.place.warm()
        return node.mount(snapshotter, self.chain, f"cold-{snapshotter}")


@contextmanager
def far_libraries(*, smoke: bool) -> Iterator[Rig]:
    """The registry with the image in it."""
    blob, against = layers.libraries(smoke=smoke), peer()
    with site() as place, place.far(LINK) as proxy:
        chain = place.image(REPOSITORY, [blob], against)
        yield Rig(place, proxy, blob, chain, against, plain_share(proxy, REPOSITORY, blob))


def reads(layer: LazyLayer, root: Path, *, marks: bool = True) -> tuple[list[float], list[float]]:
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
        allowed.append(place.compressed / RATE + ROUND_TRIPS * LINK.round_trip)
        time.sleep(_PAUSE_S)
    if not took:
        raise Skipped("no span was absent any more")
    return took, allowed


def result(
    rig: Rig, name: str, what: str, runs: list[dict[str, float]], target: float,
    notes: dict[str, float | str] | None = None,
) -> Result:  # fmt: skip
    """Seconds against seconds; against another lazy snapshotter the target is to be no slower than it."""
    link: dict[str, float | str] = {"link": "10ms,500mbit", "plain_download_share": rig.share}
    if rig.against.lazy:
        what, target = what.partition(";")[0], 1.0
    return smaller_is_better(
        rig.against.named(name), what, "s", runs, target=target, notes=link | (notes or {})
    )
