"""A real image for the demo and the benches: Debian, compilers, Python, numeric libraries, a small program.

Five layers, as a Dockerfile would make them: debootstrap, two times `apt-get install`, `pip install`, `COPY
app`. Each stage is an overlayfs upper directory, archived by GNU tar and compressed by GNU gzip or by pigz.
The result is an OCI image layout. Packages come from Debian's and PyPI's ordinary clients; everything
downloaded and the finished layout stay in one cache directory, so a second build downloads nothing and a
second run builds nothing.
"""

import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

SUITE = "bookworm"
"""Debian 12 whatever the host is: its Python is 3.11, for which the wheels below exist."""

WHEELS = (
    "numpy==2.4.6",
    "scipy==1.17.1",
    "pandas==3.0.0",
    "scikit-learn==1.8.0",
    "matplotlib==3.10.8",
    "statsmodels==0.14.6",
    "sympy==1.14.0",
)
"""Pinned, so that the image is the same size for everybody."""

TOOLS = (
    "ca-certificates",
    "curl",
    "git",
    "procps",
    "build-essential",
    "pkg-config",
    "libssl-dev",
    "libffi-dev",
)
PYTHON = ("python3", "python3-dev", "python3-venv", "python3-pip")

PROGRAM = '''\
"""Solves, integrates and groups: one use of each of three packages, then one line."""

import numpy
import pandas
import scipy.integrate

matrix = numpy.array([[4.0, 1.0], [2.0, 3.0]])
solution = numpy.linalg.solve(matrix, numpy.array([1.0, 2.0]))
area, _ = scipy.integrate.quad(lambda x: x * x, 0.0, 3.0)
table = pandas.DataFrame({"kind": ["a", "b", "a"], "value": [1, 2, 3]})
groups = table.groupby("kind")["value"].sum().to_dict()
print(f"numpy {solution.round(3).tolist()} scipy {area:.3f} pandas {groups}", flush=True)
'''
"""What the container runs. It imports three of the packages; scikit-learn and the rest stay unread."""

EXPECTED_LINE = "numpy [0.1, 0.6] scipy 9.000 pandas {'a': 4, 'b': 2}"

ARGV = ["/usr/bin/python3", "/app/main.py"]

_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"

_CHROOT_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}


@dataclass(frozen=True)
class Layer:
    """One finished layer: its compressor, its blob's digest and size, its tar's digest and size in bytes."""

    name: str
    compressor: str
    digest: str
    size: int
    diff_id: str
    tar_size: int


@dataclass(frozen=True)
class DemoImage:
    """The OCI layout at `layout`; `size` is what a client fetches: layers, config and manifest, in bytes."""

    layout: Path
    tag: str
    manifest_digest: str
    size: int
    layers: list[Layer]


