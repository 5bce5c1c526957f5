"""Id mappings: what labels say, and mounts that map."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containerd import unmount_below
from hypothesis import given
from hypothesis import strategies as st

from soci_snapshotter.errors import Invalid, NotFound
from soci_snapshotter.linux.mounts import mountinfo
from soci_snapshotter.linux.userns import user_namespace
from soci_snapshotter.policy.idmaps import IdMap, Range, id_map, lines
from soci_snapshotter.policy.prepare import GID_MAPPING, TARGET, UID_MAPPING
from soci_snapshotter.snapshotter.idmaps import MappedMounts
from soci_snapshotter.snapshotter.snapshotter import Snapshotter

MAP = IdMap((Range(0, 100000, 1000), Range(1000, 500000, 2)), (Range(0, 200000, 1000),))
LABELS = {UID_MAPPING: "0:100000:1000,1000:500000:2", GID_MAPPING: "0:200000:1000"}


def test_labels() -> None:
    """Both labels make a mapping; neither makes none."""
    assert id_map(LABELS) == MAP
    assert id_map({}) is None
    assert lines(MAP.users) == b"0 100000 1000\n1000 500000 2\n"
    assert MAP.root == (100000, 200000)
    assert MAP.owner(1001, 7) == (500001, 200007)
    assert MAP.owner(1002, 1000) == (100000, 200000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is missing"),
        ("0:1", "is not"),
        ("-1:-1:-2", "is not"),
        ("0:100000:0", "no ids"),
        ("0:4294967290:10", "beyond"),
        ("0:99999999999:1", "is not"),
        ("1:1:1", "root"),
        ("0:1:10,5:100:10", "overlap inside"),
        ("0:1:10,20:5:10", "overlap outside"),
        ("0:1:1,", "is not"),
        ("0:\u0661:1", "is not"),
        (",".join(f"{n}:{n}:1" for n in range(400)), "is not"),
    ],
)
def test_bad_labels(text: str, said: str) -> None:
    """What is no mapping is an error that names the label."""
    for label in (UID_MAPPING, GID_MAPPING):
        with pytest.raises(Invalid, match=said) as caught:
            id_map({**LABELS, label: text})
        assert label in str(caught.value)


@given(st.text(max_size=200))
def test_any_text(text: str) -> None:
    """Garbage in a label is Invalid or a mapping, nothing else."""
    try:
        found = id_map({UID_MAPPING: text, GID_MAPPING: "0:1:1"})
    except Invalid:
        return
    assert found is not None


@pytest.mark.root
def test_user_namespace() -> None:
    """The descriptor is of a namespace of its own; what the kernel does not take is an error."""
    with user_namespace(lines(MAP.users), lines(MAP.groups)) as found:
        assert os.fstat(found).st_ino != os.stat("/proc/self/ns/user").st_ino
        assert not os.get_inheritable(found)
    with pytest.raises(OSError, match="Invalid argument"), user_namespace(b"0 1 0\n", b"0 1 1\n"):
        pass


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory whose mounts go with the test."""
    yield tmp_path
    unmount_below(tmp_path)


def mounted(root: Path) -> set[str]:
    """What is mounted below root/i."""
    prefix = os.fsencode(root / "i") + b"/"
    return {os.fsdecode(each.target[len(prefix) :]) for each in mountinfo() if each.target.startswith(prefix)}


