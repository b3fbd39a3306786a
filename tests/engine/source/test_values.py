"""Contents of small tensors as Python has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.engine.source.values import to_python


@pytest.mark.parametrize(
    ("dtype", "kind", "numbers", "shape", "expected"),
    [
        ("F32", "<f4", [0.1], (), 0.1),
        ("BF16", "<u2", [0x3F80, 0x4000], (2,), [1.0, 2.0]),
        ("F16", "<f2", [65504, 6e-8, -0.1], (3,), [65500.0, 6e-08, -0.1]),
        ("F64", "<f8", [0.1], (1, 1), [[0.1]]),
        ("F8_E4M3", "<u1", [0x38, 0xB8], (2, 1), [[1.0], [-1.0]]),
        ("I32", "<i4", [[-1, 2]], (1, 2), [[-1, 2]]),
        ("I64", "<i8", [-(1 << 63)], (), -(1 << 63)),
        ("U64", "<u8", [(1 << 64) - 1], (1,), [(1 << 64) - 1]),
        ("F32", "<f4", [], (2, 0), [[], []]),
        ("C64", "<c8", [1j], (1,), None),
        ("BOOL", "<u1", [1], (1,), [True]),
        ("F4", "<u1", [1], (2,), None),
    ],
)
def test_contents_as_python_has_them(
    dtype: str, kind: str, numbers: list[Any], shape: tuple[int, ...], expected: object
) -> None:
    assert to_python(np.array(numbers, kind).tobytes(), DTYPES[dtype], shape) == expected


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("F32", np.float32)])
def test_a_number_is_told_by_as_few_digits_as_mean_it(dtype: str, kind: Any) -> None:
    """All half-precision numbers; of single precision powers of two, decimals and others."""
    bits: Any = np.arange(1 << 16, dtype=np.uint16)
    if kind is np.float32:
        powers = np.arange(256, dtype=np.uint32) << 23
        decimals = (np.arange(2000, dtype=np.float32) * np.float32(1e-3)).view(np.uint32)
        others = np.random.default_rng(3).integers(0, 1 << 32, 3000, np.uint32)
        bits = np.concatenate([powers, powers + 1, decimals, others])
    numbers = bits.view(kind)
    found: Any = to_python(numbers.tobytes(), DTYPES[dtype], numbers.shape)
    finite = np.isfinite(numbers)
    assert np.array(found)[finite].astype(kind).tobytes() == numbers[finite].tobytes()
    pairs = zip(np.array(found)[finite].tolist(), numbers[finite])
    assert [told for told, number in pairs if len(repr(told)) > len(repr(float(str(number)))) + 1] == []
