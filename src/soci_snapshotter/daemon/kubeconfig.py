"""A kubeconfig: where the Kubernetes API server is, and how to log in there.

Read are server, CA, client certificate and key (files or data), token, tokenFile, user and password of the current
context. Plugins (`exec`, `auth-provider`) are not run. JSON is YAML too, and needs no PyYAML.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from soci_snapshotter.errors import Config
from soci_snapshotter.registry.urls import is_loopback

T = TypeVar("T")

# kubectl's files hold some KiB a cluster; service account tokens 1 to 8 KiB.
_FILE_LIMIT = 1 << 20
_TOKEN_LIMIT = 48 << 10


class _Cluster(msgspec.Struct, frozen=True, rename="kebab"):
    server: str = ""
    certificate_authority: str = ""
    certificate_authority_data: str = ""
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""


class _User(msgspec.Struct, frozen=True, rename="kebab"):
    client_certificate: str = ""
    client_certificate_data: str = ""
    client_key: str = ""
    client_key_data: str = ""
    token: str = ""
    token_file: str = msgspec.field(name="tokenFile", default="")
    username: str = ""
    password: str = ""
    exec: Any = None
    auth_provider: Any = None


class _Context(msgspec.Struct, frozen=True):
    cluster: str = ""
    user: str = ""


class _NamedCluster(msgspec.Struct, frozen=True):
    name: str
    cluster: _Cluster


class _NamedUser(msgspec.Struct, frozen=True):
    name: str
    user: _User


class _NamedContext(msgspec.Struct, frozen=True):
    name: str
    context: _Context


class _File(msgspec.Struct, frozen=True, rename="kebab"):
    current_context: str = ""
    contexts: list[_NamedContext] = []
    clusters: list[_NamedCluster] = []
    users: list[_NamedUser] = []


@dataclass(frozen=True, slots=True)
class ApiServer:
    """How to reach one. `context` is None for http."""

    url: str
    context: ssl.SSLContext | None
    server_name: str
    token: str = field(repr=False)
    token_file: str
    basic: tuple[str, str] | None = field(repr=False)

    def headers(self) -> dict[str, str]:
        """Authorization for the next request; a token's file is read each time, since it is renewed there."""
        token = self.token
        if self.token_file:
            token = _read(Path(self.token_file), _TOKEN_LIMIT).decode("ascii", "replace").strip()
        if token:
            if not token.isascii() or not token.isprintable():
                raise Config(f"{self.token_file or 'kubeconfig'}: the token has characters that no token has")
            return {"Authorization": f"Bearer {token}"}
        if self.basic is not None:
            pair = ":".join(self.basic).encode()
            return {"Authorization": "Basic " + base64.b64encode(pair).decode()}
        return {}


def load(path: Path) -> ApiServer:
    """The current context of a kubeconfig. Config naming file and field when it cannot be used; quotes no secret."""
    file = _decode(_read(path, _FILE_LIMIT), path)
    named = _named([(each.name, each.context) for each in file.contexts], file.current_context)
    if named is None:
        raise Config(f"{path}: current-context {file.current_context!r} is not among its contexts")
    cluster = _named([(each.name, each.cluster) for each in file.clusters], named.cluster)
    user = _named([(each.name, each.user) for each in file.users], named.user)
    if cluster is None or not cluster.server:
        raise Config(f"{path}: no server for the cluster {named.cluster!r}")
    user = _User() if user is None else user
    if user.exec is not None or user.auth_provider is not None:
        raise Config(
            f"{path}: users[{named.user!r}] logs in by a plugin, which is not run; give it a tokenFile"
        )
    url = urlsplit(cluster.server)
    if url.scheme not in ("https", "http") or not url.hostname or "@" in url.netloc:
        raise Config(f"{path}: clusters[{named.cluster!r}].server is no URL of an API server")
    if url.scheme == "http" and not is_loopback(url.netloc):
        raise Config(f"{path}: clusters[{named.cluster!r}].server is http on another machine; use https")
    context = _tls(path, cluster, user) if url.scheme == "https" else None
    return ApiServer(
        cluster.server.rstrip("/"),
        context,
        cluster.tls_server_name,
        user.token,
        _beside(path, user.token_file),
        (user.username, user.password) if user.username else None,
    )


def _decode(data: bytes, path: Path) -> _File:
    try:
        tree = msgspec.json.decode(data) if data.lstrip()[:1] == b"{" else _yaml(data, path)
        return msgspec.convert(_without_nulls(tree), _File)
    except msgspec.MsgspecError as error:
        raise Config(f"{path}: not a kubeconfig: {error}") from None
    except (UnicodeDecodeError, RecursionError):
        raise Config(f"{path}: not a kubeconfig") from None


def _yaml(data: bytes, path: Path) -> Any:  # noqa: ANN401
    try:
        import yaml  # noqa: PLC0415 - of the extra `kubernetes`
    except ImportError:
        raise Config(
            f"{path}: reading YAML needs PyYAML; install soci-snapshotter[kubernetes], or write the file as JSON"
        ) from None
    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as error:
        # Its text quotes the line.
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise Config(f"{path}: not YAML{where}; correct the file") from None


def _without_nulls(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _named(pairs: list[tuple[str, T]], name: str) -> T | None:
    return next((value for own, value in pairs if own == name), None)


def _tls(path: Path, cluster: _Cluster, user: _User) -> ssl.SSLContext:
    authority = _material(path, cluster.certificate_authority_data, cluster.certificate_authority)
    certificate = _material(path, user.client_certificate_data, user.client_certificate)
    key = _material(path, user.client_key_data, user.client_key)
    try:
        if authority:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=authority.decode("ascii"))
        else:
            context = ssl.create_default_context()
        if certificate:
            with _in_memory(certificate) as one, _in_memory(key or certificate) as other:
                context.load_cert_chain(one, other, password=_no_password)
    except (OSError, ssl.SSLError, ValueError):
        raise Config(f"{path}: a certificate or key of the current context is not in PEM format") from None
    if cluster.insecure_skip_tls_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _material(path: Path, data: str, file: str) -> bytes:
    """A certificate or key, given as base64 or as a file beside the kubeconfig."""
    if data:
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise Config(f"{path}: certificate data of the current context is not base64") from None
    return _read(Path(_beside(path, file)), _FILE_LIMIT) if file else b""


def _beside(path: Path, file: str) -> str:
    return str(path.parent / file) if file else ""


@contextmanager
def _in_memory(data: bytes) -> Iterator[str]:
    """A file name for the library that takes no bytes; nothing is written to disk."""
    descriptor = os.memfd_create("kubeconfig")
    try:
        os.write(descriptor, data)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _no_password() -> str:
    raise ValueError("the key is encrypted")  # OpenSSL would ask on the terminal


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Config(f"{path}: {error.strerror}; check that it is there and may be read") from None
    if len(data) > limit:
        raise Config(f"{path}: larger than {limit} bytes")
    return data
