"""The registry flags as values: whose credentials go where, what survives pickling, what is never shown."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from soci_snapshotter.cli.registries import RegistryFlags, registry_access
from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import reference


def test_user_flag_is_for_one_host_only() -> None:
    """--user's password may hold colons, is in no repr, survives pickling, and no other host is ever shown it."""
    flags = RegistryFlags(user="me:pass:word")
    access = registry_access(flags, reference.parse("registry.test:5000/a/b:1"))
    assert "pass" not in repr(flags) + repr(access)
    copy = pickle.loads(pickle.dumps(access))  # noqa: S301 - our own
    with copy.open() as client:
        assert client.credentials("registry.test:5000") == ("me", "pass:word")
        assert client.credentials("elsewhere.test") is None
    with pytest.raises(Invalid, match="--user"):
        registry_access(RegistryFlags(user=":secret"), reference.parse("registry.test/a"))


def test_docker_config_is_used_without_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without --user, $DOCKER_CONFIG/config.json answers per host (auth is base64 of me:pw)."""
    (tmp_path / "config.json").write_text('{"auths":{"registry.test":{"auth":"bWU6cHc="}}}')
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    access = registry_access(RegistryFlags(), reference.parse("registry.test/a:1"))
    with access.open() as client:
        assert client.credentials("registry.test") == ("me", "pw")
        assert client.credentials("elsewhere.test") is None
