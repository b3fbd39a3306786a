"""Which source ranks a target rank needs, by layouts alone."""

from __future__ import annotations

from math import prod

import pytest
from hypothesis import given

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.ranks import needed_for_whole, needed_ranks
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.errors import StrategyError
from tests.support.strategies import pairs

ROWS, COLUMNS, WHOLE = Layout((4,), ((0,), ())), Layout((4,), ((), (0,))), Layout((4,), ((), ()))


def strategy(*items: tuple[str, int, Layout]) -> Strategy:
    return Strategy.from_items([LayoutItem(*item) for item in items], "a test")


def test_of_a_tied_parameter_one_stage_suffices() -> None:
    tied = strategy(("emb", 0, ROWS), ("a", 0, ROWS), ("emb", 1, ROWS), ("b", 1, ROWS))
    for rank in range(8):
        assert needed_ranks(tied, tied, rank) == {rank}


def test_the_stage_is_taken_that_adds_least() -> None:
    """Columns of stage 1 are needed anyway; from rows every rank would be."""
    source = strategy(("emb", 0, ROWS), ("emb", 1, COLUMNS), ("b", 1, COLUMNS))
    target = strategy(("emb", 0, COLUMNS), ("b", 0, COLUMNS))
    assert needed_ranks(source, target, 2) == {6}
    assert needed_for_whole(source) == {4, 5, 6, 7}


def test_a_tied_parameter_alone_comes_from_the_first_stage() -> None:
    source = strategy(("emb", 0, WHOLE), ("emb", 1, WHOLE), ("b", 1, ROWS))
    assert needed_ranks(source, strategy(("emb", 0, ROWS)), 3) == {3}


def test_of_replicas_the_first_holds_all() -> None:
    """And of slices those beside it."""
    halves = Layout((2, 2), ((1,), ()))
    assert needed_for_whole(strategy(("a", 0, WHOLE))) == {0}
    assert needed_for_whole(strategy(("a", 0, WHOLE), ("b", 1, halves))) == {0, 4, 6}


def test_another_number_of_axes_is_an_error_by_name() -> None:
    source, target = strategy(("w", 0, ROWS)), strategy(("w", 0, Layout((4,), ((0,), (), ()))))
    with pytest.raises(StrategyError, match="'w' has 2 axes under the source's strategy and 3 under the target's"):
        needed_ranks(source, target, 0)


def test_two_numbers_may_be_of_one_axis() -> None:
    """A bias under two device axes: its file says [1, 0], as of two tensor axes."""
    source, target = strategy(("b", 0, Layout((2, 2), ((1,), (0,))))), strategy(("b", 0, Layout((4,), ((0,),))))
    for rank in range(4):
        assert needed_ranks(source, target, rank) == needed_ranks(target, source, rank) == {rank}


@given(pairs(16))
def test_the_ranks_named_hold_all_that_is_wanted_once(case: tuple[Layout, Layout, tuple[int, ...]]) -> None:
    one, two, shape = case
    source, target = strategy(("w", 0, one)), strategy(("w", 0, two))
    for rank in range(two.devices):
        wanted = two.region(rank, shape)
        common = [one.region(each, shape).intersect(wanted) for each in needed_ranks(source, target, rank)]
        assert sum(each.size for each in common if each) == wanted.size, "slices do not overlap: no element is missing"
        assert None not in common, "nobody is named for nothing"
        assert needed_ranks(target, target, rank) == {rank}
    slices = [one.region(each, shape) for each in needed_for_whole(source)]
    assert (len({*slices}), sum(each.size for each in slices)) == (len(slices), prod(shape))
