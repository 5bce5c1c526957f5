"""`--prefetch-auto`: programs, interpreters and libraries, as this machine's ldd sees them and by hand."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.unit.elf_support import made
from tests.unit.prefetch_support import entry

from soci_snapshotter.errors import NotFound
from soci_snapshotter.formats.oci import RunConfig, decode_config
from soci_snapshotter.formats.toc import Entry
from soci_snapshotter.index import closure as closures
from soci_snapshotter.index import libraries
from soci_snapshotter.index.closure import Closure, closure
from soci_snapshotter.index.libraries import Read
from soci_snapshotter.policy.mergedtree import Found, MergedTree

HOST = (
    "bin",
    "sbin",
    "lib",
    "lib32",
    "lib64",
    "libx32",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "usr/local/lib",
    "etc",
)
DEPTH = 6  # usr/lib/jvm/java-17/lib/server/libjvm.so: below are no libraries that a loader looks for


def host_entries() -> Iterator[Entry]:
    """The directories of this machine that programs live in, and this Python's, as a layer's entries."""
    stack = [top for top in HOST if os.path.lexists("/" + top)]
    here = os.path.realpath(sys.base_prefix)
    stack += [
        f"{here}/{top}/{name}".lstrip("/") for top in ("bin", "lib") for name in os.listdir(f"{here}/{top}")
    ]
    while stack:
        path = stack.pop()
        info = os.lstat("/" + path)
        if stat.S_ISLNK(info.st_mode):
            yield entry(path, "symlink", link=os.readlink("/" + path))
        elif stat.S_ISDIR(info.st_mode):
            yield entry(path, "dir")
            if path.count("/") >= DEPTH:
                continue
            stack += [f"{path}/{name}" for name in os.listdir("/" + path) if name.isprintable()]
        elif stat.S_ISREG(info.st_mode):
            yield entry(path, size=info.st_size, mode=info.st_mode & 0o7777)


def read_host(found: Found, offset: int, size: int) -> bytes:
    """The image is this machine."""
    with open(b"/" + found.path, "rb") as file:
        return os.pread(file.fileno(), size, offset)


@pytest.fixture(scope="module")
def host() -> MergedTree:
    """This machine's programs and libraries as one layer."""
    return MergedTree([list(host_entries())])


def dynamic_programs() -> list[str]:
    """Every twentieth of this machine's programs that ldd takes, and those that everybody has."""
    found = ["/bin/sh", "/bin/ls", "/usr/bin/env", os.path.realpath(sys.executable)]
    for path in [Path("/usr/bin/python3"), *sorted(Path("/usr/bin").iterdir())[::20]]:
        real = path.resolve()
        if real.is_file() and real.parent == Path("/usr/bin") and real.read_bytes()[:4] == b"\x7fELF":
            found.append(str(path))
    return found[:40]


@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_libraries_are_those_that_ldd_finds(host: MergedTree) -> None:
    """For real programs of this machine the closure is what the real loader maps, neither more nor less."""
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    compared = 0
    for program in dynamic_programs():
        done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False, env=env)
        if done.returncode or "not found" in done.stdout:
            continue  # static, or broken on this machine
        expected = {os.path.realpath(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)}
        result = closure(host, RunConfig(entrypoint=(program,)), read_host)
        paths = {path.decode() for path in result.paths} - {"/etc/ld.so.cache"}
        assert result.warnings == (), program
        assert paths == {*expected, os.path.realpath(program)}, program
        compared += len(expected)
    assert compared > 10


def image(files: Mapping[str, bytes | str], *, plain: tuple[str, ...] = ()) -> tuple[MergedTree, Read]:
    """One layer: bytes are a program's, text that begins with `->` is a link's target; `plain` lack an x bit."""
    contents: dict[bytes, bytes] = {}
    entries = []
    for name, what in files.items():
        if isinstance(what, str) and what.startswith("->"):
            entries.append(entry(name, "symlink", link=what[2:]))
            continue
        data = what.encode() if isinstance(what, str) else what
        contents[name.encode()] = data
        entries.append(entry(name, size=len(data), mode=0o644 if name in plain else 0o755))

    def read(found: Found, offset: int, size: int) -> bytes:
        assert offset + size < 2**63 and size <= libraries.MAX_TEXT
        return contents[found.path][offset : offset + size]

    return MergedTree([entries]), read


def run(
    files: Mapping[str, bytes | str],
    *argv: str,
    env: tuple[str, ...] = (),
    cwd: str = "",
    plain: tuple[str, ...] = (),
) -> Closure:
    tree, read = image(files, plain=plain)
    return closure(tree, RunConfig(cmd=argv, env=env, working_dir=cwd), read)


