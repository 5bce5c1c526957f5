"""The registry client: resolve, fetch, referrers, upload (OCI distribution-spec 1.1).

Everything fetched is bounded before it is read and checked against size and digest before it is returned.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

from soci_snapshotter.errors import Integrity, Invalid, NotFound, Remote, SociError
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.hosts import Capability
from soci_snapshotter.formats.httpfields import Range
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.registry import manifests, referrers
from soci_snapshotter.registry.credentials import CredentialProvider
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.routes import Hosts, Route, Router
from soci_snapshotter.registry.transport import Answer, Session, read_pieces
from soci_snapshotter.registry.upload import Uploads
from soci_snapshotter.registry.urls import Repo

ACCEPT = ", ".join(oci.MANIFEST_TYPES + oci.INDEX_TYPES)
_LAYER_LIMIT = 1 << 40  # a layer beyond 1 TiB cannot be served anyway (2 TiB uncompressed, DATA-PLANE.md)


class RegistryClient:
    """One session with any number of registries. A context manager; thread safe."""

    def __init__(
        self,
        options: Options | None = None,
        credentials: CredentialProvider | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        """`hosts` says who is asked for a registry, in order (registry.certsd); by default the registry itself."""
        self.options = options or Options()
        self.credentials = credentials
        self.session = Session(self.options, credentials)
        self.router = Router(self.session, hosts)
        self._uploads = Uploads()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections; requests under way end, none is tried again."""
        self.session.close()

    def resolve(self, ref: Reference) -> Descriptor:
        """What the reference points to: a manifest or an index. A digest in the reference is checked."""
        capability = Capability.RESOLVE if ref.digest is None else Capability.PULL
        return self.router.over(ref, capability, lambda route: _resolve(route, ref))

    def fetch(self, repo: Repo, descriptor: Descriptor, limit: int) -> bytes:
        """A manifest or blob of at most `limit` bytes, checked against size and digest."""
        path, what = _place(descriptor)
        if descriptor.size > limit:
            subject = Subject(repo.host, repo.repository, what)
            raise Integrity(f"{subject}: {descriptor.size} bytes, more than the {limit} allowed")

        def attempt(route: Route) -> bytes:
            call = route.call("GET", path, what, headers={"Accept": descriptor.media_type})
            data = self.session.request(call, descriptor.size).data
            if len(data) != descriptor.size or not descriptor.digest.matches(data):
                raise Integrity(
                    f"{call.subject}: content has another size or digest; check the registry's storage"
                )
            return data

        return self.router.over(repo, Capability.PULL, attempt)

    @contextlib.contextmanager
    def open_blob(self, repo: Repo, descriptor: Descriptor, offset: int = 0) -> Iterator[Iterable[bytes]]:
        """A blob's bytes from `offset` on, in pieces, while the `with` lasts.

        The pieces raise Remote when the connection breaks (open again at the new offset: a mirror that broke is
        passed over then) and, if they began at 0, Integrity after the last one when the digest is wrong.
        """
        if not 0 <= offset <= descriptor.size:
            raise Invalid(f"offset {offset} is not within {descriptor.digest}, {descriptor.size} bytes")
        if offset == descriptor.size or descriptor.size > _LAYER_LIMIT:
            yield ()
            return
        with contextlib.ExitStack() as stack:

            def attempt(route: Route) -> Iterator[bytes]:
                with contextlib.ExitStack() as opened:
                    pieces = self._open(route, descriptor, offset, opened)
                    stack.push(opened.pop_all())
                return self._blaming(route, pieces)

            yield self.router.over(repo, Capability.PULL, attempt)

    def _open(
        self, route: Route, descriptor: Descriptor, offset: int, stack: contextlib.ExitStack
    ) -> Iterator[bytes]:
        path, what = _place(descriptor)
        headers = {"Range": str(Range(offset, descriptor.size))} if offset else {}
        call = route.call("GET", path, what, headers=headers, expected=frozenset({200, 206}))
        response = stack.enter_context(self.session.open(call))
        skip = offset if response.status == 200 else 0
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(
            f"bytes {offset}-"
        ):
            raise Remote(f"{call.subject}: answered with another range; check the proxy before the registry")
        pieces = read_pieces(response, descriptor.size - offset + skip, call.subject, None)
        return _checked(pieces, descriptor, offset, skip, call.subject)

    def _blaming(self, route: Route, pieces: Iterator[bytes]) -> Iterator[bytes]:
        try:
            yield from pieces
        except SociError as error:
            self.router.blame(route, error)
            raise

    def exists(self, repo: Repo, descriptor: Descriptor, *, pushing: bool = False) -> bool:
        """True when the registry has this manifest or blob; with `pushing`, the place that uploads go to."""
        path, what = _place(descriptor)

        def attempt(route: Route) -> bool:
            actions = "pull,push" if pushing else "pull"
            call = route.call("HEAD", path, what, headers={"Accept": descriptor.media_type}, actions=actions)
            self.session.request(call, 0)
            return True

        try:
            if pushing:
                return attempt(self.router.pushing(repo))
            return self.router.over(repo, Capability.PULL, attempt)
        except NotFound:
            return False

    def referrers(
        self, repo: Repo, digest: Digest, artifact_type: str = "", *, pushing: bool = False
    ) -> list[Descriptor]:
        """Descriptors of the manifests whose subject is `digest`, by the API or the fallback tag.

        A mirror that has none is not believed: the next is asked. With `pushing`, only the place that uploads go to.
        """
        if pushing:
            return referrers.listed(self.router.pushing(repo), digest, artifact_type, "pull,push")

        def attempt(route: Route) -> list[Descriptor]:
            found = referrers.listed(route, digest, artifact_type)
            if not found and not route.last:
                raise NotFound(f"{route}: no referrers of {digest}")
            return found

        return self.router.over(repo, Capability.PULL, attempt)

    def has_referrers(self, repo: Repo, digest: Digest) -> bool:
        """Whether the registry, or its first mirror that answers, has the referrers API of distribution-spec 1.1."""
        return self.router.over(repo, Capability.PULL, lambda route: referrers.has_api(route, digest))

    def push_blob(
        self,
        repo: Repo,
        descriptor: Descriptor,
        body: Callable[[], Iterable[bytes]],
        progress: Callable[[int], None] | None = None,
        *,
        mount_from: str = "",
        piece: int = 0,
    ) -> bool:
        """Upload a blob unless it is there; `body` makes its bytes anew for each try. True if sent.

        `mount_from`: a repository of the same registry that may have it, and from which it is then taken.
        `piece`: a larger blob goes in pieces of so many bytes; 0 leaves that to its size and to the registry.
        """
        if self.exists(repo, descriptor, pushing=True):
            return False
        return self._uploads.blob(self.router.pushing(repo), descriptor, body, progress, mount_from, piece)

    def push_manifest(
        self,
        repo: Repo,
        data: bytes,
        media_type: str,
        tag: str | None = None,
        *,
        tag_suffices: bool = False,
    ) -> Descriptor:
        """Put a manifest by tag or digest; its subject's fallback tag is updated where the registry has no API.

        With `tag_suffices` a registry may refuse that update: the manifest is found by its own tag.
        """
        return manifests.put(self.router.pushing(repo), data, media_type, tag, tag_suffices=tag_suffices)


