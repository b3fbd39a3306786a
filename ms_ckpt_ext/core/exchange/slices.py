"""What lands where, by source slice: a demand cut into rows, from shapes alone.

Every distinct target box is located in the source; what lands where is grouped by source slice, and the needed rows of
a slice are cut into boxes that are contiguous there (`core.exchange.cuts`). Which ranks want them is not known here, so
parameters that are cut alike share this.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from ms_ckpt_ext.core.exchange.cuts import Cut, Placing, cuts_of
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, boxes_moved
from ms_ckpt_ext.core.exchange.holders import InMemory, legs
from ms_ckpt_ext.core.exchange.ragged import Ints, Sets, starts
from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.layout import Cell
from ms_ckpt_ext.core.geometry.region import Shape


class _Need(NamedTuple):
    """What lands where, of one source slice; `target` is the number of a cell among those of all grids."""

    target: int
    receivers: int
    placing: Placing


class Slot(NamedTuple):
    """A source slice: its tensor's name in the files, shape, cell, the files that hold it, and its dtype."""

    name: str
    shape: Shape
    cell: Cell
    files: tuple[int, ...]
    dtype: DType


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
        for cut in cuts_of(source.shape, placings, receivers, receivers == world, source.dtype, limits):
            slot.append(number)
            cuts.append(cut)
            counts.append(len(cut.shares))
            targets += [needs[share.need].target for share in cut.shares]
            moved += [share.nbytes for share in cut.shares]
    offset = np.array([cut.offset for cut in cuts], np.int64)
    nbytes = np.array([cut.nbytes for cut in cuts], np.int64)
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
                    slot = Slot(name, piece.source_shape, piece.cell, files, box.dtype)
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
    geometry: Cutting, wanted: Ints, files: list[tuple[int, ...]], memory: InMemory, sets: Sets, holders: Sets
) -> Travelling:
    """A demand without what ranks hold themselves.

    Args:
        wanted: the number in `sets` of the ranks that want every target.
        files: of every slot.
        holders: sets of ranks that give what they have in memory; the n-th counts as file `memory.first + n`.
    """
    left = _Left(geometry)
    bounds = geometry.start.tolist()
    for row, (low, high) in enumerate(zip(bounds, bounds[1:])):
        there = files[int(geometry.slot[row])]
        entries = [(entry, int(wanted[geometry.target[entry]])) for entry in range(low, high)]
        if there[0] < memory.first:
            left.add(row, there, entries)
            continue
        by_holders: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        having = tuple(file - memory.first for file in there)
        for entry, number in entries:
            for leg in legs(sets.members[number], having, memory.servers):
                by_holders.setdefault(leg.holders, []).append((entry, sets.number(leg.receivers)))
        for giving, some in by_holders.items():
            left.add(row, (memory.first + holders.number(giving),), some)
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
