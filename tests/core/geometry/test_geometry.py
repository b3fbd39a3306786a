"""Boxes and MindSpore's layout rules: literal tables, worked out by hand from the rules."""

from __future__ import annotations

import json
from itertools import product
from math import lcm, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.layout import (
    MAX_AXES,
    Layout,
    cell_region,
    layout_from_json,
    same_slices,
    slice_shape,
    whole,
)
from ms_ckpt_ext.errors import LayoutMismatchError, StrategyError
from tests.support.strategies import layouts


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        (Region((0, 0), (4, 4)), Region((2, 1), (6, 3)), Region((2, 1), (4, 3))),
        (Region((0,), (4,)), Region((4,), (8,)), None),
        (Region((0, 0), (4, 4)), Region((1, 5), (2, 6)), None),
        (Region((), ()), Region((), ()), Region((), ())),
        (Region((3,), (4,)), Region((0,), (9,)), Region((3,), (4,))),
    ],
)
def test_intersection(a: Region, b: Region, common: Region | None) -> None:
    assert a.intersect(b) == common
    assert b.intersect(a) == common


def test_a_region_knows_its_shape_size_and_place() -> None:
    region = Region((2, 3), (5, 4))
    assert (region.shape, region.size, str(region)) == ((3, 1), 3, "[2:5, 3:4]")
    assert region.slices == (slice(2, 5), slice(3, 4))
    assert region.relative_to((2, 1)) == Region((0, 2), (3, 3))
    assert Region((), ()).size == 1
    assert Region.whole((2, 7)) == Region((0, 0), (2, 7))


@pytest.mark.parametrize(("start", "stop"), [((0,), (0,)), ((3,), (2,)), ((-1,), (2,)), ((0, 0), (1,))])
def test_what_is_no_box_is_refused_at_birth(start: tuple[int, ...], stop: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="start"):
        Region(start, stop)


