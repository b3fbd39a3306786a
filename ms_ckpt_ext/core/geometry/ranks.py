"""Which source ranks one target rank needs, from the layouts alone: no file is looked at, no shape is known.

Of replicas the one is named whose place in the device matrix is most like the target rank's own, as MindSpore does: so
all target ranks together name different replicas, and a rank whose slice stays as it is names itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import lcm
from typing import Optional

from ms_ckpt_ext.core.geometry.layout import Cell, Layout, same_slices, whole
from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.errors import StrategyError


def needed_ranks(source: Strategy, target: Strategy, rank: int) -> set[int]:
    """Global ranks of the source that hold, together, all that `rank` wants under `target`.

    Of a parameter that several source stages have, one stage suffices: the one that adds the fewest ranks, the first
    of several.

    Raises:
        StrategyError: the strategies give a parameter another number of axes.
    """
    wanted = {name: target.layout(name, rank) for name in target.names_of(rank) if name in source.layouts}
    return _ranks(source, wanted, rank % target.devices_per_stage)


def needed_for_whole(source: Strategy) -> set[int]:
    """Global ranks that hold every parameter of the source, together: what one device needs."""
    return _ranks(source, dict.fromkeys(source.layouts), 0)


def _ranks(source: Strategy, wanted: Mapping[str, Optional[Layout]], local: int) -> set[int]:
    """Ranks for parameters by name -> the layout of the one that wants them; None for whole."""
    found: set[int] = set()
    held: dict[tuple[Layout, Optional[Layout]], frozenset[int]] = {}
    for name in sorted(wanted, key=lambda name: len(source.layouts[name])):
        by_stage = []
        for stage, layout in source.layouts[name].items():
            key = layout, wanted[name]
            if key not in held:
                held[key] = frozenset(_needed(*_same_axes(name, *key), local))
            by_stage.append({stage * source.devices_per_stage + each for each in held[key]})
        found |= min(by_stage, key=lambda ranks: len(ranks - found))
    return found


def _same_axes(name: str, one: Layout, two: Optional[Layout]) -> tuple[Layout, Layout]:
    """Two layouts of a parameter, of the same number of axes."""
    two = two or whole(len(one.tensor_map))
    ndim = min(len(one.tensor_map), len(two.tensor_map))
    one, two = one.over(ndim), two.over(ndim)
    if len(one.tensor_map) != len(two.tensor_map):
        raise StrategyError(
            f"parameter {name!r} has {len(one.tensor_map)} axes under the source's strategy and {len(two.tensor_map)} "
            "under the target's; check that both belong to the same model"
        )
    return one, two


def same_cut(source: Strategy, target: Strategy) -> bool:
    """Whether both are of the same ranks, and each rank has the same slice of every parameter that both list.

    Optimizer shards are left aside. False when they have no parameter in common, for then nothing tells.
    """
    both = source.layouts.keys() & target.layouts.keys()
    jobs = {(job.devices_per_stage, job.stages) for job in (source, target)}
    return bool(both) and len(jobs) == 1 and all(_alike(source.layouts[n], target.layouts[n]) for n in both)


def _alike(one: Mapping[int, Layout], two: Mapping[int, Layout]) -> bool:
    return one.keys() == two.keys() and all(_same_boxes(layout, two[stage]) for stage, layout in one.items())


@lru_cache(maxsize=4096)
def _same_boxes(one: Layout, two: Layout) -> bool:
    return same_slices(Layout(one.dev_matrix, one.tensor_map), Layout(two.dev_matrix, two.tensor_map))


def _needed(layout: Layout, wanted: Layout, local: int) -> Iterator[int]:
    """Ranks within a stage, one for every cell of `layout` that meets the box of `local` under `wanted`."""
    shape = tuple(lcm(a, b) for a, b in zip(layout.parts, wanted.parts))
    box = wanted.region(local % wanted.devices, shape)
    ranges = [
        range(low * parts // extent, (high * parts - 1) // extent + 1)
        for low, high, parts, extent in zip(box.start, box.stop, layout.parts, shape)
    ]
    for cell in product(*ranges):
        yield _nearest(layout, cell, local % layout.devices)


def _nearest(layout: Layout, cell: Cell, local: int) -> int:
    """The holder of a cell that shares most coordinates with a rank; the lowest of several."""
    own = layout.coordinates(local)
    return min(layout.holders[cell], key=lambda rank: sum(a != b for a, b in zip(layout.coordinates(rank), own)))
