"""Block-quantised weights, and what they are as floats, one value at a time by the definitions of the formats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy

NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "<u2"}


class Tensor(NamedTuple):
    """A tensor as it is stored: bytes as an array of its items (bytes, for what numpy lacks)."""

    dtype: str
    items: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.items.shape
        return (*shape[:-1], 2 * shape[-1]) if self.dtype == "F4" else shape


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, written with nothing but the format's definition."""
    header, at = {}, 0
    for name, (dtype, items) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [at, at + items.nbytes]}
        at += items.nbytes
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(np.ascontiguousarray(items).tobytes() for _, items in tensors.values())
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def cut(layouts: Mapping[str, Layout], tensors: Mapping[str, Tensor], root: Path) -> Strategy:
    """The same as files of ranks; F4 is cut between bytes."""
    strategy = Strategy.from_items([LayoutItem(n, 0, layout) for n, layout in layouts.items()], "the test's source")
    for rank in range(strategy.world):
        mine = {}
        for name, (dtype, items) in tensors.items():
            box = layouts[name].over(items.ndim).region(rank, items.shape)
            mine[name] = Tensor(dtype, items[box.slices])
        save(mine, root / f"rank_{rank}/net.safetensors")
    return strategy


def _small_float(bits: int, exponent: int, mantissa: int, bias: int, kind: str) -> float:
    """A float of a byte or less, by its definition."""
    sign = -1.0 if bits >> (exponent + mantissa) & 1 else 1.0
    e, m = bits >> mantissa & ((1 << exponent) - 1), bits & ((1 << mantissa) - 1)
    top = e == (1 << exponent) - 1
    if kind == "E5M2" and top:
        return math.copysign(math.inf if m == 0 else math.nan, sign)
    if kind == "E4M3" and top and m == (1 << mantissa) - 1:
        return math.copysign(math.nan, sign)
    fraction = m / (1 << mantissa)
    return sign * (math.ldexp(fraction, 1 - bias) if e == 0 else math.ldexp(1 + fraction, e - bias))


TABLES = {
    "F8_E4M3": [_small_float(bits, 4, 3, 7, "E4M3") for bits in range(256)],
    "F8_E5M2": [_small_float(bits, 5, 2, 15, "E5M2") for bits in range(256)],
    "F8_E8M0": [math.ldexp(1, bits - 127) if bits < 255 else math.nan for bits in range(256)],
    "FP4": [_small_float(bits, 2, 1, 1, "E2M1") for bits in range(16)],
}


def values(tensor: Tensor, dtype: str) -> np.ndarray:
    """The values of a stored tensor, as F32 (F64 for F64)."""
    if dtype == "FP4":
        table = np.array(TABLES["FP4"], np.float32)
        raw = tensor.items.view(np.uint8)
        return np.stack([table[raw % 16], table[raw // 16]], -1).reshape(*raw.shape[:-1], -1)
    if dtype == "BF16":
        return (tensor.items.astype(np.uint32) * 65536).view(np.float32)
    if dtype in TABLES:
        return np.array(TABLES[dtype], np.float32)[tensor.items.view(np.uint8)]
    return tensor.items if dtype == "F64" else tensor.items.astype(np.float32)


def rounded(exact: np.ndarray, dtype: str) -> np.ndarray:
    """The items of a dtype that are nearest to F32 or F64 values, ties to even; NaN keeps its sign."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return np.where(np.isnan(exact), np.array(np.nan, NUMPY[dtype]), exact.astype(NUMPY[dtype]))
        exact = exact.astype(np.float64)
        low = (np.abs(exact).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        low = np.where(_bf16(low) > np.abs(exact), low - 1, low).astype(np.uint16)  # F32 rounds up, too
        up = (low + 1).astype(np.uint16)
        top = np.where(up == 0x7F80, 2.0**128, _bf16(up))  # where the next one would be
        under, over = np.abs(exact) - _bf16(low), top - np.abs(exact)
        nearest = np.where((over < under) | ((over == under) & (low % 2 == 1)), up, low)
    nearest = np.where(np.isinf(exact), 0x7F80, np.where(np.isnan(exact), 0x7FC0, nearest))
    return (nearest | np.where(np.signbit(exact) & ~np.isnan(exact), 0x8000, 0)).astype(np.uint16)


def _bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def dequantised(
    elements: Tensor, as_dtype: str, scales: Tensor, scale_as: str, block: tuple[int, ...], to: str
) -> np.ndarray:
    """Items of the result, element by element."""
    found, factors = values(elements, as_dtype), values(scales, scale_as)
    if factors.ndim < found.ndim and as_dtype == "FP4" and found.ndim > 1:
        found = found.reshape(*found.shape[:-2], -1)
    if factors.size == 1:
        each = np.broadcast_to(factors.reshape(()), found.shape)
    else:
        extents = ((1,) * (found.ndim - len(block)) + block)[-found.ndim :]
        extents = tuple(extent or whole for extent, whole in zip(extents, found.shape))
        each = factors[np.ix_(*(np.arange(whole) // extent for whole, extent in zip(found.shape, extents)))]
    with np.errstate(all="ignore"):
        return rounded(found * each, to)


def random_items(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Any bits, odd ones among them: NaN, infinities, subnormal numbers, both zeros."""
    if dtype in ("F32", "BF16", "F16"):
        width = 4 if dtype == "F32" else 2
        near = rng.standard_normal(shape).astype(np.float32) * 2.0 ** rng.integers(-12, 8, shape)
        items = rounded(near, dtype)
        odd = rng.integers(0, 1 << 8 * width, shape, dtype=f"u{width}").view(NUMPY[dtype])
        special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8]
        chosen = rounded(rng.choice(special, shape).astype(np.float32), dtype)
        kind = rng.integers(0, 10, shape)
        return np.where(kind == 0, odd, np.where(kind == 1, chosen, items)).astype(NUMPY[dtype])
    return rng.integers(0, 256, shape, dtype=np.uint8)