def cache_directory() -> Path:
    """Where downloads and the finished image stay: $XDG_CACHE_HOME if set, else .cache in the repository."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base, "soci-snapshotter", "demo") if base else REPOSITORY / ".cache" / "demo"


def recipe_key() -> str:
    """Names the recipe: another program, package list or architecture is another image."""
    text = json.dumps([SUITE, WHEELS, TOOLS, PYTHON, PROGRAM, ARGV, platform.machine(), 1])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def demo_image(cache: Path | None = None) -> DemoImage:
    """The demo image, from the cache if this recipe was built before; otherwise built, in some minutes."""
    cache = cache or cache_directory()
    final = cache / f"image-{recipe_key()}"
    if not (final / "index.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        work = cache / f"building-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        try:
            _build(cache, work)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(work / "layout", final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return load(final)


def load(layout: Path) -> DemoImage:
    """Reads a finished layout back."""
    descriptor = json.loads((layout / "index.json").read_bytes())["manifests"][0]
    layers = [Layer(**item) for item in json.loads((layout / "layers.json").read_bytes())]
    manifest = json.loads(
        (layout / "blobs/sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()
    )
    size = (
        descriptor["size"] + manifest["config"]["size"] + sum(layer["size"] for layer in manifest["layers"])
    )
    return DemoImage(layout, "demo", descriptor["digest"], size, layers)


def push(image: DemoImage, reference: str) -> None:
    """Copies the layout to `reference` (HOST:PORT/NAME:TAG, plain HTTP) no byte changed."""
    source = f"oci:{image.layout}:{image.tag}"
    _run(
        [
            "skopeo",
            "copy",
            "-q",
            "--preserve-digests",
            "--dest-tls-verify=false",
            source,
            f"docker://{reference}",
        ]
    )


def _build(cache: Path, work: Path) -> None:
    layout = work / "layout"
    (layout / "blobs/sha256").mkdir(parents=True)
    _say("downloading wheels")
    wheels = _download_wheels(cache)
    stages = [work / name for name in ("base", "tools", "python", "numeric", "app")]
    _say("base: debootstrap")
    _debootstrap(cache, stages[0])
    for stage, packages in ((1, TOOLS), (2, PYTHON)):
        _say(f"{stages[stage].name}: apt-get install {' '.join(packages)}")
        _install_packages(cache, work, stages[: stage + 1], packages)
    _say(f"numeric: pip install {' '.join(WHEELS)}")
    _install_wheels(wheels, work, stages[:4])
    (stages[4] / "app").mkdir(parents=True)
    (stages[4] / "app/main.py").write_text(PROGRAM)
    layers = []
    for stage_dir, compressor in zip(stages, ("gzip", "pigz", "gzip", "pigz", "gzip"), strict=True):
        layers.append(_archive(stage_dir, compressor, layout))
        _say(f"layer {layers[-1].name}: {layers[-1].size / 1e6:.1f} MB by {compressor}")
        shutil.rmtree(stage_dir)
    _write_layout(layout, layers)


def _download_wheels(cache: Path) -> Path:
    """`pip download` into the cache, once per list; the chroot then installs without a network."""
    target = cache / f"wheels-{hashlib.sha256(repr(WHEELS).encode()).hexdigest()[:12]}-{platform.machine()}"
    if target.exists():
        return target
    partial = target.with_name(target.name + f".{os.getpid()}")
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], check=False, capture_output=True).returncode != 0:
        _run([_system_python(), "-m", "venv", str(cache / "pip-venv")])
        pip = [str(cache / "pip-venv/bin/python"), "-m", "pip"]
    machine = platform.machine()
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in (36, 35, 34, 31, 28, 27, 24, 17)]
    selection = [
        "--only-binary=:all:",
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
        *platforms,
    ]
    selection += [f"--platform=manylinux2014_{machine}", "--abi=abi3", "--abi=none"]
    try:
        _run([*pip, "download", "-q", "--disable-pip-version-check", *selection, "-d", str(partial), *WHEELS])
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _system_python() -> str:
    """A Python that can make an environment with pip; the project's own, made by uv, has no pip."""
    return shutil.which("python3", path="/usr/bin:" + os.environ.get("PATH", "")) or sys.executable


def _debootstrap(cache: Path, target: Path) -> None:
    debs = cache / f"debs-{SUITE}-base"
    debs.mkdir(exist_ok=True)
    _run(["debootstrap", "--variant=minbase", f"--cache-dir={debs}", SUITE, str(target)])
    # debootstrap copies the host's; an image that anybody else would make has neither.
    (target / "etc/hostname").unlink(missing_ok=True)
    (target / "etc/resolv.conf").write_bytes(b"")
    shutil.rmtree(target / "var/cache/apt/archives")
    (target / "var/cache/apt/archives/partial").mkdir(parents=True)
    for entry in (target / "var/lib/apt/lists").iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _install_packages(cache: Path, work: Path, stages: Sequence[Path], packages: Sequence[str]) -> None:
    archives, lists = cache / f"debs-{SUITE}", cache / f"lists-{SUITE}"
    for directory in (archives / "partial", lists / "partial"):
        directory.mkdir(parents=True, exist_ok=True)
    binds = {
        "var/cache/apt/archives": archives,
        "var/lib/apt/lists": lists,
        "etc/resolv.conf": Path("/etc/resolv.conf"),
    }
    options = ["-o", "APT::Sandbox::User=root", "-o", "Binary::apt-get::APT::Keep-Downloaded-Packages=true"]
    with _chroot(work, stages, binds) as root:
        _run_in(root, ["apt-get", "-qq", *options, "update"])
        _run_in(root, ["apt-get", "-qq", "-y", "--no-install-recommends", *options, "install", *packages])


def _install_wheels(wheels: Path, work: Path, stages: Sequence[Path]) -> None:
    with _chroot(work, stages, {"mnt": wheels}) as root:
        pip = [
            "python3",
            "-m",
            "pip",
            "install",
            "-q",
            "--break-system-packages",
            "--root-user-action=ignore",
        ]
        _run_in(root, [*pip, "--no-cache-dir", "--no-index", "--find-links=/mnt", *WHEELS])


