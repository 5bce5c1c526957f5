"""Which shared libraries a program of an image loads: the search of ld.so, over the image's merged tree.

After glibc's ld.so(8) and ldconfig(8), and musl's ldso/dynlink.c. Of glibc's search the cache is replaced by what it
is made from, /etc/ld.so.conf; directories for certain processors (glibc-hwcaps) are left out, for the image
does not say where it will run. What a program opens by itself (dlopen) cannot be known from its files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from ..errors import SociError, Unsupported
from ..formats import elf
from ..formats.elf import Elf
from ..policy.mergedtree import Found, MergedTree
from ..policy.prefetchset import shown

Read: TypeAlias = Callable[[Found, int, int], bytes]
"""(file, offset, size) -> the file's bytes there, fewer only where it ends. May raise any SociError."""

MAX_LIBRARIES: Final = 2048
"""Of one image's programs: a browser or a desktop's office has some 300."""

MAX_LOOKUPS: Final = 1 << 18
"""Names tried: 300 libraries that each need 20 others, in 40 directories. Hostile run paths hold thousands."""

MAX_READS: Final = 1 << 16
"""Reads of one image's files: 300 libraries take some 40 each, one for each name they hold."""

MAX_TEXT: Final = 1 << 16
"""Bytes of a configuration file of the loader: a thousand directories."""

MAX_CONFIGURATIONS: Final = 256
"""Files that /etc/ld.so.conf includes, all told, and how deep: distributions have a dozen, one deep."""

# Debian's directory for a machine (e_machine, bits), its multiarch tuple: what ld.so there is built with.
_MULTIARCH: Final = {
    (62, 64): b"x86_64-linux-gnu",
    (62, 32): b"x86_64-linux-gnux32",
    (3, 32): b"i386-linux-gnu",
    (183, 64): b"aarch64-linux-gnu",
    (40, 32): b"arm-linux-gnueabihf",
    (21, 64): b"powerpc64le-linux-gnu",
    (22, 64): b"s390x-linux-gnu",
    (243, 64): b"riscv64-linux-gnu",
    (258, 64): b"loongarch64-linux-gnu",
    (8, 64): b"mips64el-linux-gnuabi64",
}
# Names that musl takes for itself, whatever the file is called after the dot.
_MUSL_OWN: Final = frozenset({b"libc", b"libpthread", b"librt", b"libm", b"libdl", b"libutil", b"libxnet"})


class Files:
    """The image's files: parsed once, read within bounds. What cannot be read is a warning and no file."""

    def __init__(self, tree: MergedTree, read: Read) -> None:
        self.tree = tree
        self.warnings: dict[str, None] = {}
        self._source = read
        self._reads = 0
        self._parsed: dict[bytes, Elf | None] = {}

    def head(self, found: Found, size: int) -> bytes:
        """The first `size` bytes."""
        try:
            return self._read(found, 0, size)[:size]
        except SociError as error:
            self.warn(found.path, str(error))
            return b""

    def elf(self, found: Found) -> Elf | None:
        """The file as an ELF file, None when it is none or broken."""
        if found.path not in self._parsed:
            self._parsed[found.path] = self._parse(found)
        return self._parsed[found.path]

    def regular(self, path: bytes) -> Found | None:
        """The regular file at `path`, links followed."""
        found = self.tree.lookup(path)
        return found if found is not None and found.is_regular else None

    def warn(self, path: bytes, what: str) -> None:
        """Keep a warning about `path`, once."""
        self.warnings.setdefault(f"{shown(path)}: {what}")

    def _read(self, found: Found, offset: int, size: int) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise Unsupported(f"not looked at, after {MAX_READS} reads")
        return self._source(found, offset, size)

    def _parse(self, found: Found) -> Elf | None:
        if self.head(found, 4) != elf.MAGIC:
            return None
        try:
            return elf.parse(lambda offset, size: self._read(found, offset, size))
        except SociError as error:
            self.warn(found.path, str(error))
            return None


@dataclass(frozen=True, slots=True)
class _Object:
    """A program or library in memory. `origin`: what $ORIGIN means in it; `parent` is who needed it."""

    elf: Elf
    origin: bytes
    parent: _Object | None

    def chain(self) -> Iterator[_Object]:
        """This one, who needed it, and so on up to the program."""
        link: _Object | None = self
        while link is not None:
            yield link
            link = link.parent


