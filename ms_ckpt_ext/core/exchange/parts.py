"""The parts of an exchange: what is cut out of which source slice, and which sets of ranks want what of it.

1. *Cutting.* Every distinct target box is located in the source; what lands where is grouped by source slice, and the
   needed rows of a slice are cut into parts. This depends on shapes only, so it is computed once for all parameters
   that share them, and once for all slices that are cut alike.
2. *Rows.* A geometry with the sets of ranks that want it: shared by all parameters of a pipeline stage that are alike.
3. *Parts.* One for every row of every parameter: the row, and where its bytes lie. Replicas of a slice are
   alternatives; consecutive parts stay with one of them for four chunks, so reads stay long.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid, Servers
from ms_ckpt_ext.core.exchange.ragged import Ints, Sets, joined, mixed, narrow, starts
from ms_ckpt_ext.core.exchange.slices import Cut, Cutting, Travelling, cutting_of, travelling
from ms_ckpt_ext.core.geometry.layout import slice_shape
from ms_ckpt_ext.core.planning.io_units import Extent, Stored, ranges
from ms_ckpt_ext.core.planning.pieces import SourceTensor

Located = Union[Stored, Mapping[str, Extent]]
"""Where stored tensors lie: a function of file and name; or name -> its one stretch, where all files are alike and
nothing is computed."""


@dataclass(frozen=True)
class Rows:
    """All rows in use, one after another.

    Attributes:
        cuts: the box of every row.
        nbytes: of it.
        whole: the number of the set of all ranks that want some of it, if there are several and all want all of it;
            else -1.
        start: its deliveries, as a ragged table.
        ranks: for every delivery the number of the set of ranks that get it.
        moved: for every delivery its bytes.
        interest: rows with the same number are wanted by the same sets of ranks, and most of all by the same.
    """

    cuts: Sequence[Cut]
    nbytes: Ints
    whole: Ints
    start: Ints
    ranks: Ints
    moved: Ints
    interest: Ints


@dataclass(frozen=True)
class Parts:
    """All parts, as columns, in the order of file and offset.

    Attributes:
        demand: number of the parameter in the list of demands.
        row: number of its row.
        file: number of the file it is read from; where that is memory, a number in `holders`.
        offset: where it begins in that file.
        scattered: number of a part -> its extents, where it does not lie in one stretch.
        rows: the rows.
        sets: the sets of ranks.
        holders: where files are the memory of ranks: sets of them that hold the same, any of which may give it.
    """

    demand: Ints
    row: Ints
    file: Ints
    offset: Ints
    scattered: Mapping[int, tuple[Extent, ...]]
    rows: Rows
    sets: Sets
    holders: Sequence[tuple[int, ...]]

    @property
    def in_memory(self) -> bool:
        """Files are ranks' memory, of which nothing need be read."""
        return bool(self.holders)


def parts_of(
    demands: Sequence[Demand], world: int, stored: Located, limits: ExchangeLimits, servers: Optional[Servers] = None
) -> Parts:
    """Cut everything that is wanted, and that has to travel or to be read.

    Args:
        servers: of the ranks, where files are their memory; None where files are files.

    Raises:
        CoverageError: a region that a rank needs is in no file.
    """
    return _Builder(world, stored, limits, servers).build(demands)


class _Made(NamedTuple):
    """A demand, cut: number of its unit of rows, for every part the number of the set of files that hold its slot."""

    geometry: Cutting
    unit: int
    replicas: Ints
    names: tuple[str, ...]
    """The stored name of every slot, or of all."""


