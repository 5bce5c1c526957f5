"""Digests: `algorithm:hex`, as the OCI image specification (descriptor.md, "Digests") writes them.

A Digest is a str, so it serves as a dict key, a JSON value and part of a path without conversion; what makes
it more than a str is that the functions below, which check it, are the only makers.
"""

from __future__ import annotations

import hashlib
import re
from typing import TypeAlias

from soci_snapshotter.errors import Invalid

# What hashlib and file writes take without a copy. (collections.abc.Buffer is Python 3.12.)
Buffer: TypeAlias = bytes | bytearray | memoryview

# The two algorithms the OCI specification registers, with the length of their lower case hex.
_HEX_LENGTH = {"sha256": 64, "sha512": 128}
_HEX = re.compile(r"[0-9a-f]+", re.ASCII)


class Digest(str):
    """A checked digest text. Make one with parse, from_hex or sha256, never by calling the class."""

    __slots__ = ()

    @property
    def algorithm(self) -> str:
        """`sha256` or `sha512`."""
        return self.partition(":")[0]

    @property
    def hex(self) -> str:
        """The lower case hex part: safe as a file name."""
        return self.partition(":")[2]

    def matches(self, data: Buffer) -> bool:
        """True when `data` has this digest."""
        return hashlib.new(self.algorithm, data).hexdigest() == self.hex


def parse(text: str) -> Digest:
    """Check `text` and return it as a Digest.

    Raises Invalid for an unknown algorithm, a wrong length or anything but lower case hex.
    """
    if type(text) is Digest:
        return text
    algorithm, colon, encoded = text.partition(":")
    length = _HEX_LENGTH.get(algorithm)
    if not colon or length is None:
        raise Invalid(f"digest {_shown(text)}: want sha256:<64 hex> or sha512:<128 hex>")
    if len(encoded) != length or not _HEX.fullmatch(encoded):
        raise Invalid(f"digest {_shown(text)}: {algorithm} takes {length} lower case hex digits")
    return Digest(text)


def from_hex(encoded: str) -> Digest:
    """The sha256 digest with these 64 hex digits; Invalid otherwise."""
    return parse("sha256:" + encoded)


def sha256(data: Buffer) -> Digest:
    """The sha256 digest of `data`."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def _shown(text: str) -> str:
    """`text` for an error message: quoted, and cut, because it may come from a registry."""
    return repr(text if len(text) <= 160 else text[:160] + "...")
