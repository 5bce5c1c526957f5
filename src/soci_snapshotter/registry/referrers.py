"""Referrers of a manifest: the API of distribution-spec 1.1, or the fallback tag where a registry has none."""

from __future__ import annotations

from urllib.parse import quote

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats import oci
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.formats.httpfields import parse_next_link
from soci_snapshotter.formats.oci import Descriptor, Index
from soci_snapshotter.registry import urls
from soci_snapshotter.registry.auth import Scope
from soci_snapshotter.registry.failures import Subject
from soci_snapshotter.registry.transport import Call, Session
from soci_snapshotter.registry.urls import Repo

# Some thousand referrers at the usual hundred a page; an endless list must end.
_PAGES = 50


def fallback_tag(digest: Digest) -> str:
    """The tag under which referrers of `digest` are listed without the API (spec: cut at 32 and 64)."""
    return f"{digest.algorithm[:32]}-{digest.hex[:64]}"


def listed(session: Session, repo: Repo, digest: Digest, artifact_type: str) -> list[Descriptor]:
    """Referrers of this artifact type (all, if empty). Empty when there are none, or no such manifest."""
    found = _from_api(session, repo, digest, artifact_type)
    if found is None:
        found = list(from_tag(session, repo, digest).manifests)
    return [entry for entry in found if not artifact_type or entry.artifact_type == artifact_type]


def from_tag(session: Session, repo: Repo, digest: Digest) -> Index:
    """The index under the fallback tag; an empty one when there is none."""
    tag = fallback_tag(digest)
    base = f"{session.options.scheme(repo.host)}://{repo.host}/v2/{repo.repository}"
    try:
        document = _get_index(session, repo, f"{base}/manifests/{tag}", f"referrers tag {tag}")
    except NotFound:
        document = None
    return document or Index(schema_version=2, media_type=oci.INDEX, manifests=())


def _from_api(session: Session, repo: Repo, digest: Digest, artifact_type: str) -> list[Descriptor] | None:
    base = f"{session.options.scheme(repo.host)}://{repo.host}/v2/{repo.repository}"
    url: str | None = f"{base}/referrers/{digest}"
    if artifact_type:
        url = f"{url}?artifactType={quote(artifact_type, safe='')}"
    found: list[Descriptor] = []
    for _ in range(_PAGES):
        call = _call(session, repo, url or "", f"referrers of {digest}")
        try:
            answer = session.request(call, oci.MANIFEST_LIMIT)
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
        url = following
    raise Remote(f"{repo.host}/{repo.repository}: more than {_PAGES} pages of referrers of {digest}")


def _call(session: Session, repo: Repo, url: str, what: str) -> Call:
    scope = Scope(repo.host, repo.repository, "pull")
    subject = Subject(repo.host, repo.repository, what)
    return Call("GET", url, scope, subject, frozenset({200}), {"Accept": oci.INDEX})


def _get_index(session: Session, repo: Repo, url: str, what: str) -> Index | None:
    document = oci.decode_manifest(session.request(_call(session, repo, url, what), oci.MANIFEST_LIMIT).data)
    return document if isinstance(document, Index) else None
