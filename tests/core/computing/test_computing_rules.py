"""Rules that compute against an oracle: every combination, from any layout, under any, read directly or together."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.planning.io_units import Extent, Landing, Limits, Target, Task
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.copying import worker
from ms_ckpt_ext.engine.source.catalog import Catalog, open_catalog
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.rules import (
    QKV,
    AddProduct,
    Crop,
    Dequantize,
    Experts,
    Interleave,
    Pad,
    Part,
    Rule,
    Scale,
    Transpose,
)
from ms_ckpt_ext.storage.sink import MemorySink
from tests.core.planning.test_weight_rules import Ruled, fused, layout_for, strategy
from tests.support.quantised import Tensor, cut, dequantised, random_items, rounded, save, values

ELEMENTS = {
    "E4M3": ("F8_E4M3", "F8_E4M3"),
    "E5M2": ("F8_E5M2", "F8_E5M2"),
    "FP4 in U8": ("U8", "FP4"),
    "FP4 in I8": ("I8", "FP4"),
    "FP4": ("F4", "FP4"),
}
SCALES = {"F32": "F32", "BF16": "BF16", "F16": "F16", "F8_E8M0": "F8_E8M0", "U8": "F8_E8M0"}


@dataclass(frozen=True)
class Case:
    """Rules, the tensors they take, and the items of what they make."""

    rules: Sequence[Rule]
    sources: Mapping[str, Tensor]
    expected: np.ndarray
    dtype: str


def quantised(
    elements: str,
    scales: str,
    output: str,
    shape: tuple[int, ...],
    block: tuple[int, ...],
    grouped: int = 0,
    seed: int = 0,
) -> Case:
    """A weight of `shape` in blocks; `grouped`: FP4 stored with an axis of groups of so many elements."""
    rng = np.random.default_rng(seed)
    stored, kind = ELEMENTS[elements]
    packed = kind == "FP4"
    extents = tuple(e or w for e, w in zip(((1,) * (len(shape) - len(block)) + block)[-len(shape) :], shape))
    held = (*shape[:-1], shape[-1] // 2) if packed else shape
    if grouped:
        held = (*shape[:-1], shape[-1] // grouped, grouped // 2)
    items = Tensor(stored, random_items(rng, stored, held).view(np.int8 if stored == "I8" else np.uint8))
    factors = tuple(-(-whole // extent) for whole, extent in zip(shape, extents))
    scale = Tensor(scales, random_items(rng, scales, factors))
    expected = dequantised(items, kind, scale, SCALES[scales], block, output)
    assert expected.shape == shape
    rule = Dequantize(["w", "w_scale"], "t", block=block, dtype=output)
    return Case([rule], {"w": items, "w_scale": scale}, expected, output)


def opened(case: Case, root: Path, trained: Optional[Any] = None) -> Catalog:
    return open_catalog(str(root), trained).ruled(case.rules)


def read(catalog: Catalog, name: str, layout: Layout, rank: int, limits: Limits, most: Optional[float] = None) -> bytes:
    tensor = catalog.tensors[name]
    region = layout.region(rank, tensor.meta.shape)
    nbytes = tensor.meta.dtype.nbytes(region.size)
    sink = MemorySink(np.full(nbytes, 0xAA, np.uint8))
    task = Task(tensor, (Target(region, (Landing(0, (Extent(0, nbytes),)),)),))
    with catalog.readers() as readers:
        worker.run(schedule([task], catalog.stored, limits), readers, [sink], 1, lambda *_: None)
        assert most is None or readers.count.nbytes <= most
    return sink.bytes.tobytes()


def assert_all_ways(
    case: Case, root: Path, layout: Layout, trained: Any, limits: Limits, together: bool = True
) -> None:
    """Every rank gets its box by itself, and of a load that all make together."""
    catalog = opened(case, root, trained)
    assert catalog.tensors["t"].meta.shape == case.expected.shape
    assert catalog.tensors["t"].meta.dtype.name == case.dtype
    boxes = [case.expected[layout.region(rank, case.expected.shape).slices].tobytes() for rank in range(layout.devices)]
    for rank, box in enumerate(boxes):
        assert read(catalog, "t", layout, rank, limits) == box
    if together:
        load = Ruled(root, trained, strategy({"t": layout}), bucket_bytes=4096)
        load.rules = case.rules
        assert [held.contents for held in load.run()] == [{"t": box} for box in boxes]


@pytest.mark.parametrize("elements", ELEMENTS)
def test_every_combination_is_dequantised(elements: str, tmp_path: Path) -> None:
    """Also where ranks and tiles cut blocks, and pairs of FP4."""
    for number, (scales, output, block) in enumerate(
        product(SCALES, ("BF16", "F16", "F32"), ((4, 4), (6,), (0, 1), (3, 0)))
    ):
        root = tmp_path / str(number)
        case = quantised(elements, scales, output, (14, 18), block, seed=number)
        save(case.sources, root / "model.safetensors")
        ways = Layout((2, 3), ((1,), (0,)))
        limits = Limits(tile=(64, 4096)[number % 2], direct=64)
        assert_all_ways(case, root, ways, None, limits, together=number % 6 == 0)


def test_every_value_is_decoded(tmp_path: Path) -> None:
    """All 256 bytes with a scale of one give the values of the format's definition."""
    for stored in ("F8_E4M3", "F8_E5M2"):
        every = Tensor(stored, np.arange(256, dtype=np.uint8).reshape(16, 16))
        save({"w": every, "w_scale": Tensor("F32", np.ones((1, 1), "<f4"))}, tmp_path / stored / "m.safetensors")
        catalog = open_catalog(str(tmp_path / stored), None).ruled([Dequantize(["w", "w_scale"], "t", dtype="F32")])
        got = np.frombuffer(read(catalog, "t", Layout((1,), ((), ())), 0, Limits()), "<f4").reshape(16, 16)
        wanted = values(every, stored)
        number = ~np.isnan(wanted)
        assert np.array_equal(got, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(got[number]), np.signbit(wanted[number]))
    powers = Tensor("F8_E8M0", np.arange(256, dtype=np.uint8).reshape(256, 1))
    ones = Tensor("U8", np.full((256, 2), 0x22, np.uint8))  # 1.0 is 2
    save({"w": ones, "w_scale": powers}, tmp_path / "mx/m.safetensors")
    catalog = open_catalog(str(tmp_path / "mx"), None).ruled([Dequantize(["w", "w_scale"], "t", block=4, dtype="F32")])
    got = np.frombuffer(read(catalog, "t", Layout((1,), ((), ())), 0, Limits()), "<f4").reshape(256, 4)
    assert [float(x) for x in got[:255, 3]] == [2.0 ** (n - 127) for n in range(255)]
    assert np.isnan(got[255]).all()


