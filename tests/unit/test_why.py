"""`soci why`: the Go tool's own images and indexes in a registry of the test's making, and what is wrong with each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import pytest

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Manifest
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.layers import spandecode
from soci_snapshotter.layers.why import Answer, Modes, explain
from soci_snapshotter.policy.discovery import Source
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options

VECTOR = Path(__file__).parents[1] / "vectors/gnu6-edge1"
REFERENCE = references.parse("registry.test/image:1")
AMD64 = oci.parse_platform("linux/amd64")
ZTOC = (VECTOR / "ztoc.bin").read_bytes()
INDEX = (VECTOR / "index-v1.json").read_bytes()
DOCUMENTS = [path.read_bytes() for path in sorted((VECTOR / "v2").glob("*.json"))]
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DEFAULT, V1, BOTH, NONE = (
    Modes(),
    Modes(v1=True, v2=False),
    Modes(v1=True, v2=True),
    Modes(v1=False, v2=False),
)


class Shelf:
    """What `why` needs of a registry: blobs by digest, one tag, referrers; the API of referrers or not."""

    def __init__(
        self, *blobs: bytes, tagged: bytes, referrers: Iterable[bytes] = (), api: bool = True
    ) -> None:
        self.options = Options()
        self.blobs = {digests.sha256(blob): blob for blob in (*blobs, tagged, *referrers)}
        self.tagged = digests.sha256(tagged)
        self.listed = [Descriptor(oci.MANIFEST, digests.sha256(each), len(each)) for each in referrers]
        self.api = api
        self.asked: list[Digest] = []

    def resolve(self, ref: Reference) -> Descriptor:
        """By tag or digest."""
        digest = ref.digest or self.tagged
        data = self._get(digest)
        kind = oci.INDEX if isinstance(oci.decode_manifest(data), oci.Index) else oci.MANIFEST
        return Descriptor(kind, digest, len(data))

    def fetch(self, _repo: Reference, descriptor: Descriptor, _limit: int) -> bytes:
        """A whole blob."""
        return self._get(descriptor.digest)

    @contextlib.contextmanager
    def open_blob(self, _repo: Reference, descriptor: Descriptor) -> Iterator[Iterable[bytes]]:
        """A blob in pieces."""
        yield (self._get(descriptor.digest),)

    def referrers(self, _repo: Reference, _digest: Digest, _kind: str) -> list[Descriptor]:
        """The same for every image."""
        return self.listed

    def has_referrers(self, _repo: Reference, _digest: Digest) -> bool:
        """Whether there is an API."""
        return self.api

    def _get(self, digest: Digest) -> bytes:
        self.asked.append(digest)
        if digest not in self.blobs:
            raise NotFound(f"registry.test/image: {digest} is not there")
        return self.blobs[digest]


def why(
    shelf: Shelf, modes: Modes = DEFAULT, *, explicit: Digest | None = None, quick: bool = False
) -> Answer:
    """Ask about the shelf's image."""
    client = cast(RegistryClient, shelf)
    return explain(client, REFERENCE, AMD64, modes, explicit=explicit, quick=quick)


def document(prefix: str) -> bytes:
    """The document of the vector whose digest begins so."""
    return next(data for data in DOCUMENTS if digests.sha256(data).hex.startswith(prefix))


PLAIN = document("1ea13bd3")  # the image as it was; converted it is 0xe8ed..., an index
CONVERTED = document("e8ed1453")
V2_INDEX = document("0a1ea62a")


def test_a_converted_image_is_lazy() -> None:
    """v2 of the Go tool, in the default modes: its index by the annotation, its layer with its ztoc's numbers."""
    found = why(Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED))
    info = json.loads((VECTOR / "ztoc-info.json").read_text())
    assert (found.lazy, found.version, found.source) == (True, 2, Source.V2)
    assert found.index == digests.sha256(V2_INDEX)
    assert found.notes == ()
    (layer,) = found.layers
    assert (layer.spans, layer.span_size, layer.files) == (
        info["num_spans"],
        info["span_size"],
        info["num_files"],
    )
    assert (layer.ztoc, layer.ztoc_size) == (digests.sha256(ZTOC), len(ZTOC))


