"""What config.toml says about fetching: the Go daemon's defaults mean ours, anything else means what it says."""

from __future__ import annotations

from soci_snapshotter.daemon import config
from soci_snapshotter.daemon.fetching import background_rules, flight_limit
from soci_snapshotter.policy.schedule import Rules


def parsed(text: str) -> config.Config:
    """The configuration in `text`."""
    found, warnings = config.parse(text.encode(), "config.toml")
    assert warnings == []
    return found


def test_saved_defaults_make_nobody_slow() -> None:
    """Nothing said, the Go daemon's defaults said, and 0 for "the default": our own rules each time."""
    go = "silence_period_msec = 30000\nfetch_period_msec = 500\nmax_queue_size = 300\n"
    zeros = "silence_period_msec = 0\nfetch_period_msec = 0\nmax_queue_size = 0\n"
    for text in ("", go, zeros):
        assert background_rules(parsed(f"[background_fetch]\n{text}")) == Rules()


def test_what_differs_is_honoured() -> None:
    """A silence, a period, a queue and what it drops, as written; an image waits ten silences at most."""
    text = (
        "silence_period_msec = 60000\nfetch_period_msec = 2000\nmax_queue_size = 7\ndrop_policy = 'oldest'\n"
    )
    rules = background_rules(parsed(f"[background_fetch]\n{text}"))
    assert rules == Rules(silence=60, patience=600, period=2, queue=7, drop_newest=False)
    assert background_rules(parsed("[background_fetch]\nsilence_period_msec = 10\n")).patience >= 30


def test_max_concurrency_bounds_flights() -> None:
    """100 by default and for 0; a number as written; negative is no bound."""
    limits = [flight_limit(parsed(f"max_concurrency = {value}")) for value in (0, 100, 5, -1)]
    assert limits == [100, 100, 5, None]
