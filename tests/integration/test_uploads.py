"""Uploads against registries that differ: whole or in pieces, broken connections, small limits, mounts, tags."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from harness.badserver import Asked, BadServer, bad_server, reply
from harness.memregistry import MemRegistry
from harness.registries import start_oci_registry, start_registry

from soci_snapshotter.errors import Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, sociindex
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.referrers import fallback_tag
from soci_snapshotter.registry.urls import Repository

DATA = os.urandom(1_000_003)
BLOB = Descriptor("application/octet-stream", digests.sha256(DATA), len(DATA))
FAST = Options(retry=Retry(attempts=3, min_wait=0.01, patience=1.0), read_timeout=2, upload_timeout=2)


@dataclass
class Sent:
    """What a push did."""

    sent: bool
    told: int
    """Bytes by which `progress` moved in the end."""
    asked: list[Asked]
    began: int
    """How often the body was made."""

    def methods(self) -> list[str]:
        """In order, without the HEAD that asks whether the blob is there."""
        return [asked.method for asked in self.asked if asked.method != "HEAD"]


def push(
    registry: MemRegistry, *, piece: int = 0, cut: Callable[[Asked], int | None] = lambda _: None
) -> Sent:
    """Push DATA to `registry`, and check that it is there, whatever happened on the way."""
    told, began = [0], [0]

    def body() -> Iterator[bytes]:
        began[0] += 1
        for start in range(0, len(DATA), 70_001):  # no divisor of any piece
            yield DATA[start : start + 70_001]

    def progress(count: int) -> None:
        told[0] += count

    with bad_server(registry, cut) as server, RegistryClient(FAST) as client:
        repo = Repository(server.host, "a/b")
        sent = client.push_blob(repo, BLOB, body, progress, piece=piece)
        assert client.fetch(repo, BLOB, len(DATA)) == DATA
    return Sent(sent, told[0], server.asked[:-1], began[0])


def test_whole_by_default() -> None:
    """A blob of ordinary size is one POST and one PUT: every registry takes that."""
    done = push(MemRegistry())
    assert done.methods() == ["POST", "PUT"]
    assert (done.sent, done.told) == (True, len(DATA))


def test_in_pieces_when_asked_to() -> None:
    """Pieces of the size asked for, in order, from a body made once, then a PUT without a body."""
    done = push(MemRegistry(), piece=300_000)
    assert done.methods() == ["POST", *["PATCH"] * 4, "PUT"]
    ranges = [asked.headers["content-range"] for asked in done.asked if asked.method == "PATCH"]
    assert ranges == ["0-299999", "300000-599999", "600000-899999", "900000-1000002"]
    assert (done.told, done.began) == (len(DATA), 1)


def test_the_registrys_minimum_is_kept() -> None:
    """OCI-Chunk-Min-Length above what was asked for: pieces are that long."""
    done = push(MemRegistry(min_piece=600_000), piece=100_000)
    assert done.methods() == ["POST", "PATCH", "PATCH", "PUT"]


@pytest.mark.parametrize("arrived", [0, 123_457])
def test_a_broken_piece_goes_on_where_it_broke(arrived: int) -> None:
    """The connection breaks within the second piece: the status is asked, and only what is missing is sent."""

    broke: list[Asked] = []

    def cut(asked: Asked) -> int | None:
        if asked.headers.get("content-range") != "400000-799999" or broke:
            return None
        broke.append(asked)
        return arrived

    done = push(MemRegistry(), piece=400_000, cut=cut)
    assert done.methods()[:4] == ["POST", "PATCH", "PATCH", "GET"]
    after = [asked.headers["content-range"] for asked in done.asked if asked.method == "PATCH"][2]
    assert after.startswith(f"{400_000 + arrived}-")
    assert done.methods().count("POST") == 1
    assert done.told == len(DATA)


def test_a_forgotten_upload_is_begun_anew() -> None:
    """A registry that lost the upload (404 to its status): a new POST, and the bytes are right."""
    lost = []

    def cut(asked: Asked) -> int | None:
        if asked.headers.get("content-range") == "400000-799999" and not lost:
            lost.append(asked.path)
            return 10
        return None

    registry = MemRegistry()
    registry.before = lambda asked: (
        reply("404 Not Found") if asked.method == "GET" and asked.path in lost else None
    )
    done = push(registry, piece=400_000, cut=cut)
    assert done.methods().count("POST") == 2
    assert done.told == len(DATA)


def test_a_registry_that_loses_what_arrived_is_not_fed_without_end() -> None:
    """It takes the first piece, refuses the second and then says that nothing has arrived, each time: the upload is
    begun anew a few times, and the blob goes whole at last."""
    registry = MemRegistry()

    def before(asked: Asked) -> bytes | None:
        if asked.method == "GET" and "/uploads/" in asked.path:
            registry.uploads[asked.path.rpartition("/")[2]] = b""
            return reply("204 No Content", Range="0-0")
        if asked.method == "PATCH" and not asked.headers["content-range"].startswith("0-"):
            return reply("416 Range Not Satisfiable") if asked.number < 50 else reply("400 Bad Request")
        return None

    registry.before = before
    done = push(registry, piece=400_000)
    assert done.methods() == [*["POST", "PATCH", "PATCH", "GET"] * 4, "POST", "PUT"]
    assert done.told == len(DATA)


def test_a_registry_that_knows_no_pieces_gets_the_blob_whole() -> None:
    """405 to PATCH: POST and PUT after all."""
    done = push(MemRegistry(pieces=False), piece=300_000)
    assert done.methods() == ["POST", "PATCH", "POST", "PUT"]


def test_a_proxy_with_a_small_limit_gets_small_pieces() -> None:
    """413 to the whole blob: pieces, smaller ones until they pass; the next blob begins with that size."""
    registry = MemRegistry(max_body=100_000)
    other = b"x" * 300_000
    with bad_server(registry) as server, RegistryClient(FAST) as client:
        repo = Repository(server.host, "a/b")
        client.push_blob(repo, BLOB, lambda: (DATA,))
        before = len(server.asked)
        described = Descriptor("application/octet-stream", digests.sha256(other), len(other))
        client.push_blob(repo, described, lambda: (other,))
        assert not any(len(asked.body) > 100_000 for asked in server.asked[before:])
        assert registry.blobs["a/b"] == {BLOB.digest: DATA, described.digest: other}


def test_a_registry_that_takes_nothing_is_said_to() -> None:
    """413 to everything: an error that names the limit, not an endless halving."""
    with (
        bad_server(MemRegistry(max_body=10)) as server,
        RegistryClient(FAST) as client,
        pytest.raises(Remote, match="takes no upload of this size"),
    ):
        client.push_blob(Repository(server.host, "a/b"), BLOB, lambda: (DATA,))


def test_a_lost_answer_to_the_last_request() -> None:
    """The PUT that ends an upload is answered by silence, but it arrived: the blob is found, nothing is sent again."""
    registry = MemRegistry()

    def answer(asked: Asked) -> bytes | None:
        said = registry(asked)
        return b"" if asked.method == "PUT" and asked.number == 0 else said

    with bad_server(answer) as server, RegistryClient(FAST) as client:
        assert client.push_blob(Repository(server.host, "a/b"), BLOB, lambda: (DATA,), piece=400_000)
        assert [asked.method for asked in server.asked].count("POST") == 1
        assert registry.blobs["a/b"][BLOB.digest] == DATA


def test_bytes_that_are_not_the_blobs_are_refused() -> None:
    """A body with another digest: the registry's refusal, by both ways, and no blob."""
    registry = MemRegistry()
    with bad_server(registry) as server, RegistryClient(FAST) as client:
        for piece in (0, 400_000):
            with pytest.raises(Remote, match="DIGEST_INVALID"):
                client.push_blob(
                    Repository(server.host, "a/b"), BLOB, lambda: (b"\0" * len(DATA),), piece=piece
                )
    assert registry.blobs["a/b"] == {}


