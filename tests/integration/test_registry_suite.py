"""One suite for every registry: push, find, read lazily through the daemon, push again; and registries that misbehave.

The raw registry is a socket whose answers the tests write: first it behaves, then it fails in each way that
CONFORMANCE.md lists, under the reader of a layer and under a mount.
"""

from __future__ import annotations

import errno
import gzip
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from harness.badserver import Asked, BadServer, Stalled, bad_server, reply
from harness.images import write_layout
from harness.memregistry import MemRegistry
from tests.integration.registry_rig import KINDS, SPAN, Indexed, Registries, put_indexed, registries
from tests.integration.test_lazy import big_layer, sum_of

from soci_snapshotter.errors import Integrity, Remote
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, ztoc
from soci_snapshotter.formats import reference as references
from soci_snapshotter.formats.digest import Buffer, Digest
from soci_snapshotter.formats.zinfo import span_table
from soci_snapshotter.layers.meta import data_size
from soci_snapshotter.layers.pool import FlightPool
from soci_snapshotter.layers.reader import LayerReader, ReadOptions
from soci_snapshotter.policy.retry import Retry
from soci_snapshotter.registry.client import RegistryClient
from soci_snapshotter.registry.options import Options
from soci_snapshotter.registry.pool import ConnectionPool
from soci_snapshotter.registry.ranges import BlobReader
from soci_snapshotter.store.layerfiles import SpanFile

pytestmark = pytest.mark.root
PASSWORD = "pa:ss-word"
REFRESH = "an-identity-token"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registries]:
    """One node and all registries for the module; each test has a repository of its own."""
    with registries(tmp_path_factory.mktemp("suite"), password=PASSWORD, refresh=REFRESH) as found:
        yield found