# dev_matrix, tensor_map, (step, size), full shape -> parts, and the box of some ranks
LAYOUTS = {
    "rows over tp": ((2, 4), ((0,), ()), (0, 0), (96, 24), (4, 1), {5: ((24, 0), (48, 24)), 1: ((24, 0), (48, 24))}),
    "columns over tp": ((2, 4), ((), (0,)), (0, 0), (24, 48), (1, 4), {7: ((0, 36), (24, 48))}),
    "whole": ((2, 4), ((), ()), (0, 0), (6, 6), (1, 1), {3: ((0, 0), (6, 6))}),
    "rows over dp": ((2, 4), ((1,), ()), (0, 0), (8, 3), (2, 1), {3: ((0, 0), (4, 3)), 4: ((4, 0), (8, 3))}),
    "two axes on one, dp major": ((2, 4), ((), (1, 0)), (0, 0), (24, 24), (1, 8), {5: ((0, 15), (24, 18))}),
    "two axes on one, tp major": ((2, 4), ((), (0, 1)), (0, 0), (24, 24), (1, 8), {5: ((0, 9), (24, 12))}),
    "optimizer shard over all replicas": (
        (2, 4), ((0,), ()), (4, -1), (96, 24), (8, 1), {0: ((0, 0), (12, 24)), 5: ((36, 0), (48, 24))},
    ),
    "optimizer shard of two in four": (
        (4, 2), ((0,), ()), (2, 2), (48, 24), (4, 1),
        {0: ((0, 0), (12, 24)), 2: ((12, 0), (24, 24)), 4: ((0, 0), (12, 24)), 7: ((36, 0), (48, 24))},
    ),
    "optimizer shard from the inside out": (
        (2, 4), ((),), (1, -1), (24,), (8,), {0: ((0,), (3,)), 3: ((9,), (12,)), 4: ((12,), (15,))},
    ),
    "optimizer shard of four in eight, innermost axis alone": (
        (2, 4), ((),), (1, 4), (24,), (4,), {1: ((6,), (12,)), 5: ((6,), (12,))},
    ),
    "optimizer shard that takes half of an axis": (
        (2, 4), ((),), (1, 2), (24,), (2,), {0: ((0,), (12,)), 1: ((12,), (24,)), 2: ((0,), (12,)), 7: ((12,), (24,))},
    ),
    "axes of one are no replicas": ((2, 1, 2), ((0,), ()), (1, -1), (8, 2), (4, 1), {2: ((2, 0), (4, 2))}),
    "a scalar": ((8,), (), (0, 0), (), (), {6: ((), ())}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    devices, tensor_map, (step, size), shape, parts, boxes = LAYOUTS[name]
    layout = Layout(devices, tensor_map, step, size)
    assert layout.parts == parts
    assert layout.full_shape(layout.slice_shape(shape)) == shape
    for rank, (start, stop) in boxes.items():
        assert layout.region(rank, shape) == Region(start, stop)
    held = [rank for ranks in layout.holders.values() for rank in ranks]
    assert sorted(held) == list(range(layout.devices))


def place_of(layout: Layout, rank: int) -> list[tuple[int, int]]:
    """(index, parts) on every tensor axis, coordinate by coordinate as MindSpore's rules say."""
    matrix, last = layout.dev_matrix, len(layout.dev_matrix) - 1
    coordinates = [int(coordinate) for coordinate in np.unravel_index(rank, matrix)]
    found = []
    for group in layout.tensor_map:
        axes = [last - value for value in group]
        index = 0
        for axis in axes:
            index = index * matrix[axis] + coordinates[axis]
        found.append((index, prod(matrix[axis] for axis in axes)))
    if layout.opt_sharded:
        replicas = [axis for axis in range(last + 1) if all(last - axis not in group for group in layout.tensor_map)]
        size = layout.opt_shard_size if layout.opt_shard_size > 0 else prod(matrix[axis] for axis in replicas)
        number, ways = 0, 1
        for axis in reversed(replicas):
            here = min(matrix[axis], size // ways)
            number, ways = number + coordinates[axis] % here * ways, ways * here
        found[0] = (found[0][0] * ways + number, found[0][1] * ways)
    return found


@given(st.integers(1, 3).flatmap(layouts))
def test_slices_are_a_grid_in_which_every_rank_has_its_place(layout: Layout) -> None:
    for rank in range(layout.devices):
        assert [*zip(layout.cells[rank], layout.parts)] == place_of(layout, rank)
    assert sorted(layout.holders) == [*product(*map(range, layout.parts))], "every slice is held"
    copies = {len(ranks) for ranks in layout.holders.values()}
    assert copies == {layout.devices // prod(layout.parts)}, "by as many ranks as every other"
    assert len({layout.coordinates(rank) for rank in range(layout.devices)}) == layout.devices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ((),)), "expected one or more extents"),
        (((2, 0), ((),)), "expected one or more extents"),
        (((1 << 20, 2), ((),)), "has more than 1048576 devices"),
        (((2,), ((-1,),)), "names a device axis that the device matrix [2] lacks"),
        (((2, 2), ((0,), ()), -1, 2), "expected step >= 0 and size >= -1"),
        (((2,), ((3,),)), "names a device axis that the device matrix [2] lacks"),
        (((2, 2), ((0,), (0,))), "uses a device axis twice"),
        (((2, 4), ((0,), ()), 1, 3), "optimizer shard of size 3 does not fit the replicas [2]"),
        (((2, 4), ((0,), ()), 1, 4), "optimizer shard of size 4 does not fit"),
        (((4, 3), ((),), 1, 4), "optimizer shard of size 4 does not fit"),  # the inner axis comes first
        (((2, 4), ((0,), ()), 1, -2), "expected step >= 0 and size >= -1"),
        (((2,), (), 1, 2), "has no axes"),
        (((1,) * 65, ((),)), "device matrix of 65 axes, tensor map of 1 that names 0 of them: expected at most 64"),
        (((1,), ((),) * 65), "device matrix of 1 axes, tensor map of 65 that names 0 of them: expected at most 64"),
        (((1,), ((0,) * 65,)), "device matrix of 1 axes, tensor map of 1 that names 65 of them: expected at most 64"),
    ],
)
def test_a_layout_that_contradicts_itself(arguments: tuple, message: str) -> None:
    with pytest.raises(StrategyError) as caught:
        Layout(*arguments)
    assert message in str(caught.value)


