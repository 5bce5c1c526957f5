"""config.toml and log lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from soci_snapshotter.daemon import config, logs
from soci_snapshotter.errors import Config


def test_defaults_survive_their_own_dump() -> None:
    """`config default` reads back as the defaults, without a warning."""
    assert config.parse(config.dump(config.Config()), "x") == (config.Config(), [])
    assert not config.Config().pull_modes.soci_v1.enable
    assert config.Config().pull_modes.soci_v2.enable


def test_unknown_keys_are_named() -> None:
    """A key nobody knows is a warning with its whole path."""
    _, warnings = config.parse(b"nope = 1\n[blob]\nmax_retrys = 3\n", "c.toml")
    assert warnings == ["c.toml: unknown key nope", "c.toml: unknown key blob.max_retrys"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[blob]\nmax_retries = 'x'", "blob.max_retries"),
        ("[blob]\nmax_retries = -1", "blob.max_retries"),
        ("metrics_network = 'carrier pigeon'", "metrics_network"),
        ("mount_method = 'carpet'", "mount_method"),
        ("[content_store]\ntype = 'oci'", "content_store.type"),
        ("a = ", "not TOML"),
    ],
)
def test_bad_values_refuse_to_start(text: str, named: str) -> None:
    """A bad value of a known key is an error that names file and key."""
    with pytest.raises(Config, match=named) as caught:
        config.parse(text.encode(), "c.toml")
    assert str(caught.value).startswith("c.toml: ")


def test_a_missing_file_is_fine_only_at_the_default_path(tmp_path: Path) -> None:
    """A path the user named must exist."""
    with pytest.raises(Config, match="no such file"):
        config.load(tmp_path / "none.toml")


def test_log_lines_are_json() -> None:
    """level, msg, time in RFC 3339 with nanoseconds, and the extra fields."""
    record = logging.makeLogRecord(
        {"levelno": logging.WARNING, "msg": "a %s", "args": ("b",), "layer": b"\xff"}
    )
    line = json.loads(logs.JsonFormatter().format(record))
    assert (line["level"], line["msg"], line["layer"]) == ("warning", "a b", "\\xff")
    assert line["time"].endswith("Z")
    assert len(line["time"]) == len("2026-11-24T12:00:00.000000000Z")
