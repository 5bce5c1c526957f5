"""index-layer: one large layer to its index; index-memory: what that takes, and what a far larger one takes."""

from collections.abc import Iterator

from bench import bulk, indexing
from bench.result import Result, interleaved, smaller_is_better

NAMES = ("index-layer", "index-memory")

MOST_TIME = 0.55
"""Of the peer's wall time."""

MOST_MB = 150.0


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """The benches of `names`."""
    for name in names:
        yield _time(smoke=smoke) if name == "index-layer" else _memory(smoke=smoke)


def _time(*, smoke: bool) -> Result:
    """The whole command, interpreter's start to exit, over an OCI layout in the page cache."""
    blob = bulk.layer(0, smoke=smoke)
    with indexing.image([blob]) as layout:
        runs = interleaved(lambda: indexing.ours(layout), lambda: indexing.peer([blob]), 1 if smoke else 5)
        memory = indexing.memory(layout)
    return smaller_is_better(
        "index-layer",
        f"soci create of one layer, {blob.size / 1e6:.0f} MB compressed, {blob.files:,} files; peer is "
        "gzip -dc layer | sha256sum",
        "s",
        runs,
        target=round(1 / MOST_TIME, 3),
        notes={
            "tar_mb": round(blob.tar_size / 1e6),
            "peak_mb_largest_process": round(memory.largest, 1),
            "peak_mb_together": round(memory.together, 1),
        },
    )


def _memory(*, smoke: bool) -> Result:
    """The largest process's peak, over a tar of many GB that is small compressed; the peer is the limit."""
    blob = bulk.repetitive(smoke=smoke)
    with indexing.image([blob]) as layout:
        found = [indexing.memory(layout) for _ in range(1 if smoke else 3)]
    return smaller_is_better(
        "index-memory",
        f"peak resident set of soci create over a tar of {blob.tar_size / 1e9:.1f} GB with {blob.files:,} files; "
        "peer is no program but the limit",
        "MB",
        [{"ours": each.largest, "peer": MOST_MB} for each in found],
        target=1.0,
        notes={"peak_mb_together": round(max(each.together for each in found), 1)},
    )
