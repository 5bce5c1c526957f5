"""The CRI's ImageService on our socket: byte for byte to containerd and back, and whose logins are kept how long."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from harness import cri
from harness.images import layer_from_dir, push, shell_rootfs, write_layout
from harness.tokenserver import start_token_registry
from tests.integration.support import GNU, PIGZ
from tests.integration.versions import node

from soci_snapshotter.containerd.stubs import cri_images_pb2 as pb
from soci_snapshotter.daemon.criproxy import CriLogins, CriProxy
from soci_snapshotter.formats.dockerconfig import Login

V1, ALPHA = "/runtime.v1.ImageService/", "/runtime.v1alpha2.ImageService/"
IMAGE = "r.test:5000/team/app:1"


@dataclass
class Cri(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """containerd's end: remembers calls, answers what it is told."""

    answers: dict[str, Callable[[bytes, grpc.ServicerContext], bytes]] = field(default_factory=dict)
    calls: list[tuple[str, bytes, dict[str, str | bytes], float | None]] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def service(self, details: grpc.HandlerCallDetails) -> object:
        method = details.method
        name = method.rpartition("/")[2]

        def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
            metadata = dict(context.invocation_metadata())
            self.calls.append((method, request, metadata, context.time_remaining()))
            context.add_callback(self.cancelled.set)
            return self.answers[name](request, context)

        def stream(request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            for number in range(3):
                yield request + bytes([number])

        if name == "StreamImages":
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary) if name in self.answers else None


@contextmanager
def serving(path: Path, handler: grpc.GenericRpcHandler) -> Iterator[None]:  # type: ignore[type-arg]
    """A gRPC server on a socket."""
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, options=[("grpc.max_receive_message_length", 16 << 20)])
        server.add_generic_rpc_handlers((handler,))
        server.add_insecure_port(f"unix:{path}")
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait()


@dataclass
class Rig:
    """The proxy between a client and the CRI's end."""

    cri: Cri
    logins: CriLogins
    channel: grpc.Channel
    address: str

    def call(self, method: str, request: bytes = b"", **how: object) -> bytes:
        """What comes back, undecoded."""
        return self.channel.unary_unary(method, None, None)(request, **how)  # type: ignore[arg-type]

    def pull(self, image: str = IMAGE, version: str = V1, **auth: str) -> bytes:
        """PullImage with these credentials."""
        message = pb.PullImageRequest(image=pb.ImageSpec(image=image), auth=pb.AuthConfig(**auth))
        return self.call(version + "PullImage", message.SerializeToString())

    def remove(self, image: str) -> bytes:
        """RemoveImage."""
        return self.call(
            V1 + "RemoveImage", pb.RemoveImageRequest(image=pb.ImageSpec(image=image)).SerializeToString()
        )

    def known(self, host: str = "r.test:5000", repository: str = "team/app") -> list[Login]:
        """The logins kept for a repository."""
        return list(self.logins.logins(host, repository))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    end = Cri()
    end.answers["PullImage"] = lambda *_: pb.PullImageResponse(image_ref="sha256:abc").SerializeToString()
    end.answers["RemoveImage"] = lambda *_: b""
    with (
        CriProxy(str(tmp_path / "cri.sock"), logins := CriLogins()) as proxy,
        serving(tmp_path / "cri.sock", end),
        serving(tmp_path / "ours.sock", proxy),
        grpc.insecure_channel(address := f"unix:{tmp_path / 'ours.sock'}") as channel,
    ):
        yield Rig(end, logins, channel, address)


@pytest.mark.parametrize("version", [V1, ALPHA])
def test_every_call_passes_byte_for_byte(rig: Rig, version: str) -> None:
    """Any method of either version, known to us or not, with bytes that are no message: they arrive as they are, with
    the caller's headers and deadline, and so does the answer."""
    for name in ("ListImages", "ImageStatus", "PullImage", "RemoveImage", "ImageFsInfo", "OfTomorrow"):
        request, answer = os.urandom(3000), os.urandom(5000)
        rig.cri.answers[name] = lambda *_, answer=answer: answer  # type: ignore[misc]
        assert (
            rig.call(version + name, request, timeout=30, metadata=[("x-a", "1"), ("y-bin", b"\0")]) == answer
        )
        method, got, metadata, left = rig.cri.calls[-1]
        assert (method, got) == (version + name, request)
        assert (metadata["x-a"], metadata["y-bin"]) == ("1", b"\0")
        assert left is not None
        assert 0 < left < 35  # gRPC rounds
    rig.call(version + "ListImages")
    left = rig.cri.calls[-1][3]
    assert left is None or left > 1e8  # no deadline was given, none is made up


