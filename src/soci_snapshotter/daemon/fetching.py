"""What config.toml says about fetching, in the terms of layers/ and policy/.

Values that equal the Go daemon's defaults count as unset where ours are better: nobody stays slow because
`config default` was saved.
"""

from __future__ import annotations

from soci_snapshotter.daemon.config import BackgroundFetch, Config
from soci_snapshotter.policy.eager import Eager, limit, parse_size
from soci_snapshotter.policy.schedule import Rules

_UNSET = BackgroundFetch()


def flight_limit(config: Config) -> int | None:
    """Requests for spans at once, over all registries; None for no bound (negative; 0 is the default)."""
    if config.max_concurrency < 0:
        return None
    return config.max_concurrency or Config().max_concurrency


def background_rules(config: Config) -> Rules:
    """When and how much the background fetch fetches."""
    said, ours = config.background_fetch, Rules()
    silence, patience = ours.silence, ours.patience
    if said.silence_period_msec not in (0, _UNSET.silence_period_msec):
        silence = said.silence_period_msec / 1000
        patience = max(patience, 10 * silence)
    other_period = said.fetch_period_msec not in (0, _UNSET.fetch_period_msec)
    # Negative: no bound.
    other_queue = said.max_queue_size > 0 and said.max_queue_size != _UNSET.max_queue_size
    return Rules(
        silence=silence,
        patience=patience,
        period=said.fetch_period_msec / 1000 if other_period else ours.period,
        queue=said.max_queue_size if other_queue else ours.queue,
        drop_newest=said.drop_policy == "newest",
    )


def eager_rules(config: Config) -> Eager:
    """Which layers are filled as they come, and how many at once."""
    said = config.pull_modes.parallel_pull_unpack
    return Eager(
        primary=said.enable,
        fallback=said.experimental_parallel_pull_as_fallback,
        downloads=limit(said.max_concurrent_downloads),
        downloads_per_image=limit(said.max_concurrent_downloads_per_image),
        unpacks=limit(said.max_concurrent_unpacks),
        unpacks_per_image=limit(said.max_concurrent_unpacks_per_image),
        chunk=parse_size(said.concurrent_download_chunk_size),
        keep_blobs=config.content_store.type == "containerd" and not said.discard_unpacked_layers,
        decompressors={
            algorithm: (stream.path, *stream.args) for algorithm, stream in said.decompress_streams.items()
        },
    )
