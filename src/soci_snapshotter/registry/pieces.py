"""One blob upload in pieces (distribution-spec 1.1, "Pushing a blob in chunks"), resumed after a broken connection.

A piece that broke off may have arrived in part: the upload's status says how much. A registry that does not answer
that has lost the upload.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace

from soci_snapshotter.errors import NotFound, Remote
from soci_snapshotter.registry import urls
from soci_snapshotter.registry.failures import Refused, Transient
from soci_snapshotter.registry.transport import Call, Session

_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,18})", re.ASCII)
# Below it a proxy that refuses a piece refuses anything.
_SMALLEST = 64 << 10
# A registry that wants pieces longer than this wants the blob whole.
_LARGEST = 1 << 30


class Lost(Remote):
    """The registry knows nothing of the upload any longer: it has to be begun anew."""


@dataclass(slots=True)
class Pieces:
    """How long pieces are, in bytes; `refused` when one was too long for the registry."""

    size: int
    refused: bool = False

    def at_least(self, minimum: int) -> None:
        """The registry's own minimum (OCI-Chunk-Min-Length)."""
        self.size = max(self.size, min(minimum, _LARGEST))

    def smaller(self, tried: int) -> bool:
        """After a refusal of `tried` bytes; False when there is nothing smaller to try."""
        self.refused = True
        if tried <= _SMALLEST:
            return False
        self.size = max(tried // 4, _SMALLEST)
        return True


class Bytes:
    """A blob's bytes from any offset; made anew when it is not where the last read ended.

    `progress` is told of bytes as they are read, of a negative number when they have to go again.
    """

    def __init__(self, body: Callable[[], Iterable[bytes]], progress: Callable[[int], None] | None) -> None:
        self._body = body
        self._progress = progress
        self._told = 0
        self._made: Iterable[bytes] = ()
        self._pieces: Iterator[bytes] = iter(())
        self._position = -1
        self._rest = b""

    def close(self) -> None:
        """End the body where it stands: it may hold a connection to where it comes from."""
        if isinstance(self._made, Generator):
            self._made.close()
        self._made, self._pieces, self._position, self._rest = (), iter(()), -1, b""

    def at(self, position: int) -> None:
        """So many bytes have arrived."""
        if self._progress is not None and position != self._told:
            self._progress(position - self._told)
        self._told = position

    def read(self, offset: int, length: int) -> Iterator[bytes]:
        """`length` bytes from `offset` on, fewer when the body is shorter."""
        self.at(offset)  # a redirect makes the body anew within one try
        if offset != self._position:
            self.close()
            self._made = self._body()
            self._pieces, self._position = iter(self._made), 0
        end = offset + length
        while self._position < end:
            piece = self._rest or next(self._pieces, b"")
            self._rest = b""
            if not piece:
                return
            start = self._position
            taken = piece[max(0, offset - start) : end - start]
            self._rest = piece[end - start :]
            self._position = min(start + len(piece), end)
            if taken:
                yield taken
                self.at(self._told + len(taken))


def in_pieces(started: Call, session: Session, size: int, data: Bytes, plan: Pieces) -> Call:
    """Send `size` bytes to the upload at `started`; the call at the location where it is to be finished.

    Raises Lost when it has to be begun anew, Refused when the registry takes no pieces.
    """
    upload = _Upload(started, session, size, data, plan)
    while upload.position < size:
        session.retrying(upload.piece, session.options.retry)
    return upload.at


class _Upload:
    def __init__(self, started: Call, session: Session, size: int, data: Bytes, plan: Pieces) -> None:
        self.at = started
        self.position = 0
        self._session = session
        self._size = size
        self._data = data
        self._plan = plan
        self._broken = False

    def piece(self) -> None:
        """Send the next piece, after asking how far the last one came if it broke off."""
        if self._broken:
            self._ask()
        offset = self.position
        length = min(self._plan.size, self._size - offset)
        call = replace(
            self.at,
            method="PATCH",
            expected=frozenset({202}),
            headers={
                "Content-Type": "application/octet-stream",
                "Content-Range": f"{offset}-{offset + length - 1}",
            },
            body=lambda: self._data.read(offset, length),
            size=length,
            timeout=self._session.options.upload_timeout,
        )
        self._broken = True
        try:
            with self._session.open_once(call) as response:
                arrived = _arrived(response.headers.get("Range", ""), offset + length)
                self._follow(response.headers.get("Location", ""))
        except NotFound as error:
            raise Lost(str(error)) from None
        except Refused as refused:
            if refused.status == 413 and self._plan.smaller(length):
                self._broken = False  # nothing of it was taken
                return
            if refused.status == 416 and offset:
                raise Transient(refused) from None  # it has another idea of how far it is
            raise
        if not offset < arrived <= offset + length:
            raise Remote(
                f"{self.at.subject}: {arrived} bytes of {offset + length} arrived; check the registry"
            )
        self.position = arrived
        self._broken = False

    def _ask(self) -> None:
        call = replace(
            self.at, method="GET", expected=frozenset({200, 204}), headers={}, body=None, size=0, timeout=None
        )
        try:
            with self._session.open_once(call) as response:
                arrived = _arrived(response.headers.get("Range", ""), 0)
                self._follow(response.headers.get("Location", ""))
        except (NotFound, Refused) as error:
            raise Lost(str(error)) from None
        if arrived > self._size:
            raise Lost(f"{self.at.subject}: {arrived} bytes of {self._size} have arrived; check the registry")
        if arrived < self.position:  # it could lose them again and again
            raise Lost(f"{self.at.subject}: {arrived} bytes of {self.position} are left; check the registry")
        self.position = arrived
        self._data.at(arrived)

    def _follow(self, location: str) -> None:
        """The next request goes where the answer says, if it does; never to another host than the upload's."""
        if not location:
            return
        target = urls.follow(self.at.url, location, self.at.subject)
        if urls.split(target)[0] != urls.split(self.at.url)[0]:
            raise Remote(f"{self.at.subject}: the upload goes on at another host; check the registry")
        self.at = replace(self.at, url=target)


def _arrived(field: str, otherwise: int) -> int:
    """How many bytes an answer's Range says are there. `0-0` stands for none: so long is no piece."""
    found = _RANGE.fullmatch(field.strip())
    if found is None:
        return otherwise
    last = int(found[1])
    return last + 1 if last else 0
