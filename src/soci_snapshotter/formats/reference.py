"""Image references, normalised as Docker and containerd do: `nginx` is `docker.io/library/nginx:latest`.

The grammar (github.com/distribution/reference):

    reference = name [":" tag] ["@" digest]
    name      = [domain "/"] component *("/" component)
    domain    = host [":" port]           host = labels joined by ".", or an IPv6 address in brackets
    component = lower case letters and digits, joined by ".", "_", "__" or any number of "-"
    tag       = a word character, then at most 127 word characters, "." or "-"

What stands before the first "/" is a domain only when it holds "." or ":", is `localhost`, or has an upper
case letter (which no component may have); otherwise the name is one of Docker Hub's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from soci_snapshotter.errors import Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.digest import Digest

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"
# Docker Hub is named docker.io but answers the registry API here.
DEFAULT_HOST = "registry-1.docker.io"
# The name Docker Hub had before 2015; still found in scripts.
_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library/"

# The grammar's own bound for the path; a reference longer than it, a domain (255), a port, a tag and a digest
# cannot be valid and is not matched against patterns at all.
MAX_PATH = 255
_MAX_TEXT = 1024

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_BARE_HEX = re.compile(r"[a-f0-9]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Reference:
    """A normalised image reference; at least one of `tag` and `digest` is set."""

    domain: str
    path: str
    tag: str | None
    digest: Digest | None

    def __str__(self) -> str:
        tag = "" if self.tag is None else ":" + self.tag
        digest = "" if self.digest is None else "@" + self.digest
        return f"{self.locator}{tag}{digest}"

    @property
    def locator(self) -> str:
        """Domain and path, without tag or digest."""
        return f"{self.domain}/{self.path}"

    @property
    def host(self) -> str:
        """The host (and port) that answers the registry API for this reference."""
        return DEFAULT_HOST if self.domain == DEFAULT_DOMAIN else self.domain

    @property
    def repository(self) -> str:
        """The repository's name on its registry: the path."""
        return self.path

    @property
    def object(self) -> str:
        """What to ask the registry for: the digest if there is one, else the tag."""
        if self.digest is not None:
            return self.digest
        return DEFAULT_TAG if self.tag is None else self.tag

    def with_digest(self, digest: Digest) -> Reference:
        """The same repository and tag, pinned to `digest`."""
        return replace(self, digest=digest)


def parse(text: str) -> Reference:
    """Parse and normalise `text`. Invalid names the text and what is wrong with it."""
    if not text:
        raise Invalid("image reference is empty")
    if len(text) > _MAX_TEXT:
        raise Invalid(f"image reference {text[:80]!r}...: {len(text)} characters, longer than any valid one")
    if _BARE_HEX.fullmatch(text):
        raise _bad(text, "64 hex digits are an image ID, not a name")

    name, at, digest_text = text.partition("@")
    digest = None
    if at:
        try:
            digest = digests.parse(digest_text)
        except Invalid as error:
            raise _bad(text, str(error)) from None

    name, tag = _split_tag(text, name)
    if tag is None and digest is None:
        tag = DEFAULT_TAG
    domain, path = _split_domain(name)
    _check(text, domain, path)
    return Reference(domain, path, tag, digest)


def _split_tag(text: str, name: str) -> tuple[str, str | None]:
    """Split a tag off: a ":" after the last "/" starts a tag, one before it a port."""
    slash = name.rfind("/")
    colon = name.find(":", slash + 1)
    if colon < 0:
        return name, None
    tag = name[colon + 1 :]
    if not _TAG.fullmatch(tag):
        raise _bad(text, f"tag {tag[:160]!r} must be a letter, digit or _, then at most 127 of those, . or -")
    return name[:colon], tag


def _split_domain(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    if not slash or not (first == "localhost" or "." in first or ":" in first or first != first.lower()):
        domain, path = DEFAULT_DOMAIN, name
    else:
        domain, path = first, rest
    if domain == _LEGACY_DOMAIN:
        domain = DEFAULT_DOMAIN
    if domain == DEFAULT_DOMAIN and "/" not in path:
        path = _OFFICIAL + path
    return domain, path


def _check(text: str, domain: str, path: str) -> None:
    if not _DOMAIN.fullmatch(domain):
        raise _bad(text, f"{domain!r} is no registry host[:port]")
    if path != path.lower():
        raise _bad(text, f"repository name {path!r} must be lower case")
    if len(path) > MAX_PATH:
        raise _bad(text, f"repository name is longer than {MAX_PATH} characters")
    for component in path.split("/"):
        if not _COMPONENT.fullmatch(component):
            raise _bad(text, f"{component!r} is no part of a name: letters, digits, joined by . _ __ or -")


def _bad(text: str, why: str) -> Invalid:
    return Invalid(f"image reference {text!r}: {why}")
