"""The containerd client against the distribution's containerd."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.containerd import Containerd, start_containerd
from harness.images import layer_from_blob, load, write_layout

from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.errors import AlreadyExists, Integrity, Invalid, NotFound, Precondition, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.oci import Descriptor

pytestmark = pytest.mark.root
VECTORS = Path(__file__).parents[1] / "vectors"


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    """One containerd for all tests here; each uses a namespace of its own."""
    with start_containerd() as daemon:
        yield daemon


@pytest.fixture
def client(containerd: Containerd, request: pytest.FixtureRequest) -> Iterator[ContainerdClient]:
    """A client in a namespace named after the test."""
    with ContainerdClient(containerd.address, request.node.name.replace("[", "-").strip("]")) as client:
        yield client


def _blob(size: int) -> tuple[Descriptor, bytes]:
    data = os.urandom(size)
    return Descriptor("application/octet-stream", digests.sha256(data), size), data


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (5 << 20) + 7])
def test_content_round_trip(client: ContainerdClient, size: int) -> None:
    """What is written in odd chunks is read back byte for byte, whole and from an offset."""
    descriptor, data = _blob(size)
    chunks = lambda offset: (data[i : i + 700_001] for i in range(offset, size, 700_001))  # noqa: E731
    with client.lease() as leased:
        written = leased.content.write(descriptor, chunks, labels={"a": "b"})
        assert written == size
        info = client.content.info(descriptor.digest)
        assert (info.size, info.labels) == (size, {"a": "b"})
        assert client.content.get(descriptor.digest, size) == data
        assert b"".join(client.content.read(descriptor.digest, size // 3)) == data[size // 3 :]


def test_write_of_existing_content_only_labels_it(client: ContainerdClient) -> None:
    """A blob that is there is not read from its source again, and keeps its other labels."""
    descriptor, data = _blob(1000)

    def unread(_offset: int) -> list[bytes]:
        raise AssertionError("the source was read")

    with client.lease() as leased:
        leased.content.write(descriptor, lambda _: [data], labels={"old": "1"})
        assert leased.content.write(descriptor, unread, labels={"new": "2"}) == 0
        assert client.content.info(descriptor.digest).labels == {"old": "1", "new": "2"}


def test_broken_upload_continues_where_it_stopped(client: ContainerdClient) -> None:
    """A source that fails half way raises its own error, and the next try is asked for the rest only."""
    descriptor, data = _blob(4 << 20)

    def breaks(_offset: int) -> Iterator[bytes]:
        yield data[: 2 << 20]
        raise ConnectionResetError("cut")

    offsets = []

    def rest(offset: int) -> list[bytes]:
        offsets.append(offset)
        return [data[offset:]]

    with client.lease() as leased:
        with pytest.raises(ConnectionResetError, match="cut"):
            leased.content.write(descriptor, breaks, ref="upload")
        leased.content.write(descriptor, rest, ref="upload")
        assert offsets == [2 << 20]
        assert client.content.get(descriptor.digest, 4 << 20) == data


@pytest.mark.parametrize("sent", [b"123456", b"1234", b"abcde"], ids=["long", "short", "other"])
def test_wrong_bytes_are_refused(client: ContainerdClient, sent: bytes) -> None:
    """Too many, too few or other bytes than announced: Integrity, nothing stored, and a retry works."""
    right = (b"right" + sent)[:10].ljust(
        10
    )  # other for each case: containerd shares content between namespaces
    sent = b"wrong" + sent
    descriptor = Descriptor("x", digests.sha256(right), 10)
    with client.lease() as leased:
        with pytest.raises(Integrity, match=descriptor.digest):
            leased.content.write(descriptor, lambda offset: [sent[offset:]])
        assert not client.content.exists(descriptor.digest)
        leased.content.write(descriptor, lambda offset: [right[offset:]])
        assert client.content.get(descriptor.digest, 10) == right


def test_get_is_bounded_and_checked(client: ContainerdClient, containerd: Containerd) -> None:
    """A blob over the limit, or damaged on containerd's disk, is an Integrity error."""
    descriptor, data = _blob(100)
    with client.lease() as leased:
        leased.content.write(descriptor, lambda _: [data])
        with pytest.raises(Integrity, match="more than the 99 allowed"):
            client.content.get(descriptor.digest, 99)
        path = containerd.root / "io.containerd.content.v1.content/blobs/sha256" / descriptor.digest.hex
        path.chmod(0o644)
        path.write_bytes(bytes(100))
        with pytest.raises(Integrity, match="another digest"):
            client.content.get(descriptor.digest, 100)


