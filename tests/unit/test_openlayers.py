"""The table of layers with a mount table and a kernel that are played: completion, lies, sharing, the quota, restarts."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from soci_snapshotter.errors import Integrity, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import ztoc, ztoc_writer
from soci_snapshotter.formats.digest import Buffer
from soci_snapshotter.layers import meta, openlayers, shelf
from soci_snapshotter.layers.complete import Completer, hash_tar
from soci_snapshotter.layers.meta import MetaRequest, MetaResult
from soci_snapshotter.layers.openlayer import LayerKey, Surroundings
from soci_snapshotter.layers.openlayers import Mounted, OpenLayers
from soci_snapshotter.layers.pool import FlightPool
from soci_snapshotter.layers.reader import ReadOptions
from soci_snapshotter.policy.lazy import Declined
from soci_snapshotter.policy.proof import Claim
from soci_snapshotter.serve.flatfiles import FlatFile
from soci_snapshotter.store.content import ContentStore

CASE = Path(__file__).parents[1] / "vectors" / "gnu6-edge1-span64k"
BLOB = (CASE / "layer.tar.gz").read_bytes()
TAR = gzip.decompress(BLOB)
DIFF_ID = digests.sha256(TAR)
LAYER = digests.sha256(BLOB)
ZTOC = (CASE / "ztoc.bin").read_bytes()
TRUE = Claim(DIFF_ID, "", "", "registry.test/true:1", 1)
FALSE = Claim(digests.sha256(b"else"), "", "", "registry.test/false:1", 2)


@dataclass
class Server:
    """The kernel's side of FUSE: what is served."""

    files: dict[int, FlatFile] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    def add(self, node_id: int, file: FlatFile, *, opens: int = 0) -> None:
        self.files[node_id] = file

    def remove(self, node_id: int) -> None:
        self.files.pop(node_id, None)

    def in_use(self, node_id: int) -> bool:
        return node_id in self.used

    def path_of(self, node_id: int) -> bytes:
        return b"fuse/%d" % node_id


@dataclass
class Mounter:
    """A mount table: directory -> device."""

    table: dict[Path, bytes] = field(default_factory=dict)

    def mount(self, meta: Path, device: bytes, target: Path) -> None:
        assert target.is_dir()
        if meta.read_bytes()[1024:1028] != b"\xe2\xe1\xf5\xe0":
            raise OSError(errno.EINVAL, "not an EROFS image")
        assert target not in self.table, "mounted over a mount"
        self.table[target] = device

    def unmount(self, target: Path) -> None:
        if self.table.pop(target, None) is None:
            raise OSError(errno.EINVAL, "not mounted")

    def mounted(self) -> set[Path]:
        return set(self.table)


@dataclass
class Book:
    """The snapshots."""

    rows: list[tuple[int, Claim]] = field(default_factory=list)
    given: set[bytes] = field(default_factory=set)
    condemned: dict[int, str] = field(default_factory=dict)

    def handed_out(self) -> frozenset[bytes]:
        return frozenset(self.given)

    def claims(self, mount_ids: Sequence[int]) -> list[Claim]:
        return [c for n, c in self.rows if n in mount_ids and c.snapshot not in self.condemned]

    def condemn(self, reasons: dict[int, str]) -> None:
        self.condemned.update(reasons)


class Source:
    """The registry."""

    group = "registry.test"
    asked = 0

    def read_range(self, start: int, end: int, sink: Callable[[memoryview], None], deadline: float) -> None:
        Source.asked += 1
        sink(memoryview(BLOB[start:end]))

    def close(self) -> None:
        """Nothing to end."""

    def warm(self) -> None:
        pass


class Replies:
    """Nobody waits in these tests."""

    def reply(self, unique: int, data: Buffer) -> None: ...
    def reply_error(self, unique: int, code: int) -> None: ...


class Workers:
    """Builds here."""

    def build(self, request: MetaRequest) -> MetaResult:
        return meta.build(request)


