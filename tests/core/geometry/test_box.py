"""Boxes that ranks say outright."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.layout import cell_region, digits
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, UsageError


@pytest.mark.parametrize(
    ("box", "parts", "cell"),
    [
        (Box((8, 4), (6, 0), (2, 4)), (4, 1), (3, 0)),
        (Box((8, 4), (0, 2), (8, 2)), (1, 2), (0, 1)),
        (Box((8,), (3,), (2,)), None, None),  # begins between slices
        (Box((8,), (3,), (3,)), None, None),  # does not divide
        (Box((), (), ()), (), ()),
    ],
)
def test_a_box_may_be_a_slice(box: Box, parts: object, cell: object) -> None:
    assert box.parts == parts
    assert cell is None or box.cell == cell
    assert box.region == Region(box.offsets, tuple(a + b for a, b in zip(box.offsets, box.shape)))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=3), st.data())
def test_a_slice_of_a_grid_is_a_box_that_names_it(axes: list[tuple[int, int]], data: st.DataObject) -> None:
    parts, shape = tuple(n for n, _ in axes), tuple(n * extent for n, extent in axes)
    cell = digits(data.draw(st.integers(0, prod(parts) - 1)), parts)
    region = cell_region(cell, parts, shape)
    box = Box(shape, region.start, region.shape)
    assert (box.region, box.parts, box.cell) == (region, parts, cell)


def test_a_box_without_elements() -> None:
    box = Box((8, 4), (8, 0), (0, 4))
    assert (box.region, box.parts) == (None, None)


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        (((8,), (7,), (2,)), LayoutMismatchError, "[2] at [7] does not lie inside a parameter of shape [8]"),
        (((8, 4), (0, 0), (8,)), LayoutMismatchError, "one number an axis"),
        (((8, 4), (0,), (8, 4)), LayoutMismatchError, "one number an axis"),
        (((8,), (-1,), (2,)), UsageError, "offsets of a Box"),
        ((("8",), (0,), (2,)), ArgumentTypeError, "global_shape of a Box"),
        (((8,), (0,), "2"), ArgumentTypeError, "shape of a Box must be a tuple of ints, got '2'"),
        (((8,), 0, (2,)), ArgumentTypeError, "offsets of a Box must be a tuple of ints, got 0"),
        (((8,), b"0", (2,)), ArgumentTypeError, "offsets of a Box must be a tuple of ints"),
    ],
)
def test_what_is_no_box_is_refused(given: tuple[object, ...], error: type[Exception], told: str) -> None:
    with pytest.raises(error) as caught:
        Box(*given)  # type: ignore[arg-type]
    assert told in str(caught.value)
