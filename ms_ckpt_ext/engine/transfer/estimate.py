"""A transfer that is only planned: the ranks' plan, from shapes and the strategies of both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.cost import Hardware
from ms_ckpt_ext.core.exchange.demand import Demand, Grid, Ways
from ms_ckpt_ext.core.exchange.ragged import Ints
from ms_ckpt_ext.core.exchange.totals import tally
from ms_ckpt_ext.core.geometry.layout import Cell
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.core.planning.pieces import stored_whole
from ms_ckpt_ext.engine.load.estimate import DirectReads, DryRun, PlannedSource, demands_under, ways_of
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.load.profiles import bucket_for, left_by, limits_for
from ms_ckpt_ext.engine.load.session import choose_way
from ms_ckpt_ext.engine.transfer.addresses import Addresses
from ms_ckpt_ext.engine.transfer.prepare import require_held
from ms_ckpt_ext.engine.transfer.wanted import by_own_placement


class DryTransfer(NamedTuple):
    """A transfer that was planned but not made: `done`, and the bytes that every rank takes from its own memory."""

    done: DryRun
    kept: Ints


def dry_transfer(
    source: PlannedSource,
    trained: Optional[Strategy],
    target: Optional[Strategy],
    options: LoadOptions,
    hardware: Hardware,
    apart: bool = False,
) -> DryTransfer:
    """Plan a transfer between all ranks of two strategies, and count it.

    Args:
        source: the parameters, by shapes.
        trained: what cuts the source; None for one rank.
        hardware: the machine, as in `engine.load.estimate.dry_run`.
        apart: the target's ranks come after the source's; else rank i of both sides is the same.

    Raises: as `engine.load.estimate.dry_run`.
    """
    givers = trained.world if trained else 1
    takers = target.world if target else 1
    world = givers + takers if apart else max(givers, takers)
    everywhere = {
        name: stored_whole(source.tensors[name].meta, tuple(range(givers))) for name in sorted(source.everywhere)
    }
    demands = demands_under(replace(source, tensors={**source.tensors, **everywhere}), target)
    demands = [each for demand in _moved(demands, givers if apart else 0) for each in by_own_placement(demand)]
    ways = Ways(gather=False, servers=ways_of(world, hardware).servers)
    left = left_by(demands, world, hardware)
    limits = limits_for(demands, world, bucket_for(options.bucket_bytes, int(hardware.call), left))
    require_held(demands)
    stored = Addresses(demand.tensor for demand in demands).stored
    table = choose_way(demands, world, stored, limits, None, ways, hardware, in_memory=True)
    counts = tally(table, 0)
    wanted = _wanted(demands, world)
    done = DryRun(table, replace(counts, wanted=wanted), limits, DirectReads(wanted, world))
    return DryTransfer(done, wanted - counts.wanted)


def _moved(demands: Sequence[Demand], by: int) -> list[Demand]:
    """The demands with all ranks raised by `by`; mappings that were one object stay one."""
    known: dict[int, Mapping[Cell, tuple[int, ...]]] = {}

    def moved(ranks: Mapping[Cell, tuple[int, ...]]) -> Mapping[Cell, tuple[int, ...]]:
        if id(ranks) not in known:
            known[id(ranks)] = {cell: tuple(rank + by for rank in some) for cell, some in ranks.items()}
        return known[id(ranks)]

    if not by:
        return list(demands)
    return [d._replace(grids=tuple(Grid(g.parts, moved(g.ranks), g.uneven) for g in d.grids)) for d in demands]


def _wanted(demands: Sequence[Demand], world: int) -> Ints:
    """Bytes of every rank's own slices."""
    wanted = np.zeros(world, np.int64)
    for demand in demands:
        meta = demand.tensor.meta
        for grid in demand.grids:
            for cell, ranks in grid.ranks.items():
                wanted[list(ranks)] += meta.dtype.nbytes(grid.region(cell, meta.shape).size)
    return wanted