class _Builder:
    def __init__(self, world: int, stored: Located, limits: ExchangeLimits, servers: Optional[Servers]) -> None:
        self._world, self._stored, self._limits, self._servers = world, stored, limits, servers
        self._keys: dict[Hashable, int] = {}
        self._key_of: dict[int, int] = {}
        self._geometries: dict[Hashable, Cutting] = {}
        self._sets, self._replicas, self._holders = Sets(), Sets(), Sets()
        self._set_numbers: dict[int, Ints] = {}
        self._files_of: dict[Hashable, Ints] = {}
        self._units: dict[Hashable, int] = {}
        self._unit_list: list[tuple[Cutting, Ints]] = []
        self._unit_start = [0]
        self._left: dict[Hashable, Travelling] = {}
        self._alike: dict[Hashable, _Made] = {}

    def build(self, demands: Sequence[Demand]) -> Parts:
        made = [self._demand(number, demand) for number, demand in enumerate(demands)]
        rows, start = self._rows(), starts([len(m.geometry.cuts) for m in made])
        wide = narrow(int(start[-1]))  # there are as many parts as rows at least
        first = np.array(self._unit_start)[[m.unit for m in made]] - start[:-1]
        row = np.repeat(first.astype(wide), np.diff(start))
        row += np.arange(start[-1], dtype=wide)
        row = row.astype(narrow(self._unit_start[-1]))
        file = self._choose(made, rows.nbytes, row)
        offset, scattered = self._offsets(made, start, file)
        order = np.lexsort((offset, file)).astype(np.int32)
        row, file, offset = row[order], file[order], offset[order]
        demand = np.repeat(np.arange(len(demands), dtype=narrow(len(demands))), np.diff(start))[order]
        back = {int(number): at for at, number in enumerate(order)} if scattered else {}
        scattered = {back[number]: extents for number, extents in scattered.items()}
        return Parts(demand, row, file, offset, scattered, rows, self._sets, tuple(self._holders.members))

    def _demand(self, number: int, demand: Demand) -> _Made:
        tensor = demand.tensor
        if tensor.recipe is not None:
            return self._cut(number, demand)
        same = (id(demand.grids), id(tensor.placements), tensor.meta.dtype, tensor.meta.shape)
        known = self._alike.get(same)
        if known is None:
            known = self._alike[same] = self._cut(number, demand)
        return _Made(known.geometry, known.unit, known.replicas, (tensor.stored_name,))

    def _cut(self, number: int, demand: Demand) -> _Made:
        tensor = demand.tensor
        key: Hashable = number
        if tensor.recipe is None:
            placements = tuple((p.parts, self._number(p.holders, tuple(p.holders))) for p in tensor.placements)
            grids = tuple((g.parts, self._number(g.ranks, _sizes(g))) for g in demand.grids)
            key = (tensor.meta.dtype.name, tensor.meta.shape, placements, grids)
        geometry = self._geometries.get(key)
        if geometry is None:
            geometry = self._geometries[key] = cutting_of(demand, self._world, self._limits)
        replicas = self._files(key, geometry, tensor)
        wanted = joined([self._numbers_of(grid) for grid in demand.grids])
        if self._servers is not None:
            key = (key, wanted.tobytes(), replicas.tobytes())
            geometry, wanted, files = self._travelling(key, geometry, wanted, replicas)
            replicas = self._replicas.numbers(files).astype(np.int32)
        names = (tensor.stored_name,) if tensor.recipe is None else tuple(slot.name for slot in geometry.slots)
        return _Made(geometry, self._unit(key, geometry, wanted), replicas[geometry.slot], names)

    def _number(self, mapping: object, content: Hashable) -> int:
        """A number for the content of a mapping."""
        found = self._key_of.get(id(mapping))
        if found is None:
            found = self._key_of[id(mapping)] = self._keys.setdefault(content, len(self._keys))
        return found

    def _unit(self, key: Hashable, geometry: Cutting, wanted: Ints) -> int:
        """The number of the rows that this geometry has with these ranks; `wanted`: the set of them of every target."""
        unit = self._units.setdefault((key, wanted.tobytes()), len(self._unit_list))
        if unit == len(self._unit_list):
            self._unit_list.append((geometry, wanted[geometry.target].astype(np.int32)))
            self._unit_start.append(self._unit_start[-1] + len(geometry.cuts))
        return unit

    def _numbers_of(self, grid: Grid) -> Ints:
        found = self._set_numbers.get(id(grid.ranks))
        if found is None:
            found = self._set_numbers[id(grid.ranks)] = self._sets.numbers(grid.ranks.values())
        return found

    def _files(self, key: Hashable, geometry: Cutting, tensor: SourceTensor) -> Ints:
        """For every slot the number of the set of files that hold it."""
        where = (key, *(id(placement.holders) for placement in tensor.placements))
        found = self._files_of.get(where)
        if found is None:
            by_shape = {slice_shape(tensor.meta.shape, p.parts): p.holders for p in tensor.placements}
            made = tensor.recipe is not None
            holders = (slot.files if made else by_shape[slot.shape][slot.cell] for slot in geometry.slots)
            found = self._files_of[where] = self._replicas.numbers(holders).astype(np.int32)
        return found

    def _travelling(self, key: Hashable, geometry: Cutting, wanted: Ints, replicas: Ints) -> Travelling:
        """What of a demand is left when ranks take what they hold themselves, see `core.exchange.demand`."""
        found = self._left.get(key)
        if found is None:
            assert self._servers is not None
            files = [self._replicas.members[number] for number in replicas.tolist()]
            sets = self._sets, self._holders
            found = self._left[key] = travelling(geometry, wanted, files, self._servers, *sets)
        return found

    def _rows(self) -> Rows:
        cuts = [cut for geometry, _ in self._unit_list for cut in geometry.cuts]
        start = starts(joined([np.diff(geometry.start) for geometry, _ in self._unit_list]))
        ranks = joined([ranks for _, ranks in self._unit_list], np.int32)
        moved = joined([geometry.moved for geometry, _ in self._unit_list])
        longest = max((cut.nbytes for cut in cuts), default=0)
        nbytes = joined([geometry.nbytes for geometry, _ in self._unit_list], narrow(longest))
        whole = np.fromiter(self._whole(cuts, start, ranks), np.int32, len(cuts))
        return Rows(cuts, nbytes, whole, start, ranks, moved, _interest(start, ranks, moved))

    def _whole(self, cuts: Sequence[Cut], start: Ints, ranks: Ints) -> Iterator[int]:
        known: dict[tuple[int, ...], int] = {}
        bounds, numbers = start.tolist(), ranks.tolist()
        for cut, low, high in zip(cuts, bounds, bounds[1:]):
            if not cut.whole:
                yield -1
                continue
            sets = tuple(numbers[low:high])
            if sets not in known:
                union = tuple(sorted({rank for number in sets for rank in self._sets.members[number]}))
                known[sets] = self._sets.number(union) if len(union) > 1 else -1
            yield known[sets]

    def _choose(self, made: Sequence[_Made], nbytes: Ints, row: Ints) -> Ints:
        """A file for every part: those with the same alternatives take them in turns of four chunks."""
        members = self._replicas.members
        replicas = joined([m.replicas for m in made], narrow(len(members)))
        most = max(map(max, members), default=0)
        file = np.array([first for first, *_ in members], narrow(most))[replicas]
        several = np.flatnonzero(np.array([len(files) > 1 for files in members], bool)[replicas])
        order = several[np.argsort(replicas[several], kind="stable")]
        for group in np.split(order, np.flatnonzero(np.diff(replicas[order])) + 1):
            if len(group):
                files = np.array(members[replicas[group[0]]], file.dtype)
                before = np.cumsum(nbytes[row[group]]) - nbytes[row[group]]
                file[group] = files[before // (4 * self._limits.chunk) % len(files)]
        return file

    def _offsets(self, made: Sequence[_Made], start: Ints, file: Ints) -> tuple[Ints, Mapping[int, tuple[Extent, ...]]]:
        """Where every part begins in its file, and the extents of those that do not lie in one stretch."""
        offset = joined([m.geometry.offset for m in made], self._offset_type())
        scattered: dict[int, tuple[Extent, ...]] = {}
        if isinstance(self._stored, Mapping):
            begin = np.array([self._stored[name].offset for m in made for name in m.names], offset.dtype)
            offset += np.repeat(begin, np.diff(start))
            return offset, scattered
        begins, files = [], iter(file.tolist())
        slots: dict[int, list[int]] = {}
        for one, low in zip(made, start.tolist()):
            geometry, names = one.geometry, one.names
            slot_of = slots.get(id(geometry)) or slots.setdefault(id(geometry), geometry.slot.tolist())
            known: dict[tuple[int, int], tuple[Extent, ...]] = {}
            for number, slot in enumerate(slot_of):
                at = (slot % len(names), next(files))
                extents = known.get(at) or known.setdefault(at, self._stored(at[1], names[at[0]]))
                first, *others = extents
                if others:
                    cut = geometry.cuts[number]
                    lying = tuple(ranges(extents, cut.offset, cut.nbytes))
                    begins.append(lying[0].offset - cut.offset)
                    if len(lying) > 1:
                        scattered[low + number] = lying
                else:
                    begins.append(first.offset)
        return offset + np.array(begins, np.int64), scattered

    def _offset_type(self) -> Any:
        if not isinstance(self._stored, Mapping):
            return np.int64
        return narrow(max((extent.offset + extent.length for extent in self._stored.values()), default=0))


def _sizes(grid: Grid) -> Hashable:
    return tuple(grid.ranks), tuple(map(len, grid.ranks.values()))


def _interest(start: Ints, ranks: Ints, moved: Ints) -> Ints:
    """Rows wanted by the same sets of ranks, and mostly by the same of them, get the same number."""
    most = np.repeat(np.maximum.reduceat(moved, start[:-1]), np.diff(start))
    wanted = mixed(ranks)
    content = wanted + np.where(2 * moved >= most, mixed(wanted), np.uint64(0))
    distinct, interest = np.unique(np.add.reduceat(content, start[:-1]), return_inverse=True)
    narrowed: Ints = interest.astype(narrow(len(distinct)))
    return narrowed
