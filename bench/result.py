"""What every bench gives, how a ratio is made, and where results are kept."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Result:
    """One bench: medians of `ours` and `peer` in `unit`; `ratio` is above 1 where ours is better.

    `target` is the ratio asked for. `runs` has one dict per interleaved run, `notes` what else was measured.
    """

    name: str
    what: str
    unit: str
    ours: float
    peer: float
    ratio: float
    target: float
    runs: list[dict[str, float]] = field(default_factory=list)
    notes: dict[str, float | str] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether the target was reached."""
        return self.ratio >= self.target


class Skipped(Exception):
    """A bench that cannot run here or yet; the message says why."""


def rotated(actions: Mapping[str, Callable[[], float]], runs: int) -> list[dict[str, float]]:
    """Runs all in turn, each time beginning with another one."""
    names = list(actions)
    collected = []
    for number in range(runs):
        first = number % len(names)
        collected.append({name: actions[name]() for name in names[first:] + names[:first]})
    return collected


def interleaved(ours: Callable[[], float], peer: Callable[[], float], runs: int) -> list[dict[str, float]]:
    """Runs the two in turn, each time in the other order, so that neither always goes first."""
    collected = []
    for number in range(runs):
        measured: dict[str, float] = {}
        for name, function in (("ours", ours), ("peer", peer))[:: -1 if number % 2 else 1]:
            measured[name] = function()
        collected.append(measured)
    return collected


def smaller_is_better(
    name: str,
    what: str,
    unit: str,
    runs: Sequence[dict[str, float]],
    *,
    target: float,
    notes: dict[str, float | str] | None = None,
    worst: bool = False,
) -> Result:
    """A result out of measurements of time, size or the like: the ratio of the medians, peer over ours.

    `worst` takes our largest instead, for what must never be more.
    """
    ours, peer = (statistics.median(each[side] for each in runs) for side in ("ours", "peer"))
    if worst:
        ours = max(each["ours"] for each in runs)
    return Result(
        name=name,
        what=what,
        unit=unit,
        ours=round(ours, 4),
        peer=round(peer, 4),
        ratio=round(peer / ours, 3),
        target=target,
        runs=[{side: round(value, 4) for side, value in each.items()} for each in runs],
        notes=notes or {},
    )


def save(result: Result, directory: Path = RESULTS) -> Path:
    """Writes DIRECTORY/<name>.json."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{result.name}.json"
    target.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return target


def line(result: Result) -> str:
    """One line for a terminal."""
    verdict = "met" if result.met else "MISSED"
    values = f"ours {result.ours:>9.3f} peer {result.peer:>9.3f} {result.unit:4}"
    return f"{result.name:22} {values} ratio {result.ratio:>6.2f} (target {result.target:.2f}: {verdict})"
