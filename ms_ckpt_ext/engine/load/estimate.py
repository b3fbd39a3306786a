"""A cooperative load on paper: the demands of every rank of a strategy, from headers or from shapes alone.

What a real load learns from its ranks (`engine.load.session`) follows here from the target's strategy; the plan is the
same. A source that exists only as shapes lies in files as a save would lay it out: one file per rank, every slice of
the rank's stage, in the order of the safetensors library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np

from ms_ckpt_ext import log
from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import ALL_RANKS, Demand, ExchangeLimits, Grid, Ways
from ms_ckpt_ext.core.exchange.parts import Located
from ms_ckpt_ext.core.exchange.plan import ExchangeTable, decide
from ms_ckpt_ext.core.exchange.ragged import Ints
from ms_ckpt_ext.core.exchange.totals import RankTotals, tally
from ms_ckpt_ext.core.geometry.array import FILE_ORDER, Shape
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, whole
from ms_ckpt_ext.core.geometry.strategy import ACCUMULATED_GRADIENT_PREFIX, Strategy
from ms_ckpt_ext.core.planning.io_units import Direct, Extent, Landing, Limits, Stored, Target, Task, Unit
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.profiles import bucket_for, left_by, limits_for
from ms_ckpt_ext.engine.load.session import choose_way
from ms_ckpt_ext.engine.load.taking import Taking, all_side_by_side
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.unlisted.alike import SMALL, Depth, compared
from ms_ckpt_ext.engine.unlisted.proven import refuse_own
from ms_ckpt_ext.errors import LayoutMismatchError, StrategyError, UsageError, some

Stages = tuple[tuple[int, Layout], ...]
_UNITS = 6000
"""Pieces of I/O that are planned to find the gaps of direct mode: about a second's worth."""


@dataclass(frozen=True)
class PlannedSource:
    """A checkpoint that a load would read.

    Attributes:
        tensors: name -> parameter, in the order of the demands.
        located: where their bytes lie.
        everywhere: names that every rank takes whole (training scalars and the like).
        own: names of what each rank has of its own, side by side: cell r of it is what rank r takes.
        files: how many files there are.
    """

    tensors: Mapping[str, SourceTensor]
    located: Located
    everywhere: frozenset[str]
    files: int
    own: frozenset[str] = frozenset()


class DirectReads(NamedTuple):
    """Bytes that every rank reads in direct mode, gaps that are read over included.

    `counted` is how many ranks were planned for it; where not all were, the others are taken to have gaps like them.
    """

    nbytes: Ints
    counted: int


class DryRun(NamedTuple):
    """A load that was planned but not made."""

    table: ExchangeTable
    tally: RankTotals
    limits: ExchangeLimits
    direct: DirectReads


def of_catalog(catalog: Catalog, target: Optional[Strategy] = None) -> PlannedSource:
    """A checkpoint whose headers were read. Of what lies outside its strategy samples are compared.

    What differs by rank every rank of `target` takes of its own file, as the load does.

    Raises:
        CoverageError: a pipeline stage has no file.
        LayoutMismatchError: something differs by rank, and the target's ranks are not the source's.
        FormatError, StorageError: a file cannot be read.
    """
    catalog.require(catalog.absent)
    catalog = compared(catalog, depth=Depth.SAMPLES)
    tensors = {**catalog.tensors, **{n: t for n, t in catalog.extras.items() if n not in catalog.tensors}}
    everywhere = frozenset(catalog.extras) - set(catalog.tensors)
    own = _own(catalog, target)
    return PlannedSource({**tensors, **own}, catalog.stored, everywhere, len(catalog.files), frozenset(own))


def _own(catalog: Catalog, target: Optional[Strategy]) -> dict[str, SourceTensor]:
    """What ranks have of their own; small things are left out, with a warning, where nobody can take them."""
    if not catalog.own:
        return {}
    firsts = [target.ranks_of(stage)[0] for stage in range(target.stages)] if target else []
    if target and all(Taking(catalog, target, rank, target.world).stands for rank in firsts):
        sides = (all_side_by_side(catalog, name, target.world) for name in catalog.own)
        return {key: tensor for side in sides for key, tensor in side.items()}
    small = [name for name, held in catalog.own.items() if catalog.nbytes(held) <= SMALL * len(held.files)]
    if small:
        log.warning("not planned, for they differ by rank, and the target has other ranks: %s", some(small))
    refuse_own(catalog, catalog.own.keys() - set(small), "no rank of another job can take it")
    return {}


