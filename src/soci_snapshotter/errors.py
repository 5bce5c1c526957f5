"""Every error this project raises on purpose, and how each edge reports it.

The type says who is at fault; the message names the thing and what to do. Each class owns its gRPC status name
(google.rpc.Code), its process exit code and the errno a reader of a mount gets, so that no edge keeps a table.
"""

from __future__ import annotations

import errno as _errno
from typing import ClassVar


class SociError(Exception):
    """Base of all errors raised on purpose."""

    grpc_code: ClassVar[str] = "UNKNOWN"
    exit_code: ClassVar[int] = 1
    errno: ClassVar[int] = _errno.EIO


class NotFound(SociError):
    """The named thing does not exist."""

    grpc_code = "NOT_FOUND"
    errno = _errno.ENOENT


class AlreadyExists(SociError):
    """The named thing exists and may not be replaced."""

    grpc_code = "ALREADY_EXISTS"
    errno = _errno.EEXIST


class Invalid(SociError):
    """A caller's argument cannot be used; the message names it."""

    grpc_code = "INVALID_ARGUMENT"
    errno = _errno.EINVAL


class Precondition(SociError):
    """The thing is in a state that forbids the request (a snapshot with children, say)."""

    grpc_code = "FAILED_PRECONDITION"
    errno = _errno.EBUSY


class Integrity(SociError):
    """Bytes are not what a digest, an offset or a format says; nothing of them may be used."""

    grpc_code = "DATA_LOSS"


class Unsupported(SociError):
    """Valid input that this program, kernel or filesystem cannot serve."""

    grpc_code = "UNIMPLEMENTED"
    errno = _errno.EOPNOTSUPP


class Remote(SociError):
    """A registry (or containerd) did not answer, or refused; the message names host, repository, what to check."""

    grpc_code = "UNAVAILABLE"


class Config(SociError):
    """A configuration file, flag or environment that must be corrected first."""

    grpc_code = "FAILED_PRECONDITION"
    errno = _errno.EINVAL