class Loader:
    """Loads programs of one image; `paths` are all files the loader would read, in its order."""

    def __init__(self, files: Files, env: Mapping[bytes, bytes], cwd: bytes) -> None:
        self.paths: dict[bytes, None] = {}
        self._files = files
        self._cwd = cwd
        self._library_path = _split(env.get(b"LD_LIBRARY_PATH", b"").replace(b";", b":"))
        self._preload = env.get(b"LD_PRELOAD", b"").replace(b":", b" ").split()
        self._lookups = 0
        self._configured: list[bytes] | None = None

    def load(self, program: Found, parsed: Elf) -> None:
        """Add the interpreter of `program` (whose ELF is `parsed`) and its libraries to `paths`."""
        if not parsed.interpreter:
            return  # static: needs nobody
        interpreter = self._files.regular(parsed.interpreter)
        if interpreter is None:
            self._files.warn(program.path, f"its interpreter {shown(parsed.interpreter)} is in no layer")
            return
        self._add(interpreter)
        search = _Search(parsed, parsed.interpreter.rpartition(b"/")[2])
        if not search.musl:
            self._add(self._files.regular(b"/etc/ld.so.cache"))
        known = {search.loader}
        itself = self._files.elf(interpreter)
        if itself is not None:
            known.add(itself.soname)
        top = _Object(parsed, b"/" + program.path.rpartition(b"/")[0], None)
        waiting: deque[tuple[_Object, bytes]] = deque((top, name) for name in self._preloaded(search))
        waiting.extend((top, name) for name in parsed.needed)
        while waiting:
            who, name = waiting.popleft()
            if name in known or (search.musl and name.partition(b".")[0] in _MUSL_OWN):
                continue
            if len(self.paths) > MAX_LIBRARIES or max(self._lookups, len(waiting)) > MAX_LOOKUPS:
                self._files.warn(
                    program.path, "needs more libraries than can be looked for; the rest is left out"
                )
                return
            place = self._find(search, who, name)
            if place is None:
                self._files.warn(program.path, f"needs {name.decode(errors='backslashreplace')!r}, not found")
                continue
            path, library, found = place
            known |= {name, library.soname}
            self._add(found)
            loaded = _Object(library, path.rpartition(b"/")[0], who)
            waiting.extend((loaded, needed) for needed in library.needed)

    def _add(self, found: Found | None) -> None:
        if found is not None:
            self.paths.setdefault(b"/" + found.path)

    def _preloaded(self, search: _Search) -> list[bytes]:
        listed: list[bytes] = []
        if not search.musl:
            listed = self._text(b"/etc/ld.so.preload").replace(b":", b" ").split()
        return [*self._preload, *listed]

    def _find(self, search: _Search, who: _Object, name: bytes) -> tuple[bytes, Elf, Found] | None:
        """The first file of that name that fits the process: its path as searched for, and what it is."""
        if b"/" in name:
            candidates: Iterable[bytes] = self._expand(search, who, [name])
        else:
            candidates = (directory + b"/" + name for directory in self._directories(search, who))
        for path in candidates:
            self._lookups += 1
            if self._lookups > MAX_LOOKUPS:
                return None
            found = self._files.regular(path)
            parsed = None if found is None else self._files.elf(found)
            if found is not None and parsed is not None and search.program.loads(parsed):
                return path, parsed, found
        return None

    def _directories(self, search: _Search, who: _Object) -> Iterator[bytes]:
        """Where `who`'s libraries are looked for, in order."""
        if search.musl:
            yield from self._absolute(self._library_path)
            for link in who.chain():
                yield from self._expand(search, link, _split(link.elf.runpath or link.elf.rpath))
            listed = self._text(search.musl_path).replace(b"\n", b":")
            yield from self._absolute(_split(listed) or [b"/lib", b"/usr/local/lib", b"/usr/lib"])
            return
        if not who.elf.runpath:
            for link in who.chain():
                if not link.elf.runpath:
                    yield from self._expand(search, link, _split(link.elf.rpath))
        yield from self._expand(search, who, self._library_path)
        yield from self._expand(search, who, _split(who.elf.runpath))
        if self._configured is None:
            self._configured = list(dict.fromkeys(self._configuration(b"/etc/ld.so.conf")))
        yield from self._configured
        yield from search.defaults

    def _expand(self, search: _Search, who: _Object, directories: Iterable[bytes]) -> Iterator[bytes]:
        """Absolute paths, $ORIGIN and $LIB replaced (glibc's $LIB depends on how it was built: each is tried)."""
        for directory in directories:
            text = directory
            for token in (b"ORIGIN", b"LIB", b"PLATFORM"):
                text = text.replace(b"${" + token + b"}", b"$" + token)
            text = text.replace(b"$ORIGIN", who.origin)
            if b"$PLATFORM" in text:
                continue  # names a processor
            for library in search.lib if b"$LIB" in text else [b""]:
                yield from self._absolute([text.replace(b"$LIB", library)])

    def _absolute(self, paths: Iterable[bytes]) -> Iterator[bytes]:
        for path in paths:
            yield path if path.startswith(b"/") else self._cwd + b"/" + path

    def _configuration(self, start: bytes) -> Iterator[bytes]:
        """The directories that ld.so.conf and what it includes list."""
        stack, seen = [start], 0
        while stack and seen < MAX_CONFIGURATIONS:
            path = stack.pop()
            seen += 1
            included: list[bytes] = []
            for raw in self._text(path).splitlines():
                line = raw.partition(b"#")[0].strip()
                word, *patterns = line.split()[:64] or [b""]
                if word == b"include":
                    for pattern in patterns:
                        base = b"" if pattern.startswith(b"/") else path.rpartition(b"/")[0] + b"/"
                        matches = sorted(found.path for found in self._files.tree.glob(base + pattern))
                        included += matches[:MAX_CONFIGURATIONS]
                elif line.startswith(b"/"):
                    yield line.partition(b"=")[0].rstrip()
            stack += reversed(included)

    def _text(self, path: bytes) -> bytes:
        found = self._files.regular(path)
        return b"" if found is None else self._files.head(found, MAX_TEXT)


class _Search:
    """What the search for one program's libraries depends on: the program, and the loader's file name."""

    def __init__(self, program: Elf, loader: bytes) -> None:
        self.program = program
        self.loader = loader
        self.musl = loader.startswith(b"ld-musl-")
        self.musl_path = b"/etc/" + loader.partition(b".so")[0] + b".path"
        multiarch = _MULTIARCH.get((program.machine, program.bits))
        own = [b"lib/" + multiarch] if multiarch else []
        self.lib = [*own, b"lib64", b"lib"] if program.bits == 64 else [*own, b"lib", b"lib32"]
        self.defaults = [top + lib for lib in self.lib for top in (b"/", b"/usr/")]


def _split(paths: bytes) -> list[bytes]:
    """A list separated by colons; a directory given as nothing, which would be the working directory, is left
    out.
    """
    return [path for path in paths.split(b":") if path]