def test_an_upload_never_wanders_to_another_host_with_credentials() -> None:
    """A Location on another host gets the bytes, as object stores do, but no Authorization."""
    store_registry = MemRegistry()
    store_registry.uploads["u"] = b""
    with bad_server(store_registry) as store:

        def home_answer(asked: Asked) -> bytes:
            if "authorization" not in asked.headers:
                return reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"')
            if asked.method == "POST":
                return reply("202 Accepted", Location=f"http://{store.host}/v2/s/blobs/uploads/u")
            return reply("404 Not Found")

        with bad_server(home_answer) as home, RegistryClient(FAST, lambda _: ("u", "MARKED")) as client:
            for piece in (0, 400_000):
                store_registry.uploads["u"] = b""
                client.push_blob(Repository(home.host, "a/b"), BLOB, lambda: (DATA,), piece=piece)
    assert [asked.method for asked in store.asked] == ["PUT", "PATCH", "PATCH", "PATCH", "PUT"]
    assert not any("authorization" in asked.headers for asked in store.asked)


@pytest.mark.parametrize("start", [start_registry, start_oci_registry], ids=["docker-registry", "oci"])
def test_pieces_with_real_registries(start: Callable[..., object], tmp_path: object) -> None:
    """Both take a blob in pieces."""
    with start(tmp_path) as registry, RegistryClient() as client:  # type: ignore[attr-defined]
        repo = Repository(registry.host, "a/b")
        assert client.push_blob(repo, BLOB, lambda: (DATA,), piece=300_000)
        assert client.fetch(repo, BLOB, len(DATA)) == DATA
        assert not client.push_blob(repo, BLOB, lambda: (DATA,), piece=300_000)


