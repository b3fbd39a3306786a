"""Stretches of files, and arrays cut into tiles."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.io_units import (
    Batch,
    Direct,
    Extent,
    Limits,
    Read,
    Stretch,
    cut,
    paired,
    ranges,
    tile_blocks,
)

EXTENTS = (Extent(100, 4), Extent(50, 2), Extent(10, 6))


def places(extents: object) -> list[int]:
    """Every byte of some extents, in their order."""
    return [byte for offset, length in extents for byte in range(offset, offset + length)]  # type: ignore[attr-defined]


def test_where_bytes_of_an_array_lie() -> None:
    whole = places(EXTENTS)
    for low in range(len(whole) + 1):
        for high in range(low, len(whole) + 1):
            found = list(ranges(EXTENTS, low, high - low))
            assert places(found) == whole[low:high]
            assert all(extent.length > 0 for extent in found)


def test_two_runs_of_extents_are_cut_at_each_others_seams() -> None:
    other = (Extent(0, 5), Extent(20, 7))
    found = list(paired(iter(EXTENTS), iter(other)))
    assert found == [
        (Extent(100, 4), Extent(0, 4)),
        (Extent(50, 1), Extent(4, 1)),
        (Extent(51, 1), Extent(20, 1)),
        (Extent(10, 6), Extent(21, 6)),
    ]
    assert list(paired(iter(()), iter(()))) == []


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([1, 4, 12, 40, 200]), st.data())
def test_tiles_are_contiguous_and_cover_a_box_once(extents: list[int], tile: int, data: st.DataObject) -> None:
    low = tuple(data.draw(st.integers(0, 2)) for _ in extents)
    box = Region(low, tuple(a + b for a, b in zip(low, extents)))
    times = np.zeros(box.stop, np.uint8)
    found = list(cut(box, 0, DTYPES["F32"], tile))
    for part in found:
        times[part.slices] += 1
        assert 4 * part.size <= max(tile, 4)
        thick = next((axis for axis, extent in enumerate(part.shape) if extent > 1), len(extents))
        assert part.shape[thick + 1 :] == box.shape[thick + 1 :], "contiguous in the box"
    assert (times[box.slices] == 1).all() and times.sum() == box.size
    assert [part.start for part in found] == sorted(part.start for part in found)


@pytest.mark.parametrize(
    ("tile", "shapes"),
    [
        (96, [(4, 6)]),
        (95, [(3, 6), (1, 6)]),
        (48, [(2, 6)] * 2),
        (47, [(1, 6)] * 4),
        (24, [(1, 6)] * 4),
        (23, [(1, 5), (1, 1)] * 4),
        (12, [(1, 3)] * 8),
        (1, [(1, 1)] * 24),
    ],
)
def test_tiles_are_as_large_as_they_may_be(tile: int, shapes: list[tuple[int, ...]]) -> None:
    assert [part.shape for part in cut(Region.whole((4, 6)), 0, DTYPES["F32"], tile)] == shapes


@pytest.mark.parametrize(
    ("shape", "tile", "starts"),
    [
        ((40,), 4, [0, 8, 16, 24, 32]),
        ((40,), 16, [0, 16, 32]),
        ((40,), 1, [0, 8, 16, 24, 32]),  # eight elements of four bits are cut between bytes, whatever their width
        ((40,), 20, [0]),
        ((40,), 14, [0, 8, 16, 24, 32]),
    ],
)
def test_packed_elements_are_cut_between_bytes(shape: tuple[int, ...], tile: int, starts: list[int]) -> None:
    assert [part.start[0] for part in cut(Region.whole(shape), 0, DTYPES["F4"], tile)] == starts


@pytest.mark.parametrize(
    ("tile", "shapes"),
    [
        (60, [(3, 40)]),
        (59, [(2, 40), (1, 40)]),
        (40, [(2, 40), (1, 40)]),
        (20, [(1, 40)] * 3),
        (19, [(1, 16), (1, 16), (1, 8)] * 3),
    ],
)
def test_rows_of_packed_elements_are_counted_in_bytes(tile: int, shapes: list[tuple[int, ...]]) -> None:
    """Only the last axis is cut in eights."""
    assert [part.shape for part in cut(Region.whole((3, 40)), 0, DTYPES["F4"], tile)] == shapes


def test_sizes_by_default() -> None:
    """The pages for users promise what a worker holds in memory, and blocks of an encrypted file are of one chunk."""
    assert Limits() == Limits(tile=8388608, gap=4096, direct=262144, chunk=67108864, share=134217728, run=4096)


def test_bytes_of_units() -> None:
    units = Direct(0, 0, 0, 0, 7), Read(0, EXTENTS, ()), Batch((), (Stretch(3, ()), Stretch(4, ())), True, ())
    assert [unit.nbytes for unit in units] == [7, 12, 7]


def test_tiles_of_several_boxes_are_those_of_their_hull() -> None:
    found = list(tile_blocks([Region((2, 0), (4, 3)), Region((3, 1), (6, 4))], DTYPES["U8"], 8))
    assert found == [Region((2, 0), (4, 4)), Region((4, 0), (6, 4))]
    assert list(tile_blocks([], DTYPES["U8"], 8)) == []
    assert prod(found[0].shape) == 8
