"""Entering a deflate stream inside a byte (FORMATS.md, 4; RFC 1951).

Decoders that cannot be primed with bits are given whole bytes: empty blocks first, as many as it takes for
the bits that are left of a shared byte to end at a byte boundary.
"""

from __future__ import annotations

from typing import Final

from soci_snapshotter.errors import Integrity

MAGIC: Final = b"\x1f\x8b"
"""How a gzip member begins (RFC 1952)."""


def _bits(*fields: tuple[int, int]) -> tuple[int, int]:
    """(value, width) fields, packed as deflate does: the first in the lowest bits."""
    value = total = 0
    for field, width in fields:
        value |= field << total
        total += width
    return value, total


def _empty_dynamic_block() -> tuple[int, int]:
    """A non-final block without output, 99 bits: the odd length that fixed blocks (10 bits) cannot give.

    All its codes are complete, because decoders differ about incomplete ones. Code lengths: 0 in one bit, 1
    and 18 in two. Literals 255 and 256 (the end) have one bit each, and so have the distances 0 and 1.
    """
    zero, one, eighteen = (0, 1), (0b01, 2), (0b11, 2)  # Huffman codes are packed from their first bit on
    lengths = dict.fromkeys(range(18), 0) | {
        2: 2,
        3: 1,
        17: 2,
    }  # by place: 16 17 18 0 8 7 9 6 10 5 11 4 12 3 13 2 14 1
    return _bits(
        (0, 1),  # not the last block
        (2, 2),  # dynamic
        (257 - 257, 5),
        (2 - 1, 5),
        (18 - 4, 4),
        *((length, 3) for length in lengths.values()),
        *(eighteen, (138 - 11, 7), eighteen, (116 - 11, 7), zero),  # 255 literals without a code
        *(one, one),
        *(one, one),
        (1, 1),  # the end
    )


def _prefixes() -> tuple[tuple[int, int], ...]:
    """For each number of leftover bits, the empty blocks (bits, width) that make them end a byte."""
    table = []
    for leftover in range(8):
        blocks = [_empty_dynamic_block()] if leftover % 2 else []
        while (sum(width for _, width in blocks) + leftover) % 8:
            blocks.append((2, 10))  # not the last, fixed codes, the end (seven zeros)
        table.append(_bits(*blocks))
    return tuple(table)


_PREFIXES: Final = _prefixes()


def resume_prefix(bits: int, byte: int) -> bytes:
    """What to feed a raw inflate before the rest of a span whose first `byte` gives it only its high `bits`
    (0..7).

    0 to 17 bytes. With 0 the whole byte belongs to the span, and there is nothing to put before it.
    """
    if not 0 <= bits <= 7:
        raise Integrity(f"checkpoint: bits is {bits}, not within 0..7")
    if bits == 0:
        return b""
    value, width = _PREFIXES[bits]
    return (value | (byte >> (8 - bits)) << width).to_bytes((width + bits) // 8, "little")
