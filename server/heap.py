"""What the C library's allocator does with memory that was given back: by default, threads keep much of it."""

from __future__ import annotations

import ctypes

from nbdshard.common.limits import HEAP_ARENAS_MAX, HEAP_PIECE_BYTES_MAX

_M_MMAP_THRESHOLD = -3  # malloc.h of glibc
_M_ARENA_MAX = -8


def give_back_large_pieces() -> None:
    """From now on, memory of a large piece is the system's again once it is free; where there is no glibc, as it was.

    Left to itself, glibc raises the size from which that is so to that of the largest piece it has seen, and has many
    heaps for many threads, each as large as it ever was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, HEAP_PIECE_BYTES_MAX)
        mallopt(_M_ARENA_MAX, HEAP_ARENAS_MAX)
