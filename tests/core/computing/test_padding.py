"""Axes made longer with a value, and cut off: what is stored of the value, and what lies where."""

from __future__ import annotations

from typing import Optional

import pytest

from ms_ckpt_ext.core.computing.arithmetic import element
from ms_ckpt_ext.core.computing.operations import Fill
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.recipes import Computation, Recipe, box_of_stored
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.rules import Crop, Pad
from tests.core.computing.test_declared import held


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (1.0, "F32", "0000803f"),
        (1.0, "BF16", "803f"),
        (-2.0, "F16", "00c0"),
        (1.00390625, "BF16", "803f"),  # a tie goes to even
        (1.01171875, "BF16", "823f"),
        (1.00390625 - 2**-40, "BF16", "803f"),  # F32 would be the tie, and the tie another number
        (1.00390625 + 2**-40, "BF16", "813f"),
        (1.01171875 - 2**-40, "BF16", "813f"),
        (-1.01171875 + 2**-40, "BF16", "81bf"),
        (1.5, "F64", "000000000000f83f"),
        (-1.0, "I8", "ff"),
        (255.0, "U8", "ff"),
        (-2.0, "I32", "feffffff"),
        (1.0, "BOOL", "01"),
        (1.0, "F8_E4M3", "38"),
        (-0.0, "F8_E4M3", "80"),
        (0.0, "F8_E4M3", "00"),
        (448.0, "F8_E4M3", "7e"),
        (1.0, "F8_E5M2", "3c"),
        (2.0, "F8_E8M0", "80"),
        (2**70, "F8_E8M0", "c5"),
        (2**70 + 1, "F8_E8M0", None),
        (2**53 + 1, "I64", "0100000000002000"),
        (0.0, "BOOL", "00"),
        (2.0, "BOOL", None),
        (-1.0, "BOOL", None),
        (256.0, "U8", None),
        (-1.0, "U8", None),
        (0.5, "I8", None),
        (float("nan"), "I8", None),
        (float("inf"), "I64", None),
        (0.3, "F8_E4M3", None),
        (0.0, "F8_E8M0", None),
        (1.0, "F4", None),
        (1.0, "C64", None),
    ],
)
def test_one_element(value: float, dtype: str, stored: Optional[str]) -> None:
    if stored is not None:
        assert element(value, dtype).hex() == stored
        return
    with pytest.raises(LayoutMismatchError, match=f"{dtype} has no value"):
        element(value, dtype)


@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if dtype.bits % 8 == 0])
def test_a_pad_of_zeros_is_for_every_dtype_that_has_one(dtype: str) -> None:
    tensors = held(w=(dtype, (4,)))
    if dtype == "F8_E8M0":
        with pytest.raises(LayoutMismatchError, match=r"'t' cannot be padded with 0.0: F8_E8M0 has no value 0.0"):
            apply_rules(tensors, [Pad("w", "t", 5)])
        return
    recipe = apply_rules(tensors, [Pad("w", "t", 5)])["t"].recipe
    assert isinstance(recipe, Recipe)
    filled = recipe.blocks[1].tensor.recipe
    assert isinstance(filled, Computation)
    assert filled.operation == Fill(bytes(DTYPES[dtype].bits // 8))


@pytest.mark.parametrize(
    ("value", "dtype", "stored"), [(-0.0, "F32", "00000080"), (0, "F32", "00000000"), (2.5, "BF16", "2040")]
)
def test_a_pad_has_its_value(value: float, dtype: str, stored: str) -> None:
    recipe = apply_rules(held(w=(dtype, (4,))), [Pad("w", "t", 5, value=value)])["t"].recipe
    assert isinstance(recipe, Recipe)
    filled = recipe.blocks[1].tensor.recipe
    assert isinstance(filled, Computation)
    assert filled.operation == Fill(bytes.fromhex(stored))


def test_a_pad_of_nothing_is_the_tensor() -> None:
    made = apply_rules(held(w=("F32", (4, 6))), [Pad("w", "t", 6, axis=1)])["t"]
    assert not made.is_computed
    assert made.meta.shape == (4, 6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_a_pad_is_the_tensor_and_one_element_behind_it(axis: int) -> None:
    shape = [4, 6, 5]
    made = apply_rules(held(w=("F32", (4, 6, 5))), [Pad("w", "t", 9, axis=axis, value=1.0)])["t"]
    start = [0, 0, 0]
    start[axis] = shape[axis]
    rest, whole = list(shape), list(shape)
    rest[axis], whole[axis] = 9 - shape[axis], 9
    assert made.meta.shape == tuple(whole)
    assert isinstance(made.recipe, Recipe)
    assert [(block.start, block.region.shape) for block in made.recipe.blocks] == [
        ((0, 0, 0), (4, 6, 5)),
        (tuple(start), tuple(rest)),
    ]


def test_a_crop_of_nothing_is_the_tensor() -> None:
    made = apply_rules(held(w=("F32", (4, 6))), [Crop("w", "t", 6, axis=1)])["t"]
    assert made.meta.shape == (4, 6)
    assert box_of_stored(made) == (held(w=("F32", (4, 6)))["w"], Region.whole((4, 6)))


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_a_crop_is_the_first_indices(axis: int) -> None:
    made = apply_rules(held(w=("F32", (4, 6, 5))), [Crop("w", "t", 3, axis=axis)])["t"]
    shape = [4, 6, 5]
    shape[axis] = 3
    assert made.meta.shape == tuple(shape)