def _resolve(route: Route, ref: Reference) -> Descriptor:
    what = f"manifest {ref.object}"
    path = f"manifests/{ref.object}"
    head = route.call("HEAD", path, what, headers={"Accept": ACCEPT})
    described = _described(route.session.request(head, 0), ref)
    if described is not None:
        return described
    get = route.call("GET", path, what, headers={"Accept": ACCEPT})
    answer = route.session.request(get, oci.MANIFEST_LIMIT)
    digest = digests.sha256(answer.data) if ref.digest is None else ref.digest
    if not digest.matches(answer.data):
        raise Integrity(f"{get.subject}: content has another digest; check the registry's storage")
    return Descriptor(_media_type(answer), digest, len(answer.data))


def _place(descriptor: Descriptor) -> tuple[str, str]:
    kind = "manifest" if descriptor.media_type in oci.MANIFEST_TYPES + oci.INDEX_TYPES else "blob"
    return f"{kind}s/{descriptor.digest}", f"{kind} {descriptor.digest}"


def _media_type(answer: Answer) -> str:
    return answer.headers.get("Content-Type", "").partition(";")[0].strip()


def _described(answer: Answer, ref: Reference) -> Descriptor | None:
    """What the head says; None when it says too little, and then the manifest itself is fetched."""
    length = answer.headers.get("Content-Length", "")
    media_type = _media_type(answer)
    try:
        digest = digests.parse(answer.headers.get("Docker-Content-Digest", ""))
    except Invalid:
        return None
    if not length.isdecimal() or len(length) > 20 or int(length) > oci.MANIFEST_LIMIT:
        return None
    if media_type not in oci.MANIFEST_TYPES + oci.INDEX_TYPES:
        return None
    if ref.digest is not None and digest != ref.digest:
        raise Integrity(f"{ref}: the registry answers for another digest, {digest}; check it")
    return Descriptor(media_type, digest, int(length))


def _checked(
    pieces: Iterator[bytes], descriptor: Descriptor, offset: int, skip: int, subject: Subject
) -> Iterator[bytes]:
    hasher = hashlib.new(descriptor.digest.algorithm) if offset == 0 else None
    position = offset - skip
    try:
        for piece in pieces:
            fresh = piece[max(0, offset - position) :]
            position += len(piece)
            if fresh:
                if hasher is not None:
                    hasher.update(fresh)
                yield fresh
    except Transient as transient:
        raise transient.error from None
    if position != descriptor.size:
        raise Remote(f"{subject}: ended after {position} of {descriptor.size} bytes; try again")
    if hasher is not None and hasher.hexdigest() != descriptor.digest.hex:
        raise Integrity(f"{subject}: content has another digest; check the registry's storage")