def test_a_v1_index_needs_its_mode() -> None:
    """v1 is off by default: not lazy, and a note names the index and the key; on, it is lazy."""
    shelf = Shelf(*DOCUMENTS, ZTOC, tagged=PLAIN, referrers=[INDEX])
    off = why(shelf)
    assert not off.lazy
    (note,) = off.notes
    assert digests.sha256(INDEX) in note
    assert "[pull_modes.soci_v1] is off" in note
    on = why(shelf, V1)
    assert (on.lazy, on.version, on.source, on.notes) == (True, 1, Source.V1, ())


def test_modes_that_are_off_decide_before_anything_is_asked() -> None:
    """No mode on: each layer gives the daemon's own reason; an index named explicitly is used all the same."""
    shelf = Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED, referrers=[INDEX])
    off = why(shelf, NONE)
    assert [layer.why for layer in off.layers] == [
        "no pull mode that looks for a SOCI index is enabled, and no label names one"
    ]
    assert len(off.notes) == 2
    named = why(shelf, NONE, explicit=digests.sha256(INDEX))
    assert (named.lazy, named.source) == (True, Source.EXPLICIT)


def test_a_dangling_annotation_is_named_and_hides_v1() -> None:
    """The index that the annotation names is not there: a note, and the v1 index beside it is not used."""
    shelf = Shelf(
        *(each for each in DOCUMENTS if each != V2_INDEX), ZTOC, tagged=CONVERTED, referrers=[INDEX]
    )
    found = why(shelf, BOTH)
    assert not found.lazy
    assert found.index is None
    assert any(digests.sha256(V2_INDEX) in note and "does not have" in note for note in found.notes)


def test_an_explicit_index_that_is_not_there() -> None:
    """Nothing else is tried, and the note names the digest."""
    gone = digests.sha256(b"gone")
    found = why(Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED), explicit=gone)
    assert not found.lazy
    assert any(gone in note for note in found.notes)


def test_no_index_at_all_and_no_referrers_api() -> None:
    """The reason is the daemon's; that only the fallback tag could be read is said where v1 was asked."""
    found = why(Shelf(*DOCUMENTS, tagged=PLAIN, api=False), BOTH)
    assert [layer.why for layer in found.layers] == ["no valid SOCI index found"]
    assert any("no referrers API" in note for note in found.notes)
    assert why(Shelf(*DOCUMENTS, tagged=PLAIN), BOTH).notes == ()


def test_a_registry_that_refuses_the_index_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the daemon: an index that cannot be had leaves the layers to containerd, and the note says why."""
    shelf = Shelf(*DOCUMENTS, ZTOC, tagged=PLAIN, referrers=[INDEX])

    def refuse(*_: object) -> list[Descriptor]:
        raise Remote("registry.test/image: 403; log in")

    monkeypatch.setattr(shelf, "referrers", refuse)
    found = why(shelf, V1)
    assert not found.lazy
    assert any("403; log in" in note for note in found.notes)


def test_several_indexes_and_another_subject() -> None:
    """Of two referrers the smaller digest is used, which is said; an index of another image is said to be one."""
    changed = INDEX.replace(b"1ea13bd3", b"2ea13bd3")
    other = min((changed + b" " * count for count in range(9)), key=digests.sha256)
    assert digests.sha256(other) < digests.sha256(INDEX)
    found = why(Shelf(*DOCUMENTS, ZTOC, tagged=PLAIN, referrers=[other, INDEX]), V1)
    assert found.lazy
    assert any(note.startswith("2 v1 indexes") and digests.sha256(other) in note for note in found.notes)
    assert any("another image, sha256:2ea13bd3" in note for note in found.notes)


def image(*layers: Descriptor) -> tuple[bytes, bytes]:
    """A manifest with the vector's layer on top of `layers`, and its config."""
    base = oci.decode_manifest(PLAIN)
    assert isinstance(base, Manifest)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {
                "type": "layers",
                "diff_ids": [digests.sha256(b"%d" % i) for i in range(len(layers) + 1)],
            },
        }
    ).encode()
    manifest = Manifest(
        schema_version=2,
        media_type=oci.MANIFEST,
        config=Descriptor(oci.CONFIG, digests.sha256(config), len(config)),
        layers=(*layers, *base.layers),
    )
    return oci.encode(manifest), config


