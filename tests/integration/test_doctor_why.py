"""`soci doctor` and `soci why` on a node that works, and against what the daemon then does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.images import layer_from_blob, push, write_layout
from harness.lazyrig import Rig, lazy_rig
from harness.registries import start_oci_registry

pytestmark = pytest.mark.root
VECTORS = Path(__file__).parents[1] / "vectors"
EDGE1 = layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz")
EDGE2 = layer_from_blob(VECTORS / "go-edge2-whiteouts/layer.tar.gz")
EDGE3 = layer_from_blob(VECTORS / "pigz-edge3/layer.tar.gz")


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """One node for the module; its daemon looks for v1 indexes."""
    with lazy_rig() as found:
        yield found


def config_of(rig: Rig) -> str:
    """The daemon's config.toml."""
    return str(rig.daemon.base / "config.toml")


def why(rig: Rig, capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> dict[str, object]:
    """Run `soci why --json`; what it prints."""
    capsys.readouterr()
    assert rig.soci("why", "--json", "--plain-http", "--config", config_of(rig), *arguments) == code
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def doctor(rig: Rig, *arguments: str) -> int:
    """Run `soci doctor` on the rig's node."""
    return rig.soci(
        *("doctor", "--config", config_of(rig), "--daemon-address", str(rig.daemon.address)),
        *("--containerd-config", str(rig.containerd.base / "config.toml"), *arguments),
    )


def test_a_working_node_has_no_problem(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """containerd, daemon and keeper run: exit 0, each of them ok, and no mount or file is left of the probing."""
    before = Path("/proc/self/mountinfo").read_text()
    assert doctor(rig, "--json") == 0
    findings = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    names = (
        *(
            "user",
            "FUSE",
            "lazy mounts",
            "filesystems",
            "config",
            "daemon",
            "keeper",
            "containerd",
            "snapshotter",
        ),
        *("containerd config", "CRI"),
    )
    assert {name: findings[name]["level"] for name in names} == dict.fromkeys(names, "ok")
    assert Path("/proc/self/mountinfo").read_text() == before
    assert not list(rig.base.rglob("probe-*"))


def test_another_socket_and_name_are_problems(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """containerd asks another socket than the daemon's, or knows no snapshotter of the name: what to write is said."""
    assert rig.soci("doctor", "--config", config_of(rig), "--daemon-address", "/run/elsewhere.sock") == 1
    out = capsys.readouterr().out
    assert f"containerd asks {rig.daemon.address}" in out
    assert 'address = "/run/elsewhere.sock"' in out
    assert doctor(rig, "--snapshotter", "other") == 1
    assert "[proxy_plugins.other]" in capsys.readouterr().out


def test_a_daemon_that_is_gone(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Its socket is left behind: a problem with the command that starts it; afterwards it is well again."""
    rig.daemon.kill()
    try:
        assert doctor(rig) == 1
        assert re.search(r"^problem daemon: .*does not answer", capsys.readouterr().out, re.MULTILINE)
    finally:
        rig.daemon.start()
    assert doctor(rig) == 0


def test_why_foretells_what_the_daemon_does(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """As many layers as were foretold are lazy in the pull that follows."""
    layers = [EDGE1, EDGE2, EDGE3]
    rig.publish("foretold", layers)
    told = why(rig, capsys, rig.name("foretold"), code=0)
    assert told["version"] == 1
    expected = [entry["lazy"] for entry in told["layers"]]  # type: ignore[attr-defined]
    before = rig.lazy_layers()
    rig.pull("foretold")
    assert rig.lazy_layers() - before == sum(expected) == 3


def test_why_without_an_index(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 3, the daemon's reason for each layer, and a pull in which nothing is lazy; docker-registry has no API."""
    rig.publish("plain", [EDGE3], index=False)
    told = why(rig, capsys, rig.name("plain"), code=3)
    assert told["lazy"] is False
    assert any("no referrers API" in note for note in told["notes"])  # type: ignore[attr-defined]
    before = rig.lazy_layers()
    rig.pull("plain")
    assert rig.lazy_layers() == before
    assert rig.soci("why", "--plain-http", "--config", config_of(rig), rig.name("plain")) == 3
    assert "local  " + EDGE3.digest in capsys.readouterr().out


def test_v1_off_is_the_reason_that_is_given(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a config.toml that leaves v1 off, the index is named and the key to turn on."""
    rig.publish("off", [EDGE3])
    path = tmp_path / "config.toml"
    path.write_text("")
    capsys.readouterr()
    assert rig.soci("why", "--plain-http", "--config", str(path), rig.name("off")) == 3
    assert "[pull_modes.soci_v1] is off" in capsys.readouterr().out


def test_a_registry_with_the_referrers_api(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No note about the API where there is one; an image that is not there is exit 4 and one line."""
    with start_oci_registry(tmp_path / "oci") as registry:
        name = f"{registry.host}/x/y:1"
        push(write_layout(tmp_path / "layout", [EDGE3]), name)
        told = why(rig, capsys, name, code=3)
        assert told["notes"] == []
        assert rig.soci("why", "--plain-http", "--config", config_of(rig), name + "gone") == 4
        err = capsys.readouterr().err
        assert registry.host in err
        assert err.count("\n") == 1
