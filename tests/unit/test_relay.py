"""What stands between systemd's socket and gRPC's."""

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest

from soci_snapshotter.daemon import systemd
from soci_snapshotter.daemon.relay import Relay


@contextmanager
def echo(path: Path) -> Iterator[None]:
    """Sends back what it gets, then what it got in all, when the other end has closed its half."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        listener.settimeout(30)

        def one(client: socket.socket) -> None:
            total = 0
            with client, suppress(OSError):  # hung up on, which is what a test does
                while data := client.recv(100_000):
                    total += len(data)
                    client.sendall(data)
                client.sendall(b"<%d>" % total)

        def serve() -> None:
            while True:
                client, _ = listener.accept()
                if client.recv(1) == b"!":
                    client.close()
                    return
                threading.Thread(target=one, args=(client,)).start()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            with socket.socket(socket.AF_UNIX) as end:
                end.connect(str(path))
                end.sendall(b"!")
                thread.join()


def talk(path: Path, seed: int) -> None:
    """Much in both directions at once; every byte comes back, and what is said after our half is closed."""
    data = os.urandom(1000) * 3000
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(path))
        channel.settimeout(60)

        def send() -> None:
            channel.sendall(b"." + data)
            channel.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        got = bytearray()
        while piece := channel.recv(65536):
            got += piece
        thread.join()
    assert got == data + b"<%d>" % len(data), seed


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[socket.socket, Path, Path]]:
    """A listener as systemd gives it, its path, and where gRPC would listen."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "front"))
        listener.listen(64)
        yield listener, tmp_path / "front", tmp_path / "back"


def test_bytes_pass(places: tuple[socket.socket, Path, Path]) -> None:
    """Twenty clients at once, the first of them there before the relay is: nothing is lost, mixed up or cut."""
    listener, front, back = places
    with echo(back), ThreadPoolExecutor(20) as clients:
        first = clients.submit(talk, front, 0)
        with Relay(listener, back) as relay, relay.accepting():
            for done in [first, *(clients.submit(talk, front, seed) for seed in range(1, 20))]:
                done.result(100)


def test_the_end(places: tuple[socket.socket, Path, Path]) -> None:
    """Leaving the relay hangs up on clients, and the listener still takes connections for the next daemon."""
    listener, front, back = places
    with echo(back), socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(30)
        with Relay(listener, back) as relay, relay.accepting():
            channel.connect(str(front))
            channel.sendall(b".x")
            assert channel.recv(1) == b"x"
        assert channel.recv(10) in {b"", b"<1>"}
        with socket.socket(socket.AF_UNIX) as late:
            late.connect(str(front))
            with Relay(listener, back) as relay, relay.accepting():
                late.sendall(b".y")
                assert late.recv(1) == b"y"


def test_a_call_under_way(places: tuple[socket.socket, Path, Path]) -> None:
    """A gRPC call that is under way when the relay accepts no more has its answer, all of it, when the server stops;
    who connects meanwhile waits for the next daemon.
    """
    listener, front, back = places
    came, go = threading.Event(), threading.Event()
    answer = os.urandom(3 << 20)

    def slow(request: bytes, context: grpc.ServicerContext) -> bytes:
        came.set()
        assert go.wait(60)
        return answer

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(slow)

    server = grpc.server(ThreadPoolExecutor(2), handlers=(Handlers(),))
    server.add_insecure_port(f"unix:{back}")
    server.start()
    unlimited = [("grpc.max_receive_message_length", -1)]
    with (
        grpc.insecure_channel(f"unix:{front}", unlimited) as channel,
        socket.socket(socket.AF_UNIX) as late,
    ):
        with Relay(listener, back) as relay:
            with relay.accepting():
                call = channel.unary_unary("/slow/Slow").future(b"")
                assert came.wait(60)
            late.connect(str(front))
            assert not call.done()
            stopped = server.stop(60)
            go.set()
            assert stopped.wait(60)
        assert call.result(60) == answer
        taken, _ = listener.accept()
        taken.close()


def test_nobody_behind(places: tuple[socket.socket, Path, Path]) -> None:
    """A connection that cannot be passed on is hung up on, and the next one is tried anew."""
    listener, front, back = places
    with Relay(listener, back) as relay, relay.accepting():
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(30)
            channel.connect(str(front))
            assert channel.recv(1) == b""
        with echo(back):
            talk(front, 0)


def test_what_is_given_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors announced to another process are not taken, and children are told of none."""
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    monkeypatch.setenv("LISTEN_FDS", "3")
    monkeypatch.setenv("LISTEN_FDNAMES", "soci-fuse:soci-mount:soci-state")
    found = systemd.inherited()
    assert (found.listeners, found.stored) == ((), None)
    assert "LISTEN_FDS" not in os.environ


def test_notifications(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One datagram each, by path and by abstract name, a descriptor with it; a manager that is gone does no harm."""
    for address in (str(tmp_path / "notify"), f"@soci-test-{os.getpid()}"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, open("/dev/null", "rb") as null:
            manager.bind("\0" + address[1:] if address[0] == "@" else address)
            systemd.notify("READY=1")
            systemd.notify("FDSTORE=1", null.fileno())
            assert manager.recv(100) == b"READY=1"
            data, given, _, _ = socket.recv_fds(manager, 100, 4)
            assert data == b"FDSTORE=1"
            [descriptor] = given
            assert os.path.samestat(os.fstat(descriptor), os.fstat(null.fileno()))
            os.close(descriptor)
        systemd.notify("READY=1")
