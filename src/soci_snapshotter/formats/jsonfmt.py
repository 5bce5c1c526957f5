"""JSON as Go's encoding/json reads and writes it, on top of msgspec structs.

Other SOCI tools hash what Go wrote, so `encode` must give the same bytes: compact, keys in declaration order,
maps sorted by the bytes of their keys, empty optionals left out, and in strings the escapes of FORMATS.md 5.
The reader is as lenient as Go's in one point that real registries need: null stands for an absent field.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from soci_snapshotter.errors import Integrity, Invalid
from soci_snapshotter.formats import digest as digests
from soci_snapshotter.formats.digest import Buffer, Digest

T = TypeVar("T")

# encoding/json escapes these so that JSON may stand inside HTML and JavaScript. In JSON they can only occur
# within strings, so replacing them in the finished bytes is exact.
_GO_ESCAPES = (
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)

# str(Digest) is a plain str; nothing else needs the hook. "sorted" sorts maps only: structs keep their order.
_ENCODER = msgspec.json.Encoder(enc_hook=str, order="deterministic")


def encode(value: Any) -> bytes:  # noqa: ANN401 - any struct of this package, or plain dicts and lists
    """`value` as Go's encoding/json would write it; no trailing newline."""
    text = _ENCODER.encode(value)
    for raw, escaped in _GO_ESCAPES:
        text = text.replace(raw, escaped)
    return text


def decode(data: Buffer, kind: type[T], what: str, limit: int) -> T:
    """Decode one JSON document of at most `limit` bytes into `kind`.

    `what` names the document in errors. Integrity when it is too big, no JSON, nested too deep or of another
    shape.
    """
    if len(data) > limit:
        raise Integrity(f"{what}: {len(data)} bytes, more than the {limit} allowed")
    try:
        document = _without_nulls(msgspec.json.decode(data))
        return msgspec.convert(document, kind, dec_hook=_dec_hook)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Integrity(f"{what}: {error}") from None


def _without_nulls(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _dec_hook(kind: type, value: Any) -> Any:  # noqa: ANN401
    if kind is Digest and isinstance(value, str):
        try:
            return digests.parse(value)
        except Invalid as error:
            raise ValueError(str(error)) from None  # msgspec adds the field's path
    raise TypeError(f"{kind.__name__} expected")
