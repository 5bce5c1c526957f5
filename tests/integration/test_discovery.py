"""How the SOCI index of an image is found, in registries that list referrers in every way, and in none."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
from harness.badserver import Asked, BadServer, bad_server, reply
from harness.memregistry import MemRegistry

from soci_snapshotter.errors import Integrity, NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, reference, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.hosts import Capability, Endpoint
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.layers.resolve import IndexResolver
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.referrers import fallback_tag, index_tag
from soci_snapshotter.registry.urls import Repository

FAST = Options(retry=Retry(attempts=1, min_wait=0.01, patience=1.0), read_timeout=2)


def manifest(kind: str, subject: Descriptor | None = None, note: str = "") -> bytes:
    """A manifest whose config is of this media type."""
    return oci.encode(
        oci.Manifest(
            schema_version=2,
            media_type=oci.MANIFEST,
            config=Descriptor(kind, oci.EMPTY_JSON_DIGEST, len(oci.EMPTY_JSON)),
            layers=(),
            subject=subject,
            annotations={sociindex.BUILD_TOOL: note} if note else {},
        )
    )


IMAGE = manifest(oci.CONFIG)
SUBJECT = Descriptor(oci.MANIFEST, digests.sha256(IMAGE), len(IMAGE))
OTHER = Descriptor(oci.MANIFEST, digests.sha256(b"another image"), 13)


def index(note: str, subject: Descriptor = SUBJECT) -> bytes:
    """A v1 index, told from others by a note."""
    return manifest(sociindex.INDEX_V1, subject, note)


@dataclass
class Place:
    """A repository in a registry, and a client."""

    registry: MemRegistry
    server: BadServer
    client: RegistryClient

    @property
    def repo(self) -> Repository:
        """The repository."""
        return Repository(self.server.host, "a/b")

    def push(self, data: bytes, tag: str | None = None, *, tag_suffices: bool = False) -> Digest:
        """Put a manifest."""
        return self.client.push_manifest(self.repo, data, oci.MANIFEST, tag, tag_suffices=tag_suffices).digest

    def find(self, *, tag: bool = False, v2: bool = False, explicit: Digest | None = None) -> Digest | None:
        """The digest of the index that the daemon would take."""
        resolver = IndexResolver(self.client, v1=True, v2=v2, tag=tag)
        found = resolver.index_for(reference.parse(f"{self.server.host}/a/b:1"), SUBJECT.digest, explicit)
        if found is None:
            return None
        known = self.registry.manifests["a/b"].items()
        return next(digests.sha256(data) for _, (_, data) in known if sociindex_of(data) == found)


def sociindex_of(data: bytes) -> object:
    """The decoded index; None for another manifest."""
    try:
        return sociindex.decode(data)
    except Integrity:
        return None


@contextmanager
def place(registry: MemRegistry | None = None) -> Iterator[Place]:
    """A registry with the image in it."""
    registry = registry or MemRegistry()
    with bad_server(registry) as server, RegistryClient(FAST) as client:
        found = Place(registry, server, client)
        found.push(IMAGE, "1")
        yield found


@pytest.mark.parametrize("page", [0, 1, 3])
@pytest.mark.parametrize("filters", [True, False], ids=["filtered", "all"])
def test_pages_and_filters(page: int, filters: bool) -> None:
    """Every page is read, and whether the registry filters or not, only the wanted type comes back."""
    with place(MemRegistry(page=page, filters=filters)) as here:
        wanted = {here.push(index(str(number))) for number in range(5)}
        others = {here.push(manifest("application/x", SUBJECT, str(number))) for number in range(4)}
        found = here.client.referrers(here.repo, SUBJECT.digest, sociindex.INDEX_V1)
        assert {entry.digest for entry in found} == wanted
        everything = here.client.referrers(here.repo, SUBJECT.digest)
        assert {entry.digest for entry in everything} == wanted | others


def listing(link: str, **more: str) -> bytes:
    """An empty page that names the next."""
    body = oci.encode(oci.Index(schema_version=2, media_type=oci.INDEX, manifests=()))
    return reply("200 OK", body, Content_Type=oci.INDEX, Link=f'<{link}>; rel="next"', **more)


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("/v2/a/b/referrers/x?last={n}", "do not end"),
        ("http://elsewhere.invalid/v2/a/b/referrers/x", "another host"),
        ("{same}", "the same again"),
    ],
    ids=["endless", "another host", "itself"],
)
def test_pages_that_do_not_end_or_lead_away(link: str, words: str) -> None:
    """Endless pages end, a next page on another host is not asked for, nor one that is the same."""

    def before(asked: Asked) -> bytes | None:
        if "/referrers/" not in asked.path:
            return None
        last = urlsplit(asked.path).query.rpartition("last=")[2]
        number = int(last) + 1 if last.isdecimal() else 1
        return listing(link.format(n=number, same=asked.path))

    with place(MemRegistry(before=before)) as here, pytest.raises(Remote, match=words):
        here.client.referrers(here.repo, SUBJECT.digest)


def test_half_a_list_is_not_the_whole() -> None:
    """The second page is gone: an error, not the first page's referrers, and not the fallback tag's."""
    registry = MemRegistry(page=1)
    registry.before = lambda asked: reply("404 Not Found") if "last=1" in asked.path else None
    with place(registry) as here:
        here.push(index("a"))
        here.push(index("b"))
        with pytest.raises(NotFound):
            here.client.referrers(here.repo, SUBJECT.digest)


def test_pages_of_a_mirror_keep_its_namespace() -> None:
    """A mirror for several registries is told on each page which one is meant."""
    with place(MemRegistry(page=1)) as here:
        wanted = {here.push(index(note)) for note in "ab"}
        endpoint = Endpoint(
            "http", here.server.host, capabilities=frozenset(Capability), namespace="registry.invalid"
        )
        with RegistryClient(FAST, hosts=lambda _host: (endpoint,)) as client:
            found = client.referrers(Repository("registry.invalid", "a/b"), SUBJECT.digest)
        assert {entry.digest for entry in found} == wanted
        pages = [asked.path for asked in here.server.asked if "/referrers/" in asked.path]
        assert len(pages) == 2
        assert all("ns=registry.invalid" in path for path in pages)


@pytest.mark.parametrize("refusal", ["400 Bad Request", "403 Forbidden", "404 Not Found", "405 No", "login"])
def test_a_registry_without_the_api_has_the_fallback_tag(refusal: str) -> None:
    """However the API is refused, a login page among it: what is listed under the tag is found."""

    def before(asked: Asked) -> bytes | None:
        if "/referrers/" not in asked.path:
            return None
        if refusal == "login":
            return reply("200 OK", b"<html>", Content_Type="text/html; charset=utf-8")
        return reply(refusal)

    with place(MemRegistry(referrers=False, before=before)) as here:
        assert here.find() is None
        pushed = here.push(index("a"))
        assert here.find() == pushed
        assert here.client.has_referrers(here.repo, SUBJECT.digest) is False


class Guarded:
    """A registry that wants a login, Basic or Bearer or an anonymous token, and gives nobody its referrers API."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.open = True
        self.tokens = 0
        self.right = ""

    def __call__(self, asked: Asked) -> bytes | None:
        """An answer instead of the registry's own."""
        if self.open:
            return None
        if asked.path.startswith("/token"):
            assert ("authorization" in asked.headers) == (self.kind == "bearer")
            self.tokens += 1
            self.right = f"Bearer t{self.tokens}"
            return reply("200 OK", b'{"token": "t%d", "expires_in": 300}' % self.tokens)
        challenge = 'Basic realm="x"'
        if self.kind != "basic":
            challenge = f'Bearer realm="http://{asked.headers["host"]}/token",scope="repository:a/b:pull"'
        else:
            self.right = "Basic " + base64.b64encode(b"me:pw").decode()
        if asked.headers.get("authorization", "none") != self.right:
            return reply("401 Unauthorized", WWW_Authenticate=challenge)
        return reply("403 Forbidden") if "/referrers/" in asked.path else None


