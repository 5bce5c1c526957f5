"""What the benches of index building share: an image of large layers, and both sides' whole commands."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import images

from bench import bulk

_SAMPLE_S = 0.2
"""Between two looks at the memory of all processes."""


@dataclass(frozen=True)
class Memory:
    """Peaks in MB (10^6 bytes): resident set of the largest process; PSS of all of them at one moment."""

    largest: float
    together: float


@contextmanager
def image(blobs: Sequence[bulk.Blob]) -> Iterator[Path]:
    """An OCI layout of these layers, which are linked, not copied; they are in the page cache then."""
    root = bulk.cache()
    root.mkdir(parents=True, exist_ok=True)
    layout = Path(tempfile.mkdtemp(prefix="image-", dir=root))
    try:
        store = layout / "blobs" / "sha256"
        store.mkdir(parents=True)
        for blob in blobs:
            os.link(blob.path, store / blob.digest.removeprefix("sha256:"))
            _read(Path(blob.path))
        config = _document(
            store,
            {
                "architecture": "amd64",
                "os": "linux",
                "rootfs": {"type": "layers", "diff_ids": [blob.diff_id for blob in blobs]},
            },
        )
        layers = [
            {"mediaType": images.GZIP_LAYER, "digest": blob.digest, "size": blob.size} for blob in blobs
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": images.MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", **config},
            "layers": layers,
        }
        entry = {"mediaType": images.MANIFEST, **_document(store, manifest)}
        index = {"schemaVersion": 2, "mediaType": images.INDEX, "manifests": [entry]}
        (layout / "index.json").write_text(json.dumps(index))
        (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        yield layout
    finally:
        shutil.rmtree(layout)


def ours(layout: Path) -> float:
    """Seconds of `soci create` over the layout, to the index in it, from exec to exit."""
    started = time.monotonic()
    done = subprocess.run(
        _command(layout), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    took = time.monotonic() - started
    if done.returncode or not done.stdout.startswith("sha256:"):
        raise RuntimeError(f"soci create: exit {done.returncode}, {done.stdout!r} {done.stderr!r}")
    return took


def peer(blobs: Sequence[bulk.Blob]) -> float:
    """Seconds of `gzip -dc layer | sha256sum`, one layer after another; the digests must be right."""
    started = time.monotonic()
    for blob in blobs:
        with (
            subprocess.Popen(["gzip", "-dc", blob.path], stdout=subprocess.PIPE) as gzip,
            subprocess.Popen(["sha256sum"], stdin=gzip.stdout, stdout=subprocess.PIPE, text=True) as summing,
        ):
            if gzip.stdout is not None:
                gzip.stdout.close()  # so that gzip is told if sha256sum ends
            found = summing.communicate()[0].split()[0]
        if blob.diff_id != f"sha256:{found}":
            raise RuntimeError(f"{blob.path}: sha256sum says {found}, not {blob.diff_id}")
    return time.monotonic() - started


def memory(layout: Path) -> Memory:
    """What `soci create` takes over the layout, its workers included; not to be timed."""
    command = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *_command(layout)]
    together = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as launcher:
        ended = threading.Event()

        def sample() -> None:
            nonlocal together
            while not ended.wait(_SAMPLE_S):
                together = max(together, sum(map(_pss, _session(launcher.pid))))

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            said = launcher.communicate()[0]
        finally:
            ended.set()
            sampler.join()
    if launcher.returncode:
        raise RuntimeError(f"soci create: exit {launcher.returncode}")
    return Memory(int(said) * 1024 / 1e6, together / 1e6)


_LAUNCHER = """
import os, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""
"""A process's peak begins with its parent's size (exec keeps it), so the parent must be a small one. The children's
peak is that of the largest, and the children of children count that were waited for (getrusage(2))."""


def _command(layout: Path) -> list[str]:
    program = str(Path(sys.executable).parent / "soci")
    return [program, "create", "--quiet", "--standalone", "--min-layer-size", "0", str(layout)]


def _session(leader: int) -> list[int]:
    """The processes of the session that `leader` began (field 6 of proc_pid_stat(5)), without itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != leader:
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # it has ended
        pass
    return 0


def _document(store: Path, content: dict[str, object]) -> dict[str, object]:
    data = json.dumps(content).encode()
    digest = hashlib.sha256(data).hexdigest()
    (store / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def _read(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(1 << 20):
            pass
