"""Every error this project raises on purpose, and how each edge reports it.

The type says who is at fault; the message names the thing and what to do. Each class owns its gRPC status name
(google.rpc.Code), its process exit code and the errno a reader of a mount gets, so that no edge keeps a table.

Exit codes: 1 is what the Go tools give for everything, and stays for bad arguments and what nobody foresaw. 3 and 10
are the command line's own (cli/main.py).
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
    exit_code = 4
    errno = _errno.ENOENT


class AlreadyExists(SociError):
    """The named thing exists and may not be replaced."""

    grpc_code = "ALREADY_EXISTS"
    exit_code = 5
    errno = _errno.EEXIST


class Invalid(SociError):
    """A caller's argument cannot be used; the message names it."""

    grpc_code = "INVALID_ARGUMENT"
    errno = _errno.EINVAL


class Precondition(SociError):
    """The thing is in a state that forbids the request (a snapshot with children, say)."""

    grpc_code = "FAILED_PRECONDITION"
    exit_code = 6
    errno = _errno.EBUSY


class Integrity(SociError):
    """Bytes are not what a digest, an offset or a format says; nothing of them may be used."""

    grpc_code = "DATA_LOSS"
    exit_code = 7


class Condemned(Integrity):
    """A (layer, ztoc) that was proven not to be what it claims: trying again cannot help, nothing of it is served."""


class Unsupported(SociError):
    """Valid input that this program, kernel or filesystem cannot serve."""

    grpc_code = "UNIMPLEMENTED"
    exit_code = 8
    errno = _errno.EOPNOTSUPP


class Remote(SociError):
    """A registry (or containerd) did not answer, or refused; the message names host, repository, what to check."""

    grpc_code = "UNAVAILABLE"
    exit_code = 9


class Config(SociError):
    """A configuration file, flag or environment that must be corrected first."""

    grpc_code = "FAILED_PRECONDITION"
    exit_code = 2
    errno = _errno.EINVAL
