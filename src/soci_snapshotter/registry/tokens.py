"""The token challenge of the distribution spec: where a token may be asked for, how, and what the answer means.

Where credentials may go:

- Basic: to the registry that asked, and nowhere else.
- Bearer: to the realm that the registry's challenge names, if that is the registry's own host; or, on another host
  (Docker Hub's tokens come from one), if both the registry and the realm are https, so that the challenge is the
  registry's word and the answer is read by nobody else; or if both are on loopback.
- A realm on plain http elsewhere gets nothing, not even an anonymous request; nor does an address that only this
  machine or its cloud's metadata service answers. Challenges of redirect targets are not answered at all (the
  callers see to that).
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias
from urllib.parse import urlencode, urlsplit

from msgspec import Struct

from soci_snapshotter.errors import Integrity, Remote
from soci_snapshotter.formats import jsonfmt
from soci_snapshotter.formats.dockerconfig import Login
from soci_snapshotter.formats.hosts import Endpoint
from soci_snapshotter.registry.failures import Subject
from soci_snapshotter.registry.urls import is_loopback, split

# Real tokens are 1 to 8 KiB; a request's header lines must stay below the 64 KiB at which servers give up.
TOKEN_ANSWER_LIMIT = 128 << 10
_TOKEN_LIMIT = 48 << 10
_TOKEN = re.compile(r"[\x21-\x7e]+", re.ASCII)
# distribution-spec: a token without expires_in lives 60 s, and none lives shorter.
_DEFAULT_LIFE = 60.0

# What the OAuth 2 flavour of token services wants to know of the asker (distribution, "Docker Registry v2
# authentication using OAuth2"): any name will do.
_CLIENT = "soci-snapshotter"

# Names of clouds' metadata services; by address they are link-local, but for AWS's IPv6 one.
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "instance-data"})
_METADATA_IPV6 = ipaddress.ip_address("fd00:ec2::254")


@dataclass(frozen=True, slots=True)
class Scope:
    """What a grant is for. `actions` is `pull` or `pull,push`."""

    host: str
    repository: str
    actions: str

    def __str__(self) -> str:
        return f"repository:{self.repository}:{self.actions}"


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """GET `url` with the Authorization header `basic`, or POST it `form`; reached as `endpoint` is."""

    url: str
    subject: Subject
    basic: str | None = field(default=None, repr=False)
    form: bytes | None = field(default=None, repr=False)
    endpoint: Endpoint | None = None


# Returns the body, at most TOKEN_ANSWER_LIMIT bytes; raises Remote (failures.Refused for a status), or Transient.
TokenFetcher: TypeAlias = Callable[[TokenRequest], bytes]


@dataclass(frozen=True, slots=True)
class Asked:
    """How a registry wants to be authorized: by Basic, with `realm` "", or by a token from there."""

    url: str
    """The request that was challenged."""
    realm: str = ""
    service: str = ""
    scope: str = ""
    endpoint: Endpoint | None = None


class _Token(Struct, frozen=True):
    token: str = ""
    access_token: str = ""
    expires_in: float = _DEFAULT_LIFE


def basic(login: Login) -> str:
    """The header for a user with a password."""
    return "Basic " + base64.b64encode(f"{login.user}:{login.secret}".encode()).decode()


def bearer(token: str) -> str | None:
    """The header for a token; None when it can stand in none."""
    return "Bearer " + token if len(token) <= _TOKEN_LIMIT and _TOKEN.fullmatch(token) else None


def fetch(
    fetcher: TokenFetcher, scope: Scope, asked: Asked, login: Login | None, subject: Subject
) -> tuple[str, float]:
    """A token for `scope`: its header, and the seconds it is good for. Anonymous without a login."""
    service = urlsplit(asked.realm).netloc
    wanted = _wanted(asked.scope, scope)
    about = Subject(service, scope.repository, "token")
    if login is not None and not login.user:
        form = {
            "grant_type": "refresh_token",
            "service": asked.service,
            "scope": wanted,
            "client_id": _CLIENT,
            "refresh_token": login.secret,
        }
        request = TokenRequest(asked.realm, about, form=urlencode(form).encode(), endpoint=asked.endpoint)
    else:
        # By GET each scope is a parameter of its own, by POST they are one, separated by spaces.
        query = urlencode(
            [("service", asked.service)] * bool(asked.service) + [("scope", each) for each in wanted.split()]
        )
        address = asked.realm + ("&" if urlsplit(asked.realm).query else "?") + query
        own = None if login is None else basic(login)
        request = TokenRequest(address, about, basic=own, endpoint=asked.endpoint)
    body = fetcher(request)
    try:
        answer = jsonfmt.decode(body, _Token, "token", TOKEN_ANSWER_LIMIT)
    except Integrity:
        # The decoder's own text may quote the answer, and that is a secret.
        raise Remote(f"{subject}: {service} sent no token; check the token service") from None
    header = bearer(answer.token or answer.access_token)
    if header is None:
        raise Remote(f"{subject}: {service} sent an unusable token; check the token service")
    return header, max(answer.expires_in, _DEFAULT_LIFE)


def _wanted(challenged: str, scope: Scope) -> str:
    """The scope to ask for: the challenge's, but with the actions that the next requests will need anyway."""
    if not challenged or challenged == str(replace(scope, actions="pull")):
        return str(scope)
    return challenged


def may_know_credentials(url: str, realm: str, subject: Subject) -> bool:
    """The rules at the top of this file. Remote when not even an anonymous request may be made."""
    try:
        registry, _ = split(url)
        target, _ = split(realm)
    except ValueError:
        raise Remote(f"{subject}: the challenge names no usable realm; check the registry") from None
    both_loopback = is_loopback(urlsplit(url).netloc) and is_loopback(urlsplit(realm).netloc)
    if (registry.host, registry.scheme) == (target.host, target.scheme) or both_loopback:
        return True
    if _is_local(target.host):
        raise Remote(
            f"{subject}: the token realm {target.host} is an address of this machine or of a metadata service; "
            "nothing is sent there, check the registry"
        )
    if target.scheme != "https":
        raise Remote(
            f"{subject}: the token realm at {target.host} is not https; check the registry's settings"
        )
    return registry.scheme == "https"


def _is_local(host: str) -> bool:
    name = host.lower().rstrip(".")
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        # All digits: inet_aton(3) takes 2852039166 and 0xa9fea9fe for 169.254.169.254.
        odd = re.fullmatch(r"(0x[0-9a-f]+|\d+)(\.(0x[0-9a-f]+|\d+))*", name, re.ASCII) is not None
        return odd or name in _METADATA_NAMES or name == "localhost" or name.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None) or address
    return (
        mapped.is_link_local
        or mapped.is_loopback
        or mapped.is_unspecified
        or mapped.is_multicast
        or address == _METADATA_IPV6
    )
