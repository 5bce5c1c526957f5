"""Putting manifests, and the referrers tag where a registry has no referrers API (distribution-spec 1.1)."""

from __future__ import annotations

import random
import time

import msgspec

from soci_snapshotter.errors import Invalid, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.oci import Descriptor, Manifest
from soci_snapshotter.registry import referrers
from soci_snapshotter.registry.failures import Refused
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.transport import Answer

_ANSWER = 64 << 10  # answers to uploads are empty or an error body
_ACTIONS = "pull,push"
# Two pushers that update one referrers tag can overwrite each other: each looks whether its entry stayed, at once and
# after a moment, longer than another's read and write take. Ten pushers at once were all listed in every run.
_TAG_TRIES = 12
_LOOK_AGAIN = 0.3


def put(
    route: Route, data: bytes, media_type: str, tag: str | None, *, tag_suffices: bool = False
) -> Descriptor:
    """Put a manifest under `tag` or its digest, and list it as a referrer of its subject if it has one.

    `tag_suffices`: a registry that refuses the referrers tag has taken the manifest all the same.
    """
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
        try:
            _list(route, subject.digest, entry)
        except Refused:
            if not tag_suffices:
                raise
    return descriptor


def _list(route: Route, subject: Digest, entry: Descriptor) -> None:
    """Have `entry` in the index under the subject's referrers tag, beside whatever else is there."""
    tag = referrers.fallback_tag(subject)
    for _ in range(_TAG_TRIES):
        current = referrers.from_tag(route, subject, _ACTIONS)
        if current.foreign:
            raise Remote(f"{route}: the tag {tag} is no index of referrers; it is not overwritten")
        if _has(current, entry):
            # random: jitter, so that several pushers do not meet again
            time.sleep(_LOOK_AGAIN * (0.5 + random.random()))  # noqa: S311
            if _has(referrers.from_tag(route, subject, _ACTIONS), entry):
                return
            continue
        updated = oci.encode(
            msgspec.structs.replace(current.index, manifests=(*current.index.manifests, entry))
        )
        if len(updated) > oci.MANIFEST_LIMIT:
            raise Invalid(f"{route}: the tag {tag} lists all the referrers that fit; delete old ones")
        try:
            _put(route, updated, oci.INDEX, tag, current.etag)
        except Refused as refused:
            if refused.status != 412:  # somebody changed it since it was read: read it again
                raise
    raise Remote(f"{route}: others keep overwriting the referrers tag; push again")


def _has(current: referrers.Tagged, entry: Descriptor) -> bool:
    return any(each.digest == entry.digest for each in current.index.manifests)


def _put(route: Route, data: bytes, media_type: str, name: str, etag: str = "") -> Answer:
    headers = {"Content-Type": media_type}
    if etag:
        headers["If-Match"] = etag
    call = route.call(
        "PUT",
        f"manifests/{name}",
        f"upload of manifest {name}",
        expected=frozenset({201}),
        headers=headers,
        actions=_ACTIONS,
        body=data,
    )
    return route.session.request(call, _ANSWER)