def test_streams_and_large_messages_pass(rig: Rig) -> None:
    """A method that streams its answers, and a list of images beyond gRPC's default limit of 4 MiB."""
    stream = rig.channel.unary_stream(V1 + "StreamImages", None, None)(b"x")
    assert list(stream) == [b"x\0", b"x\1", b"x\2"]
    big = os.urandom(9 << 20)
    rig.cri.answers["ListImages"] = lambda *_: big
    with grpc.insecure_channel(
        rig.address, options=[("grpc.max_receive_message_length", 16 << 20)]
    ) as channel:
        assert channel.unary_unary(V1 + "ListImages", None, None)(b"") == big


def test_statuses_pass_with_their_details(rig: Rig) -> None:
    """Code, text and trailing metadata (rich details among it) are the callee's, also for what it does not have."""

    def refuse(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x05"), ("x-trailing", "t")))
        context.abort(grpc.StatusCode.NOT_FOUND, "no such image: \u00fc")

    rig.cri.answers["ImageStatus"] = refuse
    with pytest.raises(grpc.RpcError) as caught:
        rig.call(V1 + "ImageStatus")
    error = caught.value
    assert isinstance(error, grpc.Call)
    assert (error.code(), error.details()) == (grpc.StatusCode.NOT_FOUND, "no such image: \u00fc")
    trailing = dict(error.trailing_metadata())
    assert trailing["grpc-status-details-bin"] == b"\x08\x05"
    assert trailing["x-trailing"] == "t"
    with pytest.raises(grpc.RpcError) as caught:
        rig.call(V1 + "Absent")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    with pytest.raises(grpc.RpcError) as caught:
        rig.call("/runtime.v1.RuntimeService/Version")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]
    assert all("RuntimeService" not in call[0] for call in rig.cri.calls)


