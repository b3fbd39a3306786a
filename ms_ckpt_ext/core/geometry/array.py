"""Arrays as planning knows them: the type of their elements, and boxes in them.

1. Bytes are moved, not values, so a dtype is a name and a width. One table has every name that a checkpoint may use.
2. Everything this package does is the intersection of two sets of boxes: half-open, axis-aligned, integer. A region is
   a box in the index space of one parameter; `start` is inside, `stop` is outside; an empty intersection is `None`. A
   scalar is the box of no axes, which holds one element.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from operator import sub
from typing import NamedTuple, Optional

Shape = tuple[int, ...]


class DType(NamedTuple):
    """One element type.

    Attributes:
        name: the safetensors name, unique ("F32").
        bits: width of one element in bits; below 8 for packed types.
        mindspore: MindSpore's name in `.ckpt` files and messages ("Float32"); "" where MindSpore has none.
        family: "float", "int", "uint", "bool", "complex" or "packed"; casts stay inside a family.
    """

    name: str
    bits: int
    mindspore: str
    family: str

    def nbytes(self, elements: int) -> int:
        """Bytes that `elements` elements occupy (rounded up for packed types)."""
        return -(-elements * self.bits // 8)


# In the order of the safetensors library's own enumeration, which decides where a tensor lies in a file it writes.
_TABLE = (
    DType("BOOL", 8, "Bool", "bool"),
    DType("F4", 4, "", "packed"),
    DType("F6_E2M3", 6, "", "packed"),
    DType("F6_E3M2", 6, "", "packed"),
    DType("U8", 8, "UInt8", "uint"),
    DType("I8", 8, "Int8", "int"),
    DType("F8_E5M2", 8, "Float8E5M2", "float"),
    DType("F8_E4M3", 8, "Float8E4M3FN", "float"),
    DType("F8_E8M0", 8, "", "float"),
    DType("F8_E4M3FNUZ", 8, "", "float"),
    DType("F8_E5M2FNUZ", 8, "", "float"),
    DType("I16", 16, "Int16", "int"),
    DType("U16", 16, "UInt16", "uint"),
    DType("F16", 16, "Float16", "float"),
    DType("BF16", 16, "BFloat16", "float"),
    DType("I32", 32, "Int32", "int"),
    DType("U32", 32, "UInt32", "uint"),
    DType("F32", 32, "Float32", "float"),
    DType("C64", 64, "Complex64", "complex"),
    DType("F64", 64, "Float64", "float"),
    DType("I64", 64, "Int64", "int"),
    DType("U64", 64, "UInt64", "uint"),
    # Not in safetensors: exist in `.ckpt` files only, so their place in the order is free.
    DType("C128", 128, "Complex128", "complex"),
    DType("STR", 32, "str", "str"),  # UTF-32 text, one code point an element
)

DTYPES: dict[str, DType] = {d.name: d for d in _TABLE}
BY_MINDSPORE: dict[str, DType] = {d.mindspore: d for d in _TABLE if d.mindspore}
INT4 = "Int4"
"""MindSpore's packed type: two 4-bit numbers a byte, kept as an int8 tensor with this word in the file's metadata."""
FILE_ORDER: dict[str, int] = {d.name: i for i, d in enumerate(_TABLE)}
"""Position of a dtype in the safetensors library's enumeration: larger comes first in a file."""


class _Corners(NamedTuple):
    start: Shape
    stop: Shape


class Region(_Corners):
    """A non-empty box `start[i] <= x[i] < stop[i]`.

    Raises:
        ValueError: at birth, when the two corners have different lengths, or an axis is negative or empty.

    >>> Region((0, 4), (2, 8)).shape
    (2, 4)
    >>> Region((0,), (4,)).intersect(Region((4,), (6,))) is None
    True
    """

    __slots__ = ()

    def __new__(cls, start: Shape, stop: Shape) -> Region:
        if len(start) != len(stop):
            raise ValueError(f"corners of different rank: start {start}, stop {stop}")
        for low, high in zip(start, stop):
            if not 0 <= low < high:
                raise ValueError(f"not a box: start {start}, stop {stop}")
        return super().__new__(cls, start, stop)

    @classmethod
    def whole(cls, shape: Shape) -> Region:
        """The box of a full array of `shape`, every extent at least 1."""
        return _whole(shape)

    @property
    def shape(self) -> Shape:
        """Extent of every axis."""
        return tuple(map(sub, self.stop, self.start))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this box in an array."""
        return tuple(slice(low, high) for low, high in zip(self.start, self.stop))

    def intersect(self, other: Region) -> Optional[Region]:
        """The common box, or `None` when there is none."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(low >= high for low, high in zip(start, stop)):
            return None
        return Region(start, stop)

    def relative_to(self, origin: Shape) -> Region:
        """This box as seen from `origin`, which lies at or before its start on every axis."""
        return Region(
            tuple(low - o for low, o in zip(self.start, origin)), tuple(high - o for high, o in zip(self.stop, origin))
        )

    def __str__(self) -> str:
        return "[" + ", ".join(f"{low}:{high}" for low, high in zip(self.start, self.stop)) + "]"


@lru_cache(maxsize=1024)
def _whole(shape: Shape) -> Region:
    return Region((0,) * len(shape), shape)


class View(NamedTuple):
    """A target box seen otherwise than row-major: element `x` lies at `offset + sum(x * strides)`, in elements."""

    offset: int
    strides: Shape
