"""Metrics, `soci status` and the debug address of a real daemon under real pulls and reads."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.daemon import CONFIG
from harness.lazyrig import Rig, lazy_rig
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.test_lazy import big_layer, sum_of

pytestmark = pytest.mark.root
SECRET = "hunter2-in-a-docker-config"

Samples = dict[tuple[str, ...], float]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


METRICS, DEBUG = free_port(), free_port()
TOP = f'metrics_address = "127.0.0.1:{METRICS}"\ndebug_address = "127.0.0.1:{DEBUG}"\n'
REST = "[background_fetch]\ndisable = true\n[blob]\nfetching_timeout_sec = 3\n"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One node that fetches nothing unasked; its daemon finds credentials in a Docker configuration."""
    docker = tmp_path_factory.mktemp("docker")
    before = os.environ.get("DOCKER_CONFIG")
    os.environ["DOCKER_CONFIG"] = str(docker)
    try:
        with lazy_rig(TOP + CONFIG + REST) as found:
            auth = base64.b64encode(f"user:{SECRET}".encode()).decode()
            (docker / "config.json").write_text(json.dumps({"auths": {found.proxy.host: {"auth": auth}}}))
            yield found
    finally:
        if before is None:
            del os.environ["DOCKER_CONFIG"]
        else:
            os.environ["DOCKER_CONFIG"] = before


def get(port: int, path: str) -> bytes:
    """A page on loopback."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200
        return response.read()
    finally:
        connection.close()


def parsed(text: bytes) -> dict[str, Samples]:
    """Family or sample name -> the values of its labels -> the number; histograms by their counts."""
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            found.setdefault(name, {})[tuple(sample.labels.values())] = sample.value
    return found


def scrape() -> dict[str, Samples]:
    """The node's metrics over TCP."""
    return parsed(get(METRICS, "/metrics"))


def status(rig: Rig, *image: str) -> list[dict[str, object]]:
    """The layers that `soci status --json` shows."""
    command = [sys.executable, "-m", "soci_snapshotter.cli.main", "status", "--json"]
    command += ["--daemon-address", str(rig.daemon.address), *image]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout
    layers: list[dict[str, object]] = json.loads(out)["layers"]
    return layers


def eventually(check: Callable[[], bool]) -> None:
    """Until it is so, for half a minute."""
    end = time.monotonic() + 30
    while not check():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_numbers_of_a_pull_and_its_reads(rig: Rig) -> None:
    """A lazy pull, then reads: each operation is timed once, bytes and counts follow what is read, until all is here."""
    layer, sums = big_layer(1)
    layout = rig.publish("numbers", [layer])
    rig.pull("numbers")
    digest, name = layer.digest, rig.name("numbers")
    before = scrape()
    took = before["soci_fs_operation_duration_milliseconds_count"]
    for operation in ("mount", "init_metadata_store", "ztoc_unmarshal", "ztoc_fetch", "fuse_mount"):
        assert took[operation, digest] == 1, operation
    assert any(labels[0] == "soci_index_fetch" for labels in took)
    counts = before["soci_fs_operation_count"]
    assert counts["resolve_cache_miss", digest] == 1
    assert ("resolve_cache_hit", digest) not in counts
    assert counts["fuse_failure_state", ""] == 0
    ((labels, size),) = [each for each in before["soci_fs_layer_size_bytes"].items() if each[0][0] == digest]
    assert size == len(layer.blob)
    assert labels[1].startswith(f"{rig.daemon.root}/m/")
    fetched = before["soci_fs_layer_fetched_size_bytes"][labels]
    assert 0 <= fetched < size / 2
    (shown,) = status(rig, name)
    assert (shown["layer"], shown["state"], shown["images"]) == (digest, "lazy", [name])
    assert (shown["size"], shown["fetched"]) == (size, fetched)
    with rig.rootfs(layout, "soci") as root:
        first = next(iter(sums))
        assert sum_of(root / first) == sums[first]
        after = scrape()
        assert after["soci_fs_operation_count"]["synchronous_read_count", digest] > 0
        assert after["soci_fs_operation_count"]["synchronous_read_remote_registry_fetch_count", digest] > 0
        assert after["soci_fs_bytes_served"]["synchronous_bytes_served", digest] >= 1 << 20
        assert after["soci_fs_operation_duration_microseconds_count"]["synchronous_read", digest] > 0
        assert after["soci_fs_operation_duration_milliseconds_count"]["remote_registry_get", digest] > 0
        assert fetched < after["soci_fs_layer_fetched_size_bytes"][labels] <= size
        for file, expected in sums.items():
            assert sum_of(root / file) == expected

        def full() -> bool:
            (found,) = status(rig, name)
            return found["state"] == "complete"

        eventually(full)
        (shown,) = status(rig, name)
        assert shown["spans_present"] == shown["spans"] != 0
        assert (shown["fetched"], shown["errors"]) == (size, 0)
        done = scrape()
        assert {
            value for each, value in done["soci_fs_layer_fetched_size_bytes"].items() if each[0] == digest
        } == {size}
        assert done["soci_fs_layers"]["complete",] >= 1
        assert done["soci_fs_operation_count"]["layers_completed", ""] >= 1
        served = done["soci_fs_bytes_served"]["synchronous_bytes_served", digest]
        assert served >= len(sums) << 20


