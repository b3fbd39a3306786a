"""Operations on plain arrays: any box by itself is that box of the whole, and the whole is what its definition says."""

from __future__ import annotations

import tracemalloc
from math import prod
from typing import Union

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.computing.operations import AddedProduct, Dequantized, Fill, Scaled
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.recipes import Operand
from tests.support.quantised import Tensor, dequantised, random_items, rounded, values

Made = Union[Fill, Scaled, Dequantized, AddedProduct]


def computed(operation: Made, box: Region, operands: list[np.ndarray], output: str, around: int = 0) -> np.ndarray:
    """A box of the result as rows of bytes; operands reach `around` further than they must where there is more."""
    given_ = []
    for whole, taken in zip(operands, operation.takes(box)):
        low = tuple(max(0, at - around) for at in taken.start)
        high = tuple(min(extent, at + around) for extent, at in zip(whole.shape, taken.stop))
        held = np.ascontiguousarray(whole[tuple(map(slice, low, high))])
        given_.append(Operand(memoryview(held.reshape(-1).view(np.uint8)), Region(low, high)))
    out = np.full(box.size * DTYPES[output].bits // 8, 0xAA, np.uint8)
    operation.compute(box, given_, memoryview(out))
    return out.reshape(*box.shape, -1)


def assert_any_box(
    operation: Made, operands: list[np.ndarray], expected: np.ndarray, output: str, data: st.DataObject
) -> None:
    whole = expected[..., None].view(np.uint8).reshape(*expected.shape, -1)
    for _ in range(3):
        ends = [sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in expected.shape]
        box = Region(tuple(low for low, _ in ends), tuple(high for _, high in ends))
        found = computed(operation, box, operands, output, data.draw(st.integers(0, 2)))
        assert found.tobytes() == whole[box.slices].tobytes()
        reached = operation.gives(operation.takes(box)[0])
        assert reached.intersect(box) == box, "what the box takes of the first operand is needed for all of it"
        assert all(
            taken.intersect(Region.whole(each.shape)) == taken for taken, each in zip(operation.takes(box), operands)
        )


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.sampled_from(["BF16", "F16", "F32"]), st.sampled_from(["BF16", "F16", "F32"]), st.data())
@settings(max_examples=40)
def test_scaled(shape: tuple[int, ...], source: str, output: str, data: st.DataObject) -> None:
    items = random_items(np.random.default_rng(prod(shape)), source, shape)
    with np.errstate(all="ignore"):
        expected = rounded(values(Tensor(source, items), source) * np.float32(0.3), output)
    assert_any_box(Scaled(0.3, source, output), [items], expected, output, data)


def test_a_value_without_axes_is_scaled() -> None:
    assert (
        computed(Scaled(2.0, "F32", "F64"), Region((), ()), [np.float32([1.5])[0]], "F64").tobytes()
        == np.float64(3).tobytes()
    )


