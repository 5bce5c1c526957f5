"""An HTTP server on a raw socket whose answers a test writes byte for byte; it remembers what it was asked."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Asked:
    """One request; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    number: int
    """How many requests for the same path came before."""
    body: bytes = b""


Answer = Callable[[Asked], bytes | None]
"""Raw bytes to send before the connection closes; None: say nothing until the client gives up."""


class Dripped(bytes):
    """Bytes to send one by one, each after 50 ms."""


class Stalled(bytes):
    """Bytes to send, and then nothing more until the client gives up."""


Cut = Callable[[Asked], int | None]
"""Of a request whose body is still to come: break the connection after so many bytes of it; None: read all of it."""


@dataclass
class BadServer:
    """Where it listens, and every request it got."""

    host: str
    asked: list[Asked] = field(default_factory=list)
    resumed: list[bool] = field(default_factory=list)
    """Of each connection by TLS: whether it took up an earlier one's session."""


def reply(status: str, body: bytes = b"", **headers: str) -> bytes:
    """A whole answer; underscores in header names become hyphens, Content-Length is right unless given."""
    fields = {"Content_Length": str(len(body)), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{lines}Connection: close\r\n\r\n".encode() + body


@contextmanager
def bad_server(
    answer: Answer, cut: Cut = lambda _: None, *, tls: ssl.SSLContext | None = None
) -> Iterator[BadServer]:
    """Serve on loopback until the block is left. What came of a body that was `cut` is answered, unheard."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = BadServer(f"127.0.0.1:{listener.getsockname()[1]}")
        ending = threading.Event()

        def accept() -> None:
            while not ending.is_set():
                with suppress(OSError):
                    connection, _ = listener.accept()
                    threading.Thread(
                        target=_serve, args=(connection, server, answer, cut, ending, tls), daemon=True
                    ).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            ending.set()
            with suppress(OSError):
                socket.create_connection(listener.getsockname()).close()  # wakes accept
            thread.join(5)


def _serve(
    connection: socket.socket,
    server: BadServer,
    answer: Answer,
    cut: Cut,
    ending: threading.Event,
    tls: ssl.SSLContext | None,
) -> None:
    with ExitStack() as stack:
        stack.callback(connection.close)
        stack.enter_context(suppress(OSError))
        connection.settimeout(30)
        if tls is not None:
            secured = stack.enter_context(tls.wrap_socket(connection, server_side=True))
            server.resumed.append(bool(secured.session_reused))
            connection = secured
        head = b""
        while b"\r\n\r\n" not in head:
            piece = connection.recv(65536)
            if not piece:
                return
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        asked = Asked(method, path, headers, sum(each.path == path for each in server.asked))
        length = int(headers.get("content-length", "0"))
        limit = cut(asked) if length else None
        wanted = length if limit is None else min(limit, length)
        while len(body) < wanted and (piece := connection.recv(1 << 20)):
            body += piece
        asked = replace(asked, body=body[:wanted])
        server.asked.append(asked)
        said = answer(asked)
        if limit is not None:
            return  # bytes that were not read make the end of the connection a reset
        if said is None:
            ending.wait(30)
        else:
            if isinstance(said, Dripped):
                for number in range(len(said)):
                    connection.sendall(said[number : number + 1])
                    time.sleep(0.05)
                return
            connection.sendall(said)
            if isinstance(said, Stalled):
                ending.wait(30)
