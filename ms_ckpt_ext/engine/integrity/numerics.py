"""Two arrays of one element type: which elements differ, and by how much. One array: what in it is not a number.

Elements differ when their bits do: -0.0 is not 0.0, and two NaN with different payloads differ. The distance of
two numbers is given in two ways: as the absolute difference, in the type's values, and in units in the last place
(ulp), the number of steps from one to the next representable number that lie between them. -0.0 and 0.0 are 0 ulp
apart. Where either is a NaN or infinite there is no absolute difference; where either is a NaN, no ulp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Optional, TypeVar, Union

import numpy as np
import numpy.typing as npt

from ms_ckpt_ext.core.geometry.array import DType
from ms_ckpt_ext.transport.base import Bytes

Number = Union[int, float]
_Size = TypeVar("_Size", bound=float)
_CHUNK = 128 << 10  # of either array at once: both stay in a core's cache, and the memory of a report is bounded


class _Float(NamedTuple):
    """A binary format: bits of exponent and mantissa, bias, and how it encodes what is no finite number."""

    exponent: int
    mantissa: int
    bias: int
    special: str = "ieee"
    """"ieee": all-ones exponent; "fn": all ones but the sign is NaN; "fnuz": -0 is NaN; "e8m0": all ones is NaN."""


_FLOATS = {
    "F64": _Float(11, 52, 1023),
    "F32": _Float(8, 23, 127),
    "BF16": _Float(8, 7, 127),
    "F16": _Float(5, 10, 15),
    "F8_E5M2": _Float(5, 2, 15),
    "F8_E4M3": _Float(4, 3, 7, "fn"),
    "F8_E4M3FNUZ": _Float(4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": _Float(5, 2, 16, "fnuz"),
    "F8_E8M0": _Float(8, 0, 127, "e8m0"),
}
_PARTS = {"C64": "F32", "C128": "F64"}


class Spot(NamedTuple):
    """An element that differs: its number in row-major order, and both values as text (bits added for NaN)."""

    at: int
    a: str
    b: str


@dataclass(frozen=True)
class Differences:
    """Differences of two arrays.

    Attributes:
        count: elements whose bits differ (bytes, for types narrower than a byte).
        first: the first of them.
        max_abs: largest absolute difference, over pairs of finite numbers; None when there is no such pair.
        max_ulp: largest distance in units in the last place, over pairs without NaN; None for what is no float.
        nans: differing pairs in which either is a NaN.
    """

    count: int = 0
    first: tuple[Spot, ...] = ()
    max_abs: Optional[Number] = None
    max_ulp: Optional[int] = None
    nans: int = 0

    def plus(self, other: Differences, spots: int) -> Differences:
        """Both together, with the first `spots` elements."""
        return Differences(
            self.count + other.count,
            tuple(sorted((*self.first, *other.first))[:spots]),
            _larger(self.max_abs, other.max_abs),
            _larger(self.max_ulp, other.max_ulp),
            self.nans + other.nans,
        )


def _larger(a: Optional[_Size], b: Optional[_Size]) -> Optional[_Size]:
    return b if a is None else a if b is None else max(a, b)


SAME = Differences()


def differences(a: Bytes, b: Bytes, dtype: DType, spots: int = 3) -> Differences:
    """Compare two flat byte arrays of equal length that hold elements of `dtype`."""
    if equal_bytes(a, b):
        return SAME
    found = SAME
    for start in range(0, a.size, _CHUNK):
        one, two = a[start : start + _CHUNK], b[start : start + _CHUNK]
        if not equal_bytes(one, two):
            found = found.plus(_tally(one, two, dtype, start, spots), spots)
    return found


def equal_bytes(a: Bytes, b: Bytes) -> bool:
    """Whether two flat byte arrays of equal length hold the same."""
    whole = a.size - a.size % 8
    return bool((a[:whole].view(np.uint64) == b[:whole].view(np.uint64)).all()) and bool((a[whole:] == b[whole:]).all())


def _tally(a: Bytes, b: Bytes, dtype: DType, start: int, spots: int) -> Differences:
    if dtype.bits < 8:
        at = np.flatnonzero(a != b)
        first = tuple(Spot(start + int(i), f"0x{a[i]:02x}", f"0x{b[i]:02x}") for i in at[:spots])
        return Differences(at.size, first)
    part = _PARTS.get(dtype.name, dtype.name)
    per = 2 if dtype.name in _PARTS else 1
    width = dtype.bits // 8 // per
    one, two = a.view(f"u{width}"), b.view(f"u{width}")
    lanes = np.flatnonzero(one != two)
    elements = np.unique(lanes // per) if per > 1 else lanes
    base = start // (dtype.bits // 8)
    first = tuple(Spot(base + int(i), _text(one, i, per, dtype), _text(two, i, per, dtype)) for i in elements[:spots])
    if part in _FLOATS:
        return _floats(one[lanes], two[lanes], part, elements.size, first)
    return Differences(elements.size, first, _integers(one[lanes], two[lanes], dtype))


def _floats(a: npt.NDArray[Any], b: npt.NDArray[Any], name: str, count: int, first: tuple[Spot, ...]) -> Differences:
    x, y = values(a, name), values(b, name)
    nan = np.isnan(x) | np.isnan(y)
    finite = np.isfinite(x) & np.isfinite(y)
    with np.errstate(over="ignore"):  # the difference of two float64 may be infinite
        max_abs = float(np.abs(x[finite] - y[finite]).max()) if finite.any() else None
    steps = _ulps(a[~nan], b[~nan], name)
    return Differences(count, first, max_abs, int(steps.max()) if steps.size else None, int(nan.sum()))


def _ulps(a: npt.NDArray[Any], b: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Steps between numbers of one format: numbers of one sign are in the order of their bits."""
    if _FLOATS[name].special == "e8m0":
        apart: npt.NDArray[Any] = np.maximum(a, b) - np.minimum(a, b)
        return apart
    sign = 1 << (a.dtype.itemsize * 8 - 1)
    one, two = (bits.astype(np.uint64) & np.uint64(sign - 1) for bits in (a, b))
    same = (a ^ b) < sign
    return np.where(same, np.maximum(one, two) - np.minimum(one, two), one + two)