# --- referrers by tag -------------------------------------------------------------------------------------------

IMAGE = oci.encode(
    oci.Manifest(
        schema_version=2,
        media_type=oci.MANIFEST,
        config=Descriptor(oci.CONFIG, oci.EMPTY_JSON_DIGEST, 2),
        layers=(),
    )
)
SUBJECT = Descriptor(oci.MANIFEST, digests.sha256(IMAGE), len(IMAGE))


def index(note: str) -> bytes:
    """A SOCI index of the image, told apart by a note."""
    return oci.encode(
        oci.Manifest(
            schema_version=2,
            media_type=oci.MANIFEST,
            config=Descriptor(sociindex.INDEX_V1, oci.EMPTY_JSON_DIGEST, 2),
            layers=(),
            subject=SUBJECT,
            annotations={"note": note},
        )
    )


@pytest.mark.parametrize("conditional", [True, False], ids=["If-Match", "plain"])
def test_many_pushers_of_one_referrers_tag(conditional: bool) -> None:
    """Eight at once, where the registry has no referrers API: all eight are listed, and who was there before."""
    registry = MemRegistry(referrers=False, conditional=conditional)
    with bad_server(registry) as server, RegistryClient(FAST) as client:
        repo = Repository(server.host, "a/b")
        foreign = {
            "schemaVersion": 2,
            "mediaType": oci.INDEX,
            "manifests": [{"mediaType": oci.MANIFEST, "digest": SUBJECT.digest, "size": 1}],
            "annotations": {"kept": "yes"},
        }
        data = json.dumps(foreign).encode()
        client.push_manifest(repo, data, oci.INDEX, fallback_tag(SUBJECT.digest))
        errors: list[BaseException] = []

        def one(number: int) -> None:
            try:
                client.push_manifest(repo, index(str(number)), oci.MANIFEST)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        listed = {entry.digest for entry in client.referrers(repo, SUBJECT.digest)}
        assert listed == {SUBJECT.digest, *(digests.sha256(index(str(number))) for number in range(8))}
        tagged = oci.decode_manifest(registry.manifests["a/b"][fallback_tag(SUBJECT.digest)][1])
        assert tagged.annotations == {"kept": "yes"}


def test_a_tag_that_is_something_else_is_not_overwritten() -> None:
    """An image under the referrers tag: Remote naming the tag, and the image stays."""
    tag = fallback_tag(SUBJECT.digest)
    registry = MemRegistry(referrers=False)
    with bad_server(registry) as server, RegistryClient(FAST) as client:
        repo = Repository(server.host, "a/b")
        client.push_manifest(repo, IMAGE, oci.MANIFEST, tag)
        with pytest.raises(Remote, match=f"{tag} is no index of referrers"):
            client.push_manifest(repo, index("x"), oci.MANIFEST)
        assert registry.manifests["a/b"][tag][1] == IMAGE


def mounted(server: BadServer, registry: MemRegistry) -> tuple[bool, int]:
    """Push DATA with a mount from a repository that has it; whether it was sent, and bytes that went."""
    registry.blobs["from"] = {BLOB.digest: DATA}
    with RegistryClient(FAST) as client:
        sent = client.push_blob(Repository(server.host, "to"), BLOB, lambda: (DATA,), mount_from="from")
    assert registry.blobs["to"] == {BLOB.digest: DATA}
    return sent, sum(len(asked.body) for asked in server.asked)


@pytest.mark.parametrize("mounts", [True, False])
def test_mounts(mounts: bool) -> None:
    """A registry that mounts gets no bytes; one that answers with an upload instead gets them."""
    registry = MemRegistry(mounts=mounts)
    with bad_server(registry) as server:
        assert mounted(server, registry) == ((False, 0) if mounts else (True, len(DATA)))
