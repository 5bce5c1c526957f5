"""nginx in front of a registry: TLS by a CA of the test's own, client certificates, basic auth."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .registries import RunningRegistry, free_port, running


@dataclass(frozen=True)
class Authority:
    """A CA in a directory; certificates that it signs are for loopback."""

    directory: Path

    @property
    def ca(self) -> Path:
        """Its certificate."""
        return self.directory / "ca.pem"

    def issue(self, name: str, *, client: bool = False) -> tuple[Path, Path]:
        """A certificate and its key, for a server on loopback or for a client called `name`."""
        key, request, certificate = (self.directory / f"{name}.{kind}" for kind in ("key", "csr", "crt.pem"))
        subject = f"/CN={name}"
        _openssl(
            "req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", subject
        )
        extensions = self.directory / f"{name}.ext"
        usage = "extendedKeyUsage=clientAuth" if client else "subjectAltName=IP:127.0.0.1,DNS:localhost"
        extensions.write_text(usage + "\n")
        signer = ("-CA", self.ca, "-CAkey", self.directory / "ca.key", "-CAcreateserial")
        _openssl(
            "x509", "-req", "-in", request, "-out", certificate, "-days", "2", *signer, "-extfile", extensions
        )
        return certificate, key


def make_authority(directory: Path) -> Authority:
    """A new CA."""
    directory.mkdir(parents=True, exist_ok=True)
    made = Authority(directory)
    _openssl(
        *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={directory.name}"),
        *("-keyout", directory / "ca.key", "-out", made.ca),
    )
    return made


@contextlib.contextmanager
def start_tls_front(
    root: Path,
    upstream: RunningRegistry,
    authority: Authority,
    *,
    client_ca: Path | None = None,
    login: tuple[str, str] | None = None,
) -> Iterator[RunningRegistry]:
    """nginx with TLS before `upstream`; with `client_ca` it wants a certificate, with `login` basic auth."""
    root.mkdir(parents=True, exist_ok=True)
    port = free_port()
    certificate, key = authority.issue(f"server-{port}")
    lines = [f"ssl_certificate {certificate};", f"ssl_certificate_key {key};"]
    if client_ca is not None:
        lines += [f"ssl_client_certificate {client_ca};", "ssl_verify_client on;"]
    if login is not None:
        passwords = root / "htpasswd"
        hashed = _openssl("passwd", "-apr1", login[1]).strip()
        passwords.write_text(f"{login[0]}:{hashed}\n")
        lines += ['auth_basic "registry";', f"auth_basic_user_file {passwords};"]
    config = root / "nginx.conf"
    config.write_text(
        _CONFIG.format(root=root, port=port, upstream=upstream.host, lines="\n    ".join(lines))
    )
    with running(
        ["nginx", "-c", str(config), "-p", str(root), "-e", str(root / "error")], port, root / "log"
    ):
        yield RunningRegistry(port)


def requests_seen(root: Path) -> list[str]:
    """What a front was asked, a line each: method, target, status, bytes of the body that came."""
    return (root / "access").read_text().splitlines()


_CONFIG = """daemon off;
user root;
worker_processes 1;
pid {root}/pid;
events {{ worker_connections 256; }}
http {{
  log_format short '$request_method $request_uri $status $request_length';
  access_log {root}/access short;
  client_body_temp_path {root}/body;
  proxy_temp_path {root}/proxy;
  fastcgi_temp_path {root}/f; uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;
  client_max_body_size 0;
  server {{
    listen 127.0.0.1:{port} ssl;
    {lines}
    location / {{
      proxy_pass http://{upstream};
      proxy_http_version 1.1;
      proxy_request_buffering off;
      proxy_set_header Host $http_host;
      proxy_set_header X-Forwarded-Proto https;
      proxy_set_header Authorization "";
    }}
  }}
}}
"""


def _openssl(*arguments: str | Path) -> str:
    done = subprocess.run(
        ["openssl", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr}")
    return done.stdout
