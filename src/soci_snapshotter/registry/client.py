"""The registry client: resolve, fetch, referrers, upload (OCI distribution-spec 1.1).

Everything fetched is bounded before it is read and checked against size and digest before it is returned.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

from soci_snapshotter.errors import Integrity, Invalid, NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.httpfields import Range
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.formats.reference import Reference
from soci_snapshotter.registry import referrers, upload
from soci_snapshotter.registry.auth import Scope
from soci_snapshotter.registry.credentials import CredentialProvider
from soci_snapshotter.registry.failures import Subject, Transient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.transport import Answer, Call, Session, read_pieces
from soci_snapshotter.registry.urls import Repo

ACCEPT = ", ".join(oci.MANIFEST_TYPES + oci.INDEX_TYPES)
_OK = frozenset({200})
_LAYER_LIMIT = 1 << 40  # a layer beyond 1 TiB cannot be served anyway (2 TiB uncompressed, DATA-PLANE.md)


class RegistryClient:
    """One session with any number of registries. A context manager; thread safe."""

    def __init__(self, options: Options | None = None, credentials: CredentialProvider | None = None) -> None:
        self.options = options or Options()
        self.session = Session(self.options, credentials)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections; requests under way end, none is tried again."""
        self.session.close()

    def call(self, method: str, repo: Repo, path: str, what: str, **fields: object) -> Call:
        """A request for `path` below the repository. `fields`: expected, headers, actions, body, size, timeout."""
        return make_call(self.options, method, repo, path, what, **fields)

    def resolve(self, ref: Reference) -> Descriptor:
        """What the reference points to: a manifest or an index. A digest in the reference is checked."""
        what = f"manifest {ref.object}"
        path = f"manifests/{ref.object}"
        head = self.call("HEAD", ref, path, what, headers={"Accept": ACCEPT})
        described = _described(self.session.request(head, 0), ref)
        if described is not None:
            return described
        get = self.call("GET", ref, path, what, headers={"Accept": ACCEPT})
        answer = self.session.request(get, oci.MANIFEST_LIMIT)
        digest = digests.sha256(answer.data) if ref.digest is None else ref.digest
        if not digest.matches(answer.data):
            raise Integrity(f"{get.subject}: content has another digest; check the registry's storage")
        return Descriptor(_media_type(answer), digest, len(answer.data))

    def fetch(self, repo: Repo, descriptor: Descriptor, limit: int) -> bytes:
        """A manifest or blob of at most `limit` bytes, checked against size and digest."""
        path, what = _place(descriptor)
        call = self.call("GET", repo, path, what, headers={"Accept": descriptor.media_type})
        if descriptor.size > limit:
            raise Integrity(f"{call.subject}: {descriptor.size} bytes, more than the {limit} allowed")
        data = self.session.request(call, descriptor.size).data
        if len(data) != descriptor.size or not descriptor.digest.matches(data):
            raise Integrity(
                f"{call.subject}: content has another size or digest; check the registry's storage"
            )
        return data

    @contextlib.contextmanager
    def open_blob(self, repo: Repo, descriptor: Descriptor, offset: int = 0) -> Iterator[Iterable[bytes]]:
        """A blob's bytes from `offset` on, in pieces, while the `with` lasts.

        The pieces raise Remote when the connection breaks (open again at the new offset) and, if they began at 0,
        Integrity after the last one when the digest is wrong.
        """
        if not 0 <= offset <= descriptor.size:
            raise Invalid(f"offset {offset} is not within {descriptor.digest}, {descriptor.size} bytes")
        if offset == descriptor.size or descriptor.size > _LAYER_LIMIT:
            yield ()
            return
        path, what = _place(descriptor)
        headers = {"Range": str(Range(offset, descriptor.size))} if offset else {}
        call = self.call("GET", repo, path, what, headers=headers, expected=frozenset({200, 206}))
        with self.session.open(call) as response:
            skip = offset if response.status == 200 else 0
            if response.status == 206 and not response.headers.get("Content-Range", "").startswith(
                f"bytes {offset}-"
            ):
                raise Remote(
                    f"{call.subject}: answered with another range; check the proxy before the registry"
                )
            pieces = read_pieces(response, descriptor.size - offset + skip, call.subject, None)
            yield _checked(pieces, descriptor, offset, skip, call.subject)

    def exists(self, repo: Repo, descriptor: Descriptor) -> bool:
        """True when the registry has this manifest or blob."""
        path, what = _place(descriptor)
        try:
            self.session.request(self.call("HEAD", repo, path, what, headers={"Accept": ACCEPT}), 0)
        except NotFound:
            return False
        return True

    def referrers(self, repo: Repo, digest: Digest, artifact_type: str = "") -> list[Descriptor]:
        """Descriptors of the manifests whose subject is `digest`, by the API or the fallback tag."""
        return referrers.listed(self.session, repo, digest, artifact_type)

    def push_blob(
        self,
        repo: Repo,
        descriptor: Descriptor,
        body: Callable[[], Iterable[bytes]],
        progress: Callable[[int], None] | None = None,
    ) -> bool:
        """Upload a blob in one piece unless it is there; `body` makes its bytes anew for each try. True if sent."""
        if self.exists(repo, descriptor):
            return False
        upload.blob(self.session, repo, descriptor, body, progress)
        return True

    def push_manifest(self, repo: Repo, data: bytes, media_type: str, tag: str | None = None) -> Descriptor:
        """Put a manifest by tag or digest; its subject's fallback tag is updated where the registry has no API."""
        return upload.manifest(self.session, repo, data, media_type, tag)


def make_call(options: Options, method: str, repo: Repo, path: str, what: str, **fields: object) -> Call:
    """A Call for `path` below the repository's URL."""
    actions = str(fields.pop("actions", "pull"))
    fields.setdefault("expected", _OK)
    fields.setdefault("headers", {})
    url = f"{options.scheme(repo.host)}://{repo.host}/v2/{repo.repository}/{path}"
    scope = Scope(repo.host, repo.repository, actions)
    return Call(method, url, scope, Subject(repo.host, repo.repository, what), **fields)  # type: ignore[arg-type]


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
    if not length.isdecimal() or int(length) > oci.MANIFEST_LIMIT:
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
