"""`soci convert`, and `create` straight against a registry, with real containerds, registries and kernels."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.containerd import Containerd
from harness.images import Layer, Layout, load, push, write_layout, write_multi_layout
from harness.lazyrig import Rig, layout_chain, lazy_rig
from harness.registries import RunningRegistry, start_oci_registry, start_registry
from tests.integration.support import GNU, PIGZ, Soci, image, tree

from soci_snapshotter.cli.pulling import snapshot_labels
from soci_snapshotter.containerd.client import ContainerdClient
from soci_snapshotter.containerd.snapshots import Snapshots
from soci_snapshotter.errors import AlreadyExists
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats import oci, reference, sociindex
from soci_snapshotter.formats.digest import Digest
from soci_snapshotter.store.content import ContentStore

pytestmark = pytest.mark.root
SRC, DST = "docker.io/library/m:1", "docker.io/library/m:2"


def multi(tmp_path: Path, containerd: Containerd, shell: Layer) -> Layout:
    """An image of two platforms in containerd, SRC."""
    layout = write_multi_layout(tmp_path / "multi", {"amd64": [shell, PIGZ], "arm64": [GNU]}, name=SRC)
    load(layout, containerd)
    return layout


@pytest.mark.parametrize("store", ["containerd", "soci"])
def test_a_converted_image_lives_on_its_own(
    soci: Soci, client: ContainerdClient, containerd: Containerd, shell: Layer, tmp_path: Path, store: str
) -> None:
    """Without SRC and after a collection DST is whole, with its indexes and ztocs, and listed; after it all is gone."""
    multi(tmp_path, containerd, shell)
    root = soci.convert("--all-platforms", "m:1", "m:2", store=store)
    client.images.delete(SRC, collect=True)
    containerd.garbage_collect()
    assert client.images.get(DST).target.digest == root
    there, gone = tree(client, root)
    assert gone == set()
    assert {blob.digest for blob in client.content.find()} == there
    assert "complete" in containerd.ctr("images", "check", f"name=={DST}").stdout
    listed = soci("index", "list", "-q").split()
    assert len(listed) == 2
    kept = ContentStore(soci.root / "content")
    for index in listed:
        manifest = json.loads(soci("index", "info", index))
        assert manifest["config"]["mediaType"] == sociindex.INDEX_V2
        assert {Digest(entry["digest"]) for entry in manifest["layers"]} < there
        if store == "soci":
            assert all(kept.exists(Digest(entry["digest"])) for entry in manifest["layers"])
    assert kept.digests() == [] if store == "containerd" else len(kept.digests()) == 2 + 3 + 1
    client.images.delete(DST, collect=True)
    assert list(client.content.find()) == []
    assert soci("index", "list", "-q").split() == (listed if store == "soci" else [])


def test_platforms_repetition_and_an_existing_name(
    soci: Soci, client: ContainerdClient, containerd: Containerd, shell: Layer, tmp_path: Path
) -> None:
    """One platform of two; again, the same digest; DST that is there is moved, and its old indexes are collected."""
    multi(tmp_path, containerd, shell)
    one = soci.convert("-p", "linux/arm64", "m:1", "m:2")
    assert soci.convert("-p", "linux/arm64", "m:1", "m:2") == one
    assert soci.convert("-p", "linux/arm64", "m:2", "m:3") == one
    (old,) = soci("index", "list", "-q").split()
    everything = soci.convert("--all-platforms", "--span-size", "65536", "m:1", "m:2")
    assert client.images.get(DST).target.digest == everything != one
    soci.convert("m:1", "m:3")
    containerd.garbage_collect()
    assert not client.content.exists(digests.parse(old))
    assert tree(client, everything)[1] == set()
    err = soci("convert", "-p", "linux/s390x", "m:1", "m:4", code=4)
    assert "linux/s390x" in err
    assert "docker.io/library/m:4" not in [found.name for found in client.images.find()]


def test_a_partially_pulled_image_is_converted_for_what_is_there(
    soci: Soci, client: ContainerdClient, containerd: Containerd, shell: Layer, name: str, tmp_path: Path
) -> None:
    """Of three platforms two were pulled, by two pulls: these are converted and complete, the third stays named."""
    layout = write_multi_layout(tmp_path / "multi", {"amd64": [shell], "arm64": [PIGZ], "s390x": [GNU]})
    push(layout, name)
    for platform in ("linux/amd64", "linux/arm64"):
        containerd.ctr("images", "pull", "--plain-http", "--platform", platform, name)
    target = name.removesuffix(":1") + ":2"
    root = soci.convert("--all-platforms", name, target)
    client.images.delete(name, collect=True)
    third = digests.parse(str(layout.images[2].manifest["digest"]))
    there, gone = tree(client, root)
    assert gone == {third}
    assert {digests.parse(layer.digest) for layer in (shell, PIGZ)} < there
    assert containerd.run(target, "/bin/sh", "-c", "echo partial") == "partial\n"


@pytest.mark.parametrize("start", [start_registry, start_oci_registry], ids=["docker-registry", "oci"])
def test_the_converted_image_runs_anywhere(
    soci: Soci, containerd: Containerd, shell: Layer, tmp_path: Path, start: object
) -> None:
    """A single manifest, converted and pushed: other clients copy it from either registry, and it runs with overlayfs."""
    assert callable(start)
    image(tmp_path, containerd, shell, PIGZ)
    with start(tmp_path / "registry") as registry:
        name = f"{registry.host}/conv/x:2"
        root = soci.convert("x:1", name)
        assert soci("push", "--quiet", name).strip() == root
        # This skopeo leaves artifact types out of the indexes it copies.
        copied = f"{registry.host}/copied/x:2"
        command = ["skopeo", "copy", "-q", "--all", "--src-tls-verify=false", "--dest-tls-verify=false"]
        subprocess.run([*command, f"docker://{name}", f"docker://{copied}"], check=True)
        containerd.ctr("images", "rm", "--sync", "docker.io/library/x:1", name)
        for each in (name, copied):
            containerd.ctr("images", "pull", "--plain-http", each)
            assert containerd.run(each, "/bin/sh", "-c", "echo anywhere") == "anywhere\n"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """A node whose daemon looks for v2 indexes only, as it does by default."""
    with lazy_rig(config="") as found:
        yield found


def test_no_ztoc_is_transferred_twice(rig: Rig, shell: Layer, capsys: pytest.CaptureFixture[str]) -> None:
    """Lazy by the v2 annotation; one GET per ztoc, also after pulling again, and when layers are prepared at once."""
    layers = [shell, GNU, PIGZ]
    layout = write_layout(rig.base / "lazy", layers)
    source, target = f"{rig.proxy.host}/lazy:1", f"{rig.proxy.host}/lazy:2"
    push(layout, source)
    rig.containerd.ctr("images", "pull", "--plain-http", "--snapshotter", "overlayfs", source)
    capsys.readouterr()
    assert rig.soci("convert", "--min-layer-size", "0", "--quiet", source, target) == 0
    root = digests.parse(capsys.readouterr().out.strip())
    assert rig.soci("push", "--plain-http", target) == 0
    with ContainerdClient(rig.containerd.address) as client:
        index, manifest = parts_of(client, root)
        ztocs = [entry.digest for entry in index.layers]
        rig.containerd.ctr("images", "rm", "--sync", source, target)
        before = gets(rig.registry, ztocs)
        pull = ("pull", "--quiet", "--plain-http", "--snapshotter", "soci", target)
        assert rig.soci(*pull) == 0
        assert rig.lazy_layers() == 3
        assert rig.soci(*pull) == 0
        assert rig.containerd.run(target, "/bin/sh", "-c", "echo lazy", snapshotter="soci") == "lazy\n"
        assert [now - then for now, then in zip(gets(rig.registry, ztocs), before, strict=True)] == [1, 1, 1]
        assert rig.daemon.log.count('"remote-snapshot-prepared": "true"') == 3

        # Without an image in containerd, as the CRI plugin's labels alone would have it; two callers per layer.
        rig.containerd.ctr("images", "rm", "--sync", target)
        wait_until(lambda: rig.lazy_layers() == 0)
        before = gets(rig.registry, ztocs)
        snapshots = client.snapshots("soci")
        diff_ids = [digests.parse(layer.diff_id) for layer in layers]
        for position in range(len(layers)):
            labels = snapshot_labels(
                reference.parse(target), manifest.digest, manifest.content.layers, position, None
            )
            parent = str(oci.chain_id(diff_ids[:position])) if position else ""
            labels["containerd.io/snapshot.ref"] = str(oci.chain_id(diff_ids[: position + 1]))
            labels["containerd.io/gc.root"] = "test"
            answers = at_once(lambda key: prepared(snapshots, key, parent, labels), 2)  # noqa: B023
            assert answers == [True, True]
        assert rig.lazy_layers() == 3
        assert [now - then for now, then in zip(gets(rig.registry, ztocs), before, strict=True)] == [1, 1, 1]
        chain = layout_chain(layout)
        while chain:
            chain, name = snapshots.stat(chain).parent, chain
            snapshots.remove(name)


@dataclass(frozen=True)
class Converted:
    """The image manifest of a converted image of one platform."""

    digest: Digest
    content: oci.Manifest


def parts_of(client: ContainerdClient, root: Digest) -> tuple[oci.Manifest, Converted]:
    """The SOCI index and the image manifest that a converted image of one platform has."""
    document = oci.decode_manifest(client.content.get(root, oci.MANIFEST_LIMIT))
    assert isinstance(document, oci.Index)
    manifest, index = (
        (entry.digest, oci.decode_manifest(client.content.get(entry.digest, oci.MANIFEST_LIMIT)))
        for entry in document.manifests
    )
    assert isinstance(manifest[1], oci.Manifest)
    assert isinstance(index[1], oci.Manifest)
    assert index[1].config.media_type == sociindex.INDEX_V2
    return index[1], Converted(*manifest)


def gets(registry: RunningRegistry, blobs: list[Digest]) -> list[int]:
    """How often each blob was asked for, whole or in part."""
    asked = [target for method, target in registry.requests() if method == "GET"]
    return [sum(target.endswith(blob) for target in asked) for blob in blobs]


def prepared(snapshots: Snapshots, key: str, parent: str, labels: dict[str, str]) -> bool:
    """Whether Prepare says that the layer is there already."""
    try:
        snapshots.prepare(key, parent, labels)
    except AlreadyExists:
        return True
    return False


def at_once(task: Callable[[str], bool], count: int) -> list[bool]:
    """What the task answers to several threads at once."""
    answers: list[bool] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(task(f"extract-{time.time_ns()}-{n}")))
        for n in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Fail when it does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
