"""The daemon's sources of logins in the Go daemon's order: Docker config, Kubernetes secrets, pulls by the CRI."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from soci_snapshotter.daemon.config import Config, CriKeychain
from soci_snapshotter.daemon.criproxy import CriLogins, CriProxy
from soci_snapshotter.daemon.kubesecrets import KubeSecrets
from soci_snapshotter.registry.credentials import DockerConfig, Source
from soci_snapshotter.registry.credhelpers import Helpers
from soci_snapshotter.registry.keychains import DEFAULT_LIFE, Keychain


@dataclass(frozen=True, slots=True)
class Keychains:
    """What is asked for logins, and the service that some of them come by."""

    keychain: Keychain
    cri: CriProxy | None
    logins: CriLogins
    """Those of the CRI; none without it."""


@contextmanager
def keychains(config: Config, docker_config: Path) -> Iterator[Keychains]:
    """As the configuration says. Credential helpers are found by PATH and get our environment."""
    with ExitStack() as stack:
        sources: list[Source] = [DockerConfig(docker_config, Helpers(os.environ))]
        if config.kubeconfig_keychain.enable_keychain:
            path = _kubeconfig(config.kubeconfig_keychain.kubeconfig_path)
            sources.append(stack.enter_context(KubeSecrets(path)))
        proxy, logins = None, CriLogins()
        if config.cri_keychain.enable_keychain:
            sources.append(logins)
            address = config.cri_keychain.image_service_path or CriKeychain().image_service_path
            proxy = stack.enter_context(CriProxy(address, logins))
        keychain = Keychain(
            sources,
            life=float(config.resolver.auth_client_ttl_sec) or DEFAULT_LIFE,
            shared=config.resolver.enable_auth_client_sharing,
        )
        yield Keychains(keychain, proxy, logins)


def _kubeconfig(said: str) -> Path:
    """As kubectl finds it; of a list in KUBECONFIG, which kubectl would merge, the first that is there."""
    if said:
        return Path(said)
    listed = [Path(each) for each in os.environ.get("KUBECONFIG", "").split(":") if each]
    listed.append(Path.home() / ".kube" / "config")
    return next((each for each in listed if each.exists()), listed[0])
