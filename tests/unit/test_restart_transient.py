"""A failure that passes is forgotten with it: whatever answer was missing or wrong once, the next Prepare is lazy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from tests.unit.test_lazy_port import REQUEST, TARGET, Table, port
from tests.unit.test_why import CONVERTED, DOCUMENTS, V2_INDEX, ZTOC, Shelf

from soci_snapshotter.errors import Integrity, NotFound, Remote, SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.layers.resolve import IndexResolver
from soci_snapshotter.policy.lazy import Declined, LazyLayer
from soci_snapshotter.registry.client import RegistryClient


class Flaky(Shelf):
    """A registry whose answer number `bad` (from 0) is another than it should be, once."""

    bad = -1
    failure: Callable[[bytes], bytes]

    def _get(self, digest: Digest) -> bytes:
        data = super()._get(digest)
        return data if len(self.asked) - 1 != self.bad else self.failure(data)


def away(data: bytes) -> bytes:
    raise Remote("registry.test: no answer")


def missing(data: bytes) -> bytes:
    raise NotFound("registry.test: not there yet")


def garbled(data: bytes) -> bytes:
    raise Integrity(f"registry.test: {len(data)} bytes of another digest")


def flaky() -> Flaky:
    return Flaky(*DOCUMENTS, ZTOC, tagged=CONVERTED)


def answers(tmp_path: Path) -> int:
    """How many answers one Prepare needs, when its parent does not say what the layer must be."""
    shelf = flaky()
    assert isinstance(port(Table(), shelf, tmp_path).prepare(UNPROVEN), LazyLayer)
    return len(shelf.asked)


UNPROVEN = replace(REQUEST, parent_chain_id=None)


@pytest.mark.parametrize("failure", [away, missing, garbled])
def test_every_answer_may_fail_once(tmp_path: Path, failure: Callable[[bytes], bytes]) -> None:
    """Index, manifest, config, ztoc: whichever fails, the next try has it, and asks for no more than what was missing."""
    needed = answers(tmp_path / "first")
    assert needed >= 6
    for bad in range(needed):
        shelf = flaky()
        shelf.bad, shelf.failure = bad, failure
        lazy = port(Table(), shelf, tmp_path / str(bad))
        try:
            made = lazy.prepare(UNPROVEN)
        except SociError:
            made = Declined("failed")
        if not isinstance(made, LazyLayer):  # a ztoc is asked for again at once
            assert isinstance(lazy.prepare(UNPROVEN), LazyLayer), bad
        assert len(shelf.asked) <= 2 * needed
        asked = len(shelf.asked)
        assert isinstance(lazy.prepare(UNPROVEN), LazyLayer)
        assert len(shelf.asked) == asked, "what cannot change was asked for again"


def test_an_index_that_comes_later(tmp_path: Path) -> None:
    """No index is no answer for ever: pushed meanwhile, the next Prepare finds it."""
    shelf = Shelf(*DOCUMENTS, ZTOC, tagged=CONVERTED)
    client = cast(RegistryClient, shelf)
    resolver = IndexResolver(client, v1=True, v2=False)
    reference, manifest = digests_of(REQUEST.image_ref, REQUEST.manifest_digest)
    assert resolver.index_for(reference, manifest, None) is None
    shelf.listed = [shelf.resolve(reference.with_digest(digests.sha256(V2_INDEX)))]
    assert resolver.index_for(reference, manifest, None) is not None


def digests_of(name: str, manifest: str) -> tuple[references.Reference, Digest]:
    return references.parse(name), digests.parse(manifest)


def test_a_mount_that_fails_once(tmp_path: Path) -> None:
    """The table refuses once (a full disk, no memory): the next Prepare mounts."""
    table = Table()
    lazy = port(table, flaky(), tmp_path)
    table.error = Integrity("for now")
    assert isinstance(lazy.prepare(REQUEST), Declined)
    table.error = None
    made = lazy.prepare(REQUEST)
    assert isinstance(made, LazyLayer) and table.claims[-1].target == TARGET
