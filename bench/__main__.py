"""`python -m bench [NAME ...] [--smoke]`: a line for each, results in bench/results/<name>.json."""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

from bench.result import Result, Skipped, line, save

MODULES = (
    *("meta_build", "toc_roundtrip", "index_layer", "index_image"),
    *("prepare160", "filled", "cold", "background", "memory", "eager", "start", "demo"),
)
"""In the order of a run of all: the short ones first."""


class Bench(Protocol):
    """What each module has: its benches' names, and a function that measures some of them over one setup."""

    NAMES: tuple[str, ...]

    def measure(self, names: tuple[str, ...], *, smoke: bool) -> Iterator[Result]:
        """One result for each of `names`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every result met its target, 1 if not, 2 for a name that is no bench."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument(
        "--smoke", action="store_true", help="one run each, nothing kept: does it work at all"
    )
    options = parser.parse_args(arguments)
    modules = [cast(Bench, importlib.import_module(f"bench.{name}")) for name in MODULES]
    known = [name for module in modules for name in module.NAMES]
    if unknown := set(options.names) - set(known):
        print(f"bench: no {', '.join(sorted(unknown))}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    missed = False
    for module in modules:
        chosen = tuple(name for name in module.NAMES if name in (options.names or known))
        try:
            for result in module.measure(chosen, smoke=options.smoke) if chosen else ():
                print(line(result), flush=True)
                if not options.smoke:
                    save(result)
                missed |= not result.met
        except Skipped as why:
            print(f"{' '.join(chosen)}: skipped: {why}", flush=True)
    return 1 if missed and not options.smoke else 0


if __name__ == "__main__":
    raise SystemExit(main())
