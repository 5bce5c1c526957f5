"""Uploads: blobs in one piece (POST, then PUT), manifests, and the referrers tag where there is no referrers API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from soci_snapshotter.errors import Invalid, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Index, Manifest
from soci_snapshotter.registry import referrers, urls
from soci_snapshotter.registry.auth import Scope
from soci_snapshotter.registry.failures import Subject
from soci_snapshotter.registry.transport import Answer, Call, Session
from soci_snapshotter.registry.urls import Repo

_ANSWER = 64 << 10  # answers to uploads are empty or an error body
# Two pushers that update one referrers tag can overwrite each other: each looks whether its entry stayed.
_TAG_TRIES = 4


def blob(
    session: Session,
    repo: Repo,
    descriptor: Descriptor,
    body: Callable[[], Iterable[bytes]],
    progress: Callable[[int], None] | None,
) -> None:
    """Upload a blob; a broken upload starts over from POST. Remote when the registry takes it for another."""
    what = f"upload of blob {descriptor.digest}"

    def attempt() -> None:
        start = _call(session, "POST", repo, "blobs/uploads/", what, expected={202}, body=b"")
        location = session.request(start, _ANSWER).headers.get("Location", "")
        if not location:
            raise Remote(f"{start.subject}: no upload location; check the registry")
        target = urls.follow(start.url, location, start.subject)
        target += f"{'&' if '?' in target else '?'}digest={descriptor.digest}"
        away = urls.split(target)[0] != urls.split(start.url)[0]
        call = Call(
            "PUT",
            target,
            # Another host than the registry's gets no authorization: a scope for which there never is a grant.
            Scope(urls.split(target)[0].host, "", "") if away else start.scope,
            start.subject,
            frozenset({201}),
            {"Content-Type": "application/octet-stream"},
            lambda: _counted(body(), progress),
            descriptor.size,
            session.options.upload_timeout,
        )
        with session.open_once(call) as response:
            said = response.headers.get("Docker-Content-Digest", descriptor.digest)
        if said != descriptor.digest:
            raise Remote(f"{start.subject}: the registry stored another digest; check its storage")

    session.retrying(attempt, session.options.retry)


def manifest(session: Session, repo: Repo, data: bytes, media_type: str, tag: str | None) -> Descriptor:
    """Put a manifest under `tag` or its digest."""
    if len(data) > oci.MANIFEST_LIMIT:
        raise Invalid(f"manifest of {len(data)} bytes: registries take at most {oci.MANIFEST_LIMIT}")
    document = oci.decode_manifest(data)
    digest = digests.sha256(data)
    answer = _put(session, repo, data, media_type, tag or str(digest))
    if answer.headers.get("Docker-Content-Digest", digest) != digest:
        raise Remote(
            f"{repo.host}/{repo.repository}: stored another digest than {digest}; check the registry"
        )
    descriptor = Descriptor(media_type, digest, len(data))
    subject = document.subject
    if subject is not None and "OCI-Subject" not in answer.headers:
        kind = document.artifact_type
        if not kind and isinstance(document, Manifest):
            kind = document.config.media_type
        entry = Descriptor(
            media_type, digest, len(data), annotations=document.annotations, artifact_type=kind
        )
        _update_tag(session, repo, subject.digest, entry)
    return descriptor


def _update_tag(session: Session, repo: Repo, subject: Digest, entry: Descriptor) -> None:
    for _ in range(_TAG_TRIES):
        current = referrers.from_tag(session, repo, subject)
        if any(each.digest == entry.digest for each in current.manifests):
            return
        updated = Index(
            schema_version=2,
            media_type=oci.INDEX,
            manifests=(*current.manifests, entry),
            annotations=current.annotations,
        )
        _put(session, repo, oci.encode(updated), oci.INDEX, referrers.fallback_tag(subject))
    if not any(each.digest == entry.digest for each in referrers.from_tag(session, repo, subject).manifests):
        raise Remote(f"{repo.host}/{repo.repository}: others keep overwriting the referrers tag; push again")


def _put(session: Session, repo: Repo, data: bytes, media_type: str, name: str) -> Answer:
    headers = {"Content-Type": media_type}
    call = _call(
        session, "PUT", repo, f"manifests/{name}", f"upload of manifest {name}", {201}, data, headers
    )
    return session.request(call, _ANSWER)


def _call(
    session: Session,
    method: str,
    repo: Repo,
    path: str,
    what: str,
    expected: set[int],
    body: bytes,
    headers: Mapping[str, str] | None = None,
) -> Call:
    return Call(
        method,
        f"{session.options.scheme(repo.host)}://{repo.host}/v2/{repo.repository}/{path}",
        Scope(repo.host, repo.repository, "pull,push"),
        Subject(repo.host, repo.repository, what),
        frozenset(expected),
        headers or {},
        lambda: body,
        len(body),
    )


def _counted(pieces: Iterable[bytes], progress: Callable[[int], None] | None) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        if progress is not None:
            progress(len(piece))
