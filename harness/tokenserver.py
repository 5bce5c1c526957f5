"""A token service for docker-registry (`auth: token`): Basic by GET, identity (refresh) tokens by POST."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from .registries import RunningRegistry, free_port, running

_SERVICE = "test-registry"
_ISSUER = "test-issuer"


@dataclass
class TokenService:
    """Whom it believes, and what it was asked: `GET basic`, `GET anonymous`, `POST refresh_token`, with the scope."""

    directory: Path
    login: tuple[str, str]
    refresh: str
    port: int = 0
    closed: str = ""
    """A repository that nobody gets access to."""
    asked: list[str] = field(default_factory=list)
    issued: list[str] = field(default_factory=list)

    @property
    def realm(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}/token"

    @property
    def certificate(self) -> Path:
        """Of the key that signs its tokens."""
        return self.directory / "signer.pem"

    def token(self, scopes: str, *, allowed: bool) -> str:
        """A JWT (RS256) for the scopes; an empty grant for who is not believed."""
        access = []
        for scope in scopes.split() if allowed else []:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            if name == self.closed:
                continue
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        now = int(time.time())
        der = subprocess.run(
            ["openssl", "x509", "-in", str(self.certificate), "-outform", "DER"],
            capture_output=True,
            check=True,
        ).stdout
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": _ISSUER,
            "sub": "tester",
            "aud": _SERVICE,
            "exp": now + 300,
            "nbf": now - 10,
            "iat": now,
            "jti": os.urandom(8).hex(),
            "access": access,
        }
        text = f"{_b64(json.dumps(head).encode())}.{_b64(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.directory / "signer.key")],
            input=text.encode(),
            capture_output=True,
            check=True,
        ).stdout
        self.issued.append(f"{text}.{_b64(signature)}")
        return self.issued[-1]


@contextlib.contextmanager
def start_token_registry(
    root: Path, login: tuple[str, str], refresh: str
) -> Iterator[tuple[RunningRegistry, TokenService]]:
    """docker-registry that wants tokens, and the service that gives them."""
    root.mkdir(parents=True, exist_ok=True)
    service = TokenService(root, login, refresh)
    subprocess.run(
        [
            *(
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=signer",
            ),
            *("-keyout", str(root / "signer.key"), "-out", str(service.certificate)),
        ],
        check=True,
        capture_output=True,
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(service))
    service.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    port = free_port()
    config = root / "config.yml"
    config.write_text(
        "version: 0.1\nlog: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {root / 'data'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
        f"auth: {{token: {{realm: '{service.realm}', service: {_SERVICE}, issuer: {_ISSUER}, "
        f"rootcertbundle: {service.certificate}}}}}\n"
    )
    try:
        with running(["docker-registry", "serve", str(config)], port, root / "log"):
            yield RunningRegistry(port), service
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _handler(service: TokenService) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            scope = " ".join(query.get("scope", []))
            given = self.headers.get("Authorization", "")
            if not given:
                service.asked.append(f"GET anonymous {scope}")
                self._answer(200, {"token": service.token(scope, allowed=False)})
                return
            service.asked.append(f"GET basic {scope}")
            right = "Basic " + base64.b64encode(":".join(service.login).encode()).decode()
            if given != right:
                self._answer(401, {"details": "wrong"})
                return
            self._answer(200, {"token": service.token(scope, allowed=True), "expires_in": 300})

        def do_POST(self) -> None:
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            scope = form.get("scope", [""])[0]
            service.asked.append(f"POST {form['grant_type'][0]} {scope}")
            if form.get("refresh_token") != [service.refresh]:
                self._answer(401, {"details": "wrong"})
                return
            token = service.token(scope, allowed=True)
            self._answer(200, {"access_token": token, "refresh_token": service.refresh, "expires_in": 300})

        def _answer(self, status: int, document: dict[str, object]) -> None:
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: the test reads `asked`."""

    return Handler


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