@pytest.mark.parametrize("kind", KINDS)
def test_push_find_read_and_push_again(
    node: Registries, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image and its index go to the registry, in pieces; a second push sends no blob; the node finds the index, mounts
    lazily and reads right bytes.
    """
    layer, sums = big_layer(500 + KINDS.index(kind), files=4, size=SPAN)
    layout = write_layout(tmp_path / "layout", [layer])
    name = node.name(kind, "suite/app")
    node.push_image(name, layout)
    rig = node.rig
    assert rig.soci("pull", "--quiet", *node.flags, "--snapshotter", "overlayfs", name) == 0
    assert rig.soci("create", "--min-layer-size", "0", "--span-size", str(SPAN), name) == 0
    pushed = []
    for again in (False, True):
        capsys.readouterr()
        assert rig.soci("push", "--quiet", "--chunk-size", "100000", "--http-dump", *node.flags, name) == 0
        out, err = capsys.readouterr()
        pushed.append(digests.parse(out.strip()))
        uploads = re.findall(r"^> (POST|PATCH|PUT) \S*/blobs/\S*", err, re.MULTILINE)
        assert bool(uploads) is not again
        assert ("PATCH" in uploads) is not again
    assert pushed[0] == pushed[1]
    rig.containerd.ctr("images", "rm", "--sync", name)

    assert rig.soci("pull", *node.flags, name) == 0
    assert "1 lazy, 0 local" in capsys.readouterr().out
    with rig.rootfs(layout, "soci") as root:
        for file, expected in sums.items():
            assert sum_of(root / file) == expected
    rig.containerd.ctr("images", "rm", "--sync", name)


# --- a layer's reader before a registry that misbehaves ---------------------------------------------------------

FAST = Options(
    retry=Retry(attempts=2, min_wait=0.01, patience=1.0),
    span_timeout=0.4,
    read_timeout=0.4,
)


@dataclass
class Kernel:
    """Hears the answer to the one read that is parked."""

    answer: bytes | int | None = None
    heard: threading.Event = field(default_factory=threading.Event)

    def reply(self, unique: int, data: Buffer) -> None:
        """The bytes."""
        del unique
        self.answer = bytes(data)
        self.heard.set()

    def reply_error(self, unique: int, code: int) -> None:
        """The errno."""
        del unique
        self.answer = code
        self.heard.set()


Fault = Callable[[Asked, bytes, bytes], bytes | None]
"""Given a request for the layer, the right answer and the whole layer: what to answer instead, if anything."""


def whole(_asked: Asked, _good: bytes, layer: bytes) -> bytes | None:
    """200 with everything, whatever range was asked for."""
    return reply("200 OK", layer)


def elsewhere(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """Right bytes that are said to be from another place."""
    return good.replace(b"Content-Range: bytes ", b"Content-Range: bytes 1")


def multipart(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """multipart/byteranges."""
    body = b"--x\r\n\r\n" + good.partition(b"\r\n\r\n")[2] + b"\r\n--x--"
    return reply("206 Partial Content", body, Content_Type="multipart/byteranges; boundary=x")


def untyped(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """No Content-Type."""
    return good.replace(b"Content-Type: application/octet-stream\r\n", b"")


def short(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """The body ends in its middle, every time."""
    head, _, body = good.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n" + body[: (len(body) + 1) // 2]


def garbage(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """As many bytes as were asked for, but others."""
    head, _, body = good.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n" + bytes(len(body))


def longer(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """More bytes than the head says."""
    return good + b"more"


def encoded(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """A Content-Encoding that nobody asked for."""
    return good.replace(b"Connection: close", b"Content-Encoding: gzip\r\nConnection: close")


def stalled(_asked: Asked, good: bytes, _layer: bytes) -> bytes | None:
    """The head, a thousand bytes, and no more while the client listens."""
    return Stalled(good[: good.index(b"\r\n\r\n") + 1004])


def first(answer: bytes | Fault) -> Fault:
    """`answer` to the first request for the layer, then as it should be."""
    asked_before: list[Asked] = []

    def fault(asked: Asked, good: bytes, layer: bytes) -> bytes | None:
        asked_before.append(asked)
        if len(asked_before) > 1:
            return None
        return answer if isinstance(answer, bytes) else answer(asked, good, layer)

    return fault


@dataclass
class Faulty:
    """A registry with one indexed image, whose blob's GETs `fault` answers; None from it: as it should."""

    fault: Fault = lambda _asked, _good, _layer: None
    raw: MemRegistry = field(default_factory=MemRegistry)
    ranges: list[Asked] = field(default_factory=list)
    blob: Digest | None = None

    def __call__(self, asked: Asked) -> bytes | None:
        """The answer."""
        good = self.raw(asked)
        if (
            good is None
            or asked.method != "GET"
            or not asked.path.partition("?")[0].endswith(f"/blobs/{self.blob}")
        ):
            return good
        self.ranges.append(asked)
        said = self.fault(asked, good, self.raw.blobs["app"][self.blob])
        return good if said is None else said


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """A layer of about a MiB with its index, made once."""
    layer, _ = big_layer(77, files=4, size=SPAN)
    layout = write_layout(tmp_path_factory.mktemp("small"), [layer])
    return put_indexed(MemRegistry(), "unused", "app", layout)


def read_all(
    small: Indexed,
    faulty: Faulty,
    directory: Path,
    login: tuple[str, str] | None = None,
    reads: int = 1 << 30,
) -> tuple[list[bytes | int], BadServer]:
    """Read the layer's tar through BlobReader and LayerReader, 64 KiB of each 256; what each read got."""
    directory.mkdir(exist_ok=True)
    put_indexed(faulty.raw, "unused", "app", small.layout)
    faulty.blob = digest = digests.sha256(small.layer)
    table = ztoc.decode_spans(small.ztoc)
    spans = span_table(table)
    (directory / "ztoc").write_bytes(small.ztoc)
    windows = os.open(directory / "ztoc", os.O_RDONLY)
    got: list[bytes | int] = []
    with (
        bad_server(faulty) as server,
        RegistryClient(FAST, lambda host: login if host == server.host else None) as client,
        ConnectionPool(client.options) as connections,
        SpanFile(directory, len(spans), data_size(table.uncompressed_size), b"a" * 36) as files,
        FlightPool(2) as pool,
    ):
        reference = references.parse(f"{server.host}/app:1")
        source = BlobReader(client, connections, reference, digest, len(small.layer))
        kernel = Kernel()
        reader = LayerReader(
            name="layer",
            spans=spans,
            files=files,
            windows_fd=windows,
            source=source,
            replies=kernel,
            pool=pool,
            options=ReadOptions(flight_seconds=3, ahead=False),
            on_complete=lambda: None,
        )
        for unique, offset in enumerate(range(0, table.uncompressed_size, 1 << 18)):
            if unique == reads:
                break
            kernel.answer = None
            kernel.heard.clear()
            size = min(1 << 16, table.uncompressed_size - offset)
            present = reader.read(unique, offset, size)
            if present is not None:
                kernel.reply(unique, present)
            assert kernel.heard.wait(10)
            assert kernel.answer is not None
            got.append(kernel.answer)
        source.close()
    os.close(windows)
    return got, server


def check(small: Indexed, got: list[bytes | int]) -> None:
    """Every read got the tar's bytes."""
    tar = gzip.decompress(small.layer)
    offsets = range(0, len(tar), 1 << 18)
    padded = tar + bytes(1 << 16)
    wrong = [
        offset
        for offset, answer in zip(offsets, got, strict=False)
        if not isinstance(answer, bytes) or answer != padded[offset : offset + len(answer)]
    ]
    assert wrong == []
    assert len(got) >= 4


RIGHT: list[Callable[[], Fault]] = [
    lambda: whole,
    lambda: untyped,
    lambda: first(short),
    lambda: first(stalled),
    lambda: longer,
    lambda: first(b""),
    lambda: first(b"no http\r\n\r\n"),
    lambda: first(reply("429 Too Many Requests", Retry_After="0")),
    lambda: first(reply("503 Service Unavailable")),
    lambda: first(Stalled(b"HTTP/1.1 206 Partial Content\r\n")),
]


@pytest.mark.parametrize(
    "make",
    RIGHT,
    ids=[
        "200",
        "untyped",
        "short",
        "stalled",
        "longer",
        "empty",
        "no http",
        "429",
        "503",
        "stalled head",
    ],
)
def test_right_bytes_all_the_same(small: Indexed, tmp_path: Path, make: Callable[[], Fault]) -> None:
    """What can be worked around is: every read of the layer gets its bytes."""
    got, _ = read_all(small, Faulty(make()), tmp_path)
    check(small, got)


@pytest.mark.parametrize(
    "fault", [elsewhere, multipart, garbage, encoded, short, stalled], ids=lambda f: f.__name__
)
def test_wrong_answers_are_errors_never_bytes(
    small: Indexed, tmp_path: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be worked around is EIO for every reader, and a log line that names registry and blob."""
    got, server = read_all(small, Faulty(fault), tmp_path, reads=1)
    assert got == [errno.EIO]
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    text = " ".join(str(vars(record)) for record in said)
    assert fault is garbage or server.host in text
    assert "layer" in text


def test_the_server_that_says_wait_is_waited_for(small: Indexed, tmp_path: Path) -> None:
    """429 with Retry-After beyond what is patience: EIO at once; within it: asked no earlier."""
    times: list[float] = []

    def busy(_asked: Asked, _good: bytes, _layer: bytes) -> bytes | None:
        times.append(time.monotonic())
        return reply("429 Too Many Requests", Retry_After="1") if len(times) == 1 else None

    got, _ = read_all(small, Faulty(busy), tmp_path / "a")
    check(small, got)
    assert times[1] - times[0] >= 1
    far = first(reply("429 Too Many Requests", Retry_After="3600"))
    got, _ = read_all(small, Faulty(far), tmp_path / "b", reads=1)
    assert got == [errno.EIO]


@contextmanager
def object_store(small: Indexed, uses: int = 1 << 30) -> Iterator[tuple[BadServer, MemRegistry]]:
    """Another host with the layer, at URLs that are good for so many requests each, then 403."""
    raw = MemRegistry()
    put_indexed(raw, "unused", "app", small.layout)
    count: dict[str, int] = {}

    def signed(asked: Asked) -> bytes | None:
        count[asked.path] = count.get(asked.path, 0) + 1
        return reply("403 Forbidden") if count[asked.path] > uses else None

    raw.before = signed
    with bad_server(raw) as server:
        yield server, raw


@pytest.mark.parametrize("uses", [1 << 30, 1], ids=["lasting", "expiring"])
def test_a_redirect_chain_to_signed_urls(small: Indexed, tmp_path: Path, uses: int) -> None:
    """Three hops to an object store, whose URLs last, or are good for one request: right bytes, and the login stays at
    the registry.
    """
    number = [0]
    with object_store(small, uses) as (store, _):

        def hop(asked: Asked, _good: bytes, _layer: bytes) -> bytes | None:
            if "authorization" not in asked.headers:
                return reply("401 Unauthorized", WWW_Authenticate='Basic realm="x"')
            step = asked.path.partition("?hop=")[2]
            if step != "2":
                location = f"{asked.path.partition('?')[0]}?hop={int(step or 0) + 1}"
                return reply("302 Found", Location=location)
            number[0] += 1
            location = f"http://{store.host}{asked.path.partition('?')[0]}?X-Signature=s{number[0]}"
            return reply("307 Temporary Redirect", Location=location)

        got, _ = read_all(small, Faulty(hop), tmp_path, login=("me", PASSWORD))
        check(small, got)
        assert store.asked
        assert not any("authorization" in asked.headers for asked in store.asked)
    assert number[0] == 1 if uses > 1 else number[0] >= 4


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"], ids=["401", "ECR's 403"])
def test_a_token_that_is_revoked_in_mid_life(small: Indexed, tmp_path: Path, status: str) -> None:
    """After each two requests the token is refused, by 401 or, as ECR does, by 403: a new one, and right bytes."""
    state = {"token": 0, "uses": 0}

    def token(asked: Asked) -> bytes | None:
        if not asked.path.startswith("/token"):
            return None
        state["token"] += 1
        state["uses"] = 0
        return reply("200 OK", b'{"token": "t%d", "expires_in": 300}' % state["token"])

    def guarded(asked: Asked, _good: bytes, _layer: bytes) -> bytes | None:
        challenge = f'Bearer realm="http://{asked.headers["host"]}/token",service="s"'
        if "authorization" not in asked.headers:
            return reply("401 Unauthorized", WWW_Authenticate=challenge)
        state["uses"] += 1
        if asked.headers["authorization"] != f"Bearer t{state['token']}" or state["uses"] > 2:
            return reply(status, WWW_Authenticate=challenge)
        return None

    got, _ = read_all(small, Faulty(guarded, MemRegistry(before=token)), tmp_path, login=("me", PASSWORD))
    check(small, got)
    assert state["token"] >= 2


# --- bad objects under a mount ----------------------------------------------------------------------------------


def spoiled(good: bytes) -> bytes:
    """The same head, other bytes of the same length."""
    head, separator, body = good.partition(b"\r\n\r\n")
    return head + separator + body[:-1] + bytes([body[-1] ^ 1])


@pytest.mark.parametrize("what", ["manifest", "index", "ztoc", "config", "layer"])
def test_objects_that_are_not_what_their_digest_says(
    node: Registries, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every kind that is fetched. Manifest and config: the pull fails, naming host and object. Index and ztoc: the
    layer is taken whole instead. The layer's bytes: EIO to who reads.
    """
    repository = f"spoiled/{what}"
    layer, sums = big_layer(600 + len(what), files=2, size=SPAN)
    layout = write_layout(tmp_path / "layout", [layer])
    raw, rig = node.raw, node.rig
    image = put_indexed(raw, node.raw_server.host, repository, layout)
    objects = {
        "manifest": str(layout.images[0].manifest["digest"]),
        "index": str(digests.sha256(image.index)),
        "ztoc": str(digests.sha256(image.ztoc)),
        "config": str(layout.images[0].config["digest"]),
        "layer": layer.digest,
    }

    def before(asked: Asked) -> bytes | None:
        if asked.method != "GET" or objects[what] not in asked.path or "/referrers/" in asked.path:
            return None
        raw.before = lambda _: None
        try:
            good = raw(asked)
        finally:
            raw.before = before
        assert good is not None
        return spoiled(good)

    raw.before = before
    try:
        code = rig.soci("pull", *node.flags, image.name)
        out, err = capsys.readouterr()
        if what in ("manifest", "config"):
            assert code == Integrity.exit_code
            assert err.count("\n") == 1
            assert f"{node.raw_server.host}/{repository}: " in err
            assert objects[what] in err
            return
        assert code == 0
        # "lazy" is also what the daemon itself pulls whole, as it does without a usable ztoc.
        assert ("1 local" if what == "index" else "1 lazy") in out
        if what == "ztoc":
            said = [line for line in rig.daemon.log.splitlines() if "failed to prepare remote" in line][-1]
            assert objects["ztoc"] in said
            assert node.raw_server.host in said
        with rig.rootfs(layout, "soci") as root:
            for file, expected in sums.items():
                if what != "layer":
                    assert sum_of(root / file) == expected
                    continue
                with pytest.raises(OSError, match="Input/output error"):
                    (root / file).read_bytes()
        rig.containerd.ctr("images", "rm", "--sync", image.name)
    finally:
        raw.before = lambda _: None


def test_a_manifest_larger_than_the_limit(node: Registries, capsys: pytest.CaptureFixture[str]) -> None:
    """More than 4 MiB under a tag, announced or not: refused, naming host and limit, without reading it all."""
    for announced in (True, False):
        big = b" " * (oci.MANIFEST_LIMIT + 1)

        def before(asked: Asked, big: bytes = big, announced: bool = announced) -> bytes | None:
            if "/large/" not in asked.path:
                return None
            if asked.method == "HEAD":
                return reply("200 OK")  # too little: then it is fetched
            if announced:
                return reply("200 OK", big, Content_Type=oci.MANIFEST)
            return b"HTTP/1.1 200 OK\r\nContent-Type: " + oci.MANIFEST.encode() + b"\r\n\r\n" + big

        node.raw.before = before
        try:
            name = f"{node.raw_server.host}/large/x:1"
            assert node.rig.soci("pull", *node.flags, name) == Remote.exit_code
        finally:
            node.raw.before = lambda _: None
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"{node.raw_server.host}/large/x: manifest 1: " in err
        assert str(oci.MANIFEST_LIMIT) in err


@pytest.mark.parametrize("fault", [whole, elsewhere], ids=["200", "elsewhere"])
def test_faults_under_a_mount(node: Registries, tmp_path: Path, fault: Fault) -> None:
    """What LayerReader's tests show, once through daemon and kernel: the file's bytes, or EIO."""
    repository = f"mounted/{fault.__name__}"
    layer, sums = big_layer(700 + len(fault.__name__), files=2, size=SPAN)
    layout = write_layout(tmp_path / "layout", [layer])
    rig, raw = node.rig, node.raw
    image = put_indexed(raw, node.raw_server.host, repository, layout)

    def before(asked: Asked) -> bytes | None:
        if asked.method != "GET" or not asked.path.endswith(layer.digest):
            return None
        raw.before = lambda _: None
        try:
            good = raw(asked)
        finally:
            raw.before = before
        assert good is not None
        return fault(asked, good, layer.blob)

    raw.before = before
    try:
        assert rig.soci("pull", "--quiet", *node.flags, image.name) == 0
        with rig.rootfs(layout, "soci") as root:
            for file, expected in sums.items():
                if fault is whole:
                    assert sum_of(root / file) == expected
                else:
                    with pytest.raises(OSError, match="Input/output error"):
                        (root / file).read_bytes()
        rig.containerd.ctr("images", "rm", "--sync", image.name)
    finally:
        raw.before = lambda _: None
