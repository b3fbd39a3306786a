"""Where the slices of a rank lie, in one address space, which an exchange treats as places in a file.

Addresses are the same on all ranks: a name has as much room as its largest slice anywhere. Between two names there is
a gap, so no read crosses the end of a slice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT
from ms_ckpt_ext.core.geometry.layout import slice_shape
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import SourceTensor


class HeldPlace(NamedTuple):
    """A place in a slice: the name under which it is held, and the byte."""

    name: str
    offset: int


class Addresses:
    """The addresses of some parameters of the source."""

    def __init__(self, tensors: Iterable[SourceTensor]) -> None:
        sizes: dict[str, int] = {}
        for tensor in tensors:
            for stored in tensor.stored():
                sizes[stored.stored_name] = max(sizes.get(stored.stored_name, 0), _largest(stored))
        self._extents: dict[str, Extent] = {}
        at = 0
        for name, nbytes in sizes.items():
            self._extents[name] = Extent(at, nbytes)
            at += nbytes + ALIGNMENT - nbytes % ALIGNMENT
        self._names, self._starts = list(sizes), [extent.offset for extent in self._extents.values()]

    def stored(self, _file: int, name: str) -> tuple[Extent, ...]:
        """Where a slice lies, on any rank that holds it; in the form in which planning looks a tensor up in a file."""
        return (self._extents[name],)

    def at(self, number: int) -> HeldPlace:
        """What lies at an address."""
        place = bisect_right(self._starts, number) - 1
        return HeldPlace(self._names[place], number - self._starts[place])


def _largest(tensor: SourceTensor) -> int:
    shape = tensor.meta.shape
    return max(tensor.meta.dtype.nbytes(prod(slice_shape(shape, placement.parts))) for placement in tensor.placements)