@pytest.mark.parametrize("kind", ["basic", "bearer", "anonymous"])
def test_a_closed_referrers_api_does_not_lock_the_repository(kind: str) -> None:
    """403 for the API with a login that is good for all else: the fallback tag is read, again and again, and a blob
    after it at once; only the very first request goes without what was granted."""
    guarded = Guarded(kind)
    with place(MemRegistry(referrers=False, before=guarded)) as here:
        pushed = here.push(index("a"))
        data = b"blob"
        blob = Descriptor("application/octet-stream", digests.sha256(data), len(data))
        here.client.push_blob(here.repo, blob, lambda: (data,))
        guarded.open = False
        before = len(here.server.asked)
        login = None if kind == "anonymous" else (lambda _: ("me", "pw"))
        with RegistryClient(FAST, login) as client:
            reading = Place(here.registry, here.server, client)
            assert client.resolve(reference.parse(f"{here.server.host}/a/b:1")) == SUBJECT
            for _ in range(3):
                assert reading.find(v2=True) == pushed
                assert client.fetch(here.repo, blob, len(data)) == data
                assert client.has_referrers(here.repo, SUBJECT.digest) is False
                assert client.fetch(here.repo, blob, len(data)) == data
        refused = sum("/referrers/" in asked.path for asked in here.server.asked)
        assert guarded.tokens <= (0 if kind == "basic" else refused)
        asked_bare = [asked for asked in here.server.asked[before:] if "authorization" not in asked.headers]
        assert [asked.path for asked in asked_bare if not asked.path.startswith("/token")] == [
            "/v2/a/b/manifests/1"
        ]