def test_a_shape_that_cannot_be_cut_names_axis_and_parts() -> None:
    with pytest.raises(LayoutMismatchError, match=r"axis 1 of shape \[4, 6\] cannot be cut into 4 equal parts"):
        Layout((4,), ((), (0,))).region(0, (4, 6))
    with pytest.raises(LayoutMismatchError, match="has 1 axes; the layout has 2"):
        slice_shape((4,), (2, 2))
    with pytest.raises(LayoutMismatchError, match=r"slice of shape \[4\] has 1 axes; the layout has 2"):
        Layout((4,), ((), (0,))).full_shape((4,))
    assert cell_region((1, 0), (2, 1), (4, 3)) == Region((2, 0), (4, 3))
    assert whole(2).region(0, (4, 3)) == Region.whole((4, 3))
    assert (whole(2), whole(0)) == (Layout((1,), ((), ())), Layout((1,), ()))


def test_the_largest_job_is_legal() -> None:
    assert Layout((1 << 20,), ((),)).devices == 1 << 20
    every = tuple((axis,) for axis in range(64))
    assert (Layout((1,) * 64, every).parts, MAX_AXES) == ((1,) * 64, 64)


def test_an_optimizer_shard_in_numbers() -> None:
    """Ways, and the two coordinates of an axis that it takes in part: the replica, then the shard."""
    half = Layout((2, 4), ((1,), ()), 1, 2)
    assert (half.shards, half.parts) == (2, (4, 1))
    assert [half.coordinates(rank) for rank in range(4)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert half.coordinates(5) == (1, 0, 1)
    assert Layout((2, 4), ((1,), ()), 1, -1).shards == 4
    assert Layout((2, 4), ((1,), ())).shards == 1
    assert Layout((2, 4), ((1,), ())).coordinates(6) == (1, 2)
    inner = Layout((2, 4), ((), ()), 1, 2)  # of the inner axis a half; of the outer one nothing
    assert [inner.coordinates(rank) for rank in (0, 3, 6)] == [(0, 0, 0), (0, 1, 1), (1, 1, 0)]
    assert Layout((2, 1, 2), ((0,), ()), 1, -1).coordinates(3) == (0, 1, 0, 1), "an axis of one is not consumed"
    for inactive in (Layout((2,), ((),), 0, 2), Layout((2,), ((),), 1, 0)):
        assert (inactive.opt_sharded, inactive.parts) == (False, (1,))


def test_a_map_of_several_axes_may_be_that_of_one() -> None:
    assert Layout((2, 4), ((1,), (0,))).over(1) == Layout((2, 4), ((1, 0),))
    assert Layout((2, 4), ((1,), (0,)), 1, 0).over(1) == Layout((2, 4), ((1, 0),), 1, 0)
    for kept in (Layout((2, 4), ((1,), ())), Layout((2, 4), ((1,),))):  # an axis is whole; there is one anyway
        assert kept.over(1) == kept
    assert Layout((2, 4), ((1,), (0,))).over(2) == Layout((2, 4), ((1,), (0,)))


def test_layouts_from_json() -> None:
    layout = Layout((2, 4), ((0,), ()), 4, -1)
    assert layout_from_json(json.loads(json.dumps(layout))) == layout


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        (Layout((2, 4), ((1,), ())), Layout((2, 2, 2), ((2,), ())), True),
        (Layout((2, 4), ((1,), ())), Layout((2, 4), ((0,), ())), False),
        (Layout((2, 2), ((1,), ())), Layout((2, 2), ((0,), ())), False),  # as many parts, of other ranks
        (Layout((2, 2), ((1,), (0,))), Layout((4,), ((0,),)), True),
        (Layout((4,), ((), ())), Layout((2, 2), ((), ())), True),
    ],
)
def test_the_same_slices_may_be_written_otherwise(one: Layout, two: Layout, same: bool) -> None:
    assert same_slices(one, two) is same
    assert same_slices(two, one) is same


@given(layouts(2, 8), layouts(2, 8))
def test_same_slices_are_the_same_boxes(one: Layout, two: Layout) -> None:
    shape = tuple(map(lcm, one.parts, two.parts))
    boxes = ([each.region(rank, shape) for rank in range(each.devices)] for each in (one, two))
    assert same_slices(one, two) is (next(boxes) == next(boxes))
