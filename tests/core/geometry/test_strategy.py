"""Strategies in all the forms MindSpore gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import (
    LayoutItem,
    Strategy,
    layouts_by_name,
    nested_tensor_map,
    split_stage,
    strategy_from_layout_dict,
    strategy_from_messages,
)
from ms_ckpt_ext.errors import StrategyError

ROWS = Layout((2, 2), ((0,), ()))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("1-decoder.w", ("decoder.w", 1)),
        ("12-a", ("a", 12)),
        ("decoder-w", ("decoder-w", 7)),
        ("0-1-a", ("1-a", 0)),
        ("3", ("3", 7)),
        ("2-", ("2-", 7)),
        ("-2-a", ("-2-a", 7)),
    ],
)
def test_exactly_one_stage_prefix_is_taken_off(name: str, split: tuple[str, int]) -> None:
    assert split_stage(name, 7) == split


@pytest.mark.parametrize(
    ("rows", "nested"),
    [
        ([[0, -1]], ((0,), ())),
        ([[-1], [1, 0]], ((), (1, 0))),
        ([[]], ()),
        ([], ()),
        ([[1]], ((1,),)),
        ([[0], [-1], []], ((0,), ())),
    ],
)
def test_both_forms_of_a_tensor_map(rows: list[list[int]], nested: tuple) -> None:
    assert nested_tensor_map(rows) == nested


def test_ranks_belong_to_stages() -> None:
    tied = [LayoutItem("emb", 0, ROWS), LayoutItem("emb", 1, ROWS), LayoutItem("head", 1, ROWS)]
    strategy = Strategy.from_items(tied, "a test")
    assert (strategy.world, strategy.stages, strategy.devices_per_stage) == (8, 2, 4)
    assert strategy.names_of(3) == ["emb"]
    assert strategy.names_of(4) == ["emb", "head"]
    assert strategy.cell("head", 3) is None
    assert [strategy.cell("head", rank) for rank in range(4, 8)] == [(0, 0), (1, 0), (0, 0), (1, 0)]
    assert (strategy.ranks_of(0), strategy.ranks_of(1)) == (range(4), range(4, 8))
    assert [strategy.stage_of(rank) for rank in (0, 3, 4, 7)] == [0, 0, 1, 1]
    assert Strategy.from_items([LayoutItem("a", (1 << 18) - 1, ROWS)], "the largest").world == 1 << 20
    assert strategy.layout("nothing", 0) is None
    strategy.check_complete()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "holds no parameter layouts"),
        ([LayoutItem("a", 0, ROWS), LayoutItem("b", 0, Layout((8,), ((),)))], "'b' (stage 0) spans 8 devices"),
        ([LayoutItem("a", 0, ROWS), LayoutItem("a", 0, Layout((2, 2), ((1,), ())))], "two layouts in stage 0"),
        ([LayoutItem("a", 1 << 18, ROWS)], "speaks of pipeline stage 262144, with 4 devices a stage"),
    ],
)
def test_contradictions(items: list[LayoutItem], message: str) -> None:
    with pytest.raises(StrategyError) as caught:
        Strategy.from_items(items, "a test")
    assert message in str(caught.value)


def test_layouts_that_no_memory_holds_are_refused_before_ranks_are_enumerated() -> None:
    cuts = [Layout((1 << axis, 1 << (20 - axis)), ((0,),)) for axis in range(20)]
    items = [LayoutItem(f"w{number}", 0, layout) for number, layout in enumerate(cuts)]
    assert Strategy.from_items(items[:4], "a test").world == 1 << 20
    for different in (5, 20):
        with pytest.raises(StrategyError, match=f"a test has {different} different layouts of 1048576 devices each"):
            Strategy.from_items(items[:different], "a test")


@pytest.mark.parametrize("ranks, layouts", [(16_384, 256), (65_536, 64)])
def test_large_jobs_are_legal(ranks: int, layouts: int) -> None:
    maps = (tuple((0,) if axis == at else () for axis in range(ndim)) for ndim in range(1, 24) for at in range(ndim))
    items = [LayoutItem(f"w{n}", 0, Layout((ranks,), each)) for n, each in zip(range(layouts), maps)]
    assert len(items) == layouts
    assert Strategy.from_items(items, "a test").world == ranks


def test_a_missing_stage_is_named() -> None:
    with pytest.raises(StrategyError, match=r"lacks pipeline stage\(s\) \[0, 1\] of 3"):
        Strategy.from_items([LayoutItem("a", 2, ROWS)], "a test").check_complete()
    first = ", ".join(map(str, range(16)))
    for stage, told in ((16, rf"\[{first}\] of 17"), (20, rf"\[{first}\] and 4 more of 21")):
        with pytest.raises(StrategyError, match=rf"lacks pipeline stage\(s\) {told}"):
            Strategy.from_items([LayoutItem("a", stage, ROWS)], "a test").check_complete()


def message(dev: list[int], rows: list[list[int]], step: int = 0, size: int = 0, field: int = 0) -> Any:
    def dims(values: list[list[int]]) -> list[Any]:
        return [SimpleNamespace(dim=row) for row in values]

    return SimpleNamespace(
        dev_matrix=dims([dev]),
        tensor_map=dims(rows),
        param_split_shape=dims([[]]),
        opt_weight_shard_step=step,
        opt_weight_shard_size=size,
        field=field,
    )


def test_messages_of_build_searched_strategy() -> None:
    strategy = strategy_from_messages(
        {"0-a": message([2, 4], [[0, -1]], 4, -1), "1-b": message([2, 4], [[-1], [1, 0]])}
    )
    assert strategy.layouts == {
        "a": {0: Layout((2, 4), ((0,), ()), 4, -1)},
        "b": {1: Layout((2, 4), ((), (1, 0)))},
    }
    assert strategy_from_messages({"a": message([2], [[0]])}).layouts == {"a": {0: Layout((2,), ((0,),))}}
    with pytest.raises(StrategyError, match="'a' is split unevenly"):
        strategy_from_messages({"a": message([2], [[0]], field=1)})
    with pytest.raises(StrategyError, match="not a ParallelLayouts message"):
        strategy_from_messages({"a": 3})
    with pytest.raises(StrategyError, match="no device matrix"):
        strategy_from_messages({"a": message([], [[0]])})


def test_layout_dict_of_a_compiled_cell() -> None:
    layouts = {
        "a": ([2, 4], [0, -1], [3, 24], 0, True, "opt-group", [24, 24]),
        "b": ([2, 4], [[-1], [1, 0]], [24, 3], 0, True, "", [24, 24]),
    }
    strategy = strategy_from_layout_dict(layouts, rank=9, group_size={"opt-group": 2}.__getitem__)
    assert strategy.layouts == {
        "a": {1: Layout((2, 4), ((0,), ()), 1, 2)},
        "b": {1: Layout((2, 4), ((), (1, 0)))},
    }
    with pytest.raises(StrategyError, match=r"must be \(dev_matrix, tensor_map"):
        strategy_from_layout_dict({"a": [1]}, 0, len)
    with pytest.raises(StrategyError, match="holds no parameter layouts"):
        strategy_from_layout_dict({}, 0, len)
    with pytest.raises(StrategyError, match="'a' must hold numbers of devices and axes"):
        strategy_from_layout_dict({"a": ([2, "4"], [0, -1])}, 0, len)
    with pytest.raises(StrategyError, match=r"parameter 'a': tensor map .* names a device axis"):
        strategy_from_layout_dict({"a": ([2], [1])}, 0, len)
    with pytest.raises(StrategyError, match="'a' is split unevenly"):
        strategy_from_layout_dict({"a": ([2], [0], [3], 1)}, 0, len)


def test_values_of_a_layout_dict_may_be_short_or_of_other_kinds() -> None:
    values = {"a": ([2, 2], [0, -1]), "b": ROWS, "c": message([2, 2], [[0, -1]]), "d": ([2, 2], [0, -1], [1, 1], 0)}
    values["e"] = ([2, 2], [0, -1], [1, 1])
    values["f"] = ([2, 2], [0, -1], [1, 1], 0, True)
    assert layouts_by_name(values, len) == dict.fromkeys(values, ROWS)
    assert layouts_by_name({"g": (*values["f"], "group")}, {"group": 2}.__getitem__) == {
        "g": Layout((2, 2), ((0,), ()), 1, 2)
    }
    assert strategy_from_layout_dict(values, 4, len).layouts["a"] == {1: ROWS}
    assert strategy_from_layout_dict(values, 3, len).layouts["a"] == {0: ROWS}


@pytest.mark.parametrize("uneven", [{"field": 1}, {"param_split_shape": [SimpleNamespace(dim=[1])]}])
def test_uneven_splits_are_refused(uneven: dict[str, Any]) -> None:
    told = message([2], [[0]])
    for name, value in uneven.items():
        setattr(told, name, value)
    with pytest.raises(StrategyError, match="'a' is split unevenly"):
        strategy_from_messages({"a": told})
