"""A real systemd, process 1 of namespaces of its own, restarts the daemon's unit under a reader."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from soci_snapshotter.linux import cgroups, mounts

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(400)]

SYSTEMD = Path("/lib/systemd/systemd")
REPOSITORY = Path(__file__).parents[2]
# The Go daemon's unit as it is installed, and what is needed where there are no other units.
GO = """[Unit]
DefaultDependencies=no
[Service]
Type=notify
ExecStart={command}
Restart=always
RestartSec=5
"""
TARGET = "[Unit]\nDefaultDependencies=no\n"
# Hierarchies as a node of Debian 12 has them, seen from a control group namespace.
INIT = """
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir /run/lock
mount -t tmpfs tmpfs /sys/fs/cgroup
if grep -q name=systemd /proc/self/cgroup; then
    mkdir /sys/fs/cgroup/systemd /sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
else
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
(
    set +e
    until [ -S /run/systemd/private ]; do sleep 0.1; done
    cd {repository}
    {python} -m tests.integration.test_systemd {units} >{units}/said 2>&1
    echo $? >{units}/status
    kill -s RTMIN+14 1  # systemd(1): exit at once
    kill -s KILL 1
) &
exec env container=lxc SYSTEMD_UNIT_PATH={units} SYSTEMD_LOG_TARGET=console \
    {systemd} --system --unit=test.target --show-status=no
"""


@pytest.mark.parametrize("ours", [False, True])
def test_systemctl_restart_loses_no_reader(tmp_path: Path, ours: bool) -> None:
    """`systemctl restart` and a killed control group, with the Go daemon's unit and with ours: a reader waits and has
    every byte; the FUSE connection stays the same.
    """
    if not SYSTEMD.exists():
        pytest.skip("systemd is not installed")
    units = tmp_path / "units"
    units.mkdir()
    (units / "test.target").write_text(TARGET)
    if ours:
        shutil.copy(REPOSITORY / "packaging/soci-snapshotter-grpc.service", units / "ours")
    script = INIT.format(repository=REPOSITORY, python=sys.executable, units=units, systemd=SYSTEMD)
    (tmp_path / "init").write_text(script)
    made = [cgroups.make_group(top, b"soci-test-systemd") for top in cgroups.tops(mounts.mountinfo())]
    groups = [os.fsdecode(group) for group in made if group]
    # What it makes of control groups stays below one of the test's own.
    join = "".join(f"echo $$ >{group}; " for group in groups) + 'exec "$@"'
    with open(tmp_path / "log", "wb") as log:
        subprocess.run(
            [
                *("bash", "-c", join, "join"),
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--cgroup",
                "--kill-child",
                "bash",
                str(tmp_path / "init"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            timeout=380,
            check=False,
        )
    for group in groups:
        for directory, _, _ in os.walk(os.path.dirname(group), topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    said = (units / "said").read_text() if (units / "said").exists() else (tmp_path / "log").read_text()
    assert (units / "status").exists() and (units / "status").read_text() == "0\n", said[-4000:]


def inside(units: Path) -> None:
    """What happens in the namespaces: a node whose daemon systemd runs."""
    from harness.images import layer_from_dir, shell_rootfs
    from harness.lazyrig import lazy_rig
    from tests.integration.test_supervised import FILES, fresh, keeper_of, reading

    with lazy_rig("[background_fetch]\ndisable = true\n[pull_modes.soci_v1]\nenable = true\n") as rig:
        rig.daemon.stop()
        daemon = rig.daemon
        command = " ".join(
            (
                *(sys.executable, "-m", "soci_snapshotter.daemon.main"),
                *("--address", str(daemon.address), "--root", str(daemon.root)),
                *("--config", str(daemon.base / "config.toml")),
            )
        )
        ours = units / "ours"
        text = GO.format(command=command) if not ours.exists() else ours.read_text()
        lines = [
            f"ExecStart={command}" if line.startswith("ExecStart=") else line for line in text.splitlines()
        ]
        head = lines.index("[Unit]")
        lines.insert(head + 1, "DefaultDependencies=no")
        body = lines.index("[Service]")
        lines.insert(body + 1, f"Environment=PYTHONPATH={REPOSITORY / 'src'}")
        lines.insert(body + 2, f"StandardError=append:{daemon.base / 'daemon.log'}")
        (units / "soci.service").write_text("\n".join(lines) + "\n")
        systemctl("daemon-reload")
        systemctl("start", "soci.service")
        rig.reconnected()
        directory = shell_rootfs(rig.base / "box")
        for number in range(FILES):
            (directory / f"file{number}").write_bytes(os.urandom(3 << 20))
        layout = rig.publish("box", [layer_from_dir(directory)])
        rig.pull("box")
        keeper = keeper_of(rig)
        with rig.rootfs(layout, "soci") as root:
            with reading(rig, root):
                systemctl("restart", "soci.service")
            with reading(rig, root):
                systemctl("kill", "--signal=KILL", "soci.service")  # all of the group
            assert keeper_of(rig) == keeper
            assert fresh(rig)[1:] == [True, False, False], fresh(rig)
            with reading(rig, root):
                systemctl("stop", "soci.service")
                systemctl("start", "soci.service")
            assert fresh(rig)[-1] is False
        systemctl("stop", "soci.service")


def systemctl(*words: str) -> None:
    """Run it."""
    subprocess.run(["systemctl", *words], check=True, timeout=120)


if __name__ == "__main__":
    inside(Path(sys.argv[1]))
