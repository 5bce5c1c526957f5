"""Mirrors on a real node: hosts.toml and config.toml serve the daemon as they serve containerd."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.badserver import Asked, BadServer, bad_server, reply
from harness.coldcache import drop_caches
from harness.daemon import CONFIG
from harness.images import Layer, layer_from_tar
from harness.lazyrig import Rig, lazy_rig
from harness.proxy import Proxy

pytestmark = pytest.mark.root


@dataclass
class Node:
    """A node whose registry has three mirrors: a dead one, one that lies about the image `lied` and has no other, and a
    proxy of the registry.
    """

    rig: Rig
    liar: BadServer
    mirror: Proxy
    dying: ExitStack
    """Closes the last mirror."""


def lie(asked: Asked) -> bytes:
    """Zeros for the spans of one image."""
    if "/lied/blobs/" not in asked.path or "range" not in asked.headers:
        return reply("404 Not Found")
    start, end = (int(part) for part in asked.headers["range"].removeprefix("bytes=").split("-"))
    return reply("206 Partial", bytes(end + 1 - start), Content_Range=f"bytes {start}-{end}/*")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One node for the module. The background fetch is off: only what is read comes."""
    certs = tmp_path_factory.mktemp("certs.d")
    more = f'[resolver]\nconfig_path = "{certs}"\n[background_fetch]\ndisable = true\n'
    with lazy_rig(CONFIG + more) as rig, bad_server(lie) as liar, ExitStack() as dying:
        mirror = dying.enter_context(Proxy(rig.registry.address))
        directory = certs / rig.proxy.host
        directory.mkdir()
        hosts = "".join(
            f'[host."http://{each}"]\ncapabilities = ["pull", "resolve"]\n'
            for each in ("127.0.0.1:1", liar.host, mirror.host)
        )
        (directory / "hosts.toml").write_text(f'server = "http://{rig.proxy.host}"\n{hosts}')
        yield Node(rig, liar, mirror, dying)


def layer(seed: int, files: int = 6, size: int = 1 << 20) -> tuple[Layer, dict[str, str]]:
    """Incompressible files, and the sha256 of each."""
    stream, sums = io.BytesIO(), {}
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(files):
            data = hashlib.shake_128(f"{seed}/{number}".encode()).digest(size)
            member = tarfile.TarInfo(f"file-{seed}-{number}")
            member.size = size
            tar.addfile(member, io.BytesIO(data))
            sums[member.name] = hashlib.sha256(data).hexdigest()
    return layer_from_tar(stream.getvalue()), sums


def right(root: Path, sums: dict[str, str]) -> bool:
    """Whether every file has the bytes that it should."""
    return all(
        hashlib.sha256((root / name).read_bytes()).hexdigest() == found for name, found in sums.items()
    )


def test_everything_comes_from_the_mirror_and_from_the_registry_when_it_dies(node: Node) -> None:
    """Index, ztoc and spans of a lazy image come from hosts.toml's mirror, although one before it is dead; then it is cut
    off, and the next layer's spans come from the registry.
    """
    rig = node.rig
    (lower, first), (upper, second) = layer(1), layer(3)
    layout = rig.publish("mirrored", [lower, upper])
    rig.pull("mirrored")
    with rig.rootfs(layout, "soci") as root:
        drop_caches()
        before, came = rig.proxy.received, node.mirror.received
        assert right(root, first)
        assert rig.proxy.received == before
        assert node.mirror.received - came > 1 << 20
        node.dying.close()
        assert right(root, second)
        assert rig.proxy.received > before


def test_a_mirror_that_lies_harms_nobody(node: Node) -> None:
    """A mirror whose blobs have other bytes: the files are right, the daemon says who lied, and asks it once."""
    rig = node.rig
    built, sums = layer(2)
    layout = rig.publish("lied", [built])
    rig.pull("lied")
    with rig.rootfs(layout, "soci") as root:
        drop_caches()
        assert right(root, sums)
    told = [asked for asked in node.liar.asked if "/lied/blobs/" in asked.path and "range" in asked.headers]
    assert told
    assert all(asked.path.endswith(f"?ns={rig.proxy.host.replace(':', '%3A')}") for asked in told)
    assert "mirror has other bytes" in rig.daemon.log
    assert f"{node.liar.host}/lied" in rig.daemon.log