def _integers(a: npt.NDArray[Any], b: npt.NDArray[Any], dtype: DType) -> int:
    """Exact also where a difference is beyond the type: flipping the sign bit puts signed numbers in order."""
    flip = np.array(1 << (dtype.bits - 1) if dtype.family == "int" else 0, a.dtype)
    one, two = a ^ flip, b ^ flip
    return int((np.maximum(one, two) - np.minimum(one, two)).max())


def values(bits: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Floats of a format, given as unsigned integers, as float64."""
    if name in ("F64", "F32", "F16"):
        floats = bits.view(f"f{bits.dtype.itemsize}")
    elif name == "BF16":
        floats = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        numbers: npt.NDArray[Any] = _decoded(name)[bits]
        return numbers
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one, which is fine here
        wide: npt.NDArray[Any] = floats.astype(np.float64)
        return wide


@cache
def _decoded(name: str) -> npt.NDArray[Any]:
    """The 256 numbers of a format of one byte."""
    return np.array([_decode(byte, _FLOATS[name]) for byte in range(256)])


def _decode(byte: int, form: _Float) -> float:
    if form.special == "e8m0":
        return float("nan") if byte == 0xFF else 2.0 ** (byte - form.bias)
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte & 0x7F) >> form.mantissa, byte & ((1 << form.mantissa) - 1)
    top = (1 << form.exponent) - 1
    if form.special == "ieee" and exponent == top:
        return float("nan") if mantissa else sign * float("inf")
    if (form.special == "fn" and byte & 0x7F == 0x7F) or (form.special == "fnuz" and byte == 0x80):
        return float("nan")
    fraction = mantissa / (1 << form.mantissa)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - form.bias)
    return sign * (1 + fraction) * 2.0 ** (exponent - form.bias)


def _text(lanes: npt.NDArray[Any], index: int, per: int, dtype: DType) -> str:
    if per > 1:
        part = _PARTS[dtype.name]
        return " + ".join(_number(lanes[per * index + n], part) + "i" * n for n in range(per))
    return _number(lanes[index], dtype.name)


def _number(bits: np.unsignedinteger[Any], name: str) -> str:
    if name in _FLOATS:
        value = float(values(np.array([bits]), name)[0])
        short = (
            repr(value) if name in ("F64", "BF16") or name.startswith("F8") else str(np.array(bits).view(_NUMPY[name]))
        )
        return f"nan (0x{int(bits):0{bits.dtype.itemsize * 2}x})" if value != value else short
    if name.startswith("I"):
        return str(int(np.array(bits).view(f"i{bits.dtype.itemsize}")))
    return str(bool(bits)) if name == "BOOL" else str(int(bits))


_NUMPY = {"F32": np.float32, "F16": np.float16}


class Odd(NamedTuple):
    """How many elements are NaN, and how many infinite."""

    nans: int = 0
    infinities: int = 0


def odd_numbers(data: Bytes, dtype: DType) -> Odd:
    """Count what is no finite number in a flat byte array; types that are no floats have none."""
    name = _PARTS.get(dtype.name, dtype.name)
    form = _FLOATS.get(name)
    if form is None:
        return Odd()
    nans = infinities = 0
    width = (1 + form.exponent + form.mantissa) // 8 or 1
    bits = data.view(f"u{width}")
    for start in range(0, bits.size, _CHUNK // width):
        chunk = bits[start : start + _CHUNK // width]
        if form.special != "ieee":
            nans += int(np.isnan(_decoded(name)[chunk]).sum())
            continue
        infinite = ((1 << form.exponent) - 1) << form.mantissa
        magnitude = chunk & chunk.dtype.type((1 << (form.exponent + form.mantissa)) - 1)
        if magnitude.max(initial=0) >= infinite:
            nans += int((magnitude > infinite).sum())
            infinities += int((magnitude == infinite).sum())
    return Odd(nans, infinities)
