"""Boxes of views: what `frames` and `nests` say is what numpy does."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.core.geometry.view import View, frames, nests, split_axes, unsplit


@pytest.mark.parametrize(
    ("shape", "view", "groups"),
    [
        ((8, 6), (4, 2, 6), ((4, 2), (6,))),
        ((8, 6), (8, 2, 3), ((8,), (2, 3))),
        ((1, 6), (1, 6), ((1,), (6,))),
        ((6, 1), (2, 3), ((2, 3), ())),
        ((6,), (1, 6, 1), ((1, 6, 1),)),
        ((), (), ()),
    ],
)
def test_axes_of_a_view(shape: Shape, view: Shape, groups: tuple[Shape, ...]) -> None:
    assert split_axes(shape, view) == groups


@pytest.mark.parametrize(("shape", "view"), [((8, 6), (4, 12)), ((8,), (2, 2)), ((8,), (8, 2)), ((), (1,))])
def test_not_a_view(shape: Shape, view: Shape) -> None:
    with pytest.raises(ValueError, match="does not split the axes"):
        split_axes(shape, view)


@st.composite
def viewed(draw: st.DrawFn) -> tuple[Shape, Shape, Region]:
    groups = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    shape = tuple(map(prod, groups))
    return shape, tuple(extent for group in groups for extent in group), draw(box_of(shape))


@st.composite
def box_of(draw: st.DrawFn, shape: Shape) -> Region:
    start = tuple(draw(st.integers(0, extent - 1)) for extent in shape)
    return Region(start, tuple(draw(st.integers(low + 1, extent)) for low, extent in zip(start, shape)))


@given(viewed())
def test_frames_fill_the_target_once(case: tuple[Shape, Shape, Region]) -> None:
    shape, view, target = case
    whole = np.arange(prod(shape)).reshape(shape)
    flat = np.full(target.size, -1)
    for box, offset, strides in frames(shape, view, target):
        for index in np.ndindex(*box.shape):
            at = offset + int(np.dot(index, strides))
            assert flat[at] == -1
            flat[at] = whole.reshape(view)[tuple(np.add(index, box.start))]
    assert np.array_equal(flat.reshape(target.shape), whole[target.slices])


@given(viewed(), st.data())
def test_nests_are_the_strided_box(case: tuple[Shape, Shape, Region], data: st.DataObject) -> None:
    shape, view, target = case
    for box, offset, strides in frames(shape, view, target):
        order = data.draw(st.permutations(range(len(view))))
        seen = View(offset, tuple(strides[axis] for axis in order))
        region = data.draw(box_of(tuple(box.shape[axis] for axis in order)))
        carry_out(target.size, seen, region)


def carry_out(size: int, seen: View, region: Region) -> int:
    """How many nests take a region of a view of so many elements; they take the right ones."""
    flat, got = np.arange(size), np.full(region.shape, -1)
    found = list(nests(size, seen, region))
    for start, extents, inner, axes, part in found:
        taken = flat[start : start + prod(extents)].reshape(extents)[inner.slices]
        got[part.slices] = taken.transpose(axes)[..., 0]
    for index in np.ndindex(*region.shape):
        assert got[index] == seen.offset + int(np.dot(np.add(index, region.start), seen.strides))
    return len(found)


def test_aligned_views_are_one_nest() -> None:
    """Rows of two tensors that alternate, grouped heads, a transposed expert: one copy each."""
    assert carry_out(8 * 6, View(6, (12, 1)), Region.whole((4, 6))) == 1
    assert carry_out(8 * 6, View(12, (24, 6, 1)), Region.whole((2, 1, 6))) == 1
    assert carry_out(2 * 4 * 6, View(6, (24, 6, 1)), Region.whole((2, 3, 6))) == 1
    assert carry_out(2 * 6 * 8, View(48, (1, 8)), Region.whole((8, 6))) == 1


def test_rows_that_do_not_divide_are_a_nest_each() -> None:
    """Two of seven elements, of which two groups of three are taken."""
    assert carry_out(14, View(0, (7, 3, 1)), Region.whole((2, 2, 3))) == 2
    assert carry_out(14, View(1, (7, 1, 3)), Region.whole((2, 3, 2))) == 2


@given(viewed(), st.data())
def test_a_box_of_a_view_is_boxes_of_the_array(case: tuple[Shape, Shape, Region], data: st.DataObject) -> None:
    """Each with how it lies in the target, where the box may lie in any way."""
    shape, view, _ = case
    shape, view = data.draw(st.sampled_from([(shape, view), ((*shape, 1), view)]))
    whole = np.arange(prod(shape))
    box = data.draw(box_of(view))
    strides = tuple(prod(box.shape[axis + 1 :]) for axis in range(len(view)))
    target = np.full(box.size + 3, -1)
    for region, seen in unsplit(shape, view, box, View(3, strides)):
        for index in np.ndindex(*region.shape):
            at = seen.offset + int(np.dot(index, seen.strides))
            assert target[at] == -1
            target[at] = whole.reshape(shape)[tuple(np.add(index, region.start))]
    assert target[3:].tolist() == whole.reshape(view)[box.slices].ravel().tolist()


def test_boxes_of_a_view_with_fewer_axes() -> None:
    """A thin axis of the array that the view does not have."""
    found = frames((6, 1), (2, 3), Region((1, 0), (5, 1)))
    assert [(frame.box, frame.offset) for frame in found] == [
        (Region((0, 1), (1, 3)), 0),
        (Region((1, 0), (2, 2)), 2),
    ]


def test_a_box_that_no_whole_rows_hold_is_a_nest_an_index() -> None:
    """Two rows of three that lie apart, the second of which ends where the array does."""
    for apart in (4, 5):
        found = list(nests(apart + 3, View(0, (apart, 1)), Region.whole((2, 3))))
        rows = [(0, Region((0, 0), (1, 3))), (apart, Region((1, 0), (2, 3)))]
        assert [(nest.start, nest.part) for nest in found] == rows
