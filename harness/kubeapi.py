"""A Kubernetes API server as far as secrets are listed and watched: pages, versions, bookmarks, 410, TLS, logins."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from .tlsfront import Authority

SELECTOR = "type=kubernetes.io/dockerconfigjson"


@dataclass
class KubeApi:
    """What it has and what it was asked: `list`, `page`, `watch <version>`, `refused`."""

    directory: Path
    authority: Authority
    port: int = 0
    token: str = ""
    """Who sends it as Bearer is let in; "": nobody by token."""
    certificate: bool = False
    """Whether TLS wants a client certificate; who shows one of the authority's is let in."""
    page: int = 2
    secrets: dict[str, dict[str, object]] = field(default_factory=dict)
    version: int = 10
    oldest: int = 0
    """A watch from before it is answered with 410."""
    asked: list[str] = field(default_factory=list)
    garbage: bytes = b""
    """Sent instead of the next answer to a list."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    events: list[tuple[int, bytes]] = field(default_factory=list)
    generation: int = 0
    """Watches of an older one end."""

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"https://127.0.0.1:{self.port}"

    def put(self, name: str, document: object, namespace: str = "default") -> None:
        """Add or change a secret; bytes are taken as they are, anything else as the JSON of a config.json."""
        raw = document if isinstance(document, bytes) else json.dumps(document).encode()
        key = f"{namespace}/{name}"
        with self.changed:
            self.version += 1
            kind = "MODIFIED" if key in self.secrets else "ADDED"
            secret: dict[str, object] = {
                "metadata": {"name": name, "namespace": namespace, "resourceVersion": str(self.version)},
                "type": "kubernetes.io/dockerconfigjson",
                "data": {".dockerconfigjson": base64.b64encode(raw).decode()},
            }
            self.secrets[key] = secret
            self._tell(kind, secret)

    def delete(self, name: str, namespace: str = "default", *, told: bool = True) -> None:
        """Remove a secret; without `told` no watch hears of it."""
        with self.changed:
            self.version += 1
            secret = self.secrets.pop(f"{namespace}/{name}")
            secret["metadata"] = {"name": name, "namespace": namespace, "resourceVersion": str(self.version)}
            if told:
                self._tell("DELETED", secret)

    def send(self, line: bytes) -> None:
        """A line to every watch, as it is."""
        with self.changed:
            self.version += 1
            self.events.append((self.version, line))
            self.changed.notify_all()

    def cut(self) -> None:
        """End every watch."""
        with self.changed:
            self.generation += 1
            self.changed.notify_all()

    def _tell(self, kind: str, secret: dict[str, object]) -> None:
        self.events.append((self.version, json.dumps({"type": kind, "object": secret}).encode()))
        self.changed.notify_all()

    def kubeconfig(self, path: Path, **user: str) -> Path:
        """A kubeconfig in YAML for it, with these fields of the user."""
        path.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: here\n"
            "contexts:\n- name: here\n  context: {cluster: c, user: u}\n"
            f"clusters:\n- name: c\n  cluster:\n    server: {self.url}\n"
            f"    certificate-authority-data: {base64.b64encode(self.authority.ca.read_bytes()).decode()}\n"
            "users:\n- name: u\n  user:\n"
            + "".join(f"    {key.replace('_', '-')}: {value}\n" for key, value in user.items())
            + ("    {}\n" if not user else "")
        )
        return path


@contextlib.contextmanager
def start_kube_api(
    directory: Path, authority: Authority, *, token: str = "", certificate: bool = False
) -> Iterator[KubeApi]:
    """Serve on loopback until the block is left, with a certificate of `authority`."""
    directory.mkdir(exist_ok=True)
    api = KubeApi(directory, authority, token=token, certificate=certificate)
    own, key = authority.directory / "api.crt.pem", authority.directory / "api.key"
    if not own.exists():
        authority.issue("api")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    if certificate:
        context.load_verify_locations(authority.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api))
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up
    api.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        api.cut()
        server.shutdown()
        server.server_close()
        thread.join(5)


def _handler(api: KubeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(parts.query).items()}
            if parts.path != "/api/v1/secrets" or query.get("fieldSelector") != SELECTOR:
                self._answer(404, {})
            elif not api.certificate and self.headers.get("Authorization") != f"Bearer {api.token}":
                api.asked.append("refused")
                self._answer(401, {"kind": "Status", "code": 401})
            elif "watch" in query:
                self._watch(int(query["resourceVersion"]))
            else:
                self._list(query)

        def _list(self, query: dict[str, str]) -> None:
            if api.garbage:
                body, api.garbage = api.garbage, b""
                self._send(200, body)
                return
            with api.changed:
                version, items = api.version, list(api.secrets.values())
            start = int(query.get("continue", "0"))
            api.asked.append("page" if start else "list")
            end = start + min(api.page, int(query["limit"]))
            metadata = {"resourceVersion": str(version)}
            if end < len(items):
                metadata["continue"] = str(end)
            self._answer(200, {"kind": "SecretList", "metadata": metadata, "items": items[start:end]})

        def _watch(self, version: int) -> None:
            api.asked.append(f"watch {version}")
            if version < api.oldest:
                self._answer(410, {"kind": "Status", "code": 410})
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            with api.changed:
                generation = api.generation
            bookmark = {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}}
            self._chunk(json.dumps(bookmark).encode())
            ended = False
            while not ended:
                with api.changed:
                    while not ended and api.version == version:
                        api.changed.wait(60)
                        ended = api.generation != generation
                    lines = [line for at, line in api.events if at > version]
                    version, ended = api.version, api.generation != generation
                for line in lines:
                    self._chunk(line)
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, line: bytes) -> None:
            self.wfile.write(f"{len(line) + 1:x}\r\n".encode() + line + b"\n\r\n")

        def _answer(self, status: int, document: dict[str, object]) -> None:
            self._send(status, json.dumps(document).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the test reads `asked`."""

    return Handler
