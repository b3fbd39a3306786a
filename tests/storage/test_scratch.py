"""Scratch memory: where in a page it begins, that it is reused, and that it is flat, writable bytes."""

from __future__ import annotations

import numpy as np
import pytest

from ms_ckpt_ext.storage.linux import PAGE, Buffer, scratch


def page_offset(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data) % PAGE


@pytest.mark.parametrize("nbytes", [1, 4096, 5000, 3 << 20])
def test_scratch_begins_with_a_page(nbytes: int) -> None:
    view = scratch(nbytes)
    assert page_offset(view) == 0
    assert (len(view), view.format, view.readonly) == (nbytes, "B", False)
    assert bytes(view) == bytes(nbytes)


def test_nothing_is_a_legal_length() -> None:
    assert bytes(scratch(0)) == b""
    assert bytes(Buffer().take(0, 17, 4)) == b""


# (offset of the source, of the target, where the buffer begins in its page)
PLACES = [
    (0, 0, 0),
    (4096, 8192, 0),
    (100, 100, 100),
    (100, 99, 100),  # behind the source: fast
    (100, 101, 164),
    (100, 163, 164),
    (100, 164, 100),
    (4090, 4096 + 5, 4090 + 64 - PAGE),
    (5 * PAGE + 7, 3 * PAGE + 6, 7),
]


@pytest.mark.parametrize(("source", "target", "expected"), PLACES)
def test_a_buffer_begins_where_copies_are_fast(source: int, target: int, expected: int) -> None:
    assert page_offset(Buffer().take(10, source, target)) == expected


def test_no_copy_goes_a_little_further_into_its_page_than_it_comes_from() -> None:
    """Some processors do this at a quarter of their speed."""
    buffer = Buffer()
    for source in range(0, PAGE, 37):
        for target in range(0, PAGE, 41):
            at = page_offset(buffer.take(1, source, target))
            assert not 0 < (at - source) % PAGE < 32, (source, target)
            assert not 0 < (target - at) % PAGE < 32, (source, target)


def test_a_buffer_is_reused() -> None:
    buffer = Buffer()
    buffer.take(1000)[:] = b"x" * 1000
    assert bytes(buffer.take(900, 3)) == b"x" * 900
    assert len(buffer.take(1 << 20)) == 1 << 20
