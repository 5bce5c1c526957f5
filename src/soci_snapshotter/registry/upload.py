"""Uploads: blobs in one piece (POST, then PUT), manifests, and the referrers tag where there is no referrers API."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from urllib.parse import quote

from soci_snapshotter.errors import Invalid, NotFound, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Index, Manifest
from soci_snapshotter.registry import referrers, urls
from soci_snapshotter.registry.auth import Scope
from soci_snapshotter.registry.failures import Transient
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.transport import Answer, Call

_ANSWER = 64 << 10  # answers to uploads are empty or an error body
# Two pushers that update one referrers tag can overwrite each other: each looks whether its entry stayed.
_TAG_TRIES = 4
_ACTIONS = "pull,push"
# 201 answers a mount that was made, 202 an upload that was begun.
_STARTED = frozenset({201, 202})


def blob(
    route: Route,
    descriptor: Descriptor,
    body: Callable[[], Iterable[bytes]],
    progress: Callable[[int], None] | None,
    mount_from: str = "",
) -> bool:
    """Upload a blob; True if it was sent. Remote when the registry takes it for another.

    A broken upload starts over from POST: the registries it was tried with (docker-registry 2.8, go-containerregistry)
    have forgotten an upload whose request broke off, so there is nothing to resume but whole blobs.
    `mount_from` is a repository of the same registry that may have the blob already: then nothing is sent, and the
    answer is False. `progress` is told of bytes as they go, of a negative number when they have to go again.
    """
    session = route.session

    def attempt() -> bool:
        started, answer = _start(route, descriptor, mount_from)
        if answer.status == 201:
            return False
        target = urls.follow(started.url, _location(answer, started), started.subject)
        target += f"{'&' if '?' in target else '?'}digest={descriptor.digest}"
        away = urls.split(target)[0] != urls.split(started.url)[0]
        counter = _Counter(progress)
        call = replace(
            started,
            method="PUT",
            url=target,
            # Another host than the registry's gets no authorization: a scope for which there never is a grant.
            scope=Scope(urls.split(target)[0].host, "", "") if away else started.scope,
            expected=frozenset({201}),
            headers={"Content-Type": "application/octet-stream"},
            body=lambda: counter.over(body()),
            size=descriptor.size,
            timeout=session.options.upload_timeout,
        )
        try:
            with session.open_once(call) as response:
                said = response.headers.get("Docker-Content-Digest", descriptor.digest)
        except Transient:
            counter.take_back()
            raise
        finally:
            counter.close()
        if said != descriptor.digest:
            raise Remote(f"{started.subject}: the registry stored another digest; check its storage")
        return True

    return session.retrying(attempt, session.options.retry)


def manifest(route: Route, data: bytes, media_type: str, tag: str | None) -> Descriptor:
    """Put a manifest under `tag` or its digest."""
    if len(data) > oci.MANIFEST_LIMIT:
        raise Invalid(f"manifest of {len(data)} bytes: registries take at most {oci.MANIFEST_LIMIT}")
    document = oci.decode_manifest(data)
    digest = digests.sha256(data)
    answer = _put(route, data, media_type, tag or str(digest))
    if answer.headers.get("Docker-Content-Digest", digest) != digest:
        raise Remote(f"{route}: stored another digest than {digest}; check the registry")
    descriptor = Descriptor(media_type, digest, len(data))
    subject = document.subject
    if subject is not None and "OCI-Subject" not in answer.headers:
        kind = document.artifact_type
        if not kind and isinstance(document, Manifest):
            kind = document.config.media_type
        entry = Descriptor(
            media_type, digest, len(data), annotations=document.annotations, artifact_type=kind
        )
        _update_tag(route, subject.digest, entry)
    return descriptor


def _update_tag(route: Route, subject: Digest, entry: Descriptor) -> None:
    for _ in range(_TAG_TRIES):
        current = referrers.from_tag(route, subject, _ACTIONS)
        if any(each.digest == entry.digest for each in current.manifests):
            return
        updated = Index(
            schema_version=2,
            media_type=oci.INDEX,
            manifests=(*current.manifests, entry),
            annotations=current.annotations,
        )
        _put(route, oci.encode(updated), oci.INDEX, referrers.fallback_tag(subject))
    listed = referrers.from_tag(route, subject, _ACTIONS).manifests
    if not any(each.digest == entry.digest for each in listed):
        raise Remote(f"{route}: others keep overwriting the referrers tag; push again")


def _put(route: Route, data: bytes, media_type: str, name: str) -> Answer:
    call = route.call(
        "PUT",
        f"manifests/{name}",
        f"upload of manifest {name}",
        expected=frozenset({201}),
        headers={"Content-Type": media_type},
        actions=_ACTIONS,
        body=data,
    )
    return route.session.request(call, _ANSWER)


def _start(route: Route, descriptor: Descriptor, mount_from: str) -> tuple[Call, Answer]:
    """Begin an upload; status 201 says that the blob was taken from `mount_from`."""
    what = f"upload of blob {descriptor.digest}"
    if mount_from and mount_from != route.repository:
        path = f"blobs/uploads/?mount={descriptor.digest}&from={quote(mount_from, safe='')}"
        mount = route.call("POST", path, what, expected=_STARTED, actions=_ACTIONS, body=b"")
        try:
            return mount, route.session.request(mount, _ANSWER)
        except (Remote, NotFound):
            pass  # this account may not read there, or the registry knows no mounts: then it is sent
    start = route.call("POST", "blobs/uploads/", what, expected=frozenset({202}), actions=_ACTIONS, body=b"")
    return start, route.session.request(start, _ANSWER)


def _location(answer: Answer, call: Call) -> str:
    location = answer.headers.get("Location", "")
    if not location:
        raise Remote(f"{call.subject}: no upload location; check the registry")
    return location


class _Counter:
    """Tells `progress` of the bytes of one try, and takes them back when it has to be made again."""

    def __init__(self, progress: Callable[[int], None] | None) -> None:
        self._progress = progress
        self._told = 0
        self._pieces: Iterable[bytes] = ()

    def close(self) -> None:
        """End the last body where it stands: it may hold a connection to where it comes from."""
        if isinstance(self._pieces, Generator):
            self._pieces.close()

    def over(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        self.take_back()  # a redirect makes the body anew within one try
        self.close()
        self._pieces = pieces
        for piece in pieces:
            yield piece
            if self._progress is not None:
                self._told += len(piece)
                self._progress(len(piece))

    def take_back(self) -> None:
        if self._progress is not None and self._told:
            self._progress(-self._told)
        self._told = 0
