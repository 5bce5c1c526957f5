"""The daemon's small HTTP server: TCP, unix sockets, clients that misbehave; and what the debug address shows."""

from __future__ import annotations

import http.client
import socket
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from soci_snapshotter.daemon import debugging, pages
from soci_snapshotter.daemon.pages import MAX_CONNECTIONS, Page, PageServer, listen_tcp, listen_unix
from soci_snapshotter.errors import Config, Invalid


def hello(query: Mapping[str, str]) -> Page:
    """A page that repeats its query."""
    if "bad" in query:
        raise Invalid("bad: is bad")
    if "bug" in query:
        raise KeyError("bug")
    return Page("text/plain", f"hello {query.get('name', '')}".encode())


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    """A server on a free port; its address."""
    listener = listen_tcp("127.0.0.1:0", "metrics_address")
    host, port = listener.getsockname()[:2]
    with PageServer(listener, {"/hello": hello}, "pages"):
        yield host, port


def get(address: tuple[str, int], path: str, method: str = "GET") -> tuple[int, bytes]:
    """One request."""
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_pages_and_errors(server: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    """A page, its head alone, an unknown path, a bad query, another method, a bug: each with its status."""
    assert get(server, "/hello?name=you") == (200, b"hello you")
    assert get(server, "/hello", "HEAD") == (200, b"")
    assert get(server, "/other")[0] == 404
    assert get(server, "/hello?bad=1")[0] == 400
    assert get(server, "/hello", "POST")[0] == 501
    assert get(server, "/hello?bug=1")[0] == 500
    assert "a page could not be made" in caplog.text
    assert get(server, "/hello?name=again") == (200, b"hello again")


def test_slow_clients_hold_up_nobody(server: tuple[str, int]) -> None:
    """More connections that say nothing than there may be: a scrape is answered all the same, the oldest are closed."""
    silent = [socket.create_connection(server, timeout=10) for _ in range(MAX_CONNECTIONS + 4)]
    try:
        assert get(server, "/hello?name=x") == (200, b"hello x")
        assert silent[0].recv(1) == b""
        silent[-1].sendall(b"GET /hello HTTP/1.0\r\n\r\n")
        assert silent[-1].recv(1 << 16).startswith(b"HTTP/1.0 200")
    finally:
        for connection in silent:
            connection.close()


def test_a_connection_does_not_live_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends a byte now and then is never idle, and is closed when its time is over."""
    monkeypatch.setattr(pages, "LIFE_SECONDS", 0.2)
    listener = listen_tcp("127.0.0.1:0", "metrics_address")
    with (
        PageServer(listener, {"/hello": hello}, "pages"),
        socket.create_connection(listener.getsockname(), timeout=20) as drip,
    ):
        drip.settimeout(0.05)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                drip.send(b"G")
                if drip.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("the connection lives on")


def test_leaving_ends_connections_and_threads() -> None:
    """When the server is left nothing of it runs, although a client is connected; the port is free again."""
    listener = listen_tcp("127.0.0.1:0", "metrics_address")
    address = listener.getsockname()
    with PageServer(listener, {"/hello": hello}, "pages"):
        client = socket.create_connection(address, timeout=10)
        while not any("process_request" in thread.name for thread in threading.enumerate()):
            time.sleep(0.01)
    assert client.recv(1) == b""
    client.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=10)


def test_unix_socket_is_for_its_owner(tmp_path: Path) -> None:
    """Mode 0600, in a directory made for it; a stale socket is replaced, a file that is none refused by name."""
    path = tmp_path / "new" / "metrics.sock"
    for _ in range(2):
        listener = listen_unix(path, "metrics_address")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with PageServer(listener, {"/hello": hello}, "pages"), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
            client.sendall(b"GET /hello?name=u HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
            assert answer.endswith(b"hello u")
    other = tmp_path / "file"
    other.write_bytes(b"mine")
    with pytest.raises(Config, match=r"metrics_address = .*/file"):
        listen_unix(other, "metrics_address")
    assert other.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "address", ["", "8000", "host", "127.0.0.1:x", "127.0.0.1:70000", "no.such.host.invalid:80"]
)
def test_bad_addresses_name_the_key(address: str) -> None:
    """What cannot be listened on refuses to start, in one line with the key."""
    with pytest.raises(Config, match=r"^debug_address = .*"):
        listen_tcp(address, "debug_address")


def test_a_port_in_use_is_said() -> None:
    """The address and the reason."""
    with listen_tcp("127.0.0.1:0", "metrics_address") as first:
        port = first.getsockname()[1]
        with pytest.raises(Config, match=r"cannot listen: Address already in use$"):
            listen_tcp(f"127.0.0.1:{port}", "metrics_address")


def test_every_interface_and_ipv6() -> None:
    """`:0` is everywhere, by IPv4 at least; a bracketed address is IPv6's."""
    with listen_tcp(":0", "metrics_address") as everywhere:
        socket.create_connection(("127.0.0.1", everywhere.getsockname()[1]), timeout=10).close()
    if socket.has_dualstack_ipv6():
        with listen_tcp("[::1]:0", "metrics_address") as six:
            assert six.family == socket.AF_INET6


def test_stacks_and_profile_show_where_threads_are() -> None:
    """A thread that waits in a function: its name and the function, once in stacks, in every look of a profile."""
    gate = threading.Event()

    def waits_here() -> None:
        gate.wait(20)

    thread = threading.Thread(target=waits_here, name="a-waiter")
    thread.start()
    try:
        text = debugging.stacks()
        assert "thread a-waiter" in text
        assert "in waits_here" in text
        found = [line for line in debugging.profile(0.2).splitlines() if line.startswith("a-waiter;")]
        assert found
        assert all("waits_here" in line for line in found)
        assert sum(int(line.rpartition(" ")[2]) for line in found) >= 2
        assert "a-waiter" not in debugging.profile(0)
    finally:
        gate.set()
        thread.join()


def test_a_profile_shows_no_values() -> None:
    """Function names only: what variables hold stays out of it."""
    gate = threading.Event()

    def holds(password: str) -> None:
        gate.wait(20)

    value = "".join(("hunter", "2"))  # the source line, which a stack shows, is no value
    thread = threading.Thread(target=holds, args=(value,))
    thread.start()
    try:
        assert value not in debugging.profile(0.1) + debugging.stacks()
    finally:
        gate.set()
        thread.join()
