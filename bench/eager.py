"""eager-pull: a whole image from a registry on loopback, ours with parallel_pull_unpack against `ctr images pull`."""

from collections.abc import Iterator

from harness.coldcache import drop_caches
from harness.daemon import CONFIG

from bench import layers
from bench.node import OURS, site
from bench.peers import peer
from bench.result import Result, Skipped, interleaved, smaller_is_better
from soci_snapshotter.daemon import config as configs

NAMES = ("eager-pull",)

MOST_TIME = 0.6
"""Of the peer's."""

EAGER = CONFIG.replace("[pull_modes.soci_v1]\nenable = true\n", "") + (
    "[pull_modes.soci_v1]\nenable = false\n[pull_modes.soci_v2]\nenable = false\n"
    "[pull_modes.parallel_pull_unpack]\nenable = true\ndiscard_unpacked_layers = true\n"
    "max_concurrent_downloads_per_image = 8\nmax_concurrent_unpacks_per_image = 4\n"
    'concurrent_download_chunk_size = "8mb"\n'
)

_LAYERS = 3


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """75,000 files in three layers of together 600 MB, compressed; each pull into a node with nothing on it."""
    _, warnings = configs.parse(EAGER.encode(), "config.toml")
    if warnings:
        raise Skipped("; ".join(warnings))
    blobs, against = [layers.eager(number, smoke=smoke) for number in range(_LAYERS)], peer()
    with site() as place, place.far() as proxy:
        chain = place.image("bench/eager", blobs, against)

        def pull(snapshotter: str) -> float:
            suffix = f"-{snapshotter}" if snapshotter == against.name and against.lazy else ""
            with place.node({OURS: EAGER} if snapshotter == OURS else {}, against) as node:
                drop_caches()
                before = proxy.received
                took = node.pull(snapshotter, f"{proxy.host}/bench/eager{suffix}:1")
                if proxy.received - before < sum(blob.size for blob in blobs):
                    raise RuntimeError(f"{snapshotter}: the pull ended before every byte was here")
                node.mount(snapshotter, chain, "eager")
            return took

        runs = interleaved(lambda: pull(OURS), lambda: pull(against.name), 1 if smoke else 3)
    yield smaller_is_better(
        against.named(names[0]),
        f"a whole pull on loopback: {sum(blob.files for blob in blobs):,} files, "
        f"{sum(blob.size for blob in blobs) / 1e6:.0f} MB compressed",
        "s",
        runs,
        target=1.0 if against.lazy else round(1 / MOST_TIME, 3),
        notes={"peer": against.name},
    )