def paths(result: Closure) -> list[str]:
    return [path.decode() for path in result.paths]


def lib(
    name: str, *needed: str, runpath: str = "", rpath: str = "", machine: int = 62, bits: int = 64
) -> bytes:
    return program(
        *needed, interpreter="", soname=name, runpath=runpath, rpath=rpath, machine=machine, bits=bits
    )


def program(
    *needed: str,
    interpreter: str = "/lib64/ld-linux-x86-64.so.2",
    soname: str = "",
    runpath: str = "",
    rpath: str = "",
    machine: int = 62,
    bits: int = 64,
) -> bytes:
    return made(
        bits,
        machine=machine,
        interpreter=interpreter.encode(),
        needed=[name.encode() for name in needed],
        soname=soname.encode(),
        runpath=runpath.encode(),
        rpath=rpath.encode(),
    )


LOADER: dict[str, bytes | str] = {
    "lib64": "->usr/lib64",
    "usr/lib64/ld-linux-x86-64.so.2": lib("ld-linux-x86-64.so.2"),
}
LD = "/usr/lib64/ld-linux-x86-64.so.2"
SHELL: dict[str, bytes | str] = {
    "bin": "->usr/bin",
    "usr/bin/sh": "->dash",
    "usr/bin/dash": program(interpreter=""),
}


def test_a_dynamic_program_and_its_libraries_in_order() -> None:
    """Program, interpreter, the loader's cache, then libraries breadth first; the loader is not looked for again."""
    files = LOADER | {
        "etc/ld.so.cache": "x",
        "app/run": program("liba.so.1", "libc.so.6", "ld-linux-x86-64.so.2"),
        "usr/lib64/liba.so.1": "->liba.so.1.2.3",
        "usr/lib64/liba.so.1.2.3": lib("liba.so.1", "libb.so", "libc.so.6"),
        "lib/x86_64-linux-gnu/libc.so.6": lib("libc.so.6", "ld-linux-x86-64.so.2"),
        "usr/lib/libb.so": lib("libb.so"),
        "usr/lib64/unused.so": lib("unused.so"),
    }
    result = run(files, "/app/run", "--flag")
    assert paths(result) == [
        "/app/run",
        LD,
        "/etc/ld.so.cache",
        "/usr/lib64/liba.so.1.2.3",
        "/lib/x86_64-linux-gnu/libc.so.6",
        "/usr/lib/libb.so",
    ]
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("runpath", "rpath", "env", "winner"),
    [
        ("", "", (), "/usr/lib64/x.so"),
        ("", "", ("LD_LIBRARY_PATH=/none:/env",), "/env/x.so"),
        ("/run", "", (), "/run/x.so"),
        ("/run", "/r", ("LD_LIBRARY_PATH=/env;/none",), "/env/x.so"),
        ("", "/none:/r", ("LD_LIBRARY_PATH=/env",), "/r/x.so"),
        ("/none", "/r", (), "/usr/lib64/x.so"),
        ("$ORIGIN/../o", "", (), "/o/x.so"),
        ("${ORIGIN}/../usr/$LIB", "", (), "/usr/lib64/x.so"),
        ("$PLATFORM:rel", "", (), "/srv/rel/x.so"),
        ("/wrong", "", (), "/usr/lib64/x.so"),
    ],
)
def test_directories_are_searched_in_the_loaders_order(
    runpath: str, rpath: str, env: tuple[str, ...], winner: str
) -> None:
    """RPATH before LD_LIBRARY_PATH before RUNPATH before the defaults; RUNPATH turns RPATH off; a library of
    another machine or class is passed over.
    """
    files = LOADER | {
        "app/run": program("x.so", runpath=runpath, rpath=rpath),
        "wrong/x.so": lib("x.so", machine=183),
        "lib/x86_64-linux-gnu/x.so": lib("x.so", bits=32, machine=3),
    }
    files |= {f"{top}/x.so": lib("x.so") for top in ("usr/lib64", "env", "run", "r", "o", "srv/rel")}
    assert paths(run(files, "/app/run", env=env, cwd="/srv")) == ["/app/run", LD, winner]


def test_rpath_is_inherited_and_runpath_is_not() -> None:
    """A library finds its own libraries through the program's RPATH, not through its RUNPATH."""
    files = LOADER | {
        "app/a.so": lib("a.so", "b.so"),
        "app/b.so": lib("b.so"),
        "old": program("a.so", rpath="/app"),
        "new": program("a.so", runpath="/app"),
    }
    assert paths(run(files, "/old"))[2:] == ["/app/a.so", "/app/b.so"]
    result = run(files, "/new")
    assert paths(result)[2:] == ["/app/a.so"]
    assert result.warnings == ("/new: needs 'b.so', not found",)


