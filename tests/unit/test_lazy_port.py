"""What the snapshotter's port asks of the registry and of the table of layers, both played."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from tests.unit.test_why import CONVERTED, DOCUMENTS, REFERENCE, VECTOR, ZTOC, Shelf

from soci_snapshotter.errors import Integrity, SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.layers.eager import Filled
from soci_snapshotter.layers.lazy import SIZE_LABEL, Lazy
from soci_snapshotter.layers.openlayer import LayerKey
from soci_snapshotter.layers.openlayers import Mounted, OpenLayers
from soci_snapshotter.layers.resolve import IndexResolver
from soci_snapshotter.layers.whole import Mount, Wanted, WholeLayers
from soci_snapshotter.policy.eager import Eager, Way
from soci_snapshotter.policy.lazy import Declined, Failed, LazyLayer, LazyRequest, LocalLower
from soci_snapshotter.policy.proof import DIFF_ID, Claim
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.store.content import ContentStore

INDEX = oci.decode_manifest(CONVERTED)
assert isinstance(INDEX, oci.Index)
MANIFEST = next(d.digest for d in INDEX.manifests if d.platform is not None)
LAYER = (VECTOR / "layer.tar.gz").read_bytes()
DIGEST = digests.sha256(LAYER)
TARGET = digests.sha256(b"target")
REQUEST = LazyRequest(
    namespace="default",
    image_ref=str(REFERENCE),
    manifest_digest=MANIFEST,
    layer_digest=DIGEST,
    image_layers=(),
    index_digest=None,
    target=TARGET,
    parent_chain_id="",
    parent_chain=(LocalLower(b"/lower"),),
    labels={},
)


class Table:
    """The table of layers: notes claims, mounts nothing."""

    def __init__(self) -> None:
        self.claims: list[Claim] = []
        self.complete = False
        self.answer: Declined | None = None
        self.error: SociError | None = None
        self.once = False
        """Whether `answer` and `error` are for the lazy try only."""

    @contextmanager
    def pinned(self, numbers: Sequence[int]) -> Iterator[dict[int, bytes]]:
        yield {number: b"/m/%d" % number for number in numbers}

    def prepare(
        self,
        key: LayerKey,
        reference: str,
        lowers: Sequence[bytes],
        layer_size: int | None,
        claim: Claim,
        filled: Filled | None = None,
    ) -> Mounted | Declined:
        assert lowers == [b"/lower"]
        self.claims.append(claim)
        first = not self.once or key.ztoc == digests.sha256(ZTOC)
        if self.error is not None and first:
            raise self.error
        return (self.answer if first else None) or Mounted(7, key, 3)

    def layer_of(self, number: int) -> object:
        assert number == 7
        record = SimpleNamespace(complete=self.complete)
        return SimpleNamespace(record=record, lazy=None, allocated=lambda: (4096, 5))


@pytest.fixture
def table() -> Table:
    return Table()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED)


class Wholes:
    """Who makes layers without an index: notes what is asked, and fails on demand."""

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []
        self.error: Exception | None = None

    def mounted(self, wanted: Wanted, mount: Mount) -> Mounted:
        self.wanted.append(wanted)
        if self.error is not None:
            raise self.error
        made = mount(LayerKey(wanted.layer, digests.sha256(b"own")), None, wanted.claim, None)
        assert isinstance(made, Mounted)
        return made


def port(
    table: Table,
    shelf: Shelf,
    tmp_path: Path,
    min_layer_size: int = 0,
    rules: Eager | None = None,
    wholes: Wholes | None = None,
    *,
    v2: bool = True,
) -> Lazy:
    """The port over both."""
    client = cast(RegistryClient, shelf)
    resolver = IndexResolver(client, v1=False, v2=v2)
    return Lazy(
        cast(OpenLayers, table),
        resolver,
        client,
        ContentStore(tmp_path),
        min_layer_size=min_layer_size,
        rules=rules or Eager(),
        wholes=cast("WholeLayers | None", wholes),
    )


@pytest.mark.parametrize("rules", [Eager(), Eager(fallback=True), Eager(primary=True)])
@pytest.mark.parametrize("case", ["lazy", "small", "no index", "bad ztoc", "lie"])
@pytest.mark.parametrize("fails", [False, True])
def test_who_makes_a_layer(
    table: Table, shelf: Shelf, tmp_path: Path, rules: Eager, case: str, fails: bool
) -> None:
    """Lazy if it can be and is wanted; with an index we make it, or containerd; without one it is as configured."""
    wholes = Wholes()
    wholes.error = OSError(28, "No space left on device") if fails else None
    lazy = port(
        table, shelf, tmp_path, 1 << 40 if case == "small" else 0, rules, wholes, v2=case != "no index"
    )
    if case == "bad ztoc":
        table.error = Integrity("a ztoc that is none")
    if case == "lie":
        table.answer = Declined("it has another DiffID")
    table.once = True
    made = lazy.prepare(REQUEST)
    if case == "lazy" and not rules.primary:
        assert isinstance(made, LazyLayer) and made.way is None and not wholes.wanted
        return
    parallel = rules.primary or (rules.fallback and case == "no index")
    if case == "no index" and not parallel:
        assert made == Declined("no valid SOCI index found") and not wholes.wanted
        return
    [wanted] = wholes.wanted
    assert (wanted.index is None) == (rules.primary or case == "no index")
    assert wanted.pull.namespace == "default"
    if not fails:
        assert isinstance(made, LazyLayer)
        assert made.way is (Way.PARALLEL if parallel else Way.LOCAL)
    elif parallel:
        assert isinstance(made, Failed) and "No space left" in str(made.error)
    else:
        assert isinstance(made, Declined) and "No space left" in made.reason


def test_a_layer_with_its_usage(table: Table, shelf: Shelf, tmp_path: Path) -> None:
    """Bytes and inodes are the disk's; the claim has target, parent and image."""
    made = port(table, shelf, tmp_path).prepare(REQUEST)
    assert isinstance(made, LazyLayer)
    assert (made.mount_id, made.size, made.inodes, made.labels) == (7, 4096, 5, {})
    assert table.claims == [Claim(TARGET, "", "", str(REFERENCE))]