def of_shapes(metas: Iterable[TensorMeta], strategy: Optional[Strategy]) -> PlannedSource:
    """A checkpoint that is known by its parameters' full shapes; without a strategy it is one merged file.

    Raises:
        UsageError: the strategy lists none of the parameters.
        LayoutMismatchError: a parameter cannot be cut as the strategy says.
    """
    shared = _Shared(strategy.devices_per_stage if strategy else 1)
    tensors: dict[str, SourceTensor] = {}
    everywhere = set()
    first_stage: dict[str, int] = {}
    for meta in metas:
        listed = strategy.layouts.get(meta.name, {}) if strategy else {}
        stages = tuple((stage, layout.over(len(meta.shape))) for stage, layout in listed.items())
        if not stages:
            everywhere.update([meta.name] if strategy else [])
            stages = ((0, whole(len(meta.shape))),)
        first_stage[meta.name] = stages[0][0]
        tensors[meta.name] = SourceTensor(meta, meta.name, _placements(meta, stages, shared))
    if strategy and len(everywhere) == len(tensors):
        raise UsageError(
            f"{strategy.origin} lists none of the {len(tensors)} parameters given by shape: check that both are of the "
            "same model"
        )
    located, at = {}, 0
    for name in sorted(tensors, key=lambda n: (first_stage[n], -FILE_ORDER[tensors[n].meta.dtype.name], n)):
        meta = tensors[name].meta
        nbytes = meta.dtype.nbytes(_size(meta.shape, tensors[name].placements[0].parts))
        located[name] = Extent(at, nbytes)
        at += nbytes
    return PlannedSource(tensors, located, frozenset(everywhere), strategy.world if strategy else 1)


def demands_under(source: PlannedSource, target: Optional[Strategy]) -> list[Demand]:
    """What the ranks of `target` want; without one, a single rank wants everything whole.

    Raises:
        StrategyError: a pipeline stage is missing, or the strategy and the source have no parameter in common.
        LayoutMismatchError: a parameter cannot be cut as the strategy says.
    """
    if target is not None:
        target.check_complete()
    shared = _Shared(target.devices_per_stage if target else 1)
    demands, common = [], 0
    for name, tensor in source.tensors.items():
        if name in source.own:
            (placement,) = tensor.placements
            demands += [Demand(name, tensor, (Grid(placement.parts, placement.expected),))] * all(tensor.meta.shape)
            continue
        stages = _stages(name, tensor, source, target)
        common += bool(stages) and name not in source.everywhere
        if stages and all(tensor.meta.shape):
            _check_cut(tensor.meta, stages)
            demands.append(Demand(name, tensor, tuple(Grid(*grid) for grid in shared.grids(stages))))
    if not common:
        raise StrategyError(
            f"{target.origin if target else 'the target'} lists no parameter of the checkpoint: check that both are "
            "of the same model"
        )
    return demands


def _stages(name: str, tensor: SourceTensor, source: PlannedSource, target: Optional[Strategy]) -> Stages:
    if target is None:
        return ((0, whole(len(tensor.meta.shape))),)
    listed = target.layouts.get(name)
    if listed is None and name in source.everywhere:
        everywhere = Layout((target.devices_per_stage,), ((),) * len(tensor.meta.shape))
        return tuple((stage, everywhere) for stage in range(target.stages))
    if listed is None or name.startswith(ACCUMULATED_GRADIENT_PREFIX):
        return ()
    return tuple((stage, layout.over(len(tensor.meta.shape))) for stage, layout in sorted(listed.items()))


def dry_run(
    source: PlannedSource,
    target: Optional[Strategy],
    options: LoadOptions,
    hardware: Optional[Hardware] = None,
    ways: Optional[Ways] = None,
) -> DryRun:
    """Plan a load of every rank of `target`, and count it.

    Args:
        hardware: the machine: it says how large a round may be, how ranks lie on servers, and what is faster. Without
            one the ranks are on one host.
        ways: how bytes may travel; by default groups of ranks gather where the machine has devices.

    Raises:
        CoverageError: a region that a rank needs is in no file.
        LayoutMismatchError: a parameter cannot be cut as a strategy says.
        StrategyError: see `demands_under`.
    """
    world = target.world if target else 1
    demands = demands_under(source, target)
    call, left = (int(hardware.call), left_by(demands, world, hardware)) if hardware else (0, 0)
    limits = limits_for(demands, world, bucket_for(options.bucket_bytes, call, left))
    if hardware is None:
        table = decide(demands, world, source.located, limits, ways=ways or ALL_RANKS)
    else:
        table = choose_way(demands, world, source.located, limits, None, ways or ways_of(world, hardware), hardware)
    counts = tally(table, options.prefetch)
    return DryRun(table, counts, limits, _direct_reads(demands, counts.wanted, source.located))