@pytest.mark.root
def test_snapshots_of_a_mapping(disk: Path) -> None:
    """Owners of local layers are seen mapped, the upper directory is the container root's, nothing is changed below;
    Mounts gives the same again, also after a restart, and Remove takes the mounts away.
    """
    root = disk / "r"
    at = root / "snapshots"
    with Snapshotter(bytes(root)) as snapshots:
        for number, parent in ((1, ""), (2, "1")):
            snapshots.prepare(f"a{number}", parent, {})
            (at / str(number) / "fs/file").write_text("x")
            os.chown(at / str(number) / "fs/file", number, 1002)
            snapshots.commit(f"a{number}", str(number), {})
        os.chown(at / "2/fs", 3, 4)
        [mount] = snapshots.prepare("c", "2", LABELS)
        assert f"lowerdir={root}/i/3/s2:{root}/i/3/s1" in mount.options
        assert not [option for option in mount.options if option.startswith(("uidmap", "gidmap"))]
        status = (root / "i/3/s2/file").stat()
        assert (status.st_uid, status.st_gid) == (100002, 65534)
        status = (at / "3/fs").stat()
        assert (status.st_uid, status.st_gid) == (100003, 200004)
        assert (at / "2/fs/file").stat().st_uid == 2
        [view] = snapshots.view("v", "1", LABELS)
        assert (view.type, view.source) == ("bind", f"{root}/i/4/s1")
        [empty] = snapshots.prepare("e", "", LABELS)
        assert (empty.type, (at / "5/fs").stat().st_uid) == ("bind", 100000)
        assert snapshots.mounts("c") == (mount,)
        assert mounted(root) == {"3/s1", "3/s2", "4/s1"}
    with Snapshotter(bytes(root)) as snapshots:
        before = [each.mount_id for each in mountinfo()]
        assert snapshots.mounts("c") == (mount,)
        assert before == [each.mount_id for each in mountinfo()]
        snapshots.unmount_all()
        assert mounted(root) == set()
        assert snapshots.mounts("c") == (mount,)
        assert (root / "i/3/s2/file").stat().st_uid == 100002
        snapshots.remove("c")
        assert mounted(root) == set()
        assert os.listdir(root / "i") == []
        assert (at / "2/fs/file").read_text() == "x"


@pytest.mark.root
def test_a_crash_leaves_nothing(disk: Path) -> None:
    """Mounts of a snapshot that is not there go at cleanup; a failed Prepare leaves none."""
    root = disk / "r"
    with Snapshotter(bytes(root)) as snapshots:
        snapshots.prepare("a", "", {})
        snapshots.commit("a", "1", {})
        snapshots.prepare("c", "1", LABELS)
        MappedMounts(bytes(root)).lowerdirs(99, MAP, [bytes(root / "snapshots/1/fs")])
        assert mounted(root) == {"2/s1", "99/s1"}
    with Snapshotter(bytes(root)) as snapshots:
        snapshots.cleanup()
        assert mounted(root) == {"2/s1"}
        for labels in ({**LABELS, GID_MAPPING: "x"}, {UID_MAPPING: "0:1:1"}):
            with pytest.raises(Invalid):
                snapshots.prepare("d", "1", labels)
        with pytest.raises(NotFound):
            snapshots.prepare("d", "nobody", LABELS)
        assert mounted(root) == {"2/s1"}
        assert sorted(os.listdir(root / "snapshots")) == ["1", "2"]


@pytest.mark.root
def test_owners_that_containerd_copied(disk: Path) -> None:
    """Above a snapshot whose owners containerd changed itself nothing is mapped a second time; above a layer of an
    image that happens to belong to that user, it is.
    """
    root = disk / "r"
    with Snapshotter(bytes(root)) as snapshots:
        for number, labels in ((1, {}), (2, {TARGET: "sha256:" + "a" * 64})):
            snapshots.prepare(f"a{number}", "", {})
            os.chown(root / f"snapshots/{number}/fs", 100000, 200000)
            snapshots.commit(f"a{number}", str(number), labels)
        snapshots.prepare("copied", "1", LABELS)
        assert mounted(root) == set()
        assert (root / "snapshots/3/fs").stat().st_uid == 100000
        snapshots.prepare("image", "2", LABELS)
        assert mounted(root) == {"4/s2"}


def test_what_came_after_the_list_stays(tmp_path: Path) -> None:
    """Cleaning up takes what was listed before it was known what is to stay; a snapshot made meanwhile keeps its own."""
    mapped = MappedMounts(bytes(tmp_path))
    for number in (1, 2):
        (tmp_path / f"i/{number}").mkdir()
    listed = mapped.listed()
    (tmp_path / "i/3").mkdir()
    mapped.remove_others(listed, {2})
    assert sorted(path.name for path in (tmp_path / "i").iterdir()) == ["2", "3"]
