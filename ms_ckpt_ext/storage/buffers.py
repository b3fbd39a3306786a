"""Scratch memory for bytes under way."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

PAGE = 4096
_APART = 64
"""Bytes by which source and target of a copy must not follow each other within their pages, unless they are level.

AMD's processors from Zen 3 on copy (`rep movsb`, which the kernel uses) at a quarter of their speed to a place that
lies 1 to 31 bytes further into its page than the source into its own. Offsets in files are often multiples of a page,
and what `malloc` gives for a long buffer begins 16 bytes after one: just there.
"""


def scratch(nbytes: int) -> memoryview:
    """Flat writable bytes, zero at first, that begin with a page; in huge pages, since fresh memory is dear."""
    if nbytes == 0:
        return memoryview(bytearray())
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # no such advice on this system, or in this kernel
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)


def address_of(buffer: memoryview) -> int:
    """Where writable bytes lie in memory; 0 when there are none. They lie there as long as `buffer` lives."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if len(buffer) else 0


class Buffer:
    """Scratch memory that grows to the largest request and is reused."""

    def __init__(self) -> None:
        self._bytes = scratch(0)

    def take(self, nbytes: int, source: int = 0, target: int = 0) -> memoryview:
        """`nbytes` that are filled from offset `source` of a file, and written to offset `target` of another.

        They begin where both copies are fast: as far into a page as the source does, or a little further.
        """
        start = source % PAGE
        if 0 < (target - source) % PAGE < _APART:
            start += _APART
        if len(self._bytes) < start + nbytes:
            self._bytes = scratch(nbytes + PAGE + _APART)
        return self._bytes[start : start + nbytes]