def test_ld_so_conf_and_its_includes_are_read() -> None:
    """Directories of the configuration come before the defaults; comments and loops of includes do no harm."""
    files = LOADER | {
        "etc/ld.so.conf": "# /bad\ninclude ld.so.conf.d/*.conf\n/last  # why\nhwcap 1 x\n",
        "etc/ld.so.conf.d/1.conf": "/opt/one\n",
        "etc/ld.so.conf.d/2.conf": "include /etc/ld.so.conf\n/opt/two/\n",
        "opt/one/x.so": lib("x.so"),
        "opt/two/x.so": lib("x.so"),
        "opt/two/y.so": lib("y.so"),
        "last/z.so": lib("z.so"),
        "usr/lib64/z.so": lib("z.so"),
        "run": program("x.so", "y.so", "z.so"),
    }
    assert paths(run(files, "/run"))[2:] == ["/opt/one/x.so", "/opt/two/y.so", "/last/z.so"]


def test_preloaded_libraries_count() -> None:
    """LD_PRELOAD and /etc/ld.so.preload, by path or by name; a soname that is loaded is not looked for again."""
    files = LOADER | {
        "opt/jemalloc-5.so": lib("libjemalloc.so.2"),
        "usr/lib64/libx.so": lib("libx.so"),
        "etc/ld.so.preload": "libx.so",
        "run": program("libjemalloc.so.2"),
    }
    result = run(files, "/run", env=("LD_PRELOAD=/opt/jemalloc-5.so",))
    assert paths(result)[2:] == ["/opt/jemalloc-5.so", "/usr/lib64/libx.so"]
    assert result.warnings == ()


def test_musl_searches_its_own_way() -> None:
    """musl takes libc's names for itself, lets RUNPATH be inherited, and reads its own list of directories."""
    ld = "/lib/ld-musl-x86_64.so.1"
    files: dict[str, bytes | str] = {
        "lib/ld-musl-x86_64.so.1": lib(""),
        "etc/ld-musl-x86_64.path": "/opt/a:/opt/b\n/opt/c",
        "etc/ld.so.cache": "another loader's",
        "run": program("libc.musl-x86_64.so.1", "libm.so.6", "x.so", interpreter=ld, runpath="/app"),
        "app/x.so": lib("x.so", "y.so"),
        "app/y.so": lib("y.so", "z.so"),
        "opt/c/z.so": lib("z.so"),
        "usr/lib/z.so": lib("z.so"),
    }
    assert paths(run(files, "/run")) == ["/run", ld, "/app/x.so", "/app/y.so", "/opt/c/z.so"]
    del files["etc/ld-musl-x86_64.path"]
    assert paths(run(files, "/run"))[-1] == "/usr/lib/z.so"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("#!/bin/sh -e\n", ["/s", "/usr/bin/dash"]),
        ("#! /bin/sh", ["/s", "/usr/bin/dash"]),
        ("#!/usr/bin/env py\n", ["/s", "/usr/bin/env", "/opt/py"]),
        ("#!/usr/bin/env -S A=b py -u\n", ["/s", "/usr/bin/env", "/opt/py"]),
        ("#!/wrapper\n", ["/s", "/wrapper", "/usr/bin/dash"]),
        ("echo no interpreter\n", ["/s"]),
        ("#!\n", ["/s"]),
        ("#!/gone\n", ["/s"]),
    ],
)
def test_interpreters_of_scripts(line: str, expected: list[str]) -> None:
    """The `#!` line is followed, `env` finds its program, an interpreter may be a script itself."""
    files = SHELL | {
        "s": line,
        "usr/bin/env": program(interpreter=""),
        "opt/py": program(interpreter=""),
        "wrapper": "#!/bin/sh\n",
    }
    result = run(files, "/s", env=("PATH=/bin:/opt",))
    assert paths(result) == expected
    assert bool(result.warnings) == (line in ("#!\n", "#!/gone\n"))


