"""`soci doctor`: what each check makes of a node, and that it never shows a secret."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soci_snapshotter.cli import nodechecks, servicechecks
from soci_snapshotter.cli.main import run
from soci_snapshotter.errors import Config, Unsupported
from soci_snapshotter.policy import containerdconf
from soci_snapshotter.policy.containerdconf import Wanted
from soci_snapshotter.policy.findings import Finding, Level, healthy, ok, problem, warning
from soci_snapshotter.serve.layer_mounts import Stack

SOCKET = "/run/soci-snapshotter-grpc/soci-snapshotter-grpc.sock"
OLD = Wanted("soci", SOCKET, "/etc/containerd/config.toml", 1)
NEW = replace(OLD, major=2)


def written(finding: Finding) -> dict[str, Any]:
    """The TOML among the lines of advice, parsed: what a user would paste."""
    lines = [line for line in finding.mend if line.startswith("  ")]
    return tomllib.loads("\n".join(lines))


def test_only_problems_make_a_node_ill() -> None:
    """Warnings alone leave the exit code at 0."""
    assert healthy([ok("a", ""), warning("b", "")])
    assert not healthy([ok("a", ""), problem("b", "")])


@pytest.mark.parametrize("wanted", [OLD, NEW], ids=["1.x", "2.x"])
def test_advice_mends_an_empty_configuration(wanted: Wanted) -> None:
    """An empty file is a problem and two warnings; with the lines of advice pasted in, every check is ok."""
    first = containerdconf.check_proxy({}, wanted)
    assert first.level is Level.PROBLEM
    cri = containerdconf.check_cri({}, wanted)
    assert cri.level is Level.WARNING
    pasted = [written(first), written(cri)]
    transfer = containerdconf.check_transfer({}, wanted)
    if wanted.major == 1:
        assert transfer is None
    else:
        assert transfer is not None
        assert transfer.level is Level.WARNING
        pasted.append({"plugins": written(transfer)["plugins"]})
    tree: dict[str, Any] = {"proxy_plugins": {}, "plugins": {}}
    for each in pasted:
        for key, value in each.items():
            tree[key].update(value)
    assert containerdconf.check_proxy(tree, wanted).level is Level.OK
    assert containerdconf.check_cri(tree, wanted).level is Level.OK
    if wanted.major == 2:
        found = containerdconf.check_transfer(tree, wanted)
        assert found is not None
        assert found.level is Level.OK


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('type = "snapshot"\naddress = "/run/other.sock"', ["/run/other.sock", SOCKET]),
        (f'type = "content"\naddress = "{SOCKET}"', ["'content'"]),
        (f'address = "{SOCKET}"', ["None"]),
    ],
)
def test_wrong_proxy_plugins_are_named(text: str, words: list[str]) -> None:
    """Another socket or type: a problem that shows what stands there and what should."""
    tree = tomllib.loads(f"version = 2\n[proxy_plugins.soci]\n{text}\n")
    finding = containerdconf.check_proxy(tree, OLD)
    assert finding.level is Level.PROBLEM
    for word in words:
        assert word in finding.found
    assert containerdconf.check_proxy(tree, replace(OLD, snapshotter="other")).level is Level.PROBLEM


def test_a_unix_scheme_is_the_same_socket() -> None:
    """unix:// before the path changes nothing."""
    tree = {"proxy_plugins": {"soci": {"type": "snapshot", "address": f"unix://{SOCKET}"}}}
    assert containerdconf.check_proxy(tree, OLD).level is Level.OK


@pytest.mark.parametrize(
    ("text", "major", "level"),
    [
        ('disabled_plugins = ["io.containerd.grpc.v1.cri"]', 1, Level.OK),
        ('[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "soci"', 1, Level.PROBLEM),
        (
            '[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "soci"\n'
            "disable_snapshot_annotations = false",
            1,
            Level.OK,
        ),
        # 2.x reads the old section of a version 2 file too.
        (
            '[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "soci"\n'
            "disable_snapshot_annotations = false",
            2,
            Level.OK,
        ),
        ('[plugins."io.containerd.cri.v1.images"]\nsnapshotter = "soci"', 2, Level.PROBLEM),
        ('[plugins."io.containerd.cri.v1.images"]\nsnapshotter = 7', 2, Level.WARNING),
        ('plugins = 3\nproxy_plugins = "x"', 2, Level.WARNING),
        (
            '[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]\nsnapshotter = "soci"\n'
            '[plugins."io.containerd.cri.v1.images"]\ndisable_snapshot_annotations = false',
            2,
            Level.OK,
        ),
        # The transfer service hands labels to a proxy that exports the word ...
        (
            '[plugins."io.containerd.cri.v1.images"]\nsnapshotter = "soci"\n'
            '[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nsnapshotter = "soci"\n'
            '[proxy_plugins.soci.exports]\nenable_remote_snapshot_annotations = "true"',
            2,
            Level.OK,
        ),
        # ... but CRI's own pull, if asked for, does not look at it.
        (
            '[plugins."io.containerd.cri.v1.images"]\nsnapshotter = "soci"\nuse_local_image_pull = true\n'
            '[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nsnapshotter = "soci"\n'
            '[proxy_plugins.soci.exports]\nenable_remote_snapshot_annotations = "true"',
            2,
            Level.PROBLEM,
        ),
    ],
)
def test_cri(text: str, major: int, level: Level) -> None:
    """CRI off, on with our snapshotter and (no) annotations, by either section, and nonsense where tables belong."""
    assert containerdconf.check_cri(tomllib.loads(text), replace(OLD, major=major)).level is level


