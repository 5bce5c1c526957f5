"""A start over layers that are not what they were: each bad one named and unavailable, all else as before."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.unit.test_openlayers import TRUE, ZTOC, Source, World, other_table

from soci_snapshotter.errors import Remote, SociError
from soci_snapshotter.layers import shelf
from soci_snapshotter.layers.openlayer import LayerKey
from soci_snapshotter.store.layerfiles import layer_directory


@dataclass
class Two:
    """A node with two lazy layers, of which `bad` is to be spoiled while the daemon is down."""

    world: World
    bad: int
    good: int

    @property
    def key(self) -> LayerKey:
        """Of the bad one."""
        return self.world.keys[self.bad]

    @property
    def directory(self) -> Path:
        """Of the bad one."""
        return layer_directory(self.world.root, self.key.layer, self.key.ztoc)

    def restart(self, spoil: Callable[[Path], None], *, fresh: bool = False) -> None:
        """Stop, spoil, start; after a reboot (`fresh`) nothing is mounted."""
        self.world.stop()
        spoil(self.directory)
        if fresh:
            self.world.mounter.table.clear()
        self.world.start(fresh=fresh)

    def drop(self) -> None:
        """Remove the bad layer's snapshot."""
        self.world.book.rows = [row for row in self.world.book.rows if row[0] != self.bad]
        self.world.layers.release(self.bad)


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    monkeypatch.setattr(shelf, "GRACE_SECONDS", -1.0)
    world = World(tmp_path)
    world.start()
    try:
        yield Two(world, world.prepare(TRUE), world.prepare(TRUE, world.key(other_table())))
    finally:
        world.stop()


def garbage(directory: Path) -> None:
    (directory / "layer.json").write_bytes(b"\0\xff{")


def huge(directory: Path) -> None:
    (directory / "layer.json").write_bytes(b" " * (2 << 20))


def gone(directory: Path) -> None:
    (directory / "layer.json").unlink()