def test_scripts_that_run_each_other_end() -> None:
    """Two scripts that name each other as interpreter, and a long chain: each file once, the chain cut."""
    assert paths(run({"a": "#!/b\n", "b": "#!/a\n"}, "/a")) == ["/a", "/b"]
    chain = {f"s{i}": f"#!/s{i + 1}\n" for i in range(20)}
    assert len(run(chain, "/s0").paths) == closures.MAX_SCRIPTS + 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("tini", "--", "/entry.sh", "nginx", "-g", "daemon off;"), ["tini", "/entry.sh", "dash", "nginx"]),
        (("/entry.sh", "nginx"), ["/entry.sh", "dash", "nginx"]),
        (("/bin/sh", "-c", "exec node server.js --port=1"), ["dash", "node", "/app/server.js"]),
        (("/bin/sh", "-c", "cd /app && X=1 node ./server.js; true"), ["dash", "node", "/app/server.js"]),
        (("/bin/sh", "-c", "it's broken nginx"), ["dash"]),
        (("node", "server.js"), ["node", "/app/server.js"]),
        (("node", "nginx"), ["node", "nginx"]),
        (("node", "-r", "/app/big.bin"), ["node"]),
        (("node", "data", "nginx"), ["node", "/app/data"]),
        (("./server.js",), ["/app/server.js"]),
    ],
)
def test_what_arguments_name(argv: tuple[str, ...], expected: list[str]) -> None:
    """Commands behind wrappers, scripts and shells; small files relative to the working directory; no big data."""
    files = SHELL | {
        "usr/bin/tini": program(interpreter=""),
        "usr/bin/nginx": program(interpreter=""),
        "usr/bin/node": program(interpreter=""),
        "entry.sh": '#!/bin/sh\nexec "$@"\n',
        "app/server.js": "js",
        "app/data": "text",
        "app/big.bin": b"",
    }
    tree, read = image(files, plain=("app/server.js", "app/data", "app/big.bin"))
    big = tree.lookup(b"app/big.bin")
    assert big is not None and big.entry is not None
    grown = [found.entry for found in tree.walk() if found.entry and found.path != big.path]
    tree = MergedTree([[*grown, big.entry._replace(size=closures.MAX_ARGUMENT + 1)]])
    result = closure(tree, RunConfig(cmd=argv, working_dir="/app/"), read)
    assert paths(result) == [name if name.startswith("/") else f"/usr/bin/{name}" for name in expected]


def test_programs_are_found_through_path_as_the_kernel_would() -> None:
    """The image's PATH, or containerd's default; files without an x bit and directories are passed over."""
    files = {"a/prog": "no x", "b/prog/file": "", "c/prog": program(interpreter=""), "usr/bin/prog": "x"}
    result = run(files, "prog", env=("PATH=/a:/b:/c", "X"), plain=("a/prog",))
    assert paths(result) == ["/c/prog"]
    assert paths(run(files, "prog")) == ["/usr/bin/prog"]
    assert paths(run(files, "c/prog", cwd="/")) == ["/c/prog"]
    assert run(files, "none", env=("PATH=/a",)).warnings == ("'none': no such program in the image",)


def test_an_image_without_a_command_is_told() -> None:
    """No entrypoint, no command: a warning, no paths. Docker's nulls are that."""
    config = decode_config(b'{"config":{"Entrypoint":null,"Cmd":null,"Env":null,"WorkingDir":""}}')
    tree, read = image({"a": "x"})
    assert closure(tree, config.config, read) == Closure(
        (), ("the image has neither an entrypoint nor a command",)
    )


def test_entrypoint_and_command_of_a_config_are_joined() -> None:
    """As Docker joins them; a lone string counts as a list of one."""
    config = decode_config(b'{"config":{"Entrypoint":"/e","Cmd":["a","b"],"Env":["A=b"],"WorkingDir":"/w"}}')
    assert config.config.argv == ("/e", "a", "b")
    assert (config.config.env, config.config.working_dir) == (("A=b",), "/w")
    assert decode_config(b"{}").config.argv == ()


def test_what_cannot_be_read_or_is_broken_is_a_warning() -> None:
    """A layer that is not there, a damaged program, a missing loader: the file itself is wanted all the same."""

    def gone(found: Found, offset: int, size: int) -> bytes:
        raise NotFound("layer is not here")

    tree, _ = image({"run": "x"})
    assert closure(tree, RunConfig(cmd=("/run",)), gone) == Closure((b"/run",), ("/run: layer is not here",))
    cut = run({"run": program()[:100]}, "/run")
    assert paths(cut) == ["/run"]
    assert "/run: ELF" in cut.warnings[0]
    alone = run({"run": program()}, "/run")
    assert alone.warnings == ("/run: its interpreter /lib64/ld-linux-x86-64.so.2 is in no layer",)


def test_a_hostile_program_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of directories and names: the search stops at its bound, and says so."""
    monkeypatch.setattr(libraries, "MAX_LOOKUPS", 3000)
    names = [f"l{i}.so" for i in range(100)]
    files = LOADER | {"run": program(*names, runpath=":".join(f"/d{i}" for i in range(500)))}
    result = run(files, "/run")
    assert result.warnings[-1] == "/run: needs more libraries than can be looked for; the rest is left out"
    monkeypatch.setattr(libraries, "MAX_READS", 10)
    assert "after 10 reads" in run(files, "/run").warnings[0]
