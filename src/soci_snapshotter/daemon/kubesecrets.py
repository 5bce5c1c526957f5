"""kubernetes.io/dockerconfigjson secrets of a cluster as a source of logins, kept up to date by list and watch.

Two endpoints of the API (Kubernetes, "API Concepts", "Efficient detection of changes"): a paged list gives the
secrets and a resource version; a watch from there gives changes, one JSON object a line, until the server ends it. A
version that the server no longer has is answered with 410, and then the list is made anew. Nothing touches the disk.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlencode

import msgspec
import urllib3
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError

from soci_snapshotter.daemon import kubeconfig
from soci_snapshotter.daemon.kubeconfig import ApiServer
from soci_snapshotter.errors import Config, Remote, SociError
from soci_snapshotter.formats import dockerconfig
from soci_snapshotter.formats.dockerconfig import DockerFile, Login
from soci_snapshotter.registry import failures

_log = logging.getLogger(__name__)

T = TypeVar("T")

_PATH = "/api/v1/secrets"
_SELECTOR = {"fieldSelector": "type=kubernetes.io/dockerconfigjson"}
_KEY = ".dockerconfigjson"
# A secret holds at most 1 MiB (Kubernetes), base64 makes 4/3 of it, and managed fields come on top.
_LINE = 4 << 20
_PAGE = 50
_PAGE_BYTES = 64 << 20
# Broken secrets that were named in the log; one that is listed again is not named again.
_TOLD = 256
# A cluster of thousands of namespaces with one secret each; beyond that memory is worth more.
_MOST = 10_000
# The server is asked to end a watch after this, and one that says nothing for longer is dead.
_WATCH_SECONDS = 300
_TIMEOUT = urllib3.Timeout(connect=5.0, read=30.0)
_WATCH_TIMEOUT = urllib3.Timeout(connect=5.0, read=_WATCH_SECONDS + 30.0)
_FIRST_WAIT, _LAST_WAIT = 1.0, 30.0
# A peer that is gone without a word is noticed after a minute.
_KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
]


class _Metadata(msgspec.Struct, frozen=True):
    name: str = ""
    namespace: str = ""
    version: str = msgspec.field(name="resourceVersion", default="")
    more: str = msgspec.field(name="continue", default="")


class _Secret(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()
    data: dict[str, str] | None = None
    code: int = 0  # of a Status, which comes with ERROR


class _List(msgspec.Struct, frozen=True):
    metadata: _Metadata = _Metadata()
    items: list[_Secret] | None = None


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: _Secret


class _Gone(Exception):
    """The resource version is too old: list again."""


_STOP_SECONDS = 2.0  # what a thread that notices needs, many times over


class KubeSecrets:
    """The secrets that `path`, a kubeconfig, gives access to. A context manager; its thread ends with it, or the process.

    A kubeconfig that is not there yet is waited for: an API server may run on this very node, after us.
    """

    def __init__(self, path: Path, *, first_wait: float = _FIRST_WAIT) -> None:
        self._path = path
        self._first_wait = first_wait
        self._lock = threading.Lock()
        self._files: dict[str, DockerFile] = {}  # by namespace/name
        self._told: set[str] = set()  # its thread's
        self._stop = threading.Event()
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="kube-secrets", daemon=True)
        self.lists = 0
        """How often all secrets were listed."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._stop.set()
            if self._connection is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own: that would take the session away from the thread that reads.
                    socket.socket.shutdown(self._connection, socket.SHUT_RDWR)
        # An answer that ends with its connection has no socket to be shut: the thread ends with the process then.
        self._thread.join(_STOP_SECONDS)

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        """What the secrets have, in the order of namespace and name."""
        del fresh  # what the server has is here a moment later
        with self._lock:
            files = sorted(self._files.items())
        for _, file in files:
            with contextlib.suppress(
                Config
            ):  # an entry of it, after all that are good; said when the secret came
                yield from file.logins(host, repository)

    def _run(self) -> None:
        wait = self._first_wait
        told = ""
        while not self._stop.is_set():
            try:
                server = kubeconfig.load(self._path)
                with _pool(server) as pool:
                    version = self._list(pool, server)
                    if told:
                        _log.info("kubernetes secrets are in sync again")
                    wait, told = self._first_wait, ""
                    while not self._stop.is_set():
                        started = time.monotonic()
                        version = self._watch(pool, server, version)
                        if time.monotonic() - started < self._first_wait:
                            self._stop.wait(self._first_wait)
            except _Gone:
                self._stop.wait(
                    self._first_wait
                )  # a server that says so again and again is not asked all the time
                continue
            except SociError as error:
                problem = str(error)
            except (HTTPError, OSError) as error:
                problem = f"{self._path}: the API server: {failures.reason(error)}; check that it is up"
            except Exception as error:  # without this thread no secret would ever be new
                problem = f"{self._path}: {type(error).__name__}"
            if self._stop.is_set():
                return
            if problem != told:
                _log.warning("kubernetes secrets are not in sync", extra={"reason": problem})
                told = problem
            self._stop.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            wait = min(wait * 2, _LAST_WAIT)

    def _list(self, pool: urllib3.PoolManager, server: ApiServer) -> str:
        """Replace all secrets; returns the version to watch from."""
        files: dict[str, DockerFile] = {}
        more = ""
        while True:
            query = {**_SELECTOR, "limit": str(_PAGE)} | ({"continue": more} if more else {})
            with self._get(pool, server, query, _TIMEOUT) as response:
                data = response.read(_PAGE_BYTES + 1)
            if len(data) > _PAGE_BYTES:
                raise Remote(f"{server.url}: a page of secrets has more than {_PAGE_BYTES} bytes")
            page = _decode(data, _List, server)
            for secret in page.items or ():
                self._take(files, secret)
            more = page.metadata.more
            if not more:
                break
        with self._lock:
            self._files = files
            self.lists += 1
        return page.metadata.version

    def _watch(self, pool: urllib3.PoolManager, server: ApiServer, version: str) -> str:
        """Take changes until the server ends the watch; returns the version to go on from."""
        query = {
            **_SELECTOR,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        with self._get(pool, server, query, _WATCH_TIMEOUT) as response:
            for line in self._lines(response, server):
                event = _decode(line, _Event, server)
                if event.type == "ERROR":
                    if event.object.code == 410:
                        raise _Gone
                    raise Remote(f"{server.url}: the watch of secrets ended with status {event.object.code}")
                self._apply(event)
                version = event.object.metadata.version or version
        return version

    def _apply(self, event: _Event) -> None:
        if event.type == "DELETED":
            with self._lock:
                self._files.pop(_name(event.object), None)
        elif event.type in ("ADDED", "MODIFIED"):
            with self._lock:
                files = dict(self._files)
            self._take(files, event.object)
            with self._lock:  # only this thread changes it
                self._files = files

    def _take(self, files: dict[str, DockerFile], secret: _Secret) -> None:
        name = _name(secret)
        files.pop(name, None)
        if len(files) >= _MOST:
            _log.warning("too many kubernetes secrets, the rest is not used", extra={"limit": _MOST})
            return
        try:
            data = base64.b64decode((secret.data or {}).get(_KEY, ""), validate=True)
            file = dockerconfig.parse(data, f"secret {name}")
        except (binascii.Error, ValueError):
            _log.warning("kubernetes secret is not base64", extra={"secret": name})
        except Config as error:
            _log.warning("kubernetes secret is broken", extra={"reason": str(error)})
        else:
            files[name] = file
            problem = file.problem()
            if problem is not None:
                self._tell(str(problem))

    def _tell(self, problem: str) -> None:
        if problem in self._told:
            return
        if len(self._told) >= _TOLD:
            self._told.clear()
        self._told.add(problem)
        _log.warning("an entry of a kubernetes secret is broken", extra={"reason": problem})

    @contextlib.contextmanager
    def _get(
        self, pool: urllib3.PoolManager, server: ApiServer, query: dict[str, str], timeout: urllib3.Timeout
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        response = pool.request(
            "GET",
            f"{server.url}{_PATH}?{urlencode(query)}",
            headers={**server.headers(), "Accept": "application/json", "User-Agent": "soci-snapshotter"},
            redirect=False,
            retries=False,
            preload_content=False,
            timeout=timeout,
        )
        try:
            with self._lock:
                self._connection = getattr(response.connection, "sock", None)
                stopped = self._stop.is_set()
            if stopped:
                raise OSError("stopped")
            if response.status == 410:
                raise _Gone
            if response.status != 200:
                raise Remote(
                    f"{server.url}: HTTP {response.status} to the list of secrets; "
                    "check that the kubeconfig's user may list and watch secrets"
                )
            yield response
        finally:
            with self._lock:
                self._connection = None
            response.close()

    def _lines(self, response: urllib3.BaseHTTPResponse, server: ApiServer) -> Iterator[bytes]:
        rest = b""
        while piece := response.read1(64 << 10):
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line for line in lines if line.strip())
            if len(rest) > _LINE:
                raise Remote(f"{server.url}: a change of a secret has more than {_LINE} bytes")


def _pool(server: ApiServer) -> urllib3.PoolManager:
    options: dict[str, object] = {}
    if server.context is not None:
        options["ssl_context"] = server.context
        if server.server_name:
            options |= {"server_hostname": server.server_name, "assert_hostname": server.server_name}
        if not server.context.check_hostname:
            options["assert_hostname"] = False
    return urllib3.PoolManager(
        num_pools=1,
        retries=False,
        socket_options=HTTPConnection.default_socket_options + _KEEPALIVE,
        **options,  # type: ignore[arg-type]
    )


def _decode(data: bytes, kind: type[T], server: ApiServer) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # The decoder's text may quote a secret.
        raise Remote(
            f"{server.url}: its answer is no list of secrets; check that it is a Kubernetes API"
        ) from None


def _name(secret: _Secret) -> str:
    return f"{secret.metadata.namespace}/{secret.metadata.name}"[:520]
