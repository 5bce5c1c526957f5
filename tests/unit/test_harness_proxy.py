"""The counting and shaping proxy, between a client and a real server on loopback."""

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest
from harness.proxy import Link, Proxy, parse_link


class _Doubler(socketserver.StreamRequestHandler):
    """Answers each line `N` with N bytes."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(b"x" * int(line))


@contextlib.contextmanager
def _server() -> Iterator[tuple[str, int]]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Doubler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield ("127.0.0.1", server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def _ask(connection: socket.socket, size: int) -> int:
    connection.sendall(b"%d\n" % size)
    left = size
    while left:
        got = len(connection.recv(1 << 20))
        assert got, "the connection ended early"
        left -= got
    return size


def _connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=10)


@pytest.mark.parametrize("link", [Link(), Link(0.002, 1e9)])
def test_counts_every_byte_of_each_direction(link: Link) -> None:
    """What the counters say equals what the client sent and received, over two connections."""
    with _server() as target, Proxy(target, link=link) as proxy:
        for size in (3_000_000, 7):
            with _connect(proxy) as connection:
                _ask(connection, size)
                _ask(connection, 1)
        assert (proxy.received, proxy.sent, proxy.connections) == (3_000_009, 8 + 2 + 2 + 2, 2)


def test_many_connections_at_once() -> None:
    """Sixteen clients each get their own answer in full."""
    with _server() as target, Proxy(target) as proxy:
        got: list[int] = []

        def client(size: int) -> None:
            with _connect(proxy) as connection:
                got.append(_ask(connection, size))

        threads = [threading.Thread(target=client, args=(100_000 + i,)) for i in range(16)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert sorted(got) == [100_000 + i for i in range(16)]
        assert proxy.received == sum(got)


def test_a_round_trip_takes_the_links_time() -> None:
    """A small question on a 40 ms link is answered after 40 ms, and after 80 on a new connection."""
    with _server() as target, Proxy(target, link=Link(0.04, None)) as proxy, _connect(proxy) as connection:
        started = time.monotonic()
        _ask(connection, 1)
        first = time.monotonic() - started
        _ask(connection, 1)
        second = time.monotonic() - started - first
    assert 0.08 <= first < 0.5
    assert 0.04 <= second < 0.3


def test_connections_share_the_links_rate() -> None:
    """Two times 1 MB over 10 MB/s takes 0.2 s, not 0.1: the rate is the link's, not the connection's."""
    link = Link(0.0, 10e6)
    with (
        _server() as target,
        Proxy(target, link=link) as proxy,
        _connect(proxy) as one,
        _connect(proxy) as two,
    ):
        started = time.monotonic()
        threads = [threading.Thread(target=_ask, args=(each, 1_000_000)) for each in (one, two)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        took = time.monotonic() - started
    assert 0.19 <= took < 1.0


def test_stall_holds_and_resume_lets_go() -> None:
    """While stalled nothing arrives and the connection stays open; afterwards the same answer comes."""
    with _server() as target, Proxy(target) as proxy, _connect(proxy) as connection:
        _ask(connection, 10)
        proxy.stall()
        connection.sendall(b"5\n")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(10)
        proxy.resume()
        connection.settimeout(5)
        assert connection.recv(10) == b"xxxxx"


@pytest.mark.parametrize("link", [Link(), Link(0.002, 1e9)])
def test_cut_ends_connections_but_not_the_proxy(link: Link) -> None:
    """An open connection ends at once; the next one works."""
    with _server() as target, Proxy(target, link=link) as proxy:
        with _connect(proxy) as connection:
            _ask(connection, 10)
            proxy.cut()
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(10) == b""
        with _connect(proxy) as connection:
            assert _ask(connection, 10) == 10


def test_a_client_that_leaves_frees_its_threads() -> None:
    """After a client hangs up in the middle of a large answer, leaving the context ends every thread."""
    before = threading.active_count()
    with _server() as target, Proxy(target) as proxy:
        with _connect(proxy) as connection:
            connection.sendall(b"50000000\n")
            connection.recv(1)
        with _connect(proxy) as connection:
            _ask(connection, 1)
    end = time.monotonic() + 10  # the server's own threads are told last
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_absent_target_closes_the_connection() -> None:
    """A client of a proxy whose target refuses sees the end of the connection, as from a dead registry."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    with Proxy(address) as proxy, _connect(proxy) as connection:
        assert connection.recv(1) == b""


def test_parse_link() -> None:
    """The command line's notation, and what it refuses."""
    assert parse_link("10ms,500mbit") == Link(0.01, 62.5e6)
    assert parse_link("1.5s") == Link(1.5, None)
    assert parse_link("2gbit") == Link(0.0, 250e6)
    for bad in ("10", "fast", "0mbit", "10ms,x"):
        with pytest.raises(ValueError, match="neither"):
            parse_link(bad)
