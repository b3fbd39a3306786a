"""Elements as numbers: decoded to F32 (F64 where they are that), and rounded to what is wanted.

Rounding is to the nearest, ties to even. What is too large for the result becomes infinite, as IEEE 754 has it. Every
NaN becomes the same one, positive and quiet: processors differ in the sign and payload that they give it.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.errors import LayoutMismatchError

Floats = npt.NDArray[Any]
"""F32, or F64 where the source is that."""
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign."""
_NATIVE = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
FLOATS = frozenset({*_NATIVE, "BF16"})
"""Dtypes that results may have."""


def decoded(data: memoryview, dtype: str) -> Floats:
    """The elements of flat bytes. FP4 (`F4`): two a byte, the first in its low bits."""
    if dtype in _NATIVE:
        found = np.frombuffer(data, _NATIVE[dtype])
        return found if dtype == "F64" else np.asarray(found, np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    found = np.take(_table(dtype), np.frombuffer(data, np.uint8), axis=0, mode="clip")
    return found.ravel()


@lru_cache(maxsize=8)
def _table(dtype: str) -> Floats:
    """The value of every byte; the two values, for FP4."""
    byte = np.arange(256, dtype=np.uint32)
    if dtype == "F8_E5M2":  # the upper half of an F16
        with np.errstate(invalid="ignore"):
            return (byte << 8).astype(np.uint16).view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        exponent, mantissa = (byte >> 3) & 15, (byte & 7).astype(np.float32)
        size = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * np.exp2(exponent.astype(np.float32) - 7))
        size = size.astype(np.float32)
        size[byte & 127 == 127] = np.nan
        return np.where(byte & 128, -size, size)
    if dtype == "F8_E8M0":
        powers = (byte << 23).view(np.float32)
        powers[0], powers[255] = 2.0**-127, np.nan
        return powers
    assert dtype == "F4"
    signed = np.array([*_FP4, *(-value for value in _FP4)], np.float32)
    return np.stack([signed[byte & 15], signed[byte >> 4]], axis=1)


def rounded_into(values: Floats, dtype: str, out: memoryview) -> None:
    """Round values (F32 or F64) to a float dtype, into flat bytes."""
    flat = values.ravel()
    if dtype == "BF16":
        np.frombuffer(out, "<u2")[:] = _to_bf16(flat)
        return
    into = np.frombuffer(out, _NATIVE[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        into[:] = flat
    unordered = np.isnan(flat)
    if unordered.any():
        into[unordered] = np.nan


def _to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    bits = _odd(values) if values.dtype == np.float64 else np.ascontiguousarray(values).view(np.uint32)
    with np.errstate(over="ignore"):
        found = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    unordered = np.isnan(values)
    if unordered.any():
        found[unordered] = 0x7FC0
    return found


def _odd(values: Floats) -> npt.NDArray[np.uint32]:
    """F64 as bits of F32, cut off, and made odd where that lost anything: so that it may be rounded once more."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
        bits = near.view(np.uint32)
        lost = near.astype(np.float64) != values
    away = np.abs(near.astype(np.float64)) > np.abs(values)
    bits = bits - away.astype(np.uint32)
    found: npt.NDArray[np.uint32] = bits | lost.astype(np.uint32)
    return found


def expanded(scale: Floats, axis: int, first: int, low: int, high: int, block: int) -> Floats:
    """The factors of indices `low .. high` along an axis, where `scale` has one for every block, from `first` on."""
    return np.take(scale, np.arange(low, high) // block - first, axis=axis)


_INTEGERS = {"I8": "b", "U8": "B", "I16": "h", "U16": "H", "I32": "i", "U32": "I", "I64": "q", "U64": "Q", "BOOL": "?"}


def element(value: float, dtype: str) -> bytes:
    """One element of a dtype that has this value, rounded where the dtype is a float of 16 bits or more.

    Raises LayoutMismatchError: the dtype has no such value.
    """
    if dtype in FLOATS:
        out = bytearray(DTYPES[dtype].bits // 8)
        rounded_into(np.array([value], np.float64), dtype, memoryview(out))
        return bytes(out)
    if dtype in _INTEGERS:
        with suppress(struct.error, ValueError, OverflowError):
            found = struct.pack(f"<{_INTEGERS[dtype]}", int(value))
            if struct.unpack(f"<{_INTEGERS[dtype]}", found) == (value,):  # no fraction, and a BOOL is 0 or 1
                return found
    if dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0"):
        table, number = _table(dtype), float(value)
        same = (table == number) & (np.signbit(table) == np.signbit(number)) & (number == value)
        if same.any():
            return bytes([int(np.argmax(same))])
    raise LayoutMismatchError(f"{dtype} has no value {value!r}")
