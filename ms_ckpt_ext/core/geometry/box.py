"""A layout that is not a strategy: which box of a parameter one rank has, said outright."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.errors import ArgumentTypeError, LayoutMismatchError, integer


class _Extents(NamedTuple):
    global_shape: Shape
    offsets: Shape
    shape: Shape


class Box(_Extents):
    """What one rank has of a parameter.

    Attributes:
        global_shape: of the whole parameter.
        offsets: where the rank's slice begins, on every axis.
        shape: of the slice.

    Raises:
        ArgumentTypeError: at birth, for what is no tuple of ints.
        LayoutMismatchError: at birth, when the slice is no box of the parameter.

    >>> Box((8, 4), (6, 0), (2, 4)).region
    Region(start=(6, 0), stop=(8, 4))
    """

    __slots__ = ()

    def __new__(cls, global_shape: Sequence[int], offsets: Sequence[int], shape: Sequence[int]) -> Box:
        given = {"global_shape": global_shape, "offsets": offsets, "shape": shape}
        box = super().__new__(cls, *(_extents(name, value) for name, value in given.items()))
        inside = all(low + extent <= whole for whole, low, extent in zip(*box))
        if len({*map(len, box)}) > 1 or not inside:
            raise LayoutMismatchError(
                f"a box of shape {list(box.shape)} at {list(box.offsets)} does not lie inside a parameter of shape "
                f"{list(box.global_shape)}: check the offsets, one number an axis"
            )
        return box

    @property
    def region(self) -> Optional[Region]:
        """The box; None when it has no elements."""
        if not all(self.shape):
            return None
        return Region(self.offsets, tuple(low + extent for low, extent in zip(self.offsets, self.shape)))

    @property
    def parts(self) -> Optional[Shape]:
        """Into how many equal slices every axis is cut, where this box is one of them; None where it is none."""
        if not all(self.shape):
            return None
        even = all(not whole % extent and not low % extent for whole, low, extent in zip(*self))
        return tuple(whole // extent for whole, extent in zip(self.global_shape, self.shape)) if even else None

    @property
    def cell(self) -> tuple[int, ...]:
        """Its place among the slices of `parts`."""
        return tuple(low // extent for low, extent in zip(self.offsets, self.shape))


def _extents(name: str, value: Sequence[int]) -> Shape:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise ArgumentTypeError(f"{name} of a Box must be a tuple of ints, got {value!r:.60}")
    return tuple(integer(extent, f"{name} of a Box", 0) for extent in value)
