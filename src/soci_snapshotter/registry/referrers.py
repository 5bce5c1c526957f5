"""Referrers of a manifest: the API of distribution-spec 1.1, or the fallback tag where a registry has none."""

from __future__ import annotations

from dataclasses import replace
from urllib.parse import quote

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.httpfields import parse_next_link
from soci_snapshotter.formats.oci import Descriptor, Index
from soci_snapshotter.registry import urls
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.transport import Call

# Some thousand referrers at the usual hundred a page; an endless list must end.
_PAGES = 50


def fallback_tag(digest: Digest) -> str:
    """The tag under which referrers of `digest` are listed without the API (spec: cut at 32 and 64)."""
    return f"{digest.algorithm[:32]}-{digest.hex[:64]}"


def listed(route: Route, digest: Digest, artifact_type: str, actions: str = "pull") -> list[Descriptor]:
    """Referrers of this artifact type (all, if empty). Empty when there are none, or no such manifest."""
    found = _from_api(route, digest, artifact_type, actions)
    if found is None:
        found = list(from_tag(route, digest, actions).manifests)
    return [entry for entry in found if not artifact_type or entry.artifact_type == artifact_type]


def has_api(route: Route, digest: Digest) -> bool:
    """Whether the API answers for this digest; without it the fallback tag is all there is."""
    return _from_api(route, digest, "", "pull") is not None


def from_tag(route: Route, digest: Digest, actions: str = "pull") -> Index:
    """The index under the fallback tag; an empty one when there is none."""
    tag = fallback_tag(digest)
    call = _call(route, f"manifests/{tag}", f"referrers tag {tag}", actions)
    try:
        document = oci.decode_manifest(route.session.request(call, oci.MANIFEST_LIMIT).data)
    except NotFound:
        document = None
    if isinstance(document, Index):
        return document
    return Index(schema_version=2, media_type=oci.INDEX, manifests=())


def _from_api(route: Route, digest: Digest, artifact_type: str, actions: str) -> list[Descriptor] | None:
    path = f"referrers/{digest}"
    if artifact_type:
        path += f"?artifactType={quote(artifact_type, safe='')}"
    call = _call(route, path, f"referrers of {digest}", actions)
    found: list[Descriptor] = []
    for _ in range(_PAGES):
        try:
            answer = route.session.request(call, oci.MANIFEST_LIMIT)
        except NotFound:
            return None
        if answer.headers.get("Content-Type", "").partition(";")[0].strip() != oci.INDEX:
            return None  # an old registry that answers something to every path
        page = oci.decode_manifest(answer.data)
        if not isinstance(page, Index):
            return None
        found.extend(page.manifests)
        link = parse_next_link(answer.headers.get("Link", ""))
        if link is None:
            return found
        following = urls.follow(call.url, link, call.subject)
        if urls.split(following)[0] != urls.split(call.url)[0]:
            raise Remote(f"{call.subject}: the next page is on another host; check the registry")
        call = replace(call, url=following)
    raise Remote(f"{route}: more than {_PAGES} pages of referrers of {digest}")


def _call(route: Route, path: str, what: str, actions: str) -> Call:
    return route.call("GET", path, what, headers={"Accept": oci.INDEX}, actions=actions)