def test_each_layer_without_a_ztoc_has_its_reason() -> None:
    """zstd, small, non-distributable, or left out; the indexed one is lazy, and a repeated one is fetched once."""
    small = Descriptor(GZIP, digests.sha256(b"small"), 1000)
    foreign = Descriptor(
        GZIP.replace("v1.tar", "nondistributable.v1.tar"), digests.sha256(b"foreign"), 20 << 20
    )
    zstd = Descriptor(ZSTD, digests.sha256(b"zstd"), 20 << 20)
    large = Descriptor(GZIP, digests.sha256(b"large"), 20 << 20)
    indexed = cast(Manifest, oci.decode_manifest(PLAIN)).layers[0]
    manifest, config = image(small, foreign, zstd, large, indexed)
    shelf = Shelf(config, ZTOC, tagged=manifest, referrers=[INDEX])
    reasons = [layer.why for layer in why(shelf, V1).layers]
    for reason, word in zip(
        reasons, ("--min-layer-size", "non-distributable", "zstd", "left out"), strict=False
    ):
        assert reason is not None
        assert word in reason
    assert reasons[4:] == [None, None]
    assert shelf.asked.count(digests.sha256(ZTOC)) == 1


def with_ztoc(data: bytes, **changes: int) -> Shelf:
    """The image with a v1 index that names another ztoc."""
    index = json.loads(INDEX)
    index["layers"][0] |= {"digest": digests.sha256(data), "size": len(data), **changes}
    return Shelf(*DOCUMENTS, data, tagged=PLAIN, referrers=[json.dumps(index).encode()])


def test_bad_ztocs_are_found_out_unless_quick() -> None:
    """A cut ztoc, one of another layer's size, one too big to be one: local, with what is wrong; --quick believes it."""
    for shelf, word in (
        (with_ztoc(ZTOC[: len(ZTOC) // 2]), "ztoc"),
        (with_ztoc((VECTOR.parent / "pigz-edge3/ztoc.bin").read_bytes()), "compressed_archive_size"),
        (with_ztoc(ZTOC, size=1 << 40), "the limit is"),
    ):
        found = why(shelf, V1)
        assert not found.lazy
        assert found.layers[0].why is not None
        assert word in found.layers[0].why
        assert why(shelf, V1, quick=True).lazy


def test_spans_too_large_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon's bound on spans counts here, too."""
    monkeypatch.setattr(spandecode, "MAX_SPAN_COMPRESSED", 1000)
    (layer,) = why(Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED)).layers
    assert layer.why is not None
    assert "smaller --span-size" in layer.why


def test_a_platform_that_is_not_there() -> None:
    """An error that names the image and what there is."""
    with pytest.raises(NotFound, match=r"linux/riscv64.*linux/amd64"):
        explain(
            cast(RegistryClient, Shelf(*DOCUMENTS, tagged=CONVERTED)),
            REFERENCE,
            oci.parse_platform("linux/riscv64"),
            Modes(),
        )


def test_the_media_types_are_what_the_names_say() -> None:
    """The vectors hold a v1 and a v2 index, or the tests above prove less than they claim."""
    assert sociindex.decode(INDEX).version == 1
    assert sociindex.decode(V2_INDEX).version == 2


def test_min_layer_size_of_the_daemon() -> None:
    """A layer with a ztoc that [snapshotter] min_layer_size leaves to containerd: that is what the answer says."""
    shelf = Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED)
    (layer,) = why(shelf).layers
    assert why(shelf, Modes(min_layer_size=layer.size), quick=True).lazy
    (small,) = why(shelf, Modes(min_layer_size=layer.size + 1)).layers
    assert small.why is not None and "min_layer_size" in small.why
