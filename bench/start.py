"""start-python: from the beginning of the pull to a program's line, the registry 10 ms and 500 Mbit/s away.

The demo's image (457 MB, five layers, 41,000 entries); the program imports numpy, scipy, pandas and scikit-learn and
computes something with each. Every start has a containerd of its own with nothing in it, and cold caches.
"""

import time
from collections.abc import Iterator

from harness.coldcache import drop_caches
from harness.daemon import CONFIG
from harness.demo_image import demo_image
from harness.proxy import Proxy

from bench.far import LINK
from bench.node import OURS, Site, site
from bench.peers import OVERLAYFS, Peer, peer
from bench.result import Result, smaller_is_better

NAMES = ("start-python",)

MOST_TIME = 0.35
"""Of overlayfs's time. Another lazy snapshotter is to be no faster than we are."""

_REPOSITORY = "bench/numeric"

_PROGRAM = """
import numpy, pandas, scipy.integrate
from sklearn.linear_model import LinearRegression
area, _ = scipy.integrate.quad(lambda x: x * x, 0.0, 3.0)
table = pandas.DataFrame({"kind": ["a", "b", "a"], "value": [1, 2, 3]})
fit = LinearRegression().fit(numpy.array([[0.0], [1.0], [2.0]]), numpy.array([1.0, 3.0, 5.0]))
print(f"{area:.3f} {table.groupby('kind')['value'].sum().to_dict()} {fit.coef_[0]:.3f}", flush=True)
"""

_LINE = "9.000 {'a': 4, 'b': 2} 2.000"


def measure(names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
    """Ours and the peer's in turn. Not in a smoke run: the image takes minutes to make."""
    if smoke:
        return
    against, image = peer(), demo_image()
    fetched: list[int] = []
    with site() as place:
        place.publish(image.layout, _REPOSITORY)
        if against.lazy:
            place.publish(image.layout, f"{_REPOSITORY}-{against.name}", against)
        with place.far(LINK) as proxy:
            runs = []
            for number in range(3):
                run: dict[str, float] = {}
                for side in ("ours", "peer")[:: -1 if number % 2 else 1]:
                    name = OURS if side == "ours" else against.name
                    run[side], came = _start(place, proxy, name, against)
                    if side == "ours":
                        fetched.append(came)
                runs.append(run)
    yield smaller_is_better(
        against.named(names[0]),
        "seconds from the beginning of the pull to the line of a program that imports four numeric packages",
        "s",
        runs,
        target=1.0 if against.lazy else round(1 / MOST_TIME, 3),
        notes={
            "link": "10ms,500mbit",
            "image_bytes": image.size,
            "share_fetched": round(sorted(fetched)[len(fetched) // 2] / image.size, 4),
        },
    )


def _start(place: Site, proxy: Proxy, snapshotter: str, against: Peer) -> tuple[float, int]:
    """Seconds to the line, and bytes that came from the registry until then."""
    suffix = "" if snapshotter in {OURS, OVERLAYFS} else f"-{snapshotter}"
    reference = f"{proxy.host}/{_REPOSITORY}{suffix}:1"
    with place.node({OURS: CONFIG} if snapshotter == OURS else {}, against) as node:
        drop_caches()
        place.warm()
        before, started = proxy.received, time.monotonic()
        node.pull(snapshotter, reference)
        command = [
            "run",
            "--rm",
            "--snapshotter",
            snapshotter,
            reference,
            "start",
            "/usr/bin/python3",
            "-c",
            _PROGRAM,
        ]
        done = node.containerd.ctr(*command, check=False, timeout=300)
        took, came = time.monotonic() - started, proxy.received - before
        node.containerd.ctr("images", "rm", "--sync", reference)
    if done.returncode or done.stdout.strip() != _LINE:
        raise RuntimeError(
            f"the program on {snapshotter}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return took, came
