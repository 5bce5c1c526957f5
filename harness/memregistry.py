"""A registry in memory, on harness.badserver's raw socket: distribution-spec 1.1, and the ways others part from it.

What a test wants to go wrong it does in `before` (an answer instead of the registry's) or around `__call__`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from harness.badserver import Asked, reply

_PATH = re.compile(r"/v2/(.+)/(manifests|blobs/uploads|blobs|referrers)/?([^/]*)")
_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass
class MemRegistry:
    """Its content by repository, and how it behaves. Call it with what is asked; thread safe."""

    referrers: bool = True
    """Has the referrers API."""
    page: int = 0
    """Referrers on a page; 0 for all."""
    filters: bool = True
    """Filters by artifactType, and says so."""
    whole: bool = True
    """Takes a blob in one PUT."""
    pieces: bool = True
    """Takes PATCHes with Content-Range, and tells the upload's status."""
    min_piece: int = 0
    """OCI-Chunk-Min-Length."""
    max_body: int = 1 << 40
    """What a proxy before it lets through, bytes."""
    mounts: bool = True
    conditional: bool = False
    """Honours If-Match."""
    before: Callable[[Asked], bytes | None] = lambda _: None
    """Answers instead of the registry when it returns something."""
    blobs: dict[str, dict[str, bytes]] = field(default_factory=dict)
    manifests: dict[str, dict[str, tuple[str, bytes]]] = field(default_factory=dict)
    """By digest and by tag: media type and bytes."""
    uploads: dict[str, bytes] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __call__(self, asked: Asked) -> bytes | None:
        """The answer."""
        said = self.before(asked)
        if said is not None:
            return said
        target = urlsplit(asked.path)
        found = _PATH.fullmatch(target.path)
        if found is None:
            return reply("200 OK") if target.path == "/v2/" else reply("404 Not Found")
        repository, kind, name = found.groups()
        query = {key: values[0] for key, values in parse_qs(target.query).items()}
        if len(asked.body) > self.max_body:
            return reply("413 Request Entity Too Large")
        with self.lock:
            if kind == "manifests":
                return self._manifest(asked, repository, name)
            if kind == "blobs":
                return self._blob(asked, repository, name)
            if kind == "referrers":
                return self._referrers(repository, name, query)
            return self._upload(asked, repository, name, query)

    def _manifest(self, asked: Asked, repository: str, name: str) -> bytes:
        known = self.manifests.setdefault(repository, {})
        if asked.method == "PUT":
            if self.conditional and "if-match" in asked.headers:
                now = known.get(name, ("", b""))[1]
                if asked.headers["if-match"] != f'"{_digest(now)}"':
                    return reply("412 Precondition Failed")
            digest = _digest(asked.body)
            known[name] = known[digest] = asked.headers["content-type"], asked.body
            subject = json.loads(asked.body).get("subject")
            more = {"OCI_Subject": subject["digest"]} if subject and self.referrers else {}
            return reply("201 Created", Docker_Content_Digest=digest, Location=asked.path, **more)
        if name not in known:
            return reply("404 Not Found")
        media_type, data = known[name]
        fields = {"Content_Type": media_type, "Docker_Content_Digest": _digest(data)}
        return _got(asked, data, ETag=f'"{_digest(data)}"', **fields)

    def _blob(self, asked: Asked, repository: str, digest: str) -> bytes:
        data = self.blobs.setdefault(repository, {}).get(digest)
        if data is None:
            return reply("404 Not Found")
        return _got(asked, data, Content_Type="application/octet-stream")

    def _referrers(self, repository: str, digest: str, query: dict[str, str]) -> bytes:
        if not self.referrers:
            return reply("404 Not Found")
        wanted = query.get("artifactType", "") if self.filters else ""
        entries = []
        for name, (media_type, data) in self.manifests.get(repository, {}).items():
            document: dict[str, Any] = json.loads(data)
            kind = document.get("artifactType") or document.get("config", {}).get("mediaType", "")
            about = document.get("subject", {}).get("digest")
            if name != _digest(data) or about != digest or (wanted and kind != wanted):
                continue
            entry = {"mediaType": media_type, "digest": name, "size": len(data), "artifactType": kind}
            entries.append(entry)
        start = int(query.get("last", "0"))
        end = start + self.page if self.page else len(entries)
        more = {"OCI_Filters_Applied": "artifactType"} if wanted else {}
        if end < len(entries):
            next_page = f"/v2/{repository}/referrers/{digest}?last={end}"
            if "artifactType" in query:
                next_page += f"&artifactType={quote(query['artifactType'], safe='')}"
            more["Link"] = f'<{next_page}>; rel="next"'
        body = json.dumps({"schemaVersion": 2, "mediaType": _INDEX, "manifests": entries[start:end]}).encode()
        return reply("200 OK", body, Content_Type=_INDEX, **more)

    def _upload(self, asked: Asked, repository: str, name: str, query: dict[str, str]) -> bytes:
        if asked.method == "POST":
            source = self.blobs.get(query.get("from", ""), {})
            if self.mounts and query.get("mount") in source:
                self.blobs.setdefault(repository, {})[query["mount"]] = source[query["mount"]]
                return reply("201 Created")
            name = f"u{len(self.uploads)}"
            self.uploads[name] = b""
            least = {"OCI_Chunk_Min_Length": str(self.min_piece)} if self.min_piece else {}
            return reply("202 Accepted", Location=f"/v2/{repository}/blobs/uploads/{name}", **least)
        if name not in self.uploads:
            return reply("404 Not Found")
        if asked.method == "PATCH":
            return self._piece(asked, name)
        if asked.method == "GET":
            return self._status("204 No Content", asked, name) if self.pieces else reply("404 Not Found")
        if asked.body and not self.whole:
            return reply("413 Request Entity Too Large")
        data = self.uploads[name] + asked.body
        if _digest(data) != query["digest"]:
            return reply("400 Bad Request", b'{"errors": [{"code": "DIGEST_INVALID"}]}')
        self.blobs.setdefault(repository, {})[query["digest"]] = data
        return reply("201 Created", Docker_Content_Digest=query["digest"])

    def _piece(self, asked: Asked, name: str) -> bytes:
        if not self.pieces:
            return reply("405 Method Not Allowed")
        start, end = (int(part) for part in asked.headers["content-range"].split("-"))
        if start != len(self.uploads[name]):
            return reply("416 Range Not Satisfiable")
        self.uploads[name] += asked.body  # also what came of one that broke off
        assert end - start + 1 == int(asked.headers["content-length"])
        return self._status("202 Accepted", asked, name)

    def _status(self, status: str, asked: Asked, name: str) -> bytes:
        last = max(len(self.uploads[name]) - 1, 0)
        return reply(status, Range=f"0-{last}", Location=urlsplit(asked.path).path)


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _got(asked: Asked, data: bytes, **fields: str) -> bytes:
    """The answer to GET, HEAD or a GET of one range."""
    if asked.method == "HEAD":
        return reply("200 OK", Content_Length=str(len(data)), **fields)
    if "range" not in asked.headers:
        return reply("200 OK", data, **fields)
    start, _, end = asked.headers["range"].removeprefix("bytes=").partition("-")
    piece = data[int(start) : int(end) + 1 if end else None]
    where = f"bytes {start}-{int(start) + len(piece) - 1}/{len(data)}"
    return reply("206 Partial Content", piece, Content_Range=where, **fields)
