"""Ztocs that come before anybody asks for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from soci_snapshotter.errors import Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.layers import ahead as module
from soci_snapshotter.layers.ahead import MOST_BYTES, ZtocsAhead
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.store.content import ContentStore

REFERENCE = references.parse("registry.test/image:1")


def described(data: bytes, size: int | None = None) -> Descriptor:
    return Descriptor("application/octet-stream", digests.sha256(data), len(data) if size is None else size)


class Client:
    """A registry that notes what it is asked, and answers when it may."""

    def __init__(self) -> None:
        self.blobs = {digests.sha256(b"%d" % number): b"%d" % number for number in range(40)}
        self.asked: list[str] = []
        self.open = threading.Event()
        self.open.set()

    def fetch(self, reference: object, ztoc: Descriptor, limit: int) -> bytes:
        self.asked.append(str(ztoc.digest))
        assert self.open.wait(20)
        if ztoc.digest not in self.blobs:
            raise Remote("registry.test: away")
        return self.blobs[ztoc.digest]


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def content(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path)


@pytest.fixture
def ahead(client: Client, content: ContentStore) -> Iterator[ZtocsAhead]:
    with ZtocsAhead(cast(RegistryClient, client), content) as made:
        yield made
        client.open.set()


def window(first: int, last: int) -> list[Descriptor]:
    """The ztocs `first` to `last`, the farthest first."""
    return [described(b"%d" % number) for number in range(last, first - 1, -1)]


def test_each_is_fetched_once(ahead: ZtocsAhead, client: Client) -> None:
    """A window that slides over the layers: every ztoc is fetched once, nearest first, and given out once."""
    for here in range(20):
        ahead.expect(REFERENCE, window(here + 1, min(here + 8, 20)))
        data = b"%d" % (here + 1)
        found = ahead.take(digests.sha256(data))
        assert found in (data, None)  # None: not begun, and whoever asks is faster
        assert ahead.take(digests.sha256(data)) is None
    assert len(client.asked) == len(set(client.asked)) <= 20


def test_what_is_not_fetched(ahead: ZtocsAhead, client: Client, content: ContentStore) -> None:
    """What is stored already, large, or empty stays where it is; what fails is for whoever needs it."""
    content.put(b"1")
    ahead.expect(REFERENCE, [described(b"1"), described(b"2", MOST_BYTES + 1), described(b"3", 0)])
    assert client.asked == []
    ahead.expect(REFERENCE, [described(b"unknown")])
    assert ahead.take(digests.sha256(b"unknown")) is None
    assert ahead.take(digests.sha256(b"nobody expected it")) is None


def test_memory_is_bounded(ahead: ZtocsAhead, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are expected, what waits has a limit in bytes, and goes when nobody comes for it."""
    monkeypatch.setattr(module, "_HELD_BYTES", 5)
    monkeypatch.setattr(module, "HELD_SECONDS", 0.05)
    client.open.clear()
    ahead.expect(REFERENCE, window(0, 9))
    client.open.set()
    end = threading.Event()
    for _ in range(400):
        if not ahead._held:
            break
        end.wait(0.05)
    assert not ahead._held
    assert len(client.asked) <= 5


def test_a_stop_waits_for_no_registry(client: Client, content: ContentStore) -> None:
    """A registry that never answers holds up neither the end nor the interpreter's: no thread is waited for."""
    client.open.clear()
    with ZtocsAhead(cast(RegistryClient, client), content) as made:
        made.expect(REFERENCE, window(0, 5))
        working = [thread for thread in threading.enumerate() if thread.name.startswith("ztoc-")]
        assert working and all(thread.daemon for thread in working)
    client.open.set()
    for thread in working:
        thread.join(20)
        assert not thread.is_alive()