def everything(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize("spoil", [garbage, huge, gone, everything])
def test_a_lost_record(two: Two, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture) -> None:
    """It is named with its image, unavailable with what to do, its mount in use stays; the other one is as before; and
    when its snapshot is removed a new pull makes it anew."""
    world = two.world
    held = world.layers.lowerdir(two.bad)
    other = world.layers.lowerdir(two.good)
    world.book.given = {os.fsencode(held)}
    two.restart(spoil)
    [record] = [r for r in caplog.records if "is lost" in r.message]
    assert record.levelno == logging.ERROR and two.key.layer in record.message
    assert vars(record)["images"] == [TRUE.image] and vars(record)["snapshots"] == 1
    with pytest.raises(Remote, match=f"layer {two.key.layer} is lost: .*pull it again"):
        world.layers.lowerdir(two.bad)
    assert held in world.mounter.table
    assert world.layers.lowerdir(two.good) == other
    two.drop()
    assert not two.directory.exists()
    world.book.given = set()
    again = world.prepare(TRUE, world.key())
    assert again not in (two.bad, two.good)
    assert world.layers.lowerdir(again) in world.mounter.table
    two.restart(lambda directory: None)
    assert held not in world.mounter.table
    assert world.layers.lowerdir(again) in world.mounter.table


def test_losses_that_are_expected(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    """With [snapshotter] allow_invalid_mounts_on_restart they are warnings; the start goes on either way."""
    world = two.world
    world.stop()
    garbage(two.directory)
    world.expect_lost = True
    world.start()
    assert {r.levelno for r in caplog.records if "is lost" in r.message} == {logging.WARNING}


@pytest.mark.parametrize("spoil", [garbage, gone])
def test_a_lost_record_that_nobody_misses(two: Two, spoil: Callable[[Path], None]) -> None:
    """A Prepare that was interrupted, or a removed layer: its directory and ztoc go."""
    ztoc = two.world.content.path(two.key.ztoc)
    two.world.book.rows = two.world.book.rows[1:]
    two.restart(spoil)
    assert not two.directory.exists() and not ztoc.exists()
    assert two.world.layers.lowerdir(two.good) in two.world.mounter.table


def test_a_lost_ztoc_comes_back(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    """Without it nothing is served and nobody is given its mount; the next pull brings it, and the old snapshot too."""
    world = two.world
    ztoc = world.content.path(two.key.ztoc)
    old = world.layers.lowerdir(two.bad)
    world.book.given = {os.fsencode(old)}
    two.restart(lambda directory: ztoc.unlink())
    assert [r for r in caplog.records if "cannot be served" in r.message and two.key.layer in r.message]
    with pytest.raises(Remote, match=r"cannot be mounted: .*pull it again"):
        world.layers.lowerdir(two.bad)
    assert old in world.mounter.table
    assert world.prepare(TRUE, LayerKey(two.key.layer, world.content.put(ZTOC))) == two.bad
    assert world.layers.lowerdir(two.bad) != old
    assert world.device(two.bad).startswith(b"fuse/")


def test_a_damaged_image_of_the_tree(two: Two) -> None:
    """After a reboot it cannot be mounted: unavailable, removed, and built anew by the next pull."""
    world = two.world
    [image] = two.directory.glob("meta-*.erofs")
    content = image.read_bytes()
    image.write_bytes(b"garbage")
    two.restart(lambda directory: None, fresh=True)
    with pytest.raises(Remote, match=r"cannot be mounted: .*pull it again"):
        world.layers.lowerdir(two.bad)
    assert not image.exists()
    assert world.layers.lowerdir(two.good) in world.mounter.table
    assert world.prepare(TRUE, world.key()) == two.bad
    assert image.read_bytes() == content
    assert world.layers.lowerdir(two.bad) in world.mounter.table


@pytest.mark.parametrize("name", ["spans.live", "spans.durable", "spans.closed", "data.tar"])
@pytest.mark.parametrize("how", ["longer", "shorter", "gone"])
def test_span_maps_of_another_length(two: Two, name: str, how: str) -> None:
    """Only what is proven to be here counts: the rest is fetched again, and the layer ends as the same bytes."""
    world = two.world
    [lazy] = [layer for layer in world.layers.layers() if layer.key == two.key]
    lazy.reader.fetch_ahead(range(2))
    while lazy.reader.flying:
        os.sched_yield()
    lazy.files.make_durable()

    def spoil(directory: Path) -> None:
        path = directory / name
        if how == "gone":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size + (600 << 20 if how == "longer" else -3))

    two.restart(spoil)
    asked = Source.asked
    world.fill()
    assert (two.directory / "data.tar").read_bytes() == (
        layer_directory(world.root, *world.keys[two.good]) / "data.tar"
    ).read_bytes()
    assert Source.asked > asked


def test_what_is_not_ours_is_left_alone(two: Two) -> None:
    """Files and directories of somebody else, wherever they are in the root, are there after a start, and harm nobody."""
    root = two.world.root
    top = root / "layers" / two.key.layer.hex
    foreign = [
        root / "notes.txt",
        root / "layers" / "notes",
        root / "layers" / "mine" / "deep" / "file",
        top / "copy-of-it" / "data.tar",
        top / "notes",
        root / "m" / "notes",
        root / "m" / "7x" / "file",
        root / "m" / "4000",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("mine")
    (root / "layers" / ("a" * 64)).symlink_to(root / "layers" / "mine")
    two.restart(lambda directory: None)
    assert [path for path in foreign if path.read_text() != "mine"] == []
    for number in (two.bad, two.good):
        assert two.world.layers.lowerdir(number) in two.world.mounter.table
    made = two.world.layers._shelf.points.next()
    assert made > 4000  # nothing is mounted over it


def test_leftovers_of_killed_calls_are_swept(two: Two) -> None:
    """Temporary files, images that no row knows, mount points and mounts of nobody, half a blob: gone after a start."""
    world, root = two.world, two.world.root
    left = [
        two.directory / "layer.json.tmp",
        two.directory / f"meta-{'0' * 32}.erofs",
        two.directory / f"meta-{'1' * 32}.erofs.123.tmp",
        root / "content" / "ingest" / "tmpabc",
    ]
    for path in left:
        path.write_bytes(b"half")
    for number in (901, 902):
        (root / "m" / str(number)).mkdir()
    world.mounter.table[root / "m" / "902"] = b"fuse/1"
    unborn = layer_directory(root, two.key.layer, world.content.put(b"another ztoc"))
    unborn.mkdir()
    (unborn / "meta-2.erofs").write_bytes(b"x")
    two.restart(lambda directory: None)
    assert [path for path in (*left, unborn, root / "m" / "901", root / "m" / "902") if path.exists()] == []
    assert len(world.mounter.table) == 2
    assert len(list((root / "content" / "blobs" / "sha256").iterdir())) == 2


def test_a_row_whose_mount_the_record_does_not_know(two: Two) -> None:
    """A record from a backup, older than the rows: that row is unavailable, those it knows are served."""
    world = two.world
    world.keys[77] = two.key
    world.book.rows.append((77, TRUE))
    two.restart(lambda directory: None)
    assert world.layers.lowerdir(two.bad) in world.mounter.table
    with pytest.raises(SociError, match="is lost: its record has no such mount"):
        world.layers.lowerdir(77)
    world.layers.release(77)
    assert two.directory.exists()


def test_a_release_that_another_process_heard_of(two: Two) -> None:
    """A layer without mounts that nobody has open goes at the start; one that is open stays until it is closed."""
    world = two.world
    nodes = {key: layer.record.node_id for layer in world.layers.all_layers() for key in [layer.key]}
    world.book.rows = []
    world.server.used = {nodes[two.key]}
    two.restart(lambda directory: None)
    assert [layer.key for layer in world.layers.all_layers()] == [two.key]
    assert list(world.server.files) == [nodes[two.key]]
    world.layers.released(nodes[two.key])
    assert not world.layers.all_layers() and not list(world.root.glob("layers/*"))
