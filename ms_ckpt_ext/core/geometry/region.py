"""Boxes: half-open, axis-aligned, integer.

Everything this package does is the intersection of two sets of boxes. A region is a box in the index space of one
parameter; `start` is inside, `stop` is outside; an empty intersection is `None`. A scalar is the box of no axes,
which holds one element.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple, Optional

Shape = tuple[int, ...]


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
        return cls((0,) * len(shape), shape)

    @property
    def shape(self) -> Shape:
        """Extent of every axis."""
        return tuple(high - low for low, high in zip(self.start, self.stop))

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


class View(NamedTuple):
    """A target box seen otherwise than row-major: element `x` lies at `offset + sum(x * strides)`, in elements."""

    offset: int
    strides: Shape