@dataclass
class World:
    """A node whose daemon can be started again."""

    root: Path
    server: Server = field(default_factory=Server)
    mounter: Mounter = field(default_factory=Mounter)
    book: Book = field(default_factory=Book)
    quota: int = 0
    expect_lost: bool = False
    boot: bytes = b"a" * 36
    stack: ExitStack = field(default_factory=ExitStack)
    layers: OpenLayers = field(init=False)
    keys: dict[int, LayerKey] = field(default_factory=dict)

    def start(self, *, fresh: bool = False) -> None:
        content = ContentStore(self.root / "content")
        pool = self.stack.enter_context(FlightPool(4))
        self.layers = self.stack.enter_context(
            OpenLayers(
                self.root,
                content=content,
                workers=Workers(),  # type: ignore[arg-type]
                server=self.server,
                mounter=self.mounter,
                around=Surroundings(Replies(), pool, ReadOptions(10), self.boot, lambda *_: Source()),
                quota=self.quota,
                idle_seconds=0,
            )
        )
        self.content = content
        self.layers.restore_files(fresh=fresh)
        self.layers.attach(self.book)
        rows = [(number, str(self.keys[number])) for number, _ in self.book.rows]
        self.layers.restore_mounts(rows, fresh=fresh, expect_lost=self.expect_lost)

    def stop(self) -> None:
        self.stack.close()
        self.stack = ExitStack()
        self.server.files.clear()

    def key(self, table: bytes = ZTOC) -> LayerKey:
        return LayerKey(LAYER, self.content.put(table))

    def prepare(self, claim: Claim = TRUE, key: LayerKey | None = None) -> int:
        """A row's number; its row is in the book."""
        made = self.layers.prepare(key or self.key(), claim.image, [], None, claim)
        assert isinstance(made, Mounted), made
        self.keys[made.number] = made.key
        self.book.rows.append((made.number, claim))
        self.layers.committed(made.number)
        return made.number

    def fill(self) -> None:
        """Fetch all spans and complete."""
        with Completer(self.layers) as completer:
            self.layers.on_full = completer.submit
            for layer in self.layers.layers():
                layer.reader.fetch_ahead(range(len(layer.spans)))
            end = time.monotonic() + 20
            while self.layers.layers():
                assert time.monotonic() < end
                time.sleep(0.01)
            with self.layers._shelf.turns.turn(self.key()):  # behind what it does last
                pass

    def device(self, number: int) -> bytes:
        """What the row's mount reads from."""
        return self.mounter.table[self.layers.lowerdir(number)]

    def release_fuse(self) -> None:
        """The kernel closes every handle that no mount has."""
        for node in list(self.server.files):
            if self.server.path_of(node) not in self.mounter.table.values():
                self.layers.released(node)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(shelf, "GRACE_SECONDS", -1.0)
    made = World(tmp_path)
    made.start()
    yield made
    made.stop()


def data(world: World) -> Path:
    """data.tar of the only layer."""
    [found] = world.root.glob("layers/*/*/data.tar")
    return found


def test_completion(world: World) -> None:
    """The tar with its tail is hashed; the row gets a local mount, the old one stays while it is held, then all goes."""
    number = world.prepare()
    old = world.layers.lowerdir(number)
    assert world.device(number).startswith(b"fuse/")
    world.book.given = {os.fsencode(old)}
    world.fill()
    assert world.layers.counts["layers_completed"] == 1
    [layer] = world.layers.all_layers()
    assert layer.record.diff_id == DIFF_ID
    assert layer.record.tar_size == len(TAR)
    assert data(world).read_bytes() == TAR
    assert world.device(number) == os.fsencode(data(world))
    world.layers.tick()
    assert old in world.mounter.table
    [file] = world.server.files.values()
    assert file.read(1, 512, 1024) == TAR[512:1536]
    world.book.given = set()
    world.layers.returned([os.fsencode(old)])
    assert old not in world.mounter.table and not old.exists()
    world.release_fuse()
    assert not world.server.files
    world.book.rows.clear()
    world.layers.release(number)
    assert not list(world.root.glob("layers/*")) and not world.mounter.table
    assert not list((world.root / "content/blobs/sha256").iterdir())


def test_a_held_path_that_is_returned_goes_later(world: World) -> None:
    """While it is pinned (attributes are read below it) a superseded mount stays; then it goes."""
    number = world.prepare()
    with world.layers.pinned([number]) as paths:
        world.fill()
        world.layers.tick()
        assert Path(os.fsdecode(paths[number])) in world.mounter.table
    world.layers.tick()
    assert Path(os.fsdecode(paths[number])) not in world.mounter.table


@pytest.mark.parametrize("fresh", [False, True])
def test_restart_of_complete_layers(world: World, fresh: bool) -> None:
    """Local mounts are adopted, or made again after a reboot; old FUSE mounts are served only while they can live."""
    number = world.prepare()
    old = world.layers.lowerdir(number)
    world.book.given = {os.fsencode(old)}
    world.fill()
    new = world.layers.lowerdir(number)
    world.stop()
    asked = Source.asked
    if fresh:
        world.mounter.table.clear()
        world.boot = b"b" * 36
    world.start(fresh=fresh)
    assert world.layers.lowerdir(number) == new
    assert world.device(number) == os.fsencode(data(world))
    assert bool(world.server.files) is not fresh
    assert (old in world.mounter.table) is not fresh
    assert Source.asked == asked
    world.layers.tick()
    assert (old in world.mounter.table) is not fresh


