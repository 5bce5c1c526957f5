"""Ztocs and indexes that pulls made on the way: what is kept, what gives way, what is never taken from others."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.layers import freeindex
from soci_snapshotter.layers.eager import Filled, Pull
from soci_snapshotter.layers.freeindex import FreeIndexes
from soci_snapshotter.layers.images import Images
from soci_snapshotter.layers.unpacking import Unpacked
from soci_snapshotter.store.artifacts import Artifacts, IndexRecord
from soci_snapshotter.store.content import ContentStore
from soci_snapshotter.store.freeztocs import FreeZtoc, FreeZtocs

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
LAYERS = [digests.sha256(bytes([number])) for number in range(9)]
PULL = Pull(references.parse("registry.test/image:1"), digests.sha256(b"manifest"), "default")


@pytest.fixture
def content(tmp_path: Path) -> ContentStore:
    """An empty store."""
    return ContentStore(tmp_path / "content")


def put(content: ContentStore, number: int, size: int = 100) -> FreeZtoc:
    """A blob that stands for a ztoc."""
    return FreeZtoc(str(content.put(bytes([number]) * size)), size)


def test_found_again_after_a_restart(tmp_path: Path, content: ContentStore) -> None:
    """What was added is found, by another process too; a ztoc that went is not; a damaged entry is none."""
    table = FreeZtocs(tmp_path, content)
    entries = [put(content, number) for number in range(3)]
    for layer, entry in zip(LAYERS, entries, strict=False):
        assert table.add(layer, entry) == []
    table.add(LAYERS[3], FreeZtoc("", 0))
    content.delete(digests.parse(entries[1].ztoc))
    (tmp_path / "made" / LAYERS[2].hex).write_text("{")
    (tmp_path / "made" / "stray").write_text("x")
    for known in (table, FreeZtocs(tmp_path, content)):
        assert known.find(LAYERS[0]) == entries[0]
        assert known.find(LAYERS[1]) is None
        assert known.find(LAYERS[3]) == FreeZtoc("", 0)
        assert known.find(LAYERS[4]) is None
        assert known.keeps(digests.parse(entries[0].ztoc))
        assert not known.keeps(LAYERS[0])
    assert FreeZtocs(tmp_path, content).find(LAYERS[2]) is None


def test_the_least_recently_used_give_way(tmp_path: Path, content: ContentStore) -> None:
    """Over the limit the oldest go, in the order of their last use, which a restart knows."""
    table = FreeZtocs(tmp_path, content, limit=250)
    entries = [put(content, number) for number in range(4)]
    for number in range(2):
        table.add(LAYERS[number], entries[number])
        os.utime(tmp_path / "made" / LAYERS[number].hex, ns=(number, number))
    assert table.find(LAYERS[0]) is not None
    assert table.add(LAYERS[2], entries[2]) == [digests.parse(entries[1].ztoc)]
    again = FreeZtocs(tmp_path, content, limit=250)
    os.utime(tmp_path / "made" / LAYERS[0].hex)
    assert again.find(LAYERS[1]) is None
    assert again.add(LAYERS[3], entries[3]) == [digests.parse(entries[0].ztoc)]


class Registry:
    """One image of some layers."""

    def __init__(self, sizes: list[int]) -> None:
        layers = tuple(Descriptor(GZIP, LAYERS[number], size) for number, size in enumerate(sizes))
        config = Descriptor(oci.CONFIG, digests.sha256(b"config"), 10)
        self.image = oci.Manifest(schema_version=2, media_type=oci.MANIFEST, config=config, layers=layers)

    def manifest(self, _reference: object, digest: Digest) -> tuple[Descriptor, oci.Manifest]:
        return Descriptor(oci.MANIFEST, digest, 500), self.image

    def config(self, _reference: object, _digest: Digest) -> object:
        return SimpleNamespace(architecture="amd64", os="linux")


def learn(indexes: FreeIndexes, root: Path, number: int, *, by_span: bool = True) -> str:
    """A layer was pulled; its ztoc."""
    data = bytes([number]) * 100
    directory = root / f"filled{number}"
    directory.mkdir()
    (directory / "ztoc").write_bytes(data)
    unpacked = Unpacked(str(digests.sha256(data)), 100, str(LAYERS[0]), 1, 1, by_span)
    indexes.keep(Filled(directory, Descriptor(GZIP, LAYERS[number], 1), unpacked))
    return unpacked.ztoc_digest


def listed(root: Path) -> list[IndexRecord]:
    """What `soci index list` would show."""
    with Artifacts(root / "content" / "artifacts.sqlite") as artifacts:
        return artifacts.all()


def indexes_of(root: Path, content: ContentStore, sizes: list[int]) -> FreeIndexes:
    """What learns of an image with layers of these sizes."""
    images = cast("Images", Registry(sizes))
    return FreeIndexes(root, content, images, span_size=4 << 20, build_tool="tests")


def test_an_index_once_all_layers_are_known(tmp_path: Path, content: ContentStore) -> None:
    """Not before; without small layers and those that have no ztoc, under the image's name and namespace, once."""
    indexes = indexes_of(tmp_path, content, [freeindex.MIN_LAYER_SIZE, 5, freeindex.MIN_LAYER_SIZE])
    ztoc = learn(indexes, tmp_path, 0)
    learn(indexes, tmp_path, 1)
    indexes.offer(PULL)
    assert listed(tmp_path) == []
    learn(indexes, tmp_path, 2, by_span=False)
    indexes.offer(PULL)
    indexes.offer(PULL)
    [record] = listed(tmp_path)
    assert (record.image_digest, record.image_name) == (PULL.manifest, "registry.test/image:1")
    assert (record.store, record.namespace, record.platform) == ("soci", "default", "linux/amd64")
    index = sociindex.decode(content.get(record.digest, 1 << 20))
    assert {layer: entry.digest for layer, entry in index.ztocs.items()} == {LAYERS[0]: ztoc}
    assert index.subject is not None and index.subject.digest == PULL.manifest
    assert content.exists(oci.EMPTY_JSON_DIGEST)