def test_the_same_layer_in_another_image_is_a_hit(rig: Rig) -> None:
    """A second image with a layer that is open already: resolve_cache_hit, and both names in its status."""
    top, _ = big_layer(2, files=2)
    below, _ = big_layer(3, files=2)
    rig.publish("hit-a", [top])
    rig.pull("hit-a")
    rig.publish("hit-b", [below, top])
    rig.pull("hit-b")
    counts = scrape()["soci_fs_operation_count"]
    assert counts["resolve_cache_miss", top.digest] == 1
    assert counts["resolve_cache_hit", top.digest] == 1
    assert {layer["layer"] for layer in status(rig, rig.name("hit-b"))} == {top.digest, below.digest}


def test_failed_reads_are_counted(rig: Rig) -> None:
    """Reads that get EIO from a registry that is silent: file_read failures of that layer, and the failure state."""
    layer, sums = big_layer(4)
    layout = rig.publish("failing", [layer])
    rig.pull("failing")
    before = scrape()["soci_fs_operation_count"]["fuse_failure_state", ""]
    with rig.rootfs(layout, "soci") as root:
        rig.proxy.stall()
        try:
            with pytest.raises(OSError, match="Input/output error"):
                (root / list(sums)[-1]).read_bytes()
        finally:
            rig.proxy.resume()
        counts = scrape()["soci_fs_operation_count"]
        assert counts["fuse_file_read_failure_count", layer.digest] >= 1
        assert counts["fuse_failure_state", ""] == before + 1
        (shown,) = status(rig, rig.name("failing"))
        assert shown["errors"] == counts["fuse_file_read_failure_count", layer.digest]
        last = list(sums)[-1]
        assert sum_of(root / last) == sums[last]


def test_a_pull_that_cannot_be_lazy_is_counted(rig: Rig) -> None:
    """An index whose ztoc is no ztoc: the layer is unpacked, and fuse_mount_failure_count says so."""
    from tests.integration.test_lazy import manifest_descriptor, push_index

    from soci_snapshotter.formats import digest as digests
    from soci_snapshotter.formats import sociindex

    layer, _ = big_layer(5, files=1)
    layout = rig.publish("broken", [layer], index=False)
    data = b"no ztoc at all" * 10
    entry = sociindex.ZtocDescriptor(
        digest=digests.sha256(data),
        size=len(data),
        layer_digest=digests.parse(layer.digest),
        layer_media_type=layer.media_type,
        span_size=4 << 20,
    )
    push_index(rig, "broken", sociindex.build(manifest_descriptor(layout), [entry], "test"), data)
    before = scrape()["soci_fs_operation_count"]["fuse_mount_failure_count", ""]
    rig.pull("broken")
    assert scrape()["soci_fs_operation_count"]["fuse_mount_failure_count", ""] == before + 1