def test_one_scale_for_all_may_be_taken_out_of_several(tmp_path: Path) -> None:
    """By a rule that moves: the scales of experts, stored side by side."""
    case = quantised("E4M3", "F32", "BF16", (4, 6), (4, 6))
    several = np.concatenate([[3.0], case.sources["w_scale"].items.ravel(), [5.0]]).astype("<f4")
    sources = {"w": case.sources["w"], "scales": Tensor("F32", several)}
    save(sources, tmp_path / "model.safetensors")
    rules = [Part("scales", "w_scale", 1, 3), *case.rules]
    taken = Case(rules, sources, case.expected, case.dtype)
    assert_all_ways(taken, tmp_path, Layout((2, 3), ((1,), (0,))), None, Limits())


@st.composite
def computing_cases(draw: st.DrawFn) -> Case:
    """Anything that computes, alone or before or behind rules that move."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    output = draw(st.sampled_from(["BF16", "F16", "F32"]))
    kind = draw(
        st.sampled_from(
            ["weight", "groups", "experts", "qkv", "interleave", "pad", "crop", "scale", "chain", "moved", "product"]
        )
    )
    if kind in ("weight", "groups"):
        grouped = 4 if kind == "groups" else 0
        names = ["FP4 in U8", "FP4 in I8"] if grouped else list(ELEMENTS)
        elements, scales = draw(st.sampled_from(names)), draw(st.sampled_from(list(SCALES)))
        shape = tuple(draw(st.integers(1, 3)) * 4 for _ in range(draw(st.integers(2 if grouped else 1, 3))))
        block = (grouped,) if grouped else tuple(draw(st.integers(0, 6)) for _ in range(draw(st.integers(1, 3))))
        return quantised(elements, scales, output, shape, block, grouped, draw(st.integers(0, 99)))
    if kind in ("experts", "qkv", "interleave"):
        return _joined(draw, kind, output)
    if kind == "product":
        return _product(draw, rng, output)
    shape = tuple(draw(st.integers(1, 4)) * 2 for _ in range(draw(st.integers(1, 3))))
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    items = random_items(rng, dtype, shape)
    held = {"w": Tensor(dtype, items)}
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    if kind == "pad":
        more, value = draw(st.integers(0, 4)), draw(st.sampled_from([0.0, -0.0, 1.5, float("-inf")]))
        width = [(0, more if number == axis % len(shape) else 0) for number in range(len(shape))]
        pad = rounded(np.full(1, value, np.float32), dtype)[0]
        expected = np.pad(items, width, constant_values=pad)
        return Case([Pad("w", "t", shape[axis] + more, axis, value)], held, expected, dtype)
    if kind == "crop":
        size = draw(st.integers(1, shape[axis]))
        return Case([Crop("w", "t", size, axis)], held, np.take(items, range(size), axis), dtype)
    factor = draw(st.sampled_from([2.0, 0.25, 0.1, -3.0, 1.0]))
    with np.errstate(all="ignore"):
        scaled = rounded(values(held["w"], dtype) * np.float32(factor), output)
    if kind == "scale":
        return Case([Scale("w", "t", factor, dtype=output)], held, scaled, output)
    if kind == "moved":  # what a rule that moves makes is computed with
        order = tuple(draw(st.permutations(range(len(shape)))))
        return Case(
            [Transpose("w", "v", order), Scale("v", "t", factor, output)], held, scaled.transpose(order), output
        )
    pad = rounded(np.full(1, 1.5, np.float32), output)[0]
    width = [(0, 2 if number == axis % len(shape) else 0) for number in range(len(shape))]
    expected = np.pad(scaled, width, constant_values=pad)
    return Case([Scale("w", "v", factor, output), Pad("v", "t", shape[axis] + 2, axis, 1.5)], held, expected, output)


def _product(draw: st.DrawFn, rng: np.random.Generator, output: str) -> Case:
    """A weight and its adapter, the product summed up one index after another."""
    m, n, r = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    dtypes = [draw(st.sampled_from(["BF16", "F16", "F32"])) for _ in range(3)]
    held = {
        name: Tensor(dtype, random_items(rng, dtype, shape))
        for name, dtype, shape in zip(("w", "w_B", "w_A"), dtypes, ((m, n), (m, r), (r, n)))
    }
    w, b, a = (values(held[name], dtype) for name, dtype in zip(held, dtypes))
    expected = np.empty((m, n), np.float32)
    with np.errstate(all="ignore"):
        for i in range(m):
            for j in range(n):
                total = b[i, 0] * a[0, j]
                for k in range(1, r):
                    total = np.float32(total + b[i, k] * a[k, j])
                expected[i, j] = np.float32(np.float32(total * np.float32(0.3)) + w[i, j])
    rule = AddProduct(["w", "w_B", "w_A"], "t", factor=0.3, dtype=output)
    return Case([rule], held, rounded(expected, output), output)


def _joined(draw: st.DrawFn, kind: str, output: str) -> Case:
    """Quantised matrices that are joined as floats."""
    names = (
        ["e.0.a", "e.0.b", "e.1.a", "e.1.b"]
        if kind == "experts"
        else ["a", "b", "c"][: 2 if kind == "interleave" else 3]
    )
    rows, columns = draw(st.integers(1, 3)) * 4, draw(st.integers(1, 4)) * 2
    held: dict[str, Tensor] = {}
    whole: list[np.ndarray] = []
    for number, name in enumerate(names):
        one = quantised("E4M3", "F32", output, (rows, columns), (3, 4), seed=number)
        held.update({f"{name}.weight": one.sources["w"], f"{name}.weight_scale_inv": one.sources["w_scale"]})
        whole.append(one.expected)
    first = Dequantize(["{*}.weight", "{*}.weight_scale_inv"], "{*}.weight", block=(3, 4), dtype=output)
    if kind == "experts":
        expected = np.stack([np.concatenate(whole[:2]), np.concatenate(whole[2:])]).transpose(0, 2, 1)
        then: Rule = Experts(["e.{n}.a.weight", "e.{n}.b.weight"], "t", merge=False)
    elif kind == "qkv":
        then, expected = QKV([f"{n}.weight" for n in names], "t", groups=2), fused(whole, 2, 0)
    else:
        then, expected = Interleave([f"{n}.weight" for n in names], "t", rows=2), fused(whole, rows // 2, 0)
    return Case([first, then], held, expected, output)


@given(computing_cases(), st.data())
@settings(deadline=None, max_examples=120)
def test_a_rank_computes_its_box(case: Case, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as root:
        trained = None
        devices = data.draw(st.sampled_from([0, 0, 2, 3]))
        layouts = {n: data.draw(layout_for(t.items.shape, devices)) for n, t in case.sources.items()} if devices else {}
        if devices and "F4" not in {tensor.dtype for tensor in case.sources.values()}:
            trained = cut(layouts, case.sources, Path(root))
        else:
            save(case.sources, Path(root) / "m.safetensors")
        layout = data.draw(layout_for(case.expected.shape, data.draw(st.sampled_from([1, 2, 3, 4]))))
        limits = Limits(
            tile=data.draw(st.sampled_from([16, 64, 4096])), gap=0, direct=data.draw(st.sampled_from([8, 4096]))
        )
        try:
            assert_all_ways(case, Path(root), layout, trained, limits)
        except LayoutMismatchError as error:
            assert devices and ("are no boxes" in str(error) or "cut along the last one" in str(error)), error
