"""demo: the lazy start of `make demo` against overlayfs's, in the form of every other bench."""

import json
from collections.abc import Iterator

from harness import demo

from bench.result import Result, smaller_is_better

NAMES = ("demo",)


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """Runs the demo three times; time to the line, with the bytes fetched beside it. Not in a smoke run: its image
    takes minutes to make, and `make demo` says as much.
    """
    if smoke:
        return
    runs = []
    found: dict[str, dict[str, float]] = {}
    for _ in range(3):
        if demo.main([]):
            raise RuntimeError("the demo failed")
        found = json.loads(demo.RESULT.read_text())
        runs.append({"ours": found["lazy"]["first_line_s"], "peer": found["overlayfs"]["first_line_s"]})
    fetched = found["lazy"]["bytes_fetched"] / found["image"]["bytes"]
    yield smaller_is_better(
        "demo-start",
        "seconds from the beginning of the pull to the program's line",
        "s",
        runs,
        # At most 0.6 of overlayfs's time.
        target=round(1 / demo.MOST_TIME, 3),
        notes={"share_fetched": round(fetched, 4), "image_bytes": found["image"]["bytes"]},
    )
