"""What lands where, by source slice: a demand cut into rows, from shapes alone.

Every distinct target box is located in the source; what lands where is grouped by source slice, and the needed rows of
a slice are cut into boxes that are read and exchanged as they are. A box is contiguous in the slice, so it is one
stretch of a file, and small enough that all copies of it fit a round. Which ranks want them is not known here, so
parameters that are cut alike share this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, Demand, ExchangeLimits, Servers, boxes_moved, legs
from ms_ckpt_ext.core.exchange.ragged import Ints, Sets, starts
from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
from ms_ckpt_ext.core.geometry.layout import Cell
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
    `early`: it is to be read before what else its parameter is made of.
    """

    shape: Shape
    offset: int
    nbytes: int
    shares: tuple[Share, ...]
    whole: bool
    dtype: DType
    early: bool


class Placing(NamedTuple):
    """A need: the box of the slice, where it lands in a target box, of which shape, seen through which view.

    `into` is 0 for the box that a rank wants, else it counts those that are computed with: see `Assembly.number`.
    """

    in_source: Region
    in_target: Region
    target_shape: Shape
    view: Optional[View]
    into: int


@lru_cache(maxsize=8192)
def cuts_of(
    shape: Shape,
    needs: tuple[Placing, ...],
    receivers: int,
    everyone: bool,
    dtype: DType,
    limits: ExchangeLimits,
    early: bool = False,
) -> tuple[Cut, ...]:
    """Cut the needed rows of a slice of `shape`.

    Args:
        receivers: ranks that need something of it, each counted as often as it does.
        everyone: these are all ranks.
        early: see `Cut`.
    """
    alike = everyone and len({need.in_source for need in needs}) == 1
    most = max(ALIGNMENT, min(limits.chunk, limits.least // (1 if alike else max(1, receivers))))
    found = []
    for box in _boxes(needs, shape, dtype, most):
        offset, nbytes = _linear(box, shape, dtype)
        shares = tuple(_shares(needs, box, dtype))
        if not shares:
            continue  # it lies between what is needed
        whole = all(share.in_part.shape == box.shape for share in shares)
        found.append(Cut(box.shape, offset, nbytes, shares, whole, dtype, early))
    return tuple(found)


def _boxes(needs: Sequence[Placing], shape: Shape, dtype: DType, most: int) -> Iterator[Region]:
    """What is needed of a slice, cut into boxes of at most `most` bytes that are contiguous there.

    They are cut as well at the rows where other ranks' needs begin, unless the parts would be too short: so there are
    few boxes of which several ranks want a part each.
    """
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


class _Need(NamedTuple):
    """What lands where, of one source slice; `target` is the number of a cell among those of all grids."""

    target: int
    receivers: int
    placing: Placing


class Slot(NamedTuple):
    """A source slice: its tensor's name in the files, shape, cell, the files that hold it, and its dtype.

    `kept`: it is needed whole before what else is computed with it, see `Assembly`.
    """

    name: str
    shape: Shape
    cell: Cell
    files: tuple[int, ...]
    dtype: DType
    kept: bool


class Cutting(NamedTuple):
    """How a demand is cut. `slot`, `cuts`, `offset` and `nbytes` by row; `start`, `target` and `moved`: deliveries."""

    slots: tuple[Slot, ...]
    slot: Ints
    cuts: tuple[Cut, ...]
    offset: Ints
    nbytes: Ints
    start: Ints
    target: Ints
    moved: Ints


def cutting_of(demand: Demand, world: int, limits: ExchangeLimits) -> Cutting:
    """Cut a demand. Raises CoverageError: a region that a rank needs is in no file."""
    slices = _needs(demand)
    slot, cuts, counts, targets, moved = [], [], [], [], []
    for number, (source, needs) in enumerate(slices.items()):
        receivers = _receivers(needs)
        placings = tuple(need.placing for need in needs)
        for made in cuts_of(source.shape, placings, receivers, receivers == world, source.dtype, limits, source.kept):
            slot.append(number)
            cuts.append(made)
            counts.append(len(made.shares))
            targets += [needs[share.need].target for share in made.shares]
            moved += [share.nbytes for share in made.shares]
    offset = np.array([made.offset for made in cuts], np.int64)
    nbytes = np.array([made.nbytes for made in cuts], np.int64)
    columns = (np.array(slot, np.int64), tuple(cuts), offset, nbytes, starts(counts))
    return Cutting(tuple(slices), *columns, np.array(targets, np.int64), np.array(moved, np.int64))


def _needs(demand: Demand) -> dict[Slot, list[_Need]]:
    """What every source slice is needed for; of what is computed, what that takes."""
    slices: dict[Slot, list[_Need]] = {}
    target_number = 0
    for grid in demand.grids:
        for cell, ranks in grid.ranks.items():
            for box in boxes_moved(demand.tensor, grid.region(cell, demand.tensor.meta.shape)):
                for piece, files, name, _ in box.pieces:
                    slot = Slot(name, piece.source_shape, piece.cell, files, box.dtype, box.kept)
                    placing = Placing(piece.in_source, piece.in_target, box.shape, piece.view, box.into)
                    slices.setdefault(slot, []).append(_Need(target_number, len(ranks), placing))
            target_number += 1
    return slices


def _receivers(needs: Sequence[_Need]) -> int:
    """How many ranks need something of a slice; what one needs in several pieces is not counted for each."""
    if len({need.target for need in needs}) == len(needs):
        return sum(need.receivers for need in needs)
    wanted: dict[int, int] = {}
    for need in needs:
        wanted[need.target] = wanted.get(need.target, 0) + need.placing.in_source.size
    receivers = {need.target: need.receivers for need in needs}
    start = map(min, zip(*(need.placing.in_source.start for need in needs)))
    stop = map(max, zip(*(need.placing.in_source.stop for need in needs)))
    hull = prod(high - low for low, high in zip(start, stop))
    return sum(count * -(-wanted[target] // hull) for target, count in receivers.items())


class Travelling(NamedTuple):
    """What of a demand has to travel or to be read.

    Attributes:
        geometry: the rows that are left, with the deliveries that are left.
        wanted: the number of the set of ranks of every delivery.
        files: for every slot the files that serve it.
    """

    geometry: Cutting
    wanted: Ints
    files: tuple[tuple[int, ...], ...]


def travelling(
    geometry: Cutting, wanted: Ints, files: list[tuple[int, ...]], servers: Servers, sets: Sets, holders: Sets
) -> Travelling:
    """A demand without what ranks hold themselves.

    Args:
        wanted: the number in `sets` of the ranks that want every target.
        files: of every slot.
        holders: sets of ranks that give what they have in memory; the n-th counts as file n.
    """
    left = _Left(geometry)
    bounds = geometry.start.tolist()
    for row, (low, high) in enumerate(zip(bounds, bounds[1:])):
        there = files[int(geometry.slot[row])]
        entries = [(entry, int(wanted[geometry.target[entry]])) for entry in range(low, high)]
        by_holders: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for entry, number in entries:
            for leg in legs(sets.members[number], there, servers):
                by_holders.setdefault(leg.holders, []).append((entry, sets.number(leg.receivers)))
        for giving, some in by_holders.items():
            left.add(row, (holders.number(giving),), some)
    return left.made()


class _Left:
    """Some rows of a geometry, with some of their deliveries, as a geometry of its own."""

    def __init__(self, geometry: Cutting) -> None:
        self._geometry = geometry
        self._slots: dict[tuple[int, tuple[int, ...]], int] = {}
        self._rows: list[int] = []
        self._slot: list[int] = []
        self._cuts: list[Cut] = []
        self._entries: list[tuple[int, int]] = []

    def add(self, row: int, files: tuple[int, ...], entries: list[tuple[int, int]]) -> None:
        """A row that some files serve, with some of its deliveries: which, and the number of the ranks of each."""
        cut, first = self._geometry.cuts[row], int(self._geometry.start[row])
        shares = tuple(cut.shares[entry - first] for entry, _ in entries)
        self._rows.append(row)
        self._slot.append(self._slots.setdefault((int(self._geometry.slot[row]), files), len(self._slots)))
        self._cuts.append(cut._replace(shares=shares))
        self._entries += entries

    def made(self) -> Travelling:
        """All of it; a delivery is a target of its own."""
        before, row = self._geometry, np.array(self._rows, np.int64)
        entry = np.array([entry for entry, _ in self._entries], np.int64)
        geometry = Cutting(
            tuple(before.slots[slot] for slot, _ in self._slots),
            np.array(self._slot, np.int64),
            tuple(self._cuts),
            before.offset[row],
            before.nbytes[row],
            starts(len(cut.shares) for cut in self._cuts),
            np.arange(len(entry)),
            before.moved[entry],
        )
        wanted = np.array([number for _, number in self._entries], np.int64)
        return Travelling(geometry, wanted, tuple(files for _, files in self._slots))