def test_a_daemon_that_died_between_record_and_mount(world: World) -> None:
    """Complete on disk, still shown through FUSE: the next start goes on from there."""
    number = world.prepare()
    world.layers._shelf.show_local = lambda layer: None  # type: ignore[method-assign]
    world.fill()
    assert world.device(number).startswith(b"fuse/")
    world.stop()
    world.start()
    assert world.device(number) == os.fsencode(data(world))


def test_a_lie_is_condemned_and_others_are_not(world: World) -> None:
    """Two rows on one layer, one honest: the other is condemned, the layer is served. Later lies are declined."""
    honest, liar = world.prepare(TRUE), world.prepare(FALSE)
    assert honest == liar
    world.fill()
    assert list(world.book.condemned) == [2]
    assert FALSE.target in world.book.condemned[2]
    [layer] = world.layers.all_layers()
    assert not layer.record.condemned
    assert world.device(honest) == os.fsencode(data(world))
    again = world.layers.prepare(world.key(), "r", [], None, FALSE)
    assert isinstance(again, Declined) and DIFF_ID in again.reason


def test_a_layer_of_lies_only_fails(world: World) -> None:
    """EIO through FUSE, over a restart; an honest snapshot makes it good again; the lie is remembered afterwards."""
    number = world.prepare(FALSE)
    world.book.given = {os.fsencode(world.layers.lowerdir(number))}
    world.fill()
    for _ in range(2):
        [file] = world.server.files.values()
        with pytest.raises(OSError, match="not what its image says"):
            file.read(1, 0, 512)
        world.stop()
        world.start()
    right = world.prepare(TRUE)
    assert world.device(right) == os.fsencode(data(world))
    [file] = world.server.files.values()
    assert file.read(1, 0, 512) == TAR[:512]
    world.book.rows.clear()
    world.book.given.clear()
    for _ in range(2):
        world.layers.release(number)
    world.release_fuse()
    assert not world.layers.all_layers()
    world.stop()
    world.start()
    assert isinstance(world.layers.prepare(world.key(), "r", [], None, FALSE), Declined)
    assert isinstance(world.layers.prepare(world.key(), "r", [], None, TRUE), Mounted)


def test_a_ztoc_that_lies(world: World) -> None:
    """Whatever its bytes: its rows are condemned, reads fail, it is declined from then on, also when it is gone."""
    number = world.prepare(TRUE)
    world.layers.condemn(world.key(), "entry x: mode is 1 in the table of contents and 2 in the tar")
    assert list(world.book.condemned) == [1]
    for _ in range(2):
        [file] = world.server.files.values()
        with pytest.raises(OSError, match="not what its image says"):
            file.read(1, 0, 512)
        made = world.layers.prepare(world.key(), "r", [], None, TRUE)
        assert isinstance(made, Declined) and "entry x" in made.reason
        world.stop()
        world.start()
    world.layers.release(number)
    world.release_fuse()
    assert not world.layers.all_layers()
    assert isinstance(world.layers.prepare(world.key(), "r", [], None, TRUE), Declined)


def other_table(**changes: object) -> bytes:
    """Another ztoc of the same layer: made by somebody else, possibly with entries changed."""
    from dataclasses import replace

    table = ztoc.decode(ZTOC)
    entries = list(table.entries)
    for name, value in changes.items():
        number = next(i for i, entry in enumerate(entries) if entry.type == "reg")
        entries[number] = entries[number]._replace(**{name: value})
    return ztoc_writer.encode(replace(table, build_tool="another", entries=entries))


def test_proven_bytes_are_shared_across_ztocs(world: World) -> None:
    """Another ztoc of the layer needs no span: its directory has the same file, and both go on their own."""
    first = world.prepare(TRUE)
    world.fill()
    asked = Source.asked
    second = world.prepare(TRUE, world.key(other_table()))
    assert second != first and Source.asked == asked
    one, two = sorted(world.root.glob("layers/*/*/data.tar"))
    assert one.stat().st_ino == two.stat().st_ino
    assert world.layers.counts["layers_shared"] == 1
    size, _ = world.layers.all_layers()[0].allocated()
    assert size < one.stat().st_blocks * 512
    world.layers.release(first)
    world.layers.tick()
    world.release_fuse()
    assert data(world).read_bytes() == TAR
    world.stop()
    world.start()
    assert world.device(second) == os.fsencode(data(world))


