"""Who stands for all: whatever a tensor is cut along, two of those who stand for all hold different slices of it."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.neighbours import Axis, axes_of, representatives, unseen_axes
from ms_ckpt_ext.core.geometry.ranks import same_cut
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from tests.support.strategies import layouts


@pytest.mark.parametrize(
    ("matrices", "axes"),
    [
        ([(4,)], [(1, 4)]),
        ([(2, 2)], [(1, 2), (2, 2)]),
        ([(4,), (2, 2)], [(1, 2), (1, 4), (2, 2)]),
        ([(1, 8, 1)], [(1, 8)]),
        ([(1,)], []),
    ],
)
def test_axes(matrices: list[tuple[int, ...]], axes: list[tuple[int, int]]) -> None:
    listed = {str(n): {0: Layout(matrix, ())} for n, matrix in enumerate(matrices)}
    assert axes_of(listed) == tuple(Axis(*axis) for axis in axes)


@pytest.mark.parametrize(
    ("holders", "devices", "axes", "whole", "sampled"),
    [
        (range(4), 4, [(1, 4)], (0, 1), (2,)),  # the frozen one may lie on (2, 2)
        (range(4), 4, [(1, 2), (2, 2)], (0, 1, 2), ()),
        (range(8), 4, [(1, 4)], (0, 1, 4, 5), (2, 6)),  # two stages
        ((4, 5, 6, 7), 4, [(1, 4)], (4, 5), (6,)),  # only the second stage has it
        ((1, 3), 4, [(1, 2), (2, 2)], (1, 3), ()),  # deduplicated: nobody beside rank 1 on the inner axis
        ((0, 3), 4, [(1, 4)], (0, 3), ()),
        ((2,), 4, [(1, 4)], (2,), ()),
        ((1, 2, 3), 4, [(1, 2), (2, 2)], (1, 2, 3), ()),  # beside rank 1 on the outer axis is rank 3
        (range(4), 4, [(2, 2)], (0, 2), (1,)),  # the frozen one may lie on the inner axis
        (range(1024), 1024, [(1, 8), (8, 128)], (0, 1, 8), (2, 4, 16, 32, 64, 128, 256, 512)),
    ],
)
def test_representatives(holders, devices, axes, whole, sampled) -> None:  # type: ignore[no-untyped-def]
    found = representatives(list(holders), devices, [Axis(*axis) for axis in axes])
    assert (found.whole, found.sampled) == (whole, sampled)


@given(st.data())
def test_a_cut_tensor_shows_between_those_who_stand_for_all(data: st.DataObject) -> None:
    hidden = data.draw(layouts(2, 32))
    other = data.draw(st.permutations(hidden.dev_matrix))  # as many devices, cut along other axes
    listed = {"w": {0: Layout(tuple(other), ())}}
    stand = representatives(range(hidden.devices), hidden.devices, axes_of(listed))
    seen = {hidden.cells[rank] for rank in (*stand.whole, *stand.sampled)}
    assert (len(seen) > 1) == (prod(hidden.parts) > 1)


@given(layouts(2, 32), st.data())
def test_what_is_cut_along_a_listed_axis_shows_between_whole_copies(hidden: Layout, data: st.DataObject) -> None:
    listed = {"w": {0: Layout(hidden.dev_matrix, ())}}
    missing = data.draw(st.sets(st.integers(0, hidden.devices - 1), max_size=hidden.devices // 2))
    holders = [rank for rank in range(hidden.devices) if rank not in missing]
    stand = representatives(holders, hidden.devices, axes_of(listed))
    assert len({hidden.cells[rank] for rank in holders}) > 1 or len({hidden.cells[r] for r in stand.whole}) == 1
    if not missing:
        assert (len({hidden.cells[rank] for rank in stand.whole}) > 1) == (prod(hidden.parts) > 1)


ROWS, COLUMNS, WHOLE = Layout((2, 2), ((1,), ())), Layout((2, 2), ((), (0,))), Layout((2, 2), ((), ()))


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"w": {0: ROWS}}, {"w": {0: ROWS}}, True),
        ({"w": {0: ROWS}, "a": {0: ROWS}}, {"w": {0: ROWS}, "b": {0: COLUMNS}}, True),
        ({"w": {0: ROWS}}, {"w": {0: COLUMNS}}, False),
        ({"w": {0: ROWS}}, {"w": {0: WHOLE}}, False),
        ({"w": {0: ROWS}}, {"w": {0: Layout((2, 2), ((0,), ()))}}, False),  # as many rows, of other ranks
        ({"w": {0: ROWS}}, {"w": {0: Layout((2, 2), ((1,), ()), 1, -1)}}, True),  # an optimizer shard is left aside
        ({"w": {0: WHOLE}}, {"w": {0: Layout((4,), ((), ()))}}, True),  # other axes, the same boxes
        ({"w": {0: ROWS}}, {"v": {0: ROWS}}, False),  # nothing tells
        ({"w": {0: ROWS}}, {"w": {0: Layout((2,), ((0,), ()))}}, False),
        ({"w": {0: ROWS}, "v": {1: ROWS}}, {"w": {0: ROWS}, "v": {1: ROWS}}, True),
        ({"w": {0: ROWS}, "v": {1: ROWS}}, {"w": {1: ROWS}, "v": {0: ROWS}}, False),
        ({"w": {0: ROWS}, "v": {1: ROWS}}, {"w": {0: ROWS}}, False),
    ],
)
def test_same_cut(one: dict[str, dict[int, Layout]], two: dict[str, dict[int, Layout]], same: bool) -> None:
    jobs = [
        Strategy.from_items([LayoutItem(n, s, la) for n, stages in each.items() for s, la in stages.items()], "it")
        for each in (one, two)
    ]
    assert same_cut(*jobs) is same


@pytest.mark.parametrize(
    ("holders", "unseen"),
    [
        ((0, 1, 2, 3), False),
        ((0, 3), False),  # differ on both axes
        ((0, 1), True),  # nobody elsewhere on the outer axis
        ((0, 2), True),
        ((1,), True),
        ((0, 1, 2, 3, 4, 7), False),
        ((0, 1, 2, 3, 4, 5), True),  # in the second stage
    ],
)
def test_axes_along_which_nothing_tells(holders: tuple[int, ...], unseen: bool) -> None:
    assert unseen_axes(holders, 4, iter([Axis(1, 2), Axis(2, 2)])) is unseen
    assert unseen_axes(holders, 4, []) is False