def test_a_caller_that_gives_up_ends_the_call(rig: Rig) -> None:
    """Its deadline, and its hanging up, reach containerd: no pull goes on that nobody waits for."""
    ended = threading.Event()

    def slow(_: bytes, context: grpc.ServicerContext) -> bytes:
        ended.wait(20)
        return b""

    rig.cri.answers["PullImage"] = slow
    with pytest.raises(grpc.RpcError) as caught:
        rig.call(V1 + "PullImage", timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert rig.cri.cancelled.wait(10)
    rig.cri.cancelled.clear()
    call = rig.channel.unary_unary(V1 + "PullImage", None, None).future(b"")
    while len(rig.cri.calls) < 2:
        time.sleep(0.01)
    call.cancel()
    assert rig.cri.cancelled.wait(10)
    ended.set()


def test_without_containerd_calls_are_unavailable_until_it_is_there(tmp_path: Path) -> None:
    """A node that boots: UNAVAILABLE, with the socket named; a moment after containerd came, its answers."""
    late = Cri()
    late.answers["ListImages"] = lambda *_: b"here"
    with (
        CriProxy(str(tmp_path / "cri.sock"), CriLogins()) as proxy,
        serving(tmp_path / "ours.sock", proxy),
        grpc.insecure_channel(f"unix:{tmp_path / 'ours.sock'}") as channel,
    ):
        call = channel.unary_unary(V1 + "ListImages", None, None)
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
            assert "cri.sock" in caught.value.details()  # type: ignore[attr-defined]
        with serving(tmp_path / "cri.sock", late):
            end = time.monotonic() + 20
            while True:
                try:
                    assert call(b"", timeout=10) == b"here"
                    break
                except grpc.RpcError:
                    assert time.monotonic() < end
                    time.sleep(0.05)


def test_pulls_do_not_starve_other_calls(rig: Rig) -> None:
    """40 pulls that wait hold up no ImageStatus: the threads of the server itself are not theirs."""
    gate = threading.Event()
    inside = threading.Semaphore(0)

    def slow(_: bytes, context: grpc.ServicerContext) -> bytes:
        inside.release()
        gate.wait(30)
        return b""

    rig.cri.answers |= {"PullImage": slow, "ImageStatus": lambda *_: b"ok"}
    pulls = [rig.channel.unary_unary(V1 + "PullImage", None, None).future(b"") for _ in range(40)]
    for _ in range(7):  # the CRI's end has 8 threads
        assert inside.acquire(timeout=20)
    status = rig.channel.unary_unary(V1 + "Unknown", None, None)
    with pytest.raises(grpc.RpcError):
        status(b"", timeout=20)
    gate.set()
    for pull in pulls:
        assert pull.result(timeout=60) == b""


# --- logins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [V1, ALPHA])
@pytest.mark.parametrize(
    ("auth", "login"),
    [
        ({"username": "u", "password": "p"}, Login("u", "p")),
        ({"auth": "dTpwOnE="}, Login("u", "p:q")),
        ({"identity_token": "idt"}, Login("", "idt")),
        ({"registry_token": "rt"}, Login("", "rt", registry_token=True)),
        ({"username": "u", "password": "p", "identity_token": "i", "auth": "eDp5"}, Login("u", "p")),
        ({"username": "u", "password": "p", "server_address": "https://r.test:5000/v2/"}, Login("u", "p")),
    ],
)
def test_every_form_of_credentials_is_kept(
    rig: Rig, version: str, auth: dict[str, str], login: Login
) -> None:
    """Of both versions of the API; for the image's registry and repository, and for nothing else."""
    rig.pull(version=version, **auth)
    assert rig.known() == [login]
    assert rig.known(host="r.test") == rig.known(host="evil.test:5000") == []
    assert rig.known(repository="team/other") == []


def test_credentials_of_another_server_go_there_only(rig: Rig) -> None:
    """server_address names a host that is not the image's registry: the registry is not given them."""
    rig.pull(username="u", password="p", server_address="mirror.test")
    assert rig.known() == []
    assert rig.known(host="mirror.test") == [Login("u", "p")]


def test_docker_hub_has_several_names(rig: Rig) -> None:
    """A short name is Docker Hub's, whatever the server address calls it."""
    for server in ("", "https://index.docker.io/v1/", "docker.io"):
        rig.pull("app", username="u", password="p", server_address=server)
        assert rig.known("registry-1.docker.io", "library/app") == [Login("u", "p")]


def test_nothing_is_kept_of_pulls_without_credentials_or_sense(rig: Rig) -> None:
    """No auth, empty auth, auth that is no base64, an image that is none, bytes that are no message: all pass."""
    rig.pull()
    rig.pull(auth="!!!")
    rig.pull(auth="bm9jb2xvbg==")
    rig.pull("UPPER CASE", username="u", password="p")
    rig.call(V1 + "PullImage", b"\xff\xff\xff")
    rig.call(V1 + "RemoveImage", b"\xff\xff\xff")
    assert len(rig.cri.calls) == 6
    assert rig.known() == []


def test_a_failed_pull_leaves_its_login_behind(rig: Rig) -> None:
    """kubelet tries one after the other: while a pull runs its login is there, when it fails it goes, an older stays."""
    rig.pull(username="good", password="p")
    seen: list[list[Login]] = []

    def fail(_: bytes, context: grpc.ServicerContext) -> bytes:
        seen.append(rig.known())
        context.abort(grpc.StatusCode.UNKNOWN, "unauthorized")

    rig.cri.answers["PullImage"] = fail
    with pytest.raises(grpc.RpcError):
        rig.pull(username="bad", password="p")
    assert [login.user for login in seen[0]] == ["bad", "good"]
    assert [login.user for login in rig.known()] == ["good"]
    with pytest.raises(grpc.RpcError):
        rig.pull("r.test:5000/team/app:2", username="bad", password="p")
    assert [login.user for login in rig.known()] == ["good"]


def test_a_failed_pull_takes_no_login_that_another_pull_proved(rig: Rig) -> None:
    """The registry is away when kubelet pulls again, also with wrong logins, more than are kept: what pulled the image
    before is there, for the host it was good for. A login that fails in one pull and works in another, begun at the
    same time, stays."""
    good = rig.cri.answers["PullImage"]
    rig.pull(username="good", password="p")

    def fail(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "away")

    rig.cri.answers["PullImage"] = fail
    for auth in ({"username": "good"}, {"username": "good", "server_address": "mirror.test"}):
        with pytest.raises(grpc.RpcError):
            rig.pull(password="p", **auth)
    for number in range(6):
        with pytest.raises(grpc.RpcError):
            rig.pull(username=f"bad{number}", password="p")
    assert rig.known() == [Login("good", "p")]
    assert rig.known(host="mirror.test") == []
    rig.cri.answers["PullImage"] = good
    one = pb.PullImageRequest(image=pb.ImageSpec(image=IMAGE), auth=pb.AuthConfig(username="both"))
    pulls = [rig.logins.pulling(one.SerializeToString()) for _ in range(2)]
    assert pulls[0] is not None
    assert pulls[1] is not None
    rig.logins.failed(pulls[0])
    rig.logins.pulled(pulls[1], b"")
    assert [login.user for login in rig.known()] == ["both", "good"]


def test_wrong_logins_take_no_place_from_the_right_one_while_they_are_tried(rig: Rig) -> None:
    """A dozen pulls of one image run at once with as many logins: the one that works is still known."""
    rig.pull(username="good", password="p")
    for number in range(12):
        request = pb.PullImageRequest(
            image=pb.ImageSpec(image=IMAGE), auth=pb.AuthConfig(username=f"bad{number}")
        )
        rig.logins.pulling(request.SerializeToString())
    assert "good" in [login.user for login in rig.known()]
    assert len(rig.known()) <= 8


@pytest.mark.parametrize("name", [IMAGE, "sha256:abc", "r.test:5000/team/app:alias"])
def test_removing_an_image_forgets_its_logins(rig: Rig, name: str) -> None:
    """By its name, by its identity (kubelet's garbage collection) or by another name of it: containerd removes all."""
    rig.pull(username="u", password="p")
    rig.pull("r.test:5000/team/app:alias", username="u2", password="p")
    rig.cri.answers["PullImage"] = lambda *_: pb.PullImageResponse(
        image_ref="sha256:other"
    ).SerializeToString()
    rig.pull("r.test:5000/team/kept:1", username="u3", password="p")

    def fail(_: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNKNOWN, "in use")

    rig.cri.answers["RemoveImage"] = fail
    with pytest.raises(grpc.RpcError):
        rig.remove(name)
    assert [login.user for login in rig.known()] == ["u2", "u"]
    rig.cri.answers["RemoveImage"] = lambda *_: b""
    rig.remove(name)
    assert rig.known() == []
    assert [login.user for login in rig.known(repository="team/kept")] == ["u3"]


def test_newer_logins_come_first_and_are_bounded(rig: Rig) -> None:
    """The last pull's login is tried first; a hundred of them, or thousands of images, do not pile up."""
    for number in range(20):
        rig.pull(username=f"u{number}", password="p")
    assert [login.user for login in rig.known()] == ["u19", "u18", "u17", "u16"]
    logins = CriLogins()
    for number in range(5000):
        message = pb.PullImageRequest(
            image=pb.ImageSpec(image=f"r.test/i{number}"), auth=pb.AuthConfig(username="u", password="p")
        )
        logins.pulling(message.SerializeToString())
    assert list(logins.logins("r.test", "i0")) == []
    assert list(logins.logins("r.test", "i4999")) == [Login("u", "p")]
    assert len(logins._images) == 4096


# --- a real node ----------------------------------------------------------------------------------------------

EAGER = "[pull_modes.parallel_pull_unpack]\nenable = true\ndiscard_unpacked_layers = true\n"


@pytest.mark.root
@pytest.mark.timeout(300)
def test_a_private_image_is_pulled_with_the_credentials_of_the_request(tmp_path: Path) -> None:
    """A real containerd behind our socket: the layers come with the kubelet's login and are on no disk of ours; without
    it, past our socket or after a removal, the daemon has neither login nor token."""
    login = ("tester", "MARKED-SECRET")
    layers = [layer_from_dir(shell_rootfs(tmp_path / "shell")), GNU]
    with (
        node("1.6") as rig,
        start_token_registry(tmp_path / "tokens", login, "unused") as (registry, service),
    ):
        push(write_layout(tmp_path / "layout", layers), f"{registry.host}/private:1", user=":".join(login))
        image = f"{registry.host}/private:1"
        rig.daemon.stop(signal.SIGTERM)
        keychain = f'enable_keychain = true\nimage_service_path = "{rig.containerd.address}"\n'
        rig.daemon.config = EAGER + "[cri_keychain]\n" + keychain
        rig.daemon.start()
        rig.reconnected()
        with cri.connect(rig.containerd.address) as past:
            with pytest.raises(grpc.RpcError, match="password"):
                past.pull(image, user=login)
            with cri.connect(str(rig.daemon.address)) as through:
                before = len(service.asked)
                identity = through.pull(image, user=login)
                own = [each for each in service.asked[before:] if each.startswith("GET basic")]
                assert own
                assert through.images() == past.images()
                known = through.image(image)
                assert known is not None
                assert known.id == identity == past.image(image).id  # type: ignore[union-attr]
                through.remove_image(identity)
                assert image not in past.images()
            other = f"{registry.host}/private:2"
            push(write_layout(tmp_path / "other", [PIGZ]), other, user=":".join(login))
            with pytest.raises(grpc.RpcError, match="password"):
                past.pull(other, user=login)
        log = rig.daemon.log
        held = [path for path in rig.daemon.base.rglob("*") if path.is_file() and path.suffix != ".log"]
        assert "MARKED-SECRET" not in log
        assert all(
            b"MARKED-SECRET" not in path.read_bytes() for path in held if path.stat().st_size < 1 << 24
        )
