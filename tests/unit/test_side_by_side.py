"""Layers that containerd 2.2 and newer unpack side by side, each without a parent until Commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.test_lazy_port import REQUEST, TARGET, Table, port
from tests.unit.test_why import CONVERTED, DOCUMENTS, ZTOC, Shelf

from soci_snapshotter.errors import Precondition
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.policy.containerdconf import Wanted, check_proxy
from soci_snapshotter.policy.findings import Level
from soci_snapshotter.policy.lazy import PARENT_CHAIN_ID, Declined, LocalLower, is_lowest
from soci_snapshotter.policy.prepare import TARGET as TARGET_LABEL
from soci_snapshotter.policy.proof import DIFF_ID
from soci_snapshotter.snapshotter.snapshotter import Snapshotter

OTHER = str(digests.sha256(b"other"))
LOWEST = str(TARGET)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({}, None),
        ({DIFF_ID: TARGET}, True),  # the lowest layer's chain ID is its DiffID
        ({DIFF_ID: OTHER}, False),
        ({DIFF_ID: OTHER, PARENT_CHAIN_ID: OTHER}, False),
        ({PARENT_CHAIN_ID: OTHER}, False),
    ],
)
def test_labels(labels: Mapping[str, str], expected: bool | None) -> None:
    """What 2.4's labels say of a layer without a parent; with a parent there is no question."""
    assert is_lowest(replace(REQUEST, parent_chain=(), labels={TARGET_LABEL: TARGET, **labels})) is expected
    assert is_lowest(replace(REQUEST, parent_chain=(LocalLower(b"/l"),), labels=labels)) is False


@pytest.mark.parametrize("labels", [{DIFF_ID: OTHER}, {}])
def test_declined(labels: Mapping[str, str], tmp_path: Path) -> None:
    """Such a layer is left to containerd: by its labels, or, before 2.4, by the image's own list of layers."""
    table = Table()
    shelf = Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED)
    request = replace(REQUEST, parent_chain=(), layer_digest=digests.parse(OTHER), labels=labels)
    made = port(table, shelf, tmp_path).prepare(request)
    assert isinstance(made, Declined)
    assert "side by side" in made.reason
    assert table.claims == []


def test_rebased_at_commit(tmp_path: Path) -> None:
    """Where 2.4's labels say that a parent comes, an overlay's upper directory is unpacked into, and Commit names it."""
    with Snapshotter(bytes(tmp_path)) as snapshots:
        [bind] = snapshots.prepare("a", "", {TARGET_LABEL: LOWEST, DIFF_ID: LOWEST})
        assert bind.type == "bind"
        labels = {TARGET_LABEL: OTHER, DIFF_ID: str(digests.sha256(b"diff")), PARENT_CHAIN_ID: LOWEST}
        [overlay] = snapshots.prepare("b", "", labels)
        assert (overlay.type, [option.partition("=")[0] for option in overlay.options]) == (
            "overlay",
            ["workdir", "upperdir"],
        )
        assert snapshots.mounts("b") == (overlay,)
        snapshots.commit("a", LOWEST, {})
        snapshots.commit("b", OTHER, labels, parent=LOWEST)
        assert snapshots.stat(OTHER).parent == LOWEST


def test_rebase_without_a_word_before(tmp_path: Path) -> None:
    """Before 2.4 no label says so: whiteouts would be lost, and Commit refuses rather than keep a wrong tree."""
    with Snapshotter(bytes(tmp_path)) as snapshots:
        for key, target in (("a", LOWEST), ("b", OTHER)):
            snapshots.prepare(key, "", {TARGET_LABEL: target})
        snapshots.commit("a", LOWEST, {})
        with pytest.raises(Precondition, match="capability rebase"):
            snapshots.commit("b", OTHER, {}, parent=LOWEST)


def test_doctor_warns() -> None:
    """Doctor says that the capability costs laziness, and that another one does not."""
    wanted = Wanted(snapshotter="soci", address="/s.sock", file="c.toml", major=2)
    for capability, level in (("rebase", Level.WARNING), ("remap-ids", Level.OK)):
        section = {"type": "snapshot", "address": "/s.sock", "capabilities": [capability]}
        assert check_proxy({"proxy_plugins": {"soci": section}}, wanted).level is level
