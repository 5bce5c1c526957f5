"""config.toml and log lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from soci_snapshotter.daemon import config, fetching, logs
from soci_snapshotter.errors import Config

PARALLEL = "[pull_modes.parallel_pull_unpack]\n"


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
        (PARALLEL + "enable = true", "parallel_pull_unpack.enable: needs content_store.type"),
        (
            PARALLEL + "experimental_parallel_pull_as_fallback = true",
            "pull_as_fallback: needs content_store.type",
        ),
        (
            PARALLEL + "concurrent_download_chunk_size = '8 tubs'",
            "parallel_pull_unpack.concurrent_download_chunk_size",
        ),
        (
            PARALLEL + "decompress_streams.gzip.path = 'unpigz'",
            "decompress_streams.gzip.path = 'unpigz': must be an",
        ),
        (
            PARALLEL + "decompress_streams.gzip.path = '/etc'",
            "decompress_streams.gzip.path = '/etc': is no program",
        ),
        (
            PARALLEL + "decompress_streams.lzma.path = '/bin/cat'",
            "decompress_streams.lzma: no such algorithm",
        ),
        ("a = ", "not TOML"),
    ],
)
def test_bad_values_refuse_to_start(text: str, named: str) -> None:
    """A bad value of a known key is an error that names file and key."""
    with pytest.raises(Config, match=named) as caught:
        config.parse(text.encode(), "c.toml")
    assert str(caught.value).startswith("c.toml: ")


def test_parallel_pulls_with_what_they_need() -> None:
    """With the layers discarded, or containerd's content store, and an absolute path: no error, no warning."""
    discard, kept = "discard_unpacked_layers = true\n", "[content_store]\ntype = 'containerd'\n"
    streams = "decompress_streams.zstd.path = '/bin/cat'\ndecompress_streams.zstd.args = ['-']\n"
    for text in (
        PARALLEL + "enable = true\n" + discard + streams,
        kept + PARALLEL + "enable = true\n" + streams,
    ):
        parsed, warnings = config.parse(text.encode(), "c.toml")
        assert warnings == []
        rules = fetching.eager_rules(parsed)
        assert rules.primary and rules.keep_blobs == (discard not in text)
        assert rules.decompressors == {"zstd": ("/bin/cat", "-")}
        assert (rules.downloads, rules.downloads_per_image) == (None, 3)
        assert (rules.unpacks, rules.unpacks_per_image, rules.chunk) == (None, 1, None)


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