def test_scrapes_do_not_disturb_readers(rig: Rig) -> None:
    """Scraping, asking and profiling without pause while files are read: every byte right, counters never go back."""
    layer, sums = big_layer(6, files=40)
    layout = rig.publish("busy", [layer])
    rig.pull("busy")
    ending, problems, served = threading.Event(), list[BaseException](), list[float]()

    def look() -> None:
        try:
            while not ending.is_set():
                found = scrape().get("soci_fs_bytes_served", {})
                served.append(found.get(("synchronous_bytes_served", layer.digest), 0.0))
                get(DEBUG, "/debug/vars")
                get(DEBUG, "/debug/stacks")
        except BaseException as error:
            problems.append(error)

    watchers = [
        threading.Thread(target=look),
        threading.Thread(target=get, args=(DEBUG, "/debug/profile?seconds=1")),
    ]
    with rig.rootfs(layout, "soci") as root:
        for watcher in watchers:
            watcher.start()
        try:
            for file, expected in sums.items():
                assert sum_of(root / file) == expected
            deadline = time.monotonic() + 60
            while len(served) <= 2 and not problems and time.monotonic() < deadline:
                time.sleep(0.05)  # the reads were quicker than three looks
        finally:
            ending.set()
            for watcher in watchers:
                watcher.join()
    assert problems == []
    assert len(served) > 2
    assert served == sorted(served)


def test_nothing_secret_is_shown(rig: Rig) -> None:
    """After pulls with credentials configured: no page has the password, plain or encoded, nor has the log."""
    own = socket.socket(socket.AF_UNIX)
    pages = get(METRICS, "/metrics")
    for path in ("/debug/", "/debug/stacks", "/debug/profile?seconds=0.2", "/debug/vars"):
        pages += get(DEBUG, path)
    with own:
        own.connect(str(rig.daemon.address.parent / "status.sock"))
        own.sendall(b"GET /status HTTP/1.0\r\n\r\n")
        pages += b"".join(iter(lambda: own.recv(1 << 16), b""))
    assert rig.name("numbers").encode() in pages
    encoded = base64.b64encode(f"user:{SECRET}".encode())
    for where in (pages, rig.daemon.log.encode()):
        assert SECRET.encode() not in where
        assert encoded not in where
        assert b"Bearer " not in where


def test_unix_network_background_and_restart(tmp_path: Path) -> None:
    """metrics_network unix; the background fetch fills a layer that nobody reads, which status shows; a daemon that is
    gone is said in one line, and the next one still knows the layer."""
    path = tmp_path / "metrics.sock"
    top = f'metrics_address = "{path}"\nmetrics_network = "unix"\n'
    config = top + CONFIG + "[background_fetch]\nsilence_period_msec = 100\n"
    with lazy_rig(config) as rig:
        layer, _ = big_layer(7)
        rig.publish("filled", [layer])
        rig.pull("filled")
        name = rig.name("filled")
        eventually(lambda: status(rig, name)[0]["state"] == "complete")
        assert path.stat().st_mode & 0o777 == 0o600

        def ask() -> dict[str, Samples]:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(str(path))
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
            return parsed(answer.partition(b"\r\n\r\n")[2])

        found = ask()
        spans = status(rig, name)[0]["spans"]
        assert found["soci_fs_operation_count"]["background_span_fetch_count", layer.digest] == spans
        assert found["soci_fs_operation_duration_milliseconds_count"]["background_fetch", layer.digest] == 1
        assert found["soci_fs_image_operation_count_key"]["background_fetch_work_queue_size", ""] == 0
        rig.daemon.kill()
        assert rig.soci("status", "--daemon-address", str(rig.daemon.address)) == 9
        rig.daemon.start()
        (shown,) = status(rig, name)
        assert (shown["state"], shown["spans_present"], shown["size"]) == ("complete", spans, len(layer.blob))
        assert ask()["soci_fs_operation_count"]["layers_completed", ""] == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('metrics_address = "nowhere"', "metrics_address = nowhere: want host:port"),
        ('debug_address = "127.0.0.1:70000"', "debug_address = 127.0.0.1:70000"),
    ],
)
def test_bad_addresses_refuse_to_start(tmp_path: Path, line: str, words: str) -> None:
    """One line that names the key and the value; nothing is left running."""
    with pytest.raises(RuntimeError, match=words), lazy_rig(line + "\n" + CONFIG):
        pass


def test_no_prometheus_turns_the_endpoint_off() -> None:
    """metrics_address with no_prometheus: nobody listens; soci status works all the same."""
    port = free_port()
    top = f'metrics_address = "127.0.0.1:{port}"\nno_prometheus = true\n'
    with lazy_rig(top + CONFIG) as rig:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        assert status(rig) == []
