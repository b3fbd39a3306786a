"""Layouts and names in words."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.core.geometry.describe import AxisSplit, describe, describe_strategy
from ms_ckpt_ext.core.geometry.groups import STATES, WEIGHTS, group_of, natural
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout((2, 4), ((0,), ())), "axis 0 in 4 (device axis 1); 2 copies; device matrix [2, 4]"),
        (Layout((2, 4), ((), (1, 0))), "axis 1 in 8 (device axis 0, device axis 1); 1 copy; device matrix [2, 4]"),
        (Layout((2, 4), ((), ())), "whole; 8 copies; device matrix [2, 4]"),
        (
            Layout((2, 4), ((0,), ()), 2, 2),
            "axis 0 in 8 (device axis 1, optimizer 2); 1 copy; device matrix [2, 4]",
        ),
        (Layout((4, 2), ((), (0,)), 1, -1), "axis 0 in 4 (optimizer 4); axis 1 in 2 (device axis 1); 1 copy"),
    ],
)
def test_a_layout_in_words(layout: Layout, words: str) -> None:
    assert str(describe(layout, 0)).startswith(words)


def test_a_layout_as_values() -> None:
    found = describe(Layout((4, 2), ((), (0,)), 1, 2), stage=3)
    assert (found.stage, found.device_matrix, found.parts, found.copies) == (3, (4, 2), (2, 2), 2)
    assert found.split == (AxisSplit(0, 2, (), 2), AxisSplit(1, 2, (1,), 1))
    assert found.optimizer_shard == (1, 2)
    assert describe(Layout((4, 2), ((), (0,))), 0).optimizer_shard is None


def test_a_strategy_in_numbers() -> None:
    layout = Layout((2, 4), ((0,), ()))
    items = [LayoutItem("a", 0, layout), LayoutItem("b", 1, layout), LayoutItem("c", 1, layout)]
    assert describe_strategy(Strategy.from_items(items, "a file")) == ("a file", 16, 2, 8, 3)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("moments.w", STATES),  # no word of a network, whatever else there is
        ("accum.w", STATES),  # beside w
        ("accum.v", WEIGHTS),  # nothing to be the state of
        ("moments", WEIGHTS),  # a name by itself
        ("w", WEIGHTS),
    ],
)
def test_what_a_parameter_is_for(name: str, group: str) -> None:
    assert group_of(name, {"w", name}) == group


def test_names_in_the_order_of_their_numbers() -> None:
    names = ["layers.10.w", "layers.9.w", "layers.9.b", "layers.x", "a"]
    assert sorted(names, key=natural) == ["a", "layers.x", "layers.9.b", "layers.9.w", "layers.10.w"]


def test_numbers_in_names_are_sorted_as_numbers_behind_words() -> None:
    names = ["a.0.w", "a.b.w", "a.10.w", "a", "a.9.w", "a.00.w", "b.0", "a.-1.w"]
    assert sorted(names, key=natural) == ["a", "a.-1.w", "a.00.w", "a.b.w", "a.0.w", "a.9.w", "a.10.w", "b.0"]
