"""Several sources of logins, asked in their order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence

from soci_snapshotter.errors import SociError
from soci_snapshotter.formats.dockerconfig import Login
from soci_snapshotter.registry.credentials import CredentialProvider, Source

_log = logging.getLogger(__name__)

# As the Go daemon's auth_client_ttl_sec.
DEFAULT_LIFE = 3600.0
# Problems that were logged; a helper that fails for another host is another problem.
_TOLD = 64


class Keychain:
    """Logins of several sources: the first non-empty answer first, the others for when it is rejected.

    A source that fails is logged, once until something else is wrong, and the next is asked.
    """

    def __init__(
        self, sources: Sequence[Source], *, life: float = DEFAULT_LIFE, shared: bool = False
    ) -> None:
        """`life`: seconds for which what a login gave is used before the sources are asked again; negative for
        ever. `shared`: what a registry said of one repository (how it wants to be asked) holds for its others."""
        self._sources = tuple(sources)
        self.life = life if life >= 0 else float("inf")
        self.shared = shared
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def __call__(self, host: str) -> tuple[str, str] | None:
        """The first login for the registry `host[:port]` that is a pair; so it is a CredentialProvider too."""
        for login in self.logins(host, ""):
            if not login.registry_token:
                return login.user, login.secret
        return None

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        """Each login once. When none is to be had because a source failed, its error is raised at the end."""
        seen: set[Login] = set()
        failed: SociError | None = None
        for source in self._sources:
            try:
                for login in source.logins(host, repository, fresh=fresh):
                    if login not in seen:
                        seen.add(login)
                        yield login
            except SociError as error:
                self._tell(str(error))
                failed = failed or error
        if failed is not None and not seen:
            raise failed

    def _tell(self, problem: str) -> None:
        with self._lock:
            if problem in self._told:
                return
            if len(self._told) >= _TOLD:
                self._told.clear()
            self._told.add(problem)
        _log.warning("a source of credentials failed, the next is asked", extra={"reason": problem})


class Provided:
    """A CredentialProvider as a source."""

    def __init__(self, provider: CredentialProvider) -> None:
        self._provider = provider

    def logins(self, host: str, repository: str, *, fresh: bool = False) -> Iterator[Login]:
        """Its one answer; the repository makes no difference to it."""
        del repository, fresh
        pair = self._provider(host)
        if pair is not None:
            yield Login(*pair)


def keychain(credentials: CredentialProvider | Keychain | Source | None) -> Keychain:
    """Whatever knows logins, as a keychain."""
    if isinstance(credentials, Keychain):
        return credentials
    if credentials is None:
        return Keychain(())
    if hasattr(credentials, "logins"):
        return Keychain((credentials,))
    return Keychain((Provided(credentials),))
