"""What an image needs to start, from its own configuration (`--prefetch-auto`).

The program that entrypoint and command name, found through PATH in the merged tree; the interpreters of
scripts; the loader and the closure of shared libraries. A wrapper's or a script's arguments that are programs or
small files of the image count too: `["tini", "--", "node", "app.js"]`, `["sh", "-c", "exec nginx"]`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from ..formats.oci import RunConfig
from ..policy.mergedtree import Found, MergedTree
from ..policy.prefetchset import shown
from .libraries import Files, Loader, Read

DEFAULT_PATH: Final = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What containerd gives a container whose image sets no PATH."""

MAX_SCRIPTS: Final = 5
"""Interpreters of interpreters: Linux follows no more (fs/exec.c)."""

MAX_LINE: Final = 256
"""Bytes of a script that the kernel looks at for its interpreter (BINPRM_BUF_SIZE)."""

MAX_WORDS: Final = 256
"""Arguments looked at; an image's command has a dozen."""

MAX_ARGUMENT: Final = 64 << 20
"""Bytes of a file that is no program but an argument: a script or a jar. Larger is data, and read in parts."""

_SEPARATORS: Final = frozenset({";", "&&", "||", "|", "&", "(", ")"})
_PREFIXES: Final = frozenset({"exec", "time", "nohup"})


@dataclass(frozen=True, slots=True)
class Closure:
    """Paths for policy.prefetchset, absolute, links followed: the program first. `warnings`: one line each."""

    paths: tuple[bytes, ...]
    warnings: tuple[str, ...]


def closure(tree: MergedTree, config: RunConfig, read: Read) -> Closure:
    """What starting the image reads, as far as its files tell.

    `read` gives bytes of a file of `tree` (see libraries.Read); at most 64 KiB at a time are asked for. What
    cannot be found or read is a warning; nothing is raised.
    """
    words = [_bytes(word) for word in config.argv]
    if not words:
        return Closure((), ("the image has neither an entrypoint nor a command",))
    start = _Start(tree, config, read)
    program = start.program(words[0])
    if program is None:
        start.files.warnings.setdefault(
            f"{words[0].decode(errors='backslashreplace')!r}: no such program in the image"
        )
    else:
        start.visit(program)
    start.arguments(config.argv[1 : 1 + MAX_WORDS])
    return Closure(tuple(start.paths), tuple(start.files.warnings))


class _Start:
    """The search for one image's programs."""

    def __init__(self, tree: MergedTree, config: RunConfig, read: Read) -> None:
        env = {key: value for key, _, value in (_bytes(item).partition(b"=") for item in config.env)}
        self._cwd = b"/" + _bytes(config.working_dir).strip(b"/")
        self._path = env.get(b"PATH") or DEFAULT_PATH
        self.files = Files(tree, read)
        self._loader = Loader(self.files, env, self._cwd)
        self.paths = self._loader.paths

    def program(self, name: bytes) -> Found | None:
        """The file that running `name` runs."""
        if b"/" in name:
            return self.files.regular(self._at(name))
        for directory in self._path.split(b":"):
            found = self.files.regular(self._at(directory) + b"/" + name)
            if found is not None and _executable(found):
                return found
        return None

    def visit(self, found: Found) -> None:
        """Add a program and whatever it takes to run it."""
        waiting = [(found, 0)]
        while waiting:
            found, depth = waiting.pop()
            path = b"/" + found.path
            if path in self.paths:
                continue
            self.paths[path] = None
            parsed = self.files.elf(found)
            if parsed is not None:
                self._loader.load(found, parsed)
            elif depth < MAX_SCRIPTS:
                waiting += [(interpreter, depth + 1) for interpreter in self._interpreters(found)]

    def arguments(self, words: Iterable[str]) -> None:
        """Add what the arguments name: a command behind a wrapper or in a shell's line, and small files."""
        first = True
        for word in _words(words):
            if word in _SEPARATORS:
                first = True
                continue
            if word in _PREFIXES or word.startswith("-") or "=" in word:
                continue
            name = _bytes(word)
            found = self.program(name) if first or b"/" in name else None
            found = found or self.files.regular(self._at(name))
            # Behind a wrapper or an entrypoint's script may come the next command: `tini -- /entry.sh nginx`.
            first = found is not None and _executable(found)
            if found is not None and (first or (found.entry and found.entry.size <= MAX_ARGUMENT)):
                self.visit(found)

    def _interpreters(self, script: Found) -> Iterator[Found]:
        """What the `#!` line runs: the interpreter, and behind `env` the program it looks for."""
        line = self.files.head(script, MAX_LINE)
        if not line.startswith(b"#!"):
            return
        interpreter, *rest = line[2:].partition(b"\n")[0].split() or [b""]
        found = self.files.regular(self._at(interpreter)) if interpreter else None
        if found is None:
            self.files.warn(script.path, f"its interpreter {shown(interpreter)} is in no layer")
            return
        if interpreter.rpartition(b"/")[2] == b"env":
            for word in rest:
                if word.startswith(b"-") or b"=" in word:
                    continue
                program = self.program(word)
                if program is None:
                    self.files.warn(
                        script.path,
                        f"its interpreter {word.decode(errors='backslashreplace')!r} is not in PATH",
                    )
                else:
                    yield program
                break
        yield found

    def _at(self, path: bytes) -> bytes:
        return path if path.startswith(b"/") else self._cwd + b"/" + path


def _words(words: Iterable[str]) -> Iterator[str]:
    """Arguments, those with spaces in them taken apart as a shell would."""
    left = MAX_WORDS
    for word in words:
        parts = [word]
        if any(map(str.isspace, word)):
            lexer = shlex.shlex(word[:4096], posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            try:
                parts = list(lexer)
            except ValueError:  # a quote without its other half
                parts = word[:4096].split()
        yield from parts[:left]
        left -= len(parts[:left])


def _executable(found: Found) -> bool:
    return found.entry is not None and bool(found.entry.mode & 0o111)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
