"""Elements that differ, and by how much: exact values, and numpy as the judge where it knows the type."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.engine.integrity.numerics import SAME, Odd, Spot, differences, odd_numbers, values

NAN_A, NAN_B = 0x7FC00001, 0x7FC00002


def raw(numbers: object, kind: str) -> np.ndarray:
    """Elements as flat bytes."""
    return np.array(numbers, kind).reshape(-1).view(np.uint8)


# (dtype, numpy kind, a, b, max_abs, max_ulp, nans, text of a, text of b)
LITERAL = [
    ("F32", "<u4", 0x3F800000, 0x3F800001, 2.0**-23, 1, 0, "1.0", "1.0000001"),
    ("F32", "<u4", 0x00000000, 0x80000000, 0.0, 0, 0, "0.0", "-0.0"),
    ("F32", "<u4", 0x00000001, 0x80000001, 2.0**-148, 2, 0, "1e-45", "-1e-45"),
    ("F32", "<u4", NAN_A, NAN_B, None, None, 1, "nan (0x7fc00001)", "nan (0x7fc00002)"),
    ("F32", "<u4", 0x3F800000, NAN_A, None, None, 1, "1.0", "nan (0x7fc00001)"),
    ("F32", "<u4", 0x7F7FFFFF, 0x7F800000, None, 1, 0, "3.4028235e+38", "inf"),
    ("BF16", "<u2", 0x3F80, 0x3F81, 2.0**-7, 1, 0, "1.0", "1.0078125"),
    ("BF16", "<u2", 0x7FC1, 0x7FC2, None, None, 1, "nan (0x7fc1)", "nan (0x7fc2)"),
    ("F16", "<u2", 0x3C00, 0xBC00, 2.0, 0x7800, 0, "1.0", "-1.0"),
    ("F64", "<u8", 0x3FF0000000000000, 0x3FF0000000000003, 3 * 2.0**-52, 3, 0, "1.0", "1.0000000000000007"),
    ("F64", "<u8", 0xFFEFFFFFFFFFFFFF, 0x7FEFFFFFFFFFFFFF, math.inf, 2 * 0x7FEFFFFFFFFFFFFF, 0, None, None),
    ("F8_E4M3", "<u1", 0x38, 0x39, 0.125, 1, 0, "1.0", "1.125"),
    ("F8_E4M3", "<u1", 0x7E, 0x7F, None, None, 1, "448.0", "nan (0x7f)"),
    ("F8_E5M2", "<u1", 0x7B, 0x7C, None, 1, 0, "57344.0", "inf"),
    ("F8_E8M0", "<u1", 127, 129, 3.0, 2, 0, "1.0", "4.0"),
    ("F8_E4M3FNUZ", "<u1", 0x80, 0x00, None, None, 1, "nan (0x80)", "0.0"),
    ("I8", "<i1", -128, 127, 255, None, 0, "-128", "127"),
    ("I64", "<i8", -(2**63), 2**63 - 1, 2**64 - 1, None, 0, None, None),
    ("U64", "<u8", 0, 2**64 - 1, 2**64 - 1, None, 0, "0", "18446744073709551615"),
    ("BOOL", "<u1", 0, 1, 1, None, 0, "False", "True"),
    ("STR", "<u4", 97, 98, 1, None, 0, "97", "98"),
]


@pytest.mark.parametrize(
    ("dtype", "kind", "a", "b", "max_abs", "max_ulp", "nans", "text_a", "text_b"),
    LITERAL,
    ids=[f"{row[0]}-{row[2]:x}-{row[3]:x}" for row in LITERAL],
)
def test_how_far_apart(
    dtype: str,
    kind: str,
    a: int,
    b: int,
    max_abs: Optional[float],
    max_ulp: Optional[int],
    nans: int,
    text_a: Optional[str],
    text_b: Optional[str],
) -> None:
    one, two = raw([a, a, a], kind), raw([a, b, a], kind)
    for x, y, swapped in ((one, two, False), (two, one, True)):
        found = differences(x, y, DTYPES[dtype])
        assert (found.count, found.max_abs, found.max_ulp, found.nans) == (1, max_abs, max_ulp, nans)
        spot = found.first[0]
        assert spot.at == 1
        if text_a is not None:
            assert (spot.a, spot.b) == ((text_b, text_a) if swapped else (text_a, text_b))


def test_complex_numbers_are_compared_by_part() -> None:
    a = raw([1 + 2j, 3 + 4j, 5 + 6j], "<c8")
    b = raw([1 + 2j, 3 + 4.5j, 5 + 6j], "<c8")
    found = differences(a, b, DTYPES["C64"])
    assert (found.count, found.max_abs) == (1, 0.5)
    assert found.first == (Spot(1, "3.0 + 4.0i", "3.0 + 4.5i"),)


def test_packed_types_are_compared_by_byte() -> None:
    a, b = np.array([1, 2, 3], np.uint8), np.array([1, 2, 0xFF], np.uint8)
    found = differences(a, b, DTYPES["F4"])
    assert (found.count, found.first, found.max_abs, found.max_ulp) == (1, (Spot(2, "0x03", "0xff"),), None, None)


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F16", np.float16), ("F64", np.float64)])
def test_values_are_those_of_numpy(dtype: str, kind: type) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    seen = values(numbers.view(f"u{np.dtype(kind).itemsize}"), dtype)
    with np.errstate(invalid="ignore"):
        expected = numbers.view(kind).astype(np.float64)
    assert np.array_equal(seen, expected, equal_nan=True)


def test_every_number_of_one_byte_is_in_the_order_of_its_bits() -> None:
    for name in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"):
        numbers = values(np.arange(0, 128, dtype=np.uint8), name)
        known = numbers[~np.isnan(numbers)]
        assert (np.diff(known) > 0).all(), name


@given(st.binary(min_size=1, max_size=400), st.integers(0, 99), st.binary(min_size=4, max_size=4))
def test_float32_against_numpy(data: bytes, at: int, other: bytes) -> None:
    a = np.frombuffer((data * 4)[: len(data) // 4 * 4 + 4], np.uint8).copy()
    b = a.copy()
    at = at % (a.size // 4) * 4
    b[at : at + 4] = np.frombuffer(other, np.uint8)
    found = differences(a, b, DTYPES["F32"])
    x, y = a.view(np.float32), b.view(np.float32)
    assert found.count == int((a.view(np.uint32) != b.view(np.uint32)).sum())
    if found.count and np.isfinite(x[at // 4]) and np.isfinite(y[at // 4]):
        assert found.max_abs == abs(float(x[at // 4]) - float(y[at // 4]))
        assert found.max_ulp == _steps(x[at // 4], y[at // 4])


def _steps(a: np.float32, b: np.float32) -> int:
    """Numbers between two, by their ranks among all floats."""

    def rank(number: np.float32) -> int:
        bits = int(np.array(number).view(np.int32))
        return bits if bits >= 0 else -(bits & 0x7FFFFFFF)

    return abs(rank(a) - rank(b))


def test_large_arrays_are_told_together() -> None:
    """Several chunks: counts add up, the first elements are the first of all."""
    a = np.zeros(300_000, np.float32)
    b = a.copy()
    b[[5, 100_000, 299_999]] = [1, -3, 2]
    found = differences(a.view(np.uint8), b.view(np.uint8), DTYPES["F32"], spots=2)
    assert (found.count, found.max_abs, [spot.at for spot in found.first]) == (3, 3.0, [5, 100_000])
    assert differences(a.view(np.uint8), a.view(np.uint8), DTYPES["F32"]) == SAME


ODD = [
    ("F32", "<f4", [math.nan, math.inf, -math.inf, 1, 3.4e38], Odd(1, 2)),
    ("F64", "<f8", [math.nan, math.inf, 0], Odd(1, 1)),
    ("F16", "<f2", [math.nan, 65504, -math.inf], Odd(1, 1)),
    ("BF16", "<u2", [0x7FC0, 0xFF80, 0x7F7F], Odd(1, 1)),
    ("F8_E4M3", "<u1", [0x7F, 0xFF, 0x7E], Odd(2, 0)),
    ("F8_E5M2", "<u1", [0x7C, 0xFD, 0x7B], Odd(1, 1)),
    ("C64", "<c8", [complex(math.nan, math.inf), 1], Odd(1, 1)),
    ("I32", "<i4", [-1, 0x7FC00000], Odd(0, 0)),
]


@pytest.mark.parametrize(("dtype", "kind", "numbers", "expected"), ODD, ids=[row[0] for row in ODD])
def test_what_is_not_finite_is_counted(dtype: str, kind: str, numbers: list[float], expected: Odd) -> None:
    assert odd_numbers(raw(numbers, kind), DTYPES[dtype]) == expected
    assert odd_numbers(raw(numbers * 20_000, kind), DTYPES[dtype]) == Odd(*(20_000 * count for count in expected))