def test_small_layers_when_there_are_no_others(tmp_path: Path, content: ContentStore) -> None:
    """An image of small layers has an index of them all."""
    indexes = indexes_of(tmp_path, content, [5, 6])
    for number in range(2):
        learn(indexes, tmp_path, number)
    indexes.offer(PULL)
    [record] = listed(tmp_path)
    assert len(sociindex.decode(content.get(record.digest, 1 << 20)).ztocs) == 2


def test_what_gives_way(tmp_path: Path, content: ContentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ztoc goes with the index made here; not while a layer uses it, or an index that somebody else made names it."""
    indexes = indexes_of(tmp_path, content, [5, 6])
    monkeypatch.setattr(indexes, "ztocs", FreeZtocs(tmp_path, content, limit=350))
    ztocs = [learn(indexes, tmp_path, number) for number in range(3)]
    indexes.offer(PULL)
    [own] = listed(tmp_path)
    theirs = content.put(sociindex.build(None, [zdesc(ztocs[1], LAYERS[1])], "somebody"))
    with Artifacts(tmp_path / "content" / "artifacts.sqlite") as artifacts:
        artifacts.add(
            IndexRecord(theirs, "soci", "default", PULL.manifest, "x", "linux/amd64", "x", 1, 1), only=False
        )
    used = tmp_path / "layers" / LAYERS[2].hex / digests.parse(ztocs[2]).hex
    used.mkdir(parents=True)
    for number in range(3, 6):
        learn(indexes, tmp_path, number)
    here = [content.exists(digests.parse(ztoc)) for ztoc in ztocs]
    assert here == [False, True, True]
    assert [record.digest for record in listed(tmp_path)] == [theirs]
    assert not content.exists(own.digest)


def test_what_an_index_names_is_kept(tmp_path: Path, content: ContentStore) -> None:
    """A ztoc stays for an index of this store that names it, for none elsewhere, and while the list cannot be read."""
    indexes = indexes_of(tmp_path, content, [5])
    named, other, free = (content.put(bytes([number]) * 100) for number in range(3))
    assert not indexes.keeps(named)
    path = tmp_path / "content" / "artifacts.sqlite"
    with Artifacts(path) as artifacts:
        for store, ztoc in (("soci", named), ("containerd", other)):
            index = content.put(sociindex.build(None, [zdesc(str(ztoc), LAYERS[0])], "somebody"))
            artifacts.add(
                IndexRecord(index, store, "default", PULL.manifest, "x", "linux/amd64", "x", 1, 1), only=False
            )
    assert [indexes.keeps(ztoc) for ztoc in (named, other, free)] == [True, False, False]
    for record in listed(tmp_path):
        content.delete(record.digest)
    assert not indexes.keeps(named)
    path.write_bytes(b"damaged" * 1000)
    assert indexes.keeps(free)


def zdesc(ztoc: str, layer: Digest) -> sociindex.ZtocDescriptor:
    """An index's entry."""
    return sociindex.ZtocDescriptor(digests.parse(ztoc), 100, layer, GZIP, 1 << 20)
