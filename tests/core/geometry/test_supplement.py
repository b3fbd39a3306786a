"""Layouts from several places as one strategy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.core.geometry.supplement import ByName, put_together
from ms_ckpt_ext.errors import StrategyError
from tests.support.strategies import layouts

ROWS, COLUMNS, WHOLE = Layout((2, 2), ((1,), ())), Layout((2, 2), ((), (0,))), Layout((2, 2), ((), ()))


def of(origin: str = "a file", **named: Any) -> Strategy:
    items = [LayoutItem(name, stage, layout) for name, stages in named.items() for stage, layout in stages.items()]
    return Strategy.from_items(items, origin)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([of(w={0: ROWS}), ByName({"f": COLUMNS}, "d")], {"w": {0: ROWS}, "f": {0: COLUMNS}}),
        ([of(w={0: ROWS}, v={1: ROWS}), ByName({"f": COLUMNS}, "d")],
         {"w": {0: ROWS}, "v": {1: ROWS}, "f": {0: COLUMNS, 1: COLUMNS}}),
        ([of(w={0: ROWS}, v={1: ROWS}), ByName({"1-f": COLUMNS}, "d")],
         {"w": {0: ROWS}, "v": {1: ROWS}, "f": {1: COLUMNS}}),
        ([of(w={0: ROWS}, v={1: ROWS}), ByName({"v": ROWS}, "d")], {"w": {0: ROWS}, "v": {1: ROWS}}),
        ([of(w={0: ROWS}), of(v={1: ROWS}), of(w={0: ROWS}, f={0: WHOLE})],
         {"w": {0: ROWS}, "v": {1: ROWS}, "f": {0: WHOLE}}),
        ([ByName({"w": ROWS}, "d"), ByName({"f": COLUMNS}, "e")], {"w": {2: ROWS}, "f": {2: COLUMNS}}),
        # Otherwise written, the same slices: the first stays.
        ([of(w={0: WHOLE}), ByName({"w": Layout((4,), ((), ()))}, "d")], {"w": {0: WHOLE}}),
        ([ByName({"w": ROWS}, "d"), of(w={1: ROWS})], {"w": {1: ROWS}}),
    ],
)  # fmt: skip
def test_put_together(parts: list[Any], expected: dict[str, dict[int, Layout]]) -> None:
    found = put_together(parts, 2)
    assert {name: dict(stages) for name, stages in found.layouts.items()} == expected
    assert found.origin == " with ".join(part.origin for part in parts)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([of(w={0: ROWS}), ByName({"w": COLUMNS}, "D")], r"'w' \(pipeline stage 0\).* in a file, but .* in D"),
        ([of(w={0: ROWS}), of("F", w={0: Layout((2, 2), ((1,), ()), 1, -1)})], "'w'.*optimizer shard -1 in F"),
        ([of(w={0: ROWS}, v={1: ROWS}), ByName({"1-v": WHOLE}, "d")], r"'v' \(pipeline stage 1\)"),
        ([ByName({"w": ROWS}, "d"), ByName({"w": WHOLE}, "e")], "'w'.* in d, but .* in e"),
        ([of(w={0: ROWS}), ByName({"f": Layout((8,), ((0,), ()))}, "d")], "'f' .*of 8 devices, but 'w'.*of 4"),
    ],
)  # fmt: skip
def test_contradictions(parts: list[Any], told: str) -> None:
    with pytest.raises(StrategyError, match=told):
        put_together(parts, 0)


@given(st.data())
def test_the_order_of_parts_does_not_matter(data: st.DataObject) -> None:
    base = data.draw(layouts(2, 16))
    shared = [base, Layout(base.dev_matrix, ((), ())), Layout((base.devices,), ((0,), ()))]
    names = data.draw(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(shared), min_size=2))
    split = data.draw(st.integers(1, len(names) - 1))
    items = list(names.items())
    parts = [of(**{n: {0: la, 1: la} for n, la in items[:split]}), ByName(dict(items[split:]), "d")]
    there, back = put_together(parts, 0), put_together(parts[::-1], 0)
    assert there.layouts == back.layouts == {name: {0: layout, 1: layout} for name, layout in items}
