"""Layers pulled whole from imitated registries, by real workers: limits, joins, what goes wrong, what is left."""

from __future__ import annotations

import io
import os
import random
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from soci_snapshotter.errors import Integrity, Invalid, Remote, SociError, Unsupported
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.formats.ztoc import Compression
from soci_snapshotter.index.build import build_ztoc
from soci_snapshotter.layers import eager
from soci_snapshotter.layers.download import Download
from soci_snapshotter.layers.eager import EagerPulls, Filled, Pull, Tools
from soci_snapshotter.layers.unpackers import Unpackers
from soci_snapshotter.policy.eager import Eager, algorithm_of, chunks, parse_size
from soci_snapshotter.registry.ranges import NoRanges, Sink

PULL = Pull(references.parse("registry.test/image:1"), digests.sha256(b"manifest"), "default")
SPAN = 1 << 20
DEFAULT = Eager()
TOOL = "tests"


def tar_of(seed: int, size: int = 3 << 20, tail: int = 0) -> bytes:
    """A tar of two files, half of it zeros; `tail` zeros follow its end."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in (("random", random.Random(seed).randbytes(size)), ("zeros", bytes(size))):
            member = tarfile.TarInfo(f"{name}-{seed}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue() + bytes(tail)


def packed(tar: bytes, *command: str) -> bytes:
    """What a compressor makes of it."""
    return subprocess.run(command, input=tar, stdout=subprocess.PIPE, check=True).stdout if command else tar


@dataclass
class Registry:
    """Blobs by digest; counts requests at once and the sizes of them."""

    blobs: dict[Digest, bytes] = field(default_factory=dict)
    pause: float = 0.0
    before: Callable[[int, int], None] = lambda start, end: None
    ranges: bool = True
    sizes: list[int] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, blob: bytes, digest: Digest | None = None, size: int | None = None) -> Descriptor:
        """Serve it; its descriptor, which may lie."""
        digest = digest or digests.sha256(blob)
        self.blobs[digest] = blob
        return Descriptor("application/x-layer", digest, len(blob) if size is None else size)

    def source(self, reference: Reference, digest: Digest, size: int) -> _Source:
        """See EagerPulls."""
        return _Source(self, self.blobs[digest])


class _Source:
    def __init__(self, registry: Registry, blob: bytes) -> None:
        self._registry = registry
        self._blob = blob

    def doubt(self) -> None:
        """There is no other place."""

    def read_range(self, start: int, end: int, sink: Sink, deadline: float) -> None:
        assert deadline > time.monotonic()
        registry = self._registry
        with registry.lock:
            registry.sizes.append(end - start)
            registry.under_way += 1
            registry.most = max(registry.most, registry.under_way)
        try:
            if start and not registry.ranges:
                raise NoRanges("registry.test: the server ignores Range requests")
            registry.before(start, end)
            time.sleep(registry.pause)
            if end > len(self._blob):
                sink(memoryview(self._blob[start:]))
                raise Remote("registry.test/image: short body")
            for at in range(start, end, 100_000):
                sink(memoryview(self._blob[at : min(at + 100_000, end)]))
        finally:
            with registry.lock:
                registry.under_way -= 1

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def unpackers() -> Iterator[Unpackers]:
    """Workers for the module: starting one takes a while."""
    with Unpackers() as found:
        yield found


@pytest.fixture
def registry() -> Registry:
    """An empty one."""
    return Registry()


@pytest.fixture
def make(tmp_path: Path, registry: Registry, unpackers: Unpackers) -> Iterator[Callable[..., EagerPulls]]:
    """Makes EagerPulls with these rules; at the end nothing may be left of any pull."""
    made: list[EagerPulls] = []

    def one(rules: Eager = DEFAULT, **options: object) -> EagerPulls:
        tools = Tools(unpackers, SPAN, TOOL)
        made.append(EagerPulls(tmp_path, rules, tools, registry.source, request_seconds=5, **options))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for pulls in made:
        pulls.__exit__(None, None, None)


def left(root: Path) -> list[str]:
    """What lies in filling/."""
    return os.listdir(root / "filling")


def content(filled: Filled) -> bytes:
    """data.tar."""
    return (filled.directory / "data.tar").read_bytes()


GZIP = ("gzip", "-n", "-c")
ZSTD = ("zstd", "-q", "-c")
SKIPPABLE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
EXTERNAL = {"gzip": ("/usr/bin/unpigz", "-c"), "zstd": ("/usr/bin/zstd", "-q", "-d", "-c")}


@pytest.mark.parametrize("chunk", [None, 1 << 20])
@pytest.mark.parametrize("command", [GZIP, ZSTD, ()])
def test_the_tar_and_its_ztoc(
    make: Callable[..., EagerPulls],
    registry: Registry,
    tmp_path: Path,
    command: tuple[str, ...],
    chunk: int | None,
) -> None:
    """Every form of a layer gives the tar with its tail, and a ztoc: of gzip and plain tars what `soci create` makes."""
    tar = tar_of(1, tail=700)
    blob = packed(tar, *command)
    layer = registry.add(blob)
    with make(Eager(chunk=chunk)).layer(PULL, layer) as filled:
        unpacked = filled.unpacked
        assert content(filled)[: len(tar)] == tar
        assert unpacked.tar_size == len(tar)
        assert unpacked.diff_id == digests.sha256(tar)
        by_span = command != ZSTD
        form = Compression.GZIP if command == GZIP else Compression.UNCOMPRESSED
        expected = build_ztoc([blob if by_span else tar], compression=form, span_size=SPAN, build_tool=TOOL)
        assert (unpacked.ztoc_digest, unpacked.by_span) == (expected.digest, by_span)
        assert (filled.directory / "ztoc").read_bytes() == expected.data
        # Runs of zeros are holes, and the blob is gone.
        assert (filled.directory / "data.tar").stat().st_blocks * 512 < len(tar) - (2 << 20)
        assert not (filled.directory / "blob").exists()
    assert left(tmp_path) == []
    assert max(registry.sizes) <= (chunk or len(blob))


@pytest.mark.parametrize("command", [GZIP, ZSTD])
def test_external_decompressors(
    make: Callable[..., EagerPulls], registry: Registry, command: tuple[str, ...]
) -> None:
    """What a configured program makes of the layer is the tar; no checkpoints are found."""
    tar = tar_of(2)
    with make(Eager(decompressors=EXTERNAL)).layer(PULL, registry.add(packed(tar, *command))) as filled:
        assert filled.unpacked.diff_id == digests.sha256(tar)
        assert not filled.unpacked.by_span


def test_a_program_gets_its_arguments_as_they_are(
    make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path
) -> None:
    """No shell looks at them: what would be a command in one is only an argument."""
    victim = tmp_path / "victim"
    rules = Eager(decompressors={"gzip": ("/usr/bin/unpigz", "-c", f"; touch {victim}")})
    layer = registry.add(packed(tar_of(3, 1000), *GZIP))
    with (
        pytest.raises(Integrity, match="unpigz could not decompress the layer"),
        make(rules).layer(PULL, layer),
    ):
        pass
    assert not victim.exists()


def test_zstd_frames(make: Callable[..., EagerPulls], registry: Registry) -> None:
    """Several frames, and skippable ones before, between and after them."""
    tar = tar_of(4)
    middle = len(tar) // 2
    blob = SKIPPABLE + packed(tar[:middle], *ZSTD) + SKIPPABLE + packed(tar[middle:], *ZSTD) + SKIPPABLE
    with make().layer(PULL, registry.add(blob)) as filled:
        assert filled.unpacked.diff_id == digests.sha256(tar)


PLAIN = tar_of(5, 1 << 20)
ZIPPED = packed(PLAIN, *GZIP)
FRAMES = packed(PLAIN, *ZSTD)
BAD: dict[str, tuple[bytes, str]] = {
    "gzip cut off": (ZIPPED[:-1000], "cut off"),
    "gzip broken": (ZIPPED[:5000] + bytes(100) + ZIPPED[5100:], "gzip"),
    "zstd cut off": (FRAMES[:-1000], "zstd stream is cut off"),
    "zstd broken": (FRAMES[:5000] + bytes(100) + FRAMES[5100:] + b"x", "zstd"),
    "zstd and more": (FRAMES + b"something", "zstd"),
    "no tar": (packed(b"x" * 5000, *GZIP), ""),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("external", [False, True])
def test_bad_layers(
    make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path, name: str, external: bool
) -> None:
    """One error that names image and layer, whoever decompresses, and nothing is left."""
    blob, words = BAD[name]
    layer = registry.add(blob)
    pulls = make(Eager(decompressors=EXTERNAL if external else {}))
    with pytest.raises((Integrity, Unsupported), match=str(layer.digest)) as caught, pulls.layer(PULL, layer):
        pass
    assert str(caught.value).startswith("image registry.test/image:1: layer ")
    assert external or words in str(caught.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("command", [GZIP, ZSTD, ()])
def test_another_digest(
    make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Good bytes of another layer than the one that was asked for are refused."""
    layer = registry.add(packed(PLAIN, *command), digests.sha256(b"another"))
    with pytest.raises(Integrity, match="have the digest"), make().layer(PULL, layer):
        pass
    assert left(tmp_path) == []