def test_sharing_believes_no_table(world: World) -> None:
    """A table that says a mode which the tar does not have is refused, and nothing is left of the try."""
    world.prepare(TRUE)
    world.fill()
    with pytest.raises(Integrity, match="mode is"):
        world.layers.prepare(world.key(other_table(mode=0o4777)), "r", [], None, TRUE)
    assert len(world.layers.all_layers()) == 1
    assert data(world)


def test_no_sharing_with_who_claims_otherwise(world: World) -> None:
    """The bytes are there, but are not what this snapshot says: fetched for itself."""
    world.prepare(TRUE)
    world.fill()
    world.prepare(FALSE, world.key(other_table()))
    assert len(world.layers.layers()) == 1


@pytest.mark.parametrize("full", [False, True], ids=["lazy", "complete"])
def test_the_quota_empties_idle_layers(world: World, full: bool) -> None:
    """Above the quota a layer that no snapshot holds gives up its bytes, sleeps, and wakes when it is asked for."""
    number = world.prepare()
    path = world.layers.lowerdir(number)
    if full:
        world.fill()
        world.layers.tick()
        world.release_fuse()
        path = world.layers.lowerdir(number)
    else:
        [layer] = world.layers.layers()
        layer.reader.fetch_ahead(range(3))
        while layer.reader.flying:
            time.sleep(0.01)
        layer.files.make_durable()
    world.layers._quota = 4096
    world.book.given = {os.fsencode(path)}
    world.layers.evict()
    assert path in world.mounter.table
    world.book.given = set()
    world.layers.evict()
    world.release_fuse()
    assert not world.mounter.table and not world.server.files
    assert not list(world.root.glob("layers/*/*/data.tar"))
    assert not list(world.root.glob("layers/*/*/spans.*"))
    assert world.layers.counts["layers_evicted"] == 1
    world.stop()
    world.start()
    assert not world.mounter.table
    assert world.layers.lowerdir(number) in world.mounter.table
    [layer] = world.layers.layers()
    assert not any(layer.files.live)
    world.fill()
    assert data(world).read_bytes() == TAR


def test_a_snapshot_that_comes_during_eviction_wins(world: World) -> None:
    """A path given between the look and the unmount keeps the mount."""
    number = world.prepare()
    path = world.layers.lowerdir(number)
    world.layers._quota = 1
    looks = iter([frozenset[bytes](), frozenset({os.fsencode(path)})])
    world.book.handed_out = lambda: next(looks)  # type: ignore[method-assign]
    world.layers.evict()
    assert world.layers.lowerdir(number) == path and path in world.mounter.table


def test_a_shared_file_is_not_emptied_for_the_other(world: World) -> None:
    """Eviction of one of two layers that share a file leaves the other whole."""
    first = world.prepare(TRUE)
    world.fill()
    second = world.prepare(TRUE, world.key(other_table()))
    world.layers.tick()
    world.release_fuse()
    world.book.given = {os.fsencode(world.layers.lowerdir(second))}
    world.layers._quota = 1
    world.layers.evict()
    assert data(world).read_bytes() == TAR
    world.layers.lowerdir(first)
    assert len(list(world.root.glob("layers/*/*/data.tar"))) == 2


def test_an_interrupted_prepare_leaves_nothing(world: World) -> None:
    """A directory without a record goes at the next start."""
    directory = world.root / "layers" / ("a" * 64) / ("b" * 64)
    directory.mkdir(parents=True)
    (directory / "data.tar").write_bytes(TAR)
    world.stop()
    world.start()
    assert not directory.exists()


def test_a_number_that_is_gone(world: World) -> None:
    """A row whose layer could not be restored is unavailable, not wrong."""
    number = world.prepare()
    world.stop()
    for directory in world.root.glob("layers/*/*"):
        (directory / "layer.json").write_text("{}")
    world.start()
    with pytest.raises(Remote, match=r"is lost: .*layer\.json: not a layer record.*pull it again"):
        world.layers.lowerdir(number)
    shutil.rmtree(world.root / "layers")


def test_hash_of_a_file(tmp_path: Path) -> None:
    """sha256 of exactly the first bytes; a file that ends before them is an error."""
    content = os.urandom(3 << 20)
    path = tmp_path / "f"
    path.write_bytes(content + b"more")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert hash_tar(fd, len(content)) == "sha256:" + hashlib.sha256(content).hexdigest()
        with pytest.raises(Integrity, match="ends at"):
            hash_tar(fd, len(content) + 5)
    finally:
        os.close(fd)
    assert openlayers.IDLE_SECONDS > 0
