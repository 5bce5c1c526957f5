"""Uploads of blobs: whole (POST, then PUT), or in pieces (POST, PATCHes, PUT) that go on where they broke.

Whole is what every registry takes, so it comes first. Pieces are for blobs that would take long to send again, for
registries, or proxies before them, that refuse large bodies, and for whoever asks for them. A registry that knows no
pieces gets the blob whole after all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from urllib.parse import quote

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.formats.oci import Descriptor
from soci_snapshotter.registry import urls
from soci_snapshotter.registry.auth import Scope
from soci_snapshotter.registry.failures import Refused, Transient
from soci_snapshotter.registry.pieces import Bytes, Lost, Pieces, in_pieces
from soci_snapshotter.registry.routes import Route
from soci_snapshotter.registry.transport import Answer, Call

_ANSWER = 64 << 10  # answers to uploads are empty or an error body
_ACTIONS = "pull,push"
# 201 answers a mount that was made, 202 an upload that was begun.
_STARTED = frozenset({201, 202})
# Above it, a minute at 35 Mbit/s, a blob goes in pieces: sending it again from its start would cost too much.
WHOLE_LIMIT = 256 << 20
# Large enough that the answers' round trips do not count, under the 100 MB that hosted proxies let through.
PIECE = 32 << 20
# A registry that forgets uploads that broke off has the blob begun anew this often.
_RESTARTS = 3
# A body too large, or a method, a path, a range or a kind of body that is not known.
_NO_WHOLE = frozenset({405, 411, 413, 415, 501})
_NO_PIECES = frozenset({400, 405, 411, 415, 416, 501})


class Uploads:
    """How blobs are sent. Remembers which hosts want pieces, and how large. Thread safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}

    def blob(
        self,
        route: Route,
        descriptor: Descriptor,
        body: Callable[[], Iterable[bytes]],
        progress: Callable[[int], None] | None,
        mount_from: str = "",
        piece: int = 0,
    ) -> bool:
        """Upload a blob; True if it was sent. Remote when the registry refuses, or takes it for another.

        `mount_from` is a repository of the same registry that may have the blob already: then nothing is sent, and
        the answer is False. `piece`: send what is larger in pieces of so many bytes; 0 decides by the blob's size.
        `progress` is told of bytes as they go, of a negative number when they have to go again.
        """
        with self._lock:
            wanted = self._sizes.get(route.endpoint.host, 0)
        pieces = bool(wanted) or descriptor.size > (piece or WHOLE_LIMIT)
        if not pieces:
            try:
                return _whole(route, descriptor, body, progress, mount_from)
            except Refused as refused:
                if refused.status not in _NO_WHOLE or not descriptor.size:
                    raise
        plan = Pieces(wanted or piece or PIECE)
        try:
            sent = _pieced(route, descriptor, body, progress, mount_from, plan)
        except (Refused, Lost) as error:
            if not pieces or (isinstance(error, Refused) and error.status not in _NO_PIECES):
                raise
            return _whole(route, descriptor, body, progress, mount_from)
        if not pieces or plan.refused:
            with self._lock:
                self._sizes[route.endpoint.host] = plan.size
        return sent


def _whole(
    route: Route,
    descriptor: Descriptor,
    body: Callable[[], Iterable[bytes]],
    progress: Callable[[int], None] | None,
    mount_from: str,
) -> bool:
    """A broken upload starts over from POST: of one request, registries keep nothing or all."""
    session = route.session
    data = Bytes(body, progress)

    def attempt() -> bool:
        data.at(0)
        started, answer = _start(route, descriptor, mount_from)
        if answer.status == 201:
            return False
        call = replace(
            _there(started, location_of(answer, started)),
            method="PUT",
            expected=frozenset({201}),
            headers={"Content-Type": "application/octet-stream"},
            body=lambda: data.read(0, descriptor.size),
            size=descriptor.size,
            timeout=session.options.upload_timeout,
        )
        call = replace(call, url=_with_digest(call.url, descriptor))
        try:
            with session.open_once(call) as response:
                said = response.headers.get("Docker-Content-Digest", descriptor.digest)
        except (Transient, Refused):
            data.at(0)
            raise
        finally:
            data.close()
        if said != descriptor.digest:
            raise Remote(f"{started.subject}: the registry stored another digest; check its storage")
        return True

    return session.retrying(attempt, session.options.retry)


def _pieced(
    route: Route,
    descriptor: Descriptor,
    body: Callable[[], Iterable[bytes]],
    progress: Callable[[int], None] | None,
    mount_from: str,
    plan: Pieces,
) -> bool:
    data = Bytes(body, progress)
    try:
        for restart in range(_RESTARTS + 1):
            data.at(0)
            started, answer = _start(route, descriptor, mount_from)
            if answer.status == 201:
                return False
            at_least = answer.headers.get("OCI-Chunk-Min-Length", "")
            plan.at_least(int(at_least) if at_least.isdecimal() and len(at_least) < 12 else 0)
            try:
                there = _there(started, location_of(answer, started))
                last = in_pieces(there, route.session, descriptor.size, data, plan)
                _finish(route, last, descriptor)
                return True
            except Lost:
                if restart == _RESTARTS:
                    raise
    except (Refused, Lost):
        data.at(0)  # it may go whole yet
        raise
    finally:
        data.close()
    raise AssertionError("unreachable: the last restart returns or raises")


def _finish(route: Route, last: Call, descriptor: Descriptor) -> None:
    """Name the digest of what was sent. An answer that was lost is found out by asking for the blob."""
    tried = False

    def attempt() -> None:
        nonlocal tried
        if tried and _is_there(route, descriptor):
            return
        tried = True
        call = replace(
            last,
            method="PUT",
            url=_with_digest(last.url, descriptor),
            expected=frozenset({201}),
            headers={},
            body=lambda: b"",
            size=0,
            timeout=route.session.options.upload_timeout,
        )
        try:
            with route.session.open_once(call) as response:
                said = response.headers.get("Docker-Content-Digest", descriptor.digest)
        except NotFound as error:
            raise Lost(str(error)) from None
        if said != descriptor.digest:
            raise Remote(f"{last.subject}: the registry stored another digest; check its storage")

    route.session.retrying(attempt, route.session.options.retry)


def _is_there(route: Route, descriptor: Descriptor) -> bool:
    call = route.call("HEAD", f"blobs/{descriptor.digest}", f"blob {descriptor.digest}", actions=_ACTIONS)
    try:
        route.session.request(call, 0)
    except NotFound:
        return False
    return True


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


def location_of(answer: Answer, call: Call) -> str:
    """Where an upload goes on; Remote when the answer does not say."""
    location = answer.headers.get("Location", "")
    if not location:
        raise Remote(f"{call.subject}: no upload location; check the registry")
    return location


def _there(started: Call, location: str) -> Call:
    """The call at the upload's own location, which on another host than the registry's gets no authorization."""
    target = urls.follow(started.url, location, started.subject)
    away = urls.split(target)[0] != urls.split(started.url)[0]
    # A scope for which there never is a grant.
    scope = Scope(urls.split(target)[0].host, "", "") if away else started.scope
    return replace(started, url=target, scope=scope)


def _with_digest(url: str, descriptor: Descriptor) -> str:
    return f"{url}{'&' if '?' in url else '?'}digest={descriptor.digest}"