def test_another_size(make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path) -> None:
    """A layer that is shorter than the manifest says is the registry's error, and it is not waited for."""
    layer = registry.add(ZIPPED, size=len(ZIPPED) + 1000)
    with pytest.raises(Remote, match="short body"), make().layer(PULL, layer):
        pass
    assert left(tmp_path) == []


def test_a_full_disk_is_seen_before_it_is_full(
    make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path
) -> None:
    """Whatever a layer inflates to, it leaves the reserve on the disk."""
    status = os.statvfs(tmp_path)
    pulls = make(reserve=status.f_bavail * status.f_frsize + (1 << 30))
    with pytest.raises(OSError, match="No space left") as caught, pulls.layer(PULL, registry.add(ZIPPED)):
        pass
    assert "registry.test/image:1" in str(caught.value)
    assert left(tmp_path) == []


def test_limits(make: Callable[..., EagerPulls], registry: Registry) -> None:
    """Requests at once: per image, and over all images; no request is larger than a chunk."""
    registry.pause = 0.01
    blobs = [registry.add(packed(tar_of(seed), *GZIP)) for seed in range(10, 16)]
    rules = Eager(downloads=3, downloads_per_image=2, chunk=1 << 19)
    pulls = make(rules)
    other = Pull(references.parse("registry.test/other:1"), digests.sha256(b"other"), "default")
    most: list[int] = []

    def pull(which: Pull, layers: list[Descriptor]) -> None:
        with pulls.layer(which, layers[0], layers[1:]):
            pass
        for layer in layers[1:]:
            with pulls.layer(which, layer):
                pass

    pull(PULL, blobs[:3])
    most.append(registry.most)
    threads = [threading.Thread(target=pull, args=args) for args in ((PULL, blobs[:3]), (other, blobs[3:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    most.append(registry.most)
    assert most == [2, 3]
    assert max(registry.sizes) == 1 << 19


def test_unpacks_are_limited(
    make: Callable[..., EagerPulls], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are unpacked one after the other, however many are here."""
    running, most = [0], [0]
    real = Unpackers.run

    def counted(self: Unpackers, *args: object) -> object:
        running[0] += 1
        most[0] = max(most[0], running[0])
        try:
            return real(self, *args)  # type: ignore[arg-type]
        finally:
            running[0] -= 1

    monkeypatch.setattr(Unpackers, "run", counted)
    layers = [registry.add(packed(tar_of(seed), *GZIP)) for seed in range(20, 24)]
    pulls = make(Eager(unpacks_per_image=1))
    with pulls.layer(PULL, layers[0], layers[1:]):
        pass
    for layer in layers[1:]:
        with pulls.layer(PULL, layer):
            pass
    assert most == [1]


def test_who_comes_later_joins(make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path) -> None:
    """A layer pulled ahead, and one that several ask for, is fetched once; its files stay while anybody has them."""
    layers = [registry.add(packed(tar_of(seed), *GZIP)) for seed in range(30, 33)]
    pulls = make()
    with pulls.layer(PULL, layers[0], layers[1:]):
        pass
    with pulls.layer(PULL, layers[1]) as first:
        with pulls.layer(PULL, layers[1]) as second:
            assert first == second
        assert content(first)
    with pulls.layer(PULL, layers[2]):
        pass
    assert sorted(registry.sizes) == sorted(layer.size for layer in layers)
    assert left(tmp_path) == []


def test_nobody_comes(
    make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer pulled ahead for a pull that was given up goes again."""
    monkeypatch.setattr(eager, "ABANDONED_SECONDS", 0.2)
    layers = [registry.add(packed(tar_of(seed), *GZIP)) for seed in range(40, 42)]
    with make().layer(PULL, layers[0], layers[1:]):
        pass
    end = time.monotonic() + 20
    while left(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    assert left(tmp_path) == []


def test_a_failure_ahead_harms_nobody(
    make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path
) -> None:
    """The layer that can be pulled is; the other one is tried again when it is asked for, and then told."""
    good, bad = registry.add(ZIPPED), registry.add(BAD["gzip cut off"][0])
    pulls = make()
    with pulls.layer(PULL, good, [bad]) as filled:
        assert content(filled)[: len(PLAIN)] == PLAIN
    with pytest.raises(Integrity, match="cut off"), pulls.layer(PULL, bad):
        pass
    end = time.monotonic() + 20
    while left(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    assert left(tmp_path) == []


def test_a_registry_without_ranges(make: Callable[..., EagerPulls], registry: Registry) -> None:
    """Chunks are asked for; where the server gives only whole blobs, one request fetches it."""
    registry.ranges = False
    blob = packed(tar_of(50), *GZIP)
    with make(Eager(chunk=1 << 19)).layer(PULL, registry.add(blob)) as filled:
        assert filled.unpacked.diff_id == digests.sha256(tar_of(50))
    assert registry.sizes.count(len(blob)) == 1


def test_a_registry_that_dies(make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path) -> None:
    """What was fetched until then is gone with the error."""

    def die(start: int, _end: int) -> None:
        if start >= 1 << 20:
            raise Remote("registry.test/image: connection refused; check the registry")

    registry.before = die
    layer = registry.add(packed(tar_of(51), *GZIP))
    pulls = make(Eager(chunk=1 << 19))
    with pytest.raises(Remote, match="connection refused"), pulls.layer(PULL, layer):
        pass
    assert left(tmp_path) == []


def test_blobs_are_kept_where_they_are_wanted(
    make: Callable[..., EagerPulls], registry: Registry, tmp_path: Path
) -> None:
    """Who keeps blobs reads every byte as it comes, and its failure is the pull's."""
    kept: dict[Digest, bytes] = {}

    def keep(pull: Pull, layer: Descriptor, download: Download) -> None:
        assert pull == PULL
        kept[layer.digest] = b"".join(download.read(0))
        if layer.digest == bad.digest:
            raise Remote("containerd: no such socket")

    blob = packed(tar_of(60), *GZIP)
    layer, bad = registry.add(blob), registry.add(ZIPPED)
    pulls = make(Eager(keep_blobs=True, chunk=1 << 19), keep=keep)
    with pulls.layer(PULL, layer):
        assert kept == {layer.digest: blob}
    with pytest.raises(Remote, match="no such socket"), pulls.layer(PULL, bad):
        pass
    assert left(tmp_path) == []


def test_leaving_gives_up(registry: Registry, tmp_path: Path) -> None:
    """A daemon that stops does not wait for a registry; what was under way goes at the next start."""
    stuck = threading.Event()
    registry.before = lambda start, end: stuck.wait(20) and None
    failure: list[SociError] = []
    with Unpackers() as unpackers:
        pulls = EagerPulls(
            tmp_path, Eager(), Tools(unpackers, SPAN, TOOL), registry.source, request_seconds=5
        )

        def pull() -> None:
            try:
                with pulls.layer(PULL, registry.add(ZIPPED)):
                    pass
            except SociError as error:
                failure.append(error)

        thread = threading.Thread(target=pull)
        thread.start()
        while not registry.sizes:
            time.sleep(0.01)
        pulls.__exit__(None, None, None)
        thread.join(10)
        assert "stopping" in str(failure[0])
        stuck.set()
        with pytest.raises(Remote, match="stopping"), pulls.layer(PULL, registry.add(ZIPPED)):
            pass
    (tmp_path / "filling" / "left").mkdir()
    EagerPulls(tmp_path, Eager(), Tools(Unpackers(), SPAN, TOOL), registry.source, request_seconds=5)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", None),
        ("0", None),
        ("8mb", 8 << 20),
        ("1.5 KB", 1536),
        (" 2gb ", 2 << 30),
        ("512", 512),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int | None) -> None:
    """Sizes as the configuration has them; units count in 1024."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8 tb", "mb", "-1", "1e3", "8mb8", "99999gb", "٣"])
def test_no_sizes(text: str) -> None:
    """What is none is named."""
    with pytest.raises(Invalid, match="is no size"):
        parse_size(text)


def test_chunks() -> None:
    """Ranges without a gap; the last is what is left."""
    assert chunks(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert chunks(10, None) == chunks(10, 10) == [(0, 10)]
    assert chunks(0, 4) == []


def test_algorithms() -> None:
    """A layer's own first bytes say what it is."""
    heads = (ZIPPED, FRAMES, SKIPPABLE + FRAMES, PLAIN, b"", b"\x1f")
    assert [algorithm_of(head[:4]) for head in heads] == ["gzip", "zstd", "zstd", None, None, None]