def test_lease_keeps_content_from_collection(client: ContainerdClient, containerd: Containerd) -> None:
    """Unreferenced content survives collection inside the lease and goes after it."""
    descriptor, data = _blob(10)
    with client.lease() as leased:
        leased.content.write(descriptor, lambda _: [data])
        containerd.garbage_collect(client.namespace)
        assert client.content.exists(descriptor.digest)
    containerd.garbage_collect(client.namespace)
    assert not client.content.exists(descriptor.digest)


def test_missing_things_are_named(client: ContainerdClient) -> None:
    """NotFound carries the digest, the image's name with its namespace, and the snapshot's key."""
    digest = digests.sha256(b"no such thing")
    with pytest.raises(NotFound, match=digest):
        client.content.info(digest)
    with pytest.raises(NotFound, match=digest):
        list(client.content.read(digest))
    with pytest.raises(NotFound, match=f"image nothing .*'{client.namespace}'"):
        client.images.get("nothing")
    with pytest.raises(NotFound, match="overlayfs snapshot nothing"):
        client.snapshots("overlayfs").stat("nothing")
    with pytest.raises(Invalid, match="snapshotter not loaded: nowhere"):
        client.snapshots("nowhere").stat("nothing")


def test_image_put_replaces_the_target(client: ContainerdClient) -> None:
    """Putting a name twice moves it to the new target and keeps labels that were not mentioned."""
    first = Descriptor("application/vnd.oci.image.manifest.v1+json", digests.sha256(b"1"), 1)
    second = Descriptor("application/vnd.oci.image.manifest.v1+json", digests.sha256(b"2"), 2)
    client.images.put("name", first, {"kept": "yes"})
    client.images.put("name", second)
    found = client.images.get("name")
    assert (found.target.digest, found.target.size, found.labels) == (second.digest, 2, {"kept": "yes"})
    assert [image.name for image in client.images.find()] == ["name"]
    client.images.delete("name", collect=True)
    assert client.images.find() == []


def test_snapshot_lifecycle(client: ContainerdClient) -> None:
    """Prepare, commit, prepare again, remove: kinds, parents, labels and the errors in between."""
    snapshots = client.snapshots("overlayfs")
    with client.lease() as leased:
        labels = {"containerd.io/snapshot/x": "y"}
        mounts = leased.snapshots("overlayfs").prepare("key", "", labels)
        assert [mount.type for mount in mounts] == ["bind"]
        assert snapshots.mounts("key") == mounts
        with pytest.raises(AlreadyExists, match="overlayfs snapshot key"):
            snapshots.prepare("key", "", {})
        snapshots.commit("name", "key", labels)
        info = snapshots.stat("name")
        assert (info.kind, info.parent, info.labels) == ("committed", "", labels)
        snapshots.prepare("child", "name")
        with pytest.raises(Precondition, match="overlayfs snapshot name"):
            snapshots.remove("name")
        assert {found.name: found.parent for found in snapshots.find()} == {"name": "", "child": "name"}
        snapshots.remove("child")
        snapshots.remove("name")
        assert not snapshots.exists("name")


def test_diff_apply_gives_the_diff_id(
    client: ContainerdClient, containerd: Containerd, tmp_path: Path
) -> None:
    """Unpacking a vector's layer answers the digest of its uncompressed tar."""
    layer = layer_from_blob(VECTORS / "gnu6-edge1/layer.tar.gz")
    load(write_layout(tmp_path / "l", [layer], name="v:1"), containerd, namespace=client.namespace)
    descriptor = Descriptor(layer.media_type, digests.parse(layer.digest), len(layer.blob))
    with client.lease() as leased:
        mounts = leased.snapshots("overlayfs").prepare("unpack", "")
        assert leased.diff.apply(descriptor, mounts).digest == layer.diff_id


def test_plugins_and_version(client: ContainerdClient) -> None:
    """The running containerd's version and its own overlayfs snapshotter are visible."""
    assert client.version()[0].isdigit()
    plugins = {plugin.id: plugin for plugin in client.snapshotter_plugins()}
    assert plugins["overlayfs"].error == ""
    assert "address" not in plugins["overlayfs"].exports


def test_dead_socket_says_what_to_check(tmp_path: Path) -> None:
    """No socket, and a socket nobody listens on, are one line with the path and the flag to look at."""
    missing = tmp_path / "none.sock"
    with (
        pytest.raises(Remote, match=f"{missing}: there is no such socket.*--address"),
        ContainerdClient(str(missing)),
    ):
        pass
    with start_containerd() as containerd, ContainerdClient("unix://" + containerd.address) as client:
        containerd.stop()
        with pytest.raises(Remote, match=f"{containerd.address} does not answer") as raised:
            client.images.get("x")
        assert "\n" not in str(raised.value)
