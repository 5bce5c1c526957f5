"""Layers that containerd 2.2 and newer unpack side by side, each without a parent until Commit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.test_lazy_port import REQUEST, TARGET, Table, port
from tests.unit.test_why import CONVERTED, DOCUMENTS, ZTOC, Shelf

from soci_snapshotter.formats import digest as digests
from soci_snapshotter.policy.lazy import PARENT_CHAIN_ID, Declined, LocalLower, is_lowest
from soci_snapshotter.policy.proof import DIFF_ID

OTHER = digests.sha256(b"other")


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
    assert is_lowest(replace(REQUEST, parent_chain=(), labels=labels)) is expected
    assert is_lowest(replace(REQUEST, parent_chain=(LocalLower(b"/l"),), labels=labels)) is False


@pytest.mark.parametrize("labels", [{DIFF_ID: OTHER}, {}])
def test_declined(labels: Mapping[str, str], tmp_path: Path) -> None:
    """Such a layer is left to containerd: by its labels, or, before 2.4, by the image's own list of layers."""
    table = Table()
    shelf = Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED)
    request = replace(REQUEST, parent_chain=(), layer_digest=OTHER, labels=labels)
    made = port(table, shelf, tmp_path).prepare(request)
    assert isinstance(made, Declined)
    assert "side by side" in made.reason
    assert table.claims == []
