"""Files that configure the Go daemon configure ours, unchanged: its own dump, and what its documentation shows."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec
import pytest

from soci_snapshotter.daemon import config as configs
from soci_snapshotter.daemon.config import Config

_VECTORS = Path(__file__).parents[1] / "vectors/configs"
_FILES = sorted(_VECTORS.glob("*.toml"))
_WARNED = {"content-store.toml": ["content_store.namespace"]}
"""What is unknown here, and to the Go daemon's own code as well, though its documentation names it."""


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
def test_starts_ours(path: Path) -> None:
    """A file for the Go daemon is taken without an error, and no key of it is unknown."""
    _, warnings = configs.load(path)
    unknown = [warning.rpartition(" ")[2] for warning in warnings if "unknown key" in warning]
    assert unknown == _WARNED.get(path.name, [])


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.name)
def test_says_what_the_file_says(path: Path) -> None:
    """Every key of the file has the file's value in what `config dump` shows."""
    loaded, _ = configs.load(path)
    shown = tomllib.loads(configs.dump(loaded).decode())
    written = tomllib.loads(path.read_text())
    for key in _WARNED.get(path.name, []):
        section, _, name = key.rpartition(".")
        del written[section][name]
    assert _within(written, shown) == []


def _within(written: object, shown: object, place: str = "") -> list[str]:
    """Where `shown` lacks something of `written`, or has another value."""
    if isinstance(written, dict) and isinstance(shown, dict):
        return [
            found
            for key, value in written.items()
            for found in _within(value, shown.get(key), f"{place}.{key}")
        ]
    if isinstance(written, list) and isinstance(shown, list) and len(written) == len(shown):
        pairs = zip(written, shown, strict=True)
        return [found for index, (a, b) in enumerate(pairs) for found in _within(a, b, f"{place}[{index}]")]
    return [] if written == shown else [f"{place}: {written!r} is shown as {shown!r}"]


def test_the_corpus_has_every_key() -> None:
    """The Go daemon's dump has every key of ours, but those that are our own."""
    dumped = tomllib.loads((_VECTORS / "default.toml").read_text())
    ours = msgspec.to_builtins(Config())
    missing = {place.partition(":")[0] for place in _within(ours, dumped) if place.endswith("shown as None")}
    assert missing == _OWN


_OWN = {
    ".mount_method",
    ".snapshotter.max_cache_bytes",
    ".pull_modes.soci_v1.index_tag",
    ".pull_modes.parallel_pull_unpack.decompress_streams",
    ".resolver.config_path",
    ".resolver.host",
}
"""Ours, or empty tables that the Go daemon does not write."""
