"""index-image: an image of four large layers to its index, two workers at once."""

from collections.abc import Iterator

from bench import bulk, indexing
from bench.result import Result, interleaved, smaller_is_better

NAMES = ("index-image",)

MOST_TIME = 0.33
"""Of the peer's wall time."""

_LAYERS = 4


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """The whole command, workers' starts included, over an OCI layout in the page cache; the peer takes one
    layer after another.
    """
    blobs = [bulk.layer(number, smoke=smoke) for number in range(_LAYERS)]
    with indexing.image(blobs) as layout:
        runs = interleaved(lambda: indexing.ours(layout), lambda: indexing.peer(blobs), 1 if smoke else 3)
        memory = indexing.memory(layout)
    yield smaller_is_better(
        names[0],
        f"soci create of {_LAYERS} layers, {sum(blob.size for blob in blobs) / 1e6:.0f} MB compressed; peer is "
        "gzip -dc layer | sha256sum, one after another",
        "s",
        runs,
        target=round(1 / MOST_TIME, 3),
        notes={
            "peak_mb_largest_process": round(memory.largest, 1),
            "peak_mb_together": round(memory.together, 1),
        },
    )
