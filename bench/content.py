"""Bytes as files in images have them: text, machine code, and what does not compress."""

import random
from itertools import accumulate

POOL = 8 << 20
"""Bytes of each kind to take files from: far more than deflate looks back."""

_LARGEST = 6 << 20  # of one piece; a larger file repeats it

MIXED, LIBRARIES = (4, 5, 1), (1, 16, 3)
"""How often a file is text, code, incompressible: a whole image, and numeric libraries with their data."""


class Content:
    """Draws the content of files, the same for the same seed."""

    def __init__(self, draw: random.Random, weights: tuple[int, int, int] = MIXED) -> None:
        self._draw = draw
        self._weights = weights
        self._pools = (_text(draw), _code(draw), draw.randbytes(POOL))

    def take(self, length: int) -> bytes:
        """A file of `length` bytes."""
        pool = self._draw.choices(self._pools, self._weights)[0]
        piece = min(length, _LARGEST)
        start = self._draw.randrange(len(pool) - piece + 1)
        content = pool[start : start + piece]
        whole = content * (length // piece + 1) if length > piece else content
        return whole[:length]


def _text(draw: random.Random) -> bytes:
    """Words of which a few are very frequent: compresses to a third."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = ["".join(draw.choices(letters, range(26, 0, -1), k=draw.randint(2, 9))) for _ in range(3000)]
    totals = list(accumulate(1 / (rank + 1) for rank in range(len(words))))
    lines: list[str] = []
    length = 0
    while length < POOL:
        line = "    " * draw.randint(0, 3) + " ".join(draw.choices(words, cum_weights=totals, k=8)) + "\n"
        lines += [line] * (1 + (draw.random() < 0.1))
        length += len(line)
    return "".join(lines).encode()[:POOL]


def _code(draw: random.Random) -> bytes:
    """Instructions out of a vocabulary, with operands that vary: compresses to two fifths."""
    vocabulary = [draw.randbytes(draw.randint(4, 12)) for _ in range(900)]
    totals = list(accumulate(1 / (rank + 2) for rank in range(len(vocabulary))))
    parts: list[bytes] = []
    length = 0
    while length < POOL:
        parts += draw.choices(vocabulary, cum_weights=totals, k=3)
        parts.append(draw.randbytes(1) + bytes(3))
        length += sum(map(len, parts[-4:]))
    return b"".join(parts)[:POOL]
