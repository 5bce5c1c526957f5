"""Credential helpers: programs `docker-credential-<name>` that keep logins (docker/docker-credential-helpers).

Run as `<program> get` with the registry on stdin; the login comes as JSON on stdout. Never through a shell; what it
writes, and how long it takes, are bounded; one that hangs is killed with whatever it started.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from soci_snapshotter.errors import Config, Integrity
from soci_snapshotter.formats import dockerconfig, jsonfmt
from soci_snapshotter.formats.dockerconfig import Login
from soci_snapshotter.registry.once import Once

# Tokens are 1 to 8 KiB.
_OUTPUT = 64 << 10
# A helper may ask a cloud's metadata service and its token service in turn; a pull waits for it.
_TIMEOUT = 10.0
# A helper is run for each new scope otherwise: 30 layers and their index within a few seconds.
_FRESH = 60.0
# So that one that hangs or is missing holds up one pull now and then, not each request.
_FAILED = 10.0
# After a rejection no older answer will do; below this the rejected one is the newest there is.
_JUST_NOW = 2.0
# It is looked up in PATH, so no "/" and nothing that begins like an option.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}", re.ASCII)
# The protocol's word for "none", exit code 1.
_NONE = b"credentials not found"
# The user name that marks an identity token.
_TOKEN_USER = "<token>"  # noqa: S105


class _Answer(Struct, frozen=True):
    username: str = msgspec.field(name="Username", default="")
    secret: str = msgspec.field(name="Secret", default="")


class Helpers:
    """Runs helpers found in `environment`'s PATH, with that environment. Thread safe; remembers for a short time."""

    def __init__(self, environment: Mapping[str, str], *, timeout: float = _TIMEOUT) -> None:
        self._environment = dict(environment)
        self._timeout = timeout
        self._answers: Once[tuple[str, str], Login | Config | None] = Once()

    def login(self, name: str, host: str, *, fresh: bool = False) -> Login | None:
        """The login that helper `name` has for `host[:port]`. Config, naming both, when it cannot be had."""

        def ask() -> tuple[Login | Config | None, float]:
            try:
                return self._ask(name, host), _FRESH
            except Config as error:
                return error, _FAILED

        try:
            answer = self._answers.get((name, host), ask, newer_than=_JUST_NOW if fresh else None)
        except TimeoutError:
            raise Config(f"docker-credential-{name[:100]} for {host}: no answer; run it by hand") from None
        if isinstance(answer, Config):
            raise answer
        return answer

    def _ask(self, name: str, host: str) -> Login | None:
        where = f"docker-credential-{name[:100]} for {host}"
        program = None
        if _NAME.fullmatch(name):
            program = shutil.which(f"docker-credential-{name}", path=self._environment.get("PATH", ""))
        if program is None:
            raise Config(f"{where}: no such program in PATH; install it, or correct config.json")
        try:
            status, output = _run(
                program, dockerconfig.helper_key(host).encode(), self._environment, self._timeout
            )
        except TimeoutError:
            raise Config(f"{where}: no answer within {self._timeout:g} s; run it by hand") from None
        except OSError as error:
            raise Config(f"{where}: {error.strerror}; check the program {program}") from None
        if len(output) > _OUTPUT:
            raise Config(f"{where}: wrote more than {_OUTPUT} bytes; check the program {program}")
        if status:
            if _NONE in output:
                return None
            raise Config(f"{where}: ended with status {status}; run it by hand to see why")
        try:
            answer = jsonfmt.decode(output, _Answer, where, _OUTPUT)
        except Integrity:  # its text may quote the answer
            raise Config(f"{where}: its answer is not a login; check the program {program}") from None
        if not answer.secret:
            return None
        return Login("" if answer.username == _TOKEN_USER else answer.username, answer.secret)


def _run(program: str, text: bytes, environment: Mapping[str, str], timeout: float) -> tuple[int, bytes]:
    """Exit status and output, at most one byte more than _OUTPUT. Raises OSError, TimeoutError among them."""
    end = time.monotonic() + timeout
    process = subprocess.Popen(
        [program, "get"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None  # noqa: S101 - for mypy: both are pipes
        assert process.stdout is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it need not read what it is asked
            process.stdin.write(text)  # far less than a pipe holds
        output = _read(process.stdout.fileno(), end)
        if len(output) > _OUTPUT:
            return 0, output
        try:
            return process.wait(max(0.0, end - time.monotonic())), output
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
    finally:
        # Also after a good end: whatever it left running has our pipe.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _read(descriptor: int, end: float) -> bytes:
    output = bytearray()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    while len(output) <= _OUTPUT:
        left = end - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise TimeoutError
        piece = os.read(descriptor, _OUTPUT + 1 - len(output))
        if not piece:
            break
        output += piece
    return bytes(output)