def test_the_smallest_of_several_indexes_is_taken_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Two indexes of one manifest, listed in both orders: the same one is taken, and the log names it."""
    caplog.set_level(logging.INFO)
    first, second = sorted((index("a"), index("b")), key=digests.sha256)
    for order in ((first, second), (second, first)):
        with place() as here:
            for data in order:
                here.push(data)
            assert here.find() == digests.sha256(first)
    assert [record.message for record in caplog.records if "SOCI index" in record.message] == [
        f"SOCI index: 2 v1 indexes refer to the image; taken is {digests.sha256(first)}, the smallest digest"
    ] * 2


def test_an_index_that_is_listed_but_gone_is_passed_over() -> None:
    """A stale entry of a fallback tag: the next index is taken; none left: none."""
    first, second = sorted((index("a"), index("b")), key=digests.sha256)
    with place(MemRegistry(referrers=False)) as here:
        here.push(first)
        here.push(second)
        del here.registry.manifests["a/b"][digests.sha256(first)]
        assert here.find() == digests.sha256(second)
        del here.registry.manifests["a/b"][digests.sha256(second)]
        assert here.find() is None


# --- the tag convention -----------------------------------------------------------------------------------------


def refusing(asked: Asked) -> bytes | None:
    """Lists no referrers and takes no list of them."""
    if "/referrers/" in asked.path or f"/manifests/{fallback_tag(SUBJECT.digest)}" in (asked.path,):
        return reply("401 Unauthorized")
    if asked.path.endswith(fallback_tag(SUBJECT.digest)):
        return reply("403 Forbidden")
    return None


def test_an_index_found_by_its_tag() -> None:
    """Where nothing lists referrers: pushed under the tag, found by it when that is on, not when it is off."""
    with place(MemRegistry(referrers=False, before=refusing)) as here:
        with pytest.raises(Remote):
            here.push(index("a"))
        pushed = here.push(index("a"), index_tag(SUBJECT.digest), tag_suffices=True)
        assert index_tag(SUBJECT.digest) == f"sha256-{SUBJECT.digest.hex}.soci"
        assert here.find(tag=True) == pushed
        with pytest.raises(Remote):
            here.find()


def test_a_tag_that_names_another_images_index_is_not_believed(caplog: pytest.LogCaptureFixture) -> None:
    """The tag's index has another subject, or none: no index, and the log says why."""
    caplog.set_level(logging.INFO)
    with place(MemRegistry(referrers=False)) as here:
        here.push(index("a", OTHER), index_tag(SUBJECT.digest))
        assert here.find(tag=True) is None
        here.push(manifest(sociindex.INDEX_V1), index_tag(SUBJECT.digest))
        assert here.find(tag=True) is None
    assert caplog.text.count("names an index of another image") == 2


def test_a_tag_that_names_no_index_is_an_error() -> None:
    """The image itself under the tag: Integrity, as for any malformed index."""
    with place(MemRegistry(referrers=False)) as here:
        here.push(IMAGE, index_tag(SUBJECT.digest))
        with pytest.raises(Integrity):
            here.find(tag=True)


def test_a_referrer_goes_before_the_tag() -> None:
    """Both there: the referrer is taken, the tag not even asked."""
    with place() as here:
        here.push(index("b"), index_tag(SUBJECT.digest))
        del here.registry.manifests["a/b"][digests.sha256(index("b"))]
        referrer = here.push(index("a"))
        assert here.find(tag=True) == referrer
        assert not any(asked.path.endswith(".soci") for asked in here.server.asked if asked.method != "PUT")


def test_an_explicit_digest_asks_nothing_else() -> None:
    """With a digest named neither referrers nor tags are asked."""
    with place() as here:
        here.push(index("a"))
        named = here.push(index("b"))
        before = len(here.server.asked)
        assert here.find(tag=True, v2=True, explicit=named) == named
        assert all(named in asked.path for asked in here.server.asked[before:])