@contextmanager
def _chroot(work: Path, stages: Sequence[Path], binds: dict[str, Path]) -> Iterator[Path]:
    """Mounts stages[:-1] under stages[-1] (the new layer) with `binds` over it; always unmounts all."""
    upper, workdir, root = stages[-1], work / "overlay-work", work / "root"
    for directory in (upper, workdir, root):
        directory.mkdir(exist_ok=True)
    lower = ":".join(str(stage) for stage in reversed(stages[:-1]))
    options = f"lowerdir={lower},upperdir={upper},workdir={workdir},index=off,metacopy=off,redirect_dir=off"
    with ExitStack() as mounts:

        def mount(target: Path, *arguments: str) -> None:
            _run(["mount", *arguments, str(target)])
            mounts.callback(_run, ["umount", "-l", str(target)])

        mount(root, "-t", "overlay", "-o", options, "overlay")
        mount(root / "proc", "-t", "proc", "proc")
        for inside, outside in binds.items():
            mount(root / inside, "--bind", str(outside))
        yield root
    shutil.rmtree(workdir, ignore_errors=True)


def _archive(upper: Path, compressor: str, layout: Path) -> Layer:
    """GNU tar of the stage, compressed; both digests from one pass over each stream."""
    _oci_whiteouts(upper)
    names = sorted(os.listdir(upper))
    tar = ["tar", "-C", str(upper), "--format=posix", "--pax-option=delete=atime,delete=ctime", "--sort=name"]
    tar += [
        "--numeric-owner",
        "--xattrs",
        "--xattrs-include=security.*",
        "--xattrs-include=user.*",
        "-cf",
        "-",
        "--",
    ]
    blob = layout / f"blobs/{upper.name}"
    diff, diff_size = hashlib.sha256(), 0
    with (
        open(blob, "wb") as out,
        subprocess.Popen([*tar, *names], stdout=subprocess.PIPE) as archiver,
        subprocess.Popen([compressor, "-n", "-c"], stdin=subprocess.PIPE, stdout=out) as packer,
    ):
        assert archiver.stdout is not None
        assert packer.stdin is not None
        while chunk := archiver.stdout.read(1 << 20):
            diff.update(chunk)
            diff_size += len(chunk)
            packer.stdin.write(chunk)
        packer.stdin.close()
    if archiver.returncode or packer.returncode:
        raise SystemExit(f"demo image: tar or {compressor} failed on layer {upper.name}")
    with open(blob, "rb") as written:
        digest = hashlib.file_digest(written, "sha256").hexdigest()
    size = blob.stat().st_size
    os.rename(blob, layout / "blobs/sha256" / digest)
    return Layer(upper.name, compressor, f"sha256:{digest}", size, f"sha256:{diff.hexdigest()}", diff_size)


def _oci_whiteouts(upper: Path) -> None:
    """overlayfs's character device 0:0 becomes `.wh.NAME`, its opaque xattr `.wh..wh..opq`."""
    for directory, _, files in os.walk(upper):
        with_opaque = "trusted.overlay.opaque" in os.listxattr(directory)
        if with_opaque and os.getxattr(directory, "trusted.overlay.opaque") == b"y":
            Path(directory, ".wh..wh..opq").write_bytes(b"")
        for name in files:
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                path.unlink()
                Path(directory, f".wh.{name}").write_bytes(b"")


def _write_layout(layout: Path, layers: list[Layer]) -> None:
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Env": [f"PATH={_CHROOT_ENV['PATH']}", "LC_ALL=C.UTF-8"], "Cmd": ARGV, "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _store(layout, _CONFIG, config),
        "layers": [
            {"mediaType": _LAYER_GZIP, "digest": layer.digest, "size": layer.size} for layer in layers
        ],
    }
    descriptor = _store(layout, _MANIFEST, manifest)
    descriptor["platform"] = {"architecture": architecture, "os": "linux"}
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": "demo"}
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "layers.json").write_text(json.dumps([layer.__dict__ for layer in layers]))
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))


def _store(layout: Path, media_type: str, value: object) -> dict[str, object]:
    data = json.dumps(value, separators=(",", ":")).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _run_in(root: Path, command: Sequence[str]) -> None:
    _run(["chroot", str(root), *command], env=_CHROOT_ENV)


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> None:
    """Runs quietly; a failure shows the command and its last output. Never reads standard input."""
    result = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
    )
    if result.returncode:
        tail = result.stdout.decode(errors="replace")[-2000:]
        raise SystemExit(f"demo image: {' '.join(command)} failed with status {result.returncode}:\n{tail}")


def _say(text: str) -> None:
    print(f"demo image: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    built = demo_image()
    for item in built.layers:
        print(f"{item.name:8} {item.compressor:5} {item.size / 1e6:8.1f} MB of {item.tar_size / 1e6:8.1f} MB")
    print(f"{built.size / 1e6:.1f} MB in {built.layout}")
