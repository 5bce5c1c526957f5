"""What lies on a layer of ours, read from mount tables; and control groups."""

import pytest

from soci_snapshotter.linux import cgroups, ownmounts
from soci_snapshotter.linux.mounts import parse_mountinfo

DISK = b"20 1 254:1 / / rw - ext4 /dev/vda1 rw"
LAYER = b"30 20 0:50 / /r/m/7 ro - erofs /r/layers/aa/bb/meta-0c.erofs ro"
LOOP = b"31 20 7:0 / /r/m/8 ro - erofs /dev/loop0 ro"
CLASSIC = b"32 20 0:51 /1 /r/m/9 ro - fuse soci ro"
OTHERS = b"33 20 0:52 / /image ro - erofs /images/os.erofs ro\n34 20 0:53 / /ssh rw - fuse sshfs rw"
ABOVE = b"40 20 0:60 / /run/c/rootfs rw - overlay overlay rw,lowerdir=%s,upperdir=/s/1/fs,workdir=/s/1/work"
TABLE = b"\n".join([DISK, LAYER, LOOP, CLASSIC, OTHERS])


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        (b"/usr/bin/python3", None),
        (b"/r/m/7/usr/bin/python3", b"/r/m/7"),
        (b"/r/m/7", b"/r/m/7"),
        (b"/r/m/77/x", None),
        (b"/r/m/8/x", b"/r/m/8"),
        (b"/r/m/9/x", b"/r/m/9"),
        (b"/image/x", None),
        (b"/ssh/x", None),
    ],
)
def test_layers(path: bytes, layer: bytes | None) -> None:
    """Layers mounted in each of the three ways are known, other people's EROFS and FUSE mounts are not taken for them."""
    assert ownmounts.below(path, parse_mountinfo(TABLE)) == layer


@pytest.mark.parametrize(
    ("lower", "layer"),
    [
        (b"/s/2/fs:/s/1/fs", None),
        (b"/s/2/fs:/r/m/7", b"/r/m/7"),
        (b"/r/m/7/sub", b"/r/m/7/sub"),  # below a layer that is in the table
        (
            b"/elsewhere/m/12:/s/1/fs",
            b"/elsewhere/m/12",
        ),  # in a container the layers' mounts are out of sight
        (b"m/12:snapshotter/snapshots/3/fs", b"m/12"),
        (b"12:11", b"12"),
        (b"12/fs:11/fs", None),
        (rb"/a\134:b\054c/m/7:/s/1/fs", b"/a:b,c/m/7"),
    ],
)
def test_overlays(lower: bytes, layer: bytes | None) -> None:
    """An overlay is ours when one of its lower directories is, however it is written."""
    table = TABLE + b"\n" + ABOVE % lower
    assert ownmounts.below(b"/run/c/rootfs/usr/bin/python3", parse_mountinfo(table)) == layer


def test_lowerdirs_one_by_one() -> None:
    """Linux 6.8 shows lower directories that were given one at a time as options of their own."""
    above = b"40 20 0:60 / /o rw - overlay overlay rw,lowerdir+=/s/2/fs,lowerdir+=/r/m/7"
    assert ownmounts.below(b"/o/x", parse_mountinfo(TABLE + b"\n" + above)) == b"/r/m/7"


def test_the_last_mount_of_a_place_counts() -> None:
    """A disk mounted over a layer hides it."""
    over = b"50 30 254:2 / /r/m/7 rw - ext4 /dev/vdb rw"
    assert ownmounts.below(b"/r/m/7/x", parse_mountinfo(TABLE + b"\n" + over)) is None


def test_control_groups() -> None:
    """Of a process's groups the two that service managers end processes by; where their tops are mounted."""
    text = b"9:name=systemd:/system.slice/a:b.service\n4:memory:/x\n0::/system.slice/a.service\n\nnonsense\n"
    assert cgroups.groups(text) == {
        b"name=systemd": b"/system.slice/a:b.service",
        b"": b"/system.slice/a.service",
    }
    table = (
        b"1 0 0:1 / /cg/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        b"2 0 0:2 / /cg/memory rw - cgroup cgroup rw,memory\n"
        b"3 0 0:3 / /cg/unified rw - cgroup2 cgroup2 rw\n"
    )
    assert cgroups.tops(parse_mountinfo(table)) == [b"/cg/systemd", b"/cg/unified"]
    assert cgroups.groups_of(0) == {}