@given(SHAPES, st.sampled_from(["F8_E4M3", "F4"]), st.lists(st.integers(1, 4), min_size=4, max_size=4), st.data())
@settings(max_examples=60)
def test_dequantised(shape: tuple[int, ...], source: str, extents: list[int], data: st.DataObject) -> None:
    packed = source == "F4"
    shape = (*shape[:-1], 2 * shape[-1]) if packed else shape
    block = tuple(extents[: len(shape)])
    rng = np.random.default_rng(prod(shape))
    stored = (*shape[:-1], shape[-1] // 2) if packed else shape
    items = random_items(rng, "U8" if packed else source, stored)
    factors = random_items(rng, "F32", tuple(-(-n // e) for n, e in zip(shape, block)))
    kind = "FP4" if packed else source
    expected = dequantised(
        Tensor("U8" if packed else source, items), kind, Tensor("F32", factors), "F32", block, "BF16"
    )
    operation = Dequantized(source, "F32", "BF16", block)
    assert_any_box(operation, [items, factors], expected, "BF16", data)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.data())
@settings(max_examples=30)
def test_a_product_is_added(m: int, n: int, r: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(m * n * r)
    shapes = (m, n), (m, r), (r, n)
    dtypes = tuple(data.draw(st.sampled_from(["BF16", "F16", "F32"])) for _ in shapes)
    items = [random_items(rng, dtype, shape) for dtype, shape in zip(dtypes, shapes)]
    w, b, a = (values(Tensor(dtype, each), dtype) for dtype, each in zip(dtypes, items))
    with np.errstate(all="ignore"):
        total = b[:, :1] * a[:1]
        for k in range(1, r):
            total = total + b[:, k : k + 1] * a[k : k + 1]
        expected = rounded(total * np.float32(0.3) + w, "F32")
    assert_any_box(AddedProduct(0.3, dtypes, r, "F32"), items, expected, "F32", data)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 5, 1 << 17, (1 << 17) + 3])
def test_one_element_everywhere(size: int) -> None:
    found = computed(Fill(b"\x01\x02"), Region((4,), (4 + size,)), [], "BF16")
    assert found.tobytes() == b"\x01\x02" * size


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_boxes_larger_than_what_is_computed_at_once(dtype: str) -> None:
    """Rows of 2 ** 16 elements: two at a time."""
    items = np.arange(5 << 16, dtype=f"<f{DTYPES[dtype].bits // 8}").reshape(5, 1 << 16)
    box = Region((1, 3), (5, 1 << 16))
    found = computed(Scaled(2.0, dtype, dtype), box, [items], dtype)
    assert found.tobytes() == (2 * items[box.slices]).tobytes()
    left, right = np.arange(5, dtype="<f4").reshape(5, 1), np.arange(1 << 16, dtype="<f4").reshape(1, -1)
    found = computed(AddedProduct(1.0, (dtype, "F32", "F32"), 1, dtype), box, [items, left, right], dtype)
    assert found.tobytes() == (items + left * right).astype(items.dtype)[box.slices].tobytes()


@pytest.mark.parametrize("shape", [(8, 1 << 17), (2, 8, 1 << 16), (2, 8, 1 << 17), (1 << 12, 1 << 8), (4, 1 << 18)])
def test_what_is_computed_at_once_bounds_the_memory(shape: tuple[int, ...]) -> None:
    """Beside operands and result lies what is computed of 2 ** 17 elements, or of one row."""
    items = np.ones(shape, "<f4")
    operand = Operand(memoryview(items.reshape(-1).view(np.uint8)), Region.whole(shape))
    out = np.empty(items.nbytes, np.uint8)
    computed(Scaled(2.0, "F32", "F32"), Region.whole((1, 1)), [np.ones((1, 1), "<f4")], "F32")  # what is imported
    tracemalloc.start()
    try:
        Scaled(2.0, "F32", "F32").compute(operand.region, [operand], memoryview(out))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert out.tobytes() == (2 * items).tobytes()
    assert peak <= 1.5 * 4 * max(1 << 17, shape[-1]), "of one array of F32, and which elements are NaN"


def test_what_the_first_operand_is_needed_for() -> None:
    """Boxes of four bits are twice as long in elements as in bytes; what may reach over the end does."""
    box = Region((2, 1, 3), (4, 2, 5))
    assert Dequantized("F4", "F32", "BF16", (1, 1, 32)).gives(box) == Region((2, 1, 6), (4, 2, 10))
    for operation in (Scaled(2.0, "F32", "F32"), Dequantized("F8_E4M3", "F32", "BF16", (1, 1, 1)), Fill(b"\x00")):
        assert operation.gives(box) == box
    flat = Region((2, 3), (4, 5))
    assert AddedProduct(1.0, ("F32",) * 3, 2, "F32").gives(flat) == flat


def test_a_product_is_added_in_64_bits_to_a_matrix_of_them() -> None:
    """What F32 would lose of 1 + 2 ** -40 is there."""
    items = [np.ones((1, 1)), np.full((1, 1), 2.0**-20, np.float32), np.full((1, 1), 2.0**-20, np.float32)]
    operation = AddedProduct(1.0, ("F64", "F32", "F32"), 1, "F64")
    found = computed(operation, Region.whole((1, 1)), items, "F64")
    assert found.tobytes() == np.float64(1 + 2.0**-40).tobytes()
