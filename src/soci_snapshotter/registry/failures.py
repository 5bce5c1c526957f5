"""What a registry's refusal or silence means, in one line that names host, repository, object and what to check."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from http import HTTPStatus

from soci_snapshotter.errors import NotFound, Remote, SociError

# distribution-spec, "Error Codes": the only part of an error body that is shown, because the rest is free text
# from the network.
_CODE = re.compile(rb'"code"\s*:\s*"([A-Z_]{1,40})"')

# What http.client and urllib3 raise when a proxy refuses CONNECT; its words are the network's.
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})\b", re.ASCII)


@dataclass(frozen=True, slots=True)
class Subject:
    """Who is asked for what; its text begins every error line. Never holds a URL's query or a credential."""

    host: str
    repository: str
    what: str

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}: {self.what}"


class Transient(Exception):
    """The same request may succeed later. `error` is what to raise when no try is left."""

    def __init__(self, error: SociError, retry_after: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after = retry_after
        """Seconds the server asked to wait, None when it did not."""


class Refused(Remote):
    """The registry answered, with `status`, an HTTP status that is no success and not 404."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)  # the only argument: it is pickled on its way from a worker
        self.status = status


def refused(subject: Subject, status: int, body: bytes = b"") -> NotFound | Refused:
    """The error for an answer with this status; NotFound for 404, Refused otherwise."""
    code = _CODE.search(body)
    said = f"HTTP {status} {_phrase(status)}" + (f" ({code[1].decode()})" if code else "")
    if status == 404:
        return NotFound(f"{subject}: {said}; check the name, tag or digest, and that it was pushed there")
    check = {
        400: "check the registry, and whether it wants https or a client certificate",
        401: f"check the user name and password for {subject.host}",
        403: f"check that the account may access {subject.repository}, and that its token has not expired",
        407: "the proxy wants a user name and password; check HTTP_PROXY and HTTPS_PROXY",
        413: "the registry, or a proxy before it, takes no upload of this size; check its limits",
        416: "the blob is shorter than its descriptor says; check the registry's storage",
        429: "too many requests; log in for a higher limit, or wait",
    }.get(status, "the registry is failing; check its state" if status >= 500 else "check the registry")
    return Refused(f"{subject}: {said}; {check}", status)


def unreachable(subject: Subject, error: BaseException, place: str = "") -> Remote:
    """The error for a connection that failed or broke; `place` is whom it was to, if not the subject's host."""
    place = place or subject.host
    return Remote(f"{subject}: {reason(error)}; check that {place} is right, up and reachable from here")


def untrusted(subject: Subject, error: BaseException, place: str = "") -> Remote:
    """The error for a TLS handshake that failed: trying again changes nothing. `place`: see `unreachable`."""
    return Remote(
        f"{subject}: TLS with {place or subject.host} failed ({reason(error)}); "
        "check its certificate, or whether it speaks plain HTTP only"
    )


def reason(error: BaseException) -> str:
    """A short text for a low-level error, from the innermost cause and without any URL."""
    cause = root_cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError):
        return (cause.reason or "handshake failure").replace("_", " ").lower()
    if isinstance(cause, TimeoutError) or "timeout" in type(error).__name__.lower():
        return "timed out"
    if isinstance(cause, socket.gaierror):
        return f"host name not found ({cause.strerror})"
    if (refusal := _TUNNEL.match(str(cause))) is not None:
        return f"the proxy answered HTTP {refusal[1]}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return "connection broke off"


def proxy_refused(error: BaseException) -> bool:
    """Whether a proxy does not let us through: asking again changes nothing."""
    refusal = _TUNNEL.match(str(root_cause(error)))
    return refusal is not None and refusal[1] in ("403", "407")


def root_cause(error: BaseException) -> BaseException:
    """The innermost exception of a chain (`raise from`, or given as an argument), at most 10 links down."""
    for _ in range(10):
        inner = error.__cause__ or error.__context__
        if inner is None:
            inner = next((each for each in error.args if isinstance(each, BaseException)), None)
        if inner is None:
            break
        error = inner
    return error


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
