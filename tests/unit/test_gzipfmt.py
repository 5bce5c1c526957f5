"""The blocks put before a span that begins inside a byte."""

from __future__ import annotations

import zlib

import pytest
from isal import isal_zlib
from zlib_ng import zlib_ng

from soci_snapshotter.errors import Integrity
from soci_snapshotter.formats.gzipfmt import resume_prefix

# The last block, fixed codes, "a", the end; the stream's first bit first.
FIXED_A = [1, 1, 0, *[1, 0, 0, 1, 0, 0, 0, 1], *[0] * 7]


def _pack(bits: list[int]) -> bytes:
    padded = bits + [0] * (-len(bits) % 8)
    return bytes(
        sum(bit << i for i, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8)
    )


@pytest.mark.parametrize("engine", [zlib, isal_zlib, zlib_ng], ids=lambda engine: engine.__name__)
@pytest.mark.parametrize("bits", range(1, 8))
def test_a_block_that_begins_at_any_bit_decodes(bits: int, engine: object) -> None:
    """After the prefix a block that starts in the middle of a byte decodes, whatever the lower bits were."""
    for noise in range(2 ** (8 - bits)):
        stream = _pack([noise >> i & 1 for i in range(8 - bits)] + FIXED_A)
        prefix = resume_prefix(bits, stream[0])
        inflater = engine.decompressobj(-15)  # type: ignore[attr-defined]
        assert inflater.decompress(prefix) + inflater.decompress(stream[1:]) == b"a"
        assert inflater.eof
        assert 2 <= len(prefix) <= 17


def test_whole_bytes_need_no_prefix() -> None:
    """Without leftover bits nothing is put before the span."""
    assert resume_prefix(0, 0xFF) == b""


@pytest.mark.parametrize("bits", [-1, 8, 255])
def test_impossible_bits_are_refused(bits: int) -> None:
    """More bits than a byte has, as a hostile checkpoint may say, are an Integrity error."""
    with pytest.raises(Integrity, match=f"bits is {bits}"):
        resume_prefix(bits, 0)
