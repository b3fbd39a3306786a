"""Widths of elements."""

from __future__ import annotations

import re

import pytest

from ms_ckpt_ext.core.geometry.array import BY_MINDSPORE, DTYPES, FILE_ORDER

NAMELESS = {"BOOL": 8, "STR": 32}
"""Those whose name has no width: a byte a truth value; UTF-32."""


@pytest.mark.parametrize("name", DTYPES)
def test_the_name_says_the_width(name: str) -> None:
    digits = re.match(r"B?[A-Z](\d+)", name)
    assert DTYPES[name].bits == (int(digits[1]) if digits else NAMELESS[name])
    told = re.search(r"(\d+)", DTYPES[name].mindspore)
    assert told is None or int(told[1]) == DTYPES[name].bits
    assert DTYPES[name].mindspore in ("", *BY_MINDSPORE)


def test_wider_elements_lie_first_in_a_file() -> None:
    ordered = sorted(DTYPES.values(), key=lambda dtype: FILE_ORDER[dtype.name])
    stored = [dtype.bits for dtype in ordered if dtype.name not in ("BOOL", "C128", "STR")]
    assert stored == sorted(stored)


@pytest.mark.parametrize(
    ("name", "elements", "nbytes"),
    [("F4", 0, 0), ("F4", 1, 1), ("F4", 2, 1), ("F4", 3, 2), ("F6_E2M3", 4, 3), ("F6_E2M3", 5, 4), ("F32", 3, 12)],
)
def test_bytes_of_elements(name: str, elements: int, nbytes: int) -> None:
    assert DTYPES[name].nbytes(elements) == nbytes
