"""What the tests of push's flags share: a registry, nginx before it with TLS, a login, client certificates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.registries import RunningRegistry, start_registry
from harness.tlsfront import Authority, make_authority, start_tls_front

# Searched for in everything that is shown.
PASSWORD = "MARKED-pa:ss-word"
REFRESH = "MARKED-refresh-token"
USER = ("me", PASSWORD)
LOGIN = f"me:{PASSWORD}"


@dataclass(frozen=True)
class Rig:
    """A plain registry, and before it nginx with TLS and a login, and one that also wants a client certificate."""

    root: Path
    plain: RunningRegistry
    authority: Authority
    tls: RunningRegistry
    mutual: RunningRegistry
    certificate: Path
    key: Path


@contextmanager
def push_rig(root: Path) -> Iterator[Rig]:
    """Start all of it below `root`."""
    authority = make_authority(root / "ca")
    certificate, key = authority.issue("client", client=True)
    with (
        start_registry(root / "registry") as plain,
        start_tls_front(root / "tls", plain, authority, login=USER) as tls,
        start_tls_front(root / "mutual", plain, authority, client_ca=authority.ca) as mutual,
    ):
        yield Rig(root, plain, authority, tls, mutual, certificate, key)


def certs_d(root: Path, host: str, text: str) -> str:
    """A certs.d directory with one hosts.toml; returned as --hosts-dir takes it."""
    directory = root / host.replace(":", "_", 1)
    directory = directory.with_name(directory.name + "_") if ":" in host else directory
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(text)
    return str(root)
