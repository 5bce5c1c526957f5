"""What the C library keeps of memory that was freed: mallopt(3) of glibc."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h

_WHOLE_PAGES = 256 << 10
"""Bytes from which a block is mapped by itself and goes back when freed. Left alone glibc raises this to the size of the
largest block freed so far, a span of 4 MiB and more, and keeps what spans took: 190 MB after reading 50 layers."""

_ARENAS = 2
"""As many as processors in a small node; by default eight a processor, each with its own holes."""


def give_memory_back() -> bool:
    """Have this process return what it frees; call it before there are threads. Whether the library can."""
    try:
        option = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl gives back by itself
        return False
    settings = ((_MMAP_THRESHOLD, _WHOLE_PAGES), (_TRIM_THRESHOLD, _WHOLE_PAGES), (_ARENA_MAX, _ARENAS))
    done = [option(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]  # all of them
    return done == [1, 1, 1]