def ways_of(world: int, hardware: Hardware) -> Ways:
    """How bytes may travel between `world` ranks that lie on servers one after another."""
    size = hardware.ranks_per_host
    servers = tuple(rank // size for rank in range(world)) if world > size else ()
    return Ways(groups=hardware.memory > 0, servers=servers)


def _direct_reads(demands: Sequence[Demand], wanted: Ints, located: Located) -> DirectReads:
    limits = Limits()
    units = 1 + len(demands) + int(wanted.max(initial=0)) // limits.tile
    count = min(len(wanted), max(4, _UNITS // units))
    ranks = [n * len(wanted) // count for n in range(count)]
    cells = _Cells(ranks)
    stored = (lambda _, name: (located[name],)) if isinstance(located, Mapping) else located
    nbytes = np.array([_direct_bytes(demands, cells, rank, stored, limits) for rank in ranks], np.int64)
    if count == len(wanted):
        return DirectReads(nbytes, count)
    gaps = nbytes.sum() / max(int(wanted[ranks].sum()), 1)
    return DirectReads((wanted * gaps).astype(np.int64), count)


def _direct_bytes(demands: Sequence[Demand], cells: _Cells, rank: int, stored: Stored, limits: Limits) -> int:
    """Bytes that one rank reads: the reads of a direct load, planned."""
    tasks = []
    for demand in demands:
        for grid in demand.grids:
            cell = cells.of(grid).get(rank)
            if cell is not None:
                box = grid.region(cell, demand.tensor.meta.shape)
                landing = Landing(0, (Extent(0, demand.tensor.meta.dtype.nbytes(box.size)),))
                tasks.append(Task(demand.tensor, (Target(box, (landing,)),)))
    return sum(_unit_bytes(unit) for unit in schedule(tasks, stored, limits))


def _unit_bytes(unit: Unit) -> int:
    return unit.length if isinstance(unit, Direct) else sum(read.nbytes for read in unit.reads)


class _Cells:
    """Which cell each of some ranks wants; looked up once for grids that parameters share."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._ranks = frozenset(ranks)
        self._known: dict[int, dict[int, Cell]] = {}

    def of(self, grid: Grid) -> dict[int, Cell]:
        """Rank -> cell."""
        found = self._known.get(id(grid.ranks))
        if found is None:
            wanted = ((rank, cell) for cell, ranks in grid.ranks.items() for rank in ranks)
            found = self._known[id(grid.ranks)] = {rank: cell for rank, cell in wanted if rank in self._ranks}
        return found


class _Shared:
    """Cells and their ranks, one mapping for all parameters that are cut alike."""

    def __init__(self, devices_per_stage: int) -> None:
        self._devices = devices_per_stage
        self._known: dict[Stages, tuple[tuple[Shape, dict[Cell, tuple[int, ...]]], ...]] = {}

    def grids(self, stages: Stages) -> tuple[tuple[Shape, dict[Cell, tuple[int, ...]]], ...]:
        """For every number of slices, the global ranks of every cell."""
        found = self._known.get(stages)
        if found is None:
            merged: dict[Shape, dict[Cell, tuple[int, ...]]] = {}
            for stage, layout in stages:
                cells, base = merged.setdefault(layout.parts, {}), stage * self._devices
                for cell, ranks in layout.holders.items():
                    cells[cell] = cells.get(cell, ()) + tuple(base + rank for rank in ranks)
            found = self._known[stages] = tuple(merged.items())
        return found


def _check_cut(meta: TensorMeta, stages: Stages) -> None:
    for _, layout in stages:
        try:
            layout.slice_shape(meta.shape)
        except LayoutMismatchError as error:
            raise LayoutMismatchError(f"parameter {meta.name!r}: {error}") from error


def _placements(meta: TensorMeta, stages: Stages, shared: _Shared) -> tuple[Placement, ...]:
    _check_cut(meta, stages)
    return tuple(Placement(parts, ranks, ranks) for parts, ranks in shared.grids(stages))


def _size(shape: Shape, parts: Shape) -> int:
    size = 1
    for extent, count in zip(shape, parts):
        size *= extent // count
    return size
