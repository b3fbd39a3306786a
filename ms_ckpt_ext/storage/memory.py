"""Scratch memory for bytes under way."""

from __future__ import annotations

import contextlib
import mmap

_HUGE = 2 << 20  # bytes of a huge page on x86-64 and, with 4 KiB pages, on arm64


def scratch(nbytes: int) -> memoryview:
    """Flat writable bytes, zero at first. Long ones ask for huge pages: fresh memory is dear page by page."""
    if nbytes < _HUGE:
        return memoryview(bytearray(nbytes))
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # no such advice on this system, or in this kernel
        area.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(area)
