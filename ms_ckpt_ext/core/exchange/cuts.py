"""What is needed of one source slice, cut into boxes that are read and exchanged as they are.

A box is contiguous in the slice, so it is one stretch of a file, and small enough that all copies of it fit a round.
It depends on shapes only: slices that are needed alike share their cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, ExchangeLimits
from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.region import Region, Shape, View
from ms_ckpt_ext.core.geometry.strided import byte_box, strides_of
from ms_ckpt_ext.core.planning.io_units import cut

_CRUMB = 64 << 10
"""Bytes; a box is not cut at a seam of the targets into parts shorter than this."""


class Share(NamedTuple):
    """A box of a part that lands somewhere; `need` counts the needs of the slice, the others are as of `Placing`."""

    need: int
    in_part: Region
    in_target: Region
    target_shape: Shape
    view: Optional[View]
    into: int
    nbytes: int


class Cut(NamedTuple):
    """A box of a slice, contiguous in it: shape in elements, offset and length in bytes, what lands where.

    `whole`: who wants some of it wants all of it. `dtype`: of its elements.
    """

    shape: Shape
    offset: int
    nbytes: int
    shares: tuple[Share, ...]
    whole: bool
    dtype: DType


class Placing(NamedTuple):
    """A need: the box of the slice, where it lands in a target box, of which shape, seen through which view.

    `into` is 0 for the box that a rank wants, else it counts those that are computed with: see `Assembly.number`.
    """

    in_source: Region
    in_target: Region
    target_shape: Shape
    view: Optional[View]
    into: int = 0


@lru_cache(maxsize=8192)
def cuts_of(
    shape: Shape, needs: tuple[Placing, ...], receivers: int, everyone: bool, dtype: DType, limits: ExchangeLimits
) -> tuple[Cut, ...]:
    """Cut the needed rows of a slice of `shape`.

    Args:
        receivers: ranks that need something of it, each counted as often as it does.
        everyone: these are all ranks.
    """
    alike = everyone and all(need[0] == needs[0][0] for need in needs)
    most = max(ALIGNMENT, min(limits.chunk, limits.least // (1 if alike else max(1, receivers))))
    found = []
    for box in _boxes(needs, shape, dtype, most):
        offset, nbytes = _linear(box, shape, dtype)
        shares = tuple(_shares(needs, box, dtype))
        whole = all(share.in_part.shape == box.shape for share in shares)
        found.append(Cut(box.shape, offset, nbytes, shares, whole, dtype))
    return tuple(found)


def _boxes(needs: Sequence[Placing], shape: Shape, dtype: DType, most: int) -> Iterator[Region]:
    """What is needed of a slice, cut into boxes that are contiguous there: of at most `most` bytes, and, where that
    makes no crumbs, at the rows where other ranks' needs begin, so that few boxes have several readers to choose from
    who each want a part only."""
    hull = _rows(needs, shape)
    free = next((axis for axis, extent in enumerate(hull.shape) if extent > 1), None)
    if free is None:
        yield hull
        return
    row = dtype.nbytes(prod(hull.shape[free + 1 :]))
    edges = [hull.start[free]]
    for edge in sorted({e for in_source, *_ in needs for e in (in_source.start[free], in_source.stop[free])}):
        if min(edge - edges[-1], hull.stop[free] - edge) * row >= _CRUMB:
            edges.append(edge)
    for low, high in zip(edges, [*edges[1:], hull.stop[free]]):
        part = Region(
            (*hull.start[:free], low, *hull.start[free + 1 :]), (*hull.stop[:free], high, *hull.stop[free + 1 :])
        )
        yield from cut(part, 0, dtype, most)


def _rows(needs: Sequence[Placing], shape: Shape) -> Region:
    """The hull of what is needed, widened to whole rows so that any cut of it is contiguous in the slice."""
    start = list(map(min, zip(*(in_source.start for in_source, *_ in needs))))
    stop = list(map(max, zip(*(in_source.stop for in_source, *_ in needs))))
    free = next((axis for axis in range(len(shape)) if stop[axis] - start[axis] > 1), len(shape))
    return Region((*start[: free + 1], *(0 for _ in shape[free + 1 :])), (*stop[: free + 1], *shape[free + 1 :]))


def _linear(box: Region, shape: Shape, dtype: DType) -> tuple[int, int]:
    """Byte offset and length of a contiguous box of a slice."""
    byte_shape, byte_region = byte_box(shape, box, dtype)
    return sum(low * s for low, s in zip(byte_region.start, strides_of(byte_shape))), byte_region.size


def _shares(needs: Iterable[Placing], box: Region, dtype: DType) -> Iterator[Share]:
    for number, (in_source, in_target, target_shape, view, into) in enumerate(needs):
        common = in_source.intersect(box)
        if common is None:
            continue
        moved = common.relative_to(in_source.start)
        start = tuple(a + b for a, b in zip(in_target.start, moved.start))
        stop = tuple(a + b for a, b in zip(in_target.start, moved.stop))
        nbytes = dtype.nbytes(common.size)
        yield Share(number, common.relative_to(box.start), Region(start, stop), target_shape, view, into, nbytes)
