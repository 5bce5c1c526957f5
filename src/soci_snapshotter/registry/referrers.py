"""Referrers of a manifest: the API of distribution-spec 1.1, or the fallback tag where a registry has none.

And a tag convention of ours for registries that have neither: the SOCI index of a manifest under a plain tag.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from urllib.parse import parse_qs, quote, urlsplit

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.httpfields import parse_next_link
from soci_snapshotter.formats.oci import Descriptor, Index
from soci_snapshotter.registry import urls
from soci_snapshotter.registry.failures import Refused
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.transport import Answer, Call

# Some thousand referrers at the usual hundred a page; an endless list must end.
_PAGES = 50
# Of all pages together: as many entries as four of the largest manifests hold.
_BYTES = 4 * oci.MANIFEST_LIMIT
# Beside 404, what registries without the API were seen to answer: a path, a method or a type that they do not know,
# or one that no token of theirs is good for. The fallback tag then has the last word.
_NO_API = frozenset({400, 403, 405, 406, 410, 415, 501})


@dataclass(frozen=True, slots=True)
class Tagged:
    """What the fallback tag names: an index, empty when there is none; `foreign` when it is something else."""

    index: Index
    etag: str = ""
    foreign: bool = False


def fallback_tag(digest: Digest) -> str:
    """The tag under which referrers of `digest` are listed without the API (spec: cut at 32 and 64)."""
    return f"{digest.algorithm[:32]}-{digest.hex[:64]}"


def index_tag(digest: Digest) -> str:
    """Our convention: the tag under which the SOCI index of the image manifest `digest` is found."""
    return f"{fallback_tag(digest)}.soci"


def listed(route: Route, digest: Digest, artifact_type: str, actions: str = "pull") -> list[Descriptor]:
    """Referrers of this artifact type (all, if empty). Empty when there are none, or no such manifest."""
    found = _from_api(route, digest, artifact_type, actions)
    if found is None:
        found = _of_type(from_tag(route, digest, actions).index.manifests, artifact_type)
    return found


def has_api(route: Route, digest: Digest) -> bool:
    """Whether the API answers for this digest; without it the fallback tag is all there is."""
    return _from_api(route, digest, "", "pull") is not None


def from_tag(route: Route, digest: Digest, actions: str = "pull") -> Tagged:
    """What is under the fallback tag."""
    nothing = Index(schema_version=2, media_type=oci.INDEX, manifests=())
    tag = fallback_tag(digest)
    call = _call(route, f"manifests/{tag}", f"referrers tag {tag}", actions)
    try:
        answer = route.session.request(call, oci.MANIFEST_LIMIT)
    except NotFound:
        return Tagged(nothing)
    document = oci.decode_manifest(answer.data)
    if not isinstance(document, Index):
        return Tagged(nothing, foreign=True)
    etag = answer.headers.get("ETag", "")
    # If-Match takes no weak one (RFC 9110 13.1.1).
    return Tagged(document, etag if etag.startswith('"') and etag.isascii() else "")


def _from_api(route: Route, digest: Digest, artifact_type: str, actions: str) -> list[Descriptor] | None:
    """None when the registry has no such API."""
    path = f"referrers/{digest}"
    if artifact_type:
        path += f"?artifactType={quote(artifact_type, safe='')}"
    call = _call(route, path, f"referrers of {digest}", actions)
    found: list[Descriptor] = []
    received = 0
    for number in range(_PAGES):
        try:
            answer = route.session.request(call, oci.MANIFEST_LIMIT)
        except (NotFound, Refused) as error:
            # Half a list is not taken for the whole.
            if number or (isinstance(error, Refused) and error.status not in _NO_API):
                raise
            return None
        received += len(answer.data)
        if received > _BYTES:
            break
        page = _page(answer)
        if page is None and number:
            raise Remote(f"{call.subject}: page {number + 1} is no index; check the registry")
        if page is None:
            return None
        filtered = artifact_type and _was_filtered(answer)
        found.extend(_of_type(page.manifests, artifact_type, vouched=bool(filtered)))
        link = parse_next_link(answer.headers.get("Link", ""))
        if link is None:
            return found
        call = replace(call, url=_following(route, call, link))
    raise Remote(
        f"{route}: referrers of {digest} do not end after {received} bytes; delete some, or name the index's digest"
    )


def _page(answer: Answer) -> Index | None:
    """One page; None for what an old registry, or a login page before a new one, answers to every path."""
    if answer.headers.get("Content-Type", "").partition(";")[0].strip() != oci.INDEX:
        return None
    page = oci.decode_manifest(answer.data)
    return page if isinstance(page, Index) else None


def _following(route: Route, call: Call, link: str) -> str:
    """The next page's URL: on the same host, and for the same registry where a mirror serves several."""
    following = urls.follow(call.url, link, call.subject)
    if urls.split(following)[0] != urls.split(call.url)[0]:
        raise Remote(f"{call.subject}: the next page is on another host; check the registry")
    if following == call.url:
        raise Remote(f"{call.subject}: the next page is the same again; check the registry")
    namespace = route.endpoint.namespace
    if namespace and "ns" not in parse_qs(urlsplit(following).query):
        following += f"{'&' if '?' in following else '?'}ns={quote(namespace, safe='')}"
    return following


def _was_filtered(answer: Answer) -> bool:
    applied = answer.headers.get("OCI-Filters-Applied", "")
    return "artifactType" in (each.strip() for each in applied.split(","))


def _of_type(
    entries: tuple[Descriptor, ...], artifact_type: str, *, vouched: bool = False
) -> list[Descriptor]:
    """Those of the type; without a type of their own only if the registry says that it filtered."""
    return [
        each
        for each in entries
        if not artifact_type or each.artifact_type == artifact_type or (vouched and not each.artifact_type)
    ]


def _call(route: Route, path: str, what: str, actions: str) -> Call:
    return route.call("GET", path, what, headers={"Accept": oci.INDEX}, actions=actions)