def test_layers_below_min_layer_size(table: Table, shelf: Shelf, tmp_path: Path) -> None:
    """By the label, else by the manifest; the size itself is not below."""
    big = port(table, shelf, tmp_path, len(LAYER) + 1)
    found = big.prepare(replace(REQUEST, labels={SIZE_LABEL: str(len(LAYER))}))
    assert isinstance(found, Declined) and "min_layer_size" in found.reason
    assert isinstance(big.prepare(REQUEST), Declined)
    assert isinstance(port(table, shelf, tmp_path, len(LAYER)).prepare(REQUEST), LazyLayer)
    asked = shelf.asked.count(digests.parse(MANIFEST))
    big.prepare(REQUEST)
    assert shelf.asked.count(digests.parse(MANIFEST)) == asked


def test_a_parent_that_does_not_say(table: Table, shelf: Shelf, tmp_path: Path) -> None:
    """The DiffID to expect is the image config's then, and the row is labelled with it."""
    made = port(table, shelf, tmp_path).prepare(replace(REQUEST, parent_chain_id=None))
    assert isinstance(made, LazyLayer)
    diff_id = table.claims[0].diff_id
    assert diff_id.startswith("sha256:") and made.labels == {DIFF_ID: diff_id}
    config = next(d for d in DOCUMENTS if b'"diff_ids"' in d)
    assert diff_id in oci.decode_config(config).diff_ids
    labelled = replace(REQUEST, parent_chain_id=None, labels={DIFF_ID: TARGET})
    assert isinstance(port(table, shelf, tmp_path).prepare(labelled), LazyLayer)
    assert table.claims[1].diff_id == TARGET
    index = replace(REQUEST, parent_chain_id=None, manifest_digest=digests.sha256(CONVERTED))
    with pytest.raises(Integrity):
        port(table, shelf, tmp_path).prepare(index)


def test_a_layer_that_is_known_to_be_a_lie(table: Table, shelf: Shelf, tmp_path: Path) -> None:
    """What the table declines is declined."""
    table.answer = Declined("it has another DiffID")
    assert port(table, shelf, tmp_path).prepare(REQUEST) is table.answer


def test_who_may_share_a_chain_id(table: Table, shelf: Shelf, tmp_path: Path) -> None:
    """The same layer with the same ztoc, or any complete one; another that is only claimed to be the same may not."""
    lazy = port(table, shelf, tmp_path)
    key = str(LayerKey(DIGEST, digests.sha256(ZTOC)))
    assert lazy.serves(REQUEST, 7, key) is None
    other = str(LayerKey(DIGEST, digests.sha256(b"another ztoc")))
    reason = lazy.serves(REQUEST, 7, other)
    assert reason is not None and "chain ID" in reason
    table.complete = True
    assert lazy.serves(REQUEST, 7, other) is None