def test_imports_are_followed_once(tmp_path: Path) -> None:
    """Globs and relative imports, one that imports its importer; the later file wins for a section as a whole."""
    (tmp_path / "conf.d").mkdir()
    main = tmp_path / "config.toml"
    main.write_text(
        'version = 2\nimports = ["conf.d/*.toml"]\n[proxy_plugins.soci]\ntype = "snapshot"\naddress = "/a"\n'
        '[plugins."io.containerd.grpc.v1.cri"]\nx = 1\n'
    )
    (tmp_path / "conf.d/10.toml").write_text(f'imports = ["{main}"]\n[proxy_plugins.soci]\naddress = "/b"\n')
    (tmp_path / "conf.d/20.toml").write_text('disabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    tree = servicechecks.read_containerd_config(main)
    assert tree["proxy_plugins"] == {"soci": {"address": "/b"}}
    assert tree["plugins"] == {"io.containerd.grpc.v1.cri": {"x": 1}}
    assert tree["disabled_plugins"] == ["io.containerd.grpc.v1.cri"]


@pytest.mark.parametrize("text", ["a = ", "imports = ['gone.toml']", "imports = ['d*.toml']"])
def test_bad_containerd_files_are_named(text: str, tmp_path: Path) -> None:
    """Not TOML, an import that is missing, and too many of them: an error that names the file."""
    main = tmp_path / "config.toml"
    main.write_text(text)
    for number in range(70):
        (tmp_path / f"d{number}.toml").write_text("")
    with pytest.raises(Config, match=str(tmp_path)):
        servicechecks.read_containerd_config(main)
    with pytest.raises(FileNotFoundError):
        servicechecks.read_containerd_config(tmp_path / "none.toml")


def test_filesystems_that_are_missing_come_with_modprobe() -> None:
    """/proc/filesystems without EROFS: a warning, as layers go without, with the module to load now and at boot."""
    finding = nodechecks.check_filesystems("nodev\tsysfs\nnodev\tfuse\n\text4\nnodev\toverlay\n")
    assert finding.level is Level.WARNING
    assert nodechecks.check_filesystems("\text4\n").level is Level.PROBLEM
    assert "modprobe erofs" in finding.mend
    assert "modprobe fuse" not in finding.mend
    assert any("modules-load.d" in line for line in finding.mend)
    assert nodechecks.check_filesystems("nodev\tfuse\n\terofs\nnodev\toverlay\n").level is Level.OK


@pytest.mark.parametrize(
    ("key", "stack", "level", "words"),
    [
        ("auto", Stack("file", True), Level.OK, "EROFS from files, direct I/O"),
        ("auto", Stack("file", False), Level.OK, "cached twice"),
        ("auto", Stack("loop", True), Level.OK, "loop devices, direct I/O"),
        ("auto", Stack("classic", False), Level.WARNING, "slower than EROFS"),
        ("classic", Stack("classic", False), Level.OK, "mount_method = classic"),
    ],
)
def test_the_way_of_mounting_is_shown(
    key: str, stack: Stack, level: Level, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the probe found, asked for what the configuration says; only an unwanted classic way is a warning."""
    config = tmp_path / "config.toml"
    config.write_text(f'mount_method = "{key}"\n')
    asked: list[object] = []

    def probe(root: Path, method: str | None) -> Stack:
        asked.append(method)
        return stack

    monkeypatch.setattr(nodechecks.probes, "probe", probe)
    finding = nodechecks.check_mounts(tmp_path / "not/there", config)
    assert (finding.level, asked) == (level, [None if key == "auto" else key])
    assert words in finding.found


def test_a_forced_way_that_fails_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The problem has what the probe said, and how to let the daemon choose."""

    def probe(root: Path, method: str | None) -> Stack:
        raise Unsupported("no loop devices")

    config = tmp_path / "config.toml"
    config.write_text('mount_method = "loop"\n')
    monkeypatch.setattr(nodechecks.probes, "probe", probe)
    finding = nodechecks.check_mounts(tmp_path, config)
    assert (finding.level, finding.found) == (Level.PROBLEM, "no loop devices")
    assert 'mount_method = "auto"' in finding.mend[0]


@pytest.mark.parametrize(
    ("release", "level"), [("5.10.0-1", Level.WARNING), ("6.12.1", Level.OK), ("10.0", Level.OK)]
)
def test_kernel_version_is_a_hint(release: str, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old version is a warning at most: what counts is what the probe mounts."""
    monkeypatch.setattr("platform.release", lambda: release)
    assert nodechecks.check_kernel().level is level


def test_bad_config_names_the_key(tmp_path: Path) -> None:
    """A bad value of the daemon's config.toml is a problem that names file and key, an unknown key a warning."""
    path = tmp_path / "config.toml"
    path.write_text("[blob]\nmax_retries = 'x'\n")
    (finding,) = nodechecks.check_config(path)
    assert finding.level is Level.PROBLEM
    assert "blob.max_retries" in finding.found
    path.write_text("nope = 1\n[pull_modes.soci_v2]\nenable = false\n")
    first, second = nodechecks.check_config(path)
    assert (first.level, second.level) == (Level.WARNING, Level.WARNING)
    assert "soci_v2" in first.mend[1]
    assert "nope" in second.found


def docker(tmp_path: Path, text: str) -> Finding:
    """The finding for a Docker config.json."""
    path = tmp_path / "config.json"
    path.write_text(text)
    path.chmod(0o600)
    return nodechecks.check_credentials(path)


def test_credentials_are_checked_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are listed, helpers looked for in PATH, and no part of a secret is in any finding."""
    secret = "bWU6czNjcjN0"
    auths = f'"auths": {{"registry.test": {{"auth": "{secret}"}}}}'
    good = docker(tmp_path, "{" + auths + "}")
    assert good.level is Level.OK
    assert "registry.test" in good.found
    missing = docker(
        tmp_path, "{" + auths + ', "credHelpers": {"cloud.test": "cloud-login"}, "credsStore": "box"}'
    )
    assert missing.level is Level.PROBLEM
    assert "box, cloud-login" in missing.found
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("box", "cloud-login"):
        program = bin_dir / f"docker-credential-{name}"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    found = docker(
        tmp_path, "{" + auths + ', "credHelpers": {"cloud.test": "cloud-login"}, "credsStore": "box"}'
    )
    assert found.level is Level.OK
    broken = docker(
        tmp_path, '{"auths": {"registry.test": {"auth": "' + secret + '"}}, "credHelpers": "' + secret + '"}'
    )
    assert broken.level is Level.PROBLEM
    open_file = tmp_path / "config.json"
    open_file.write_text("{" + auths + "}")
    open_file.chmod(0o644)
    seen = nodechecks.check_credentials(open_file)
    assert seen.level is Level.WARNING
    for finding in (good, missing, found, broken, seen):
        assert secret not in repr(finding)


def test_no_docker_config_is_fine(tmp_path: Path) -> None:
    """Public images need no login."""
    assert nodechecks.check_credentials(tmp_path / "none.json").level is Level.OK


def test_unit(tmp_path: Path) -> None:
    """No systemd is fine, systemd without our unit a warning, with it ok."""
    assert servicechecks.check_unit(tmp_path).level is Level.OK
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert servicechecks.check_unit(tmp_path).level is Level.WARNING
    directory = tmp_path / "usr/lib/systemd/system"
    directory.mkdir(parents=True)
    (directory / "soci-snapshotter-grpc.service").write_text("")
    assert servicechecks.check_unit(tmp_path).level is Level.OK


def test_a_root_that_others_may_read_is_a_warning(tmp_path: Path) -> None:
    """Mode 0755 comes with the chmod; 0700 is ok; a root that is not there yet is judged by the directory above."""
    tmp_path.chmod(0o755)
    finding = nodechecks.check_root(tmp_path)
    assert finding.level is Level.WARNING
    assert f"chmod 0700 {tmp_path}" in finding.mend
    tmp_path.chmod(0o700)
    assert nodechecks.check_root(tmp_path).level is Level.OK
    assert nodechecks.check_root(tmp_path / "a/b").level is Level.OK
    shm = Path("/dev/shm")
    if shm.is_dir():
        assert nodechecks.check_root(shm).level is Level.PROBLEM


def test_a_bare_node_is_examined_to_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing installed: exit 1, every check reported, as JSON and as text without colours, nothing on stderr."""
    flags = ["--address", str(tmp_path / "c.sock"), "--root", str(tmp_path / "root")]
    command = [
        *("doctor", "--daemon-address", str(tmp_path / "d.sock"), "--config", str(tmp_path / "none.toml")),
        *("--containerd-config", str(tmp_path / "c.toml")),
    ]
    assert run([*flags, *command, "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    levels = {entry["name"]: entry["level"] for entry in json.loads(out)}
    assert [levels[name] for name in ("config", "daemon", "containerd", "containerd config")] == [
        "problem"
    ] * 4
    assert {"user", "kernel", "FUSE", "lazy mounts", "filesystems", "root", "credentials", "systemd"} < set(
        levels
    )
    assert not list(tmp_path.rglob("probe-*"))
    assert run([*flags, *command]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert f'address = "{tmp_path / "d.sock"}"' in out


def test_a_socket_nobody_serves_is_a_problem(tmp_path: Path) -> None:
    """A daemon's socket that was left behind: it does not answer."""
    import socket

    path = tmp_path / "d.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    node = nodechecks.Node("c", "default", "soci", path, tmp_path, tmp_path, tmp_path, tmp_path)
    (finding,) = servicechecks.check_daemon(node)
    assert finding.level is Level.PROBLEM
    assert str(path) in finding.found
