"""Which source ranks one target rank needs, from the layouts alone: no file is looked at, no shape is known.

Of replicas the one is named whose place in the device matrix is most like the target rank's own, as MindSpore does: so
all target ranks together name different replicas, and a rank whose slice stays as it is names itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import lcm
from typing import Callable

from ms_ckpt_ext.core.layout import Cell, Layout, whole
from ms_ckpt_ext.core.strategy import Strategy


def needed_ranks(source: Strategy, target: Strategy, rank: int) -> set[int]:
    """Global ranks of the source that hold, together, all that `rank` wants under `target`.

    Of a parameter that several source stages have, all of these stages are named.
    """
    found: set[int] = set()
    local: dict[tuple[Layout, Layout], set[int]] = {}
    for name in target.names_of(rank):
        wanted = target.layout(name, rank)
        for stage, layout in source.layouts.get(name, {}).items():
            assert wanted is not None  # names_of() says so
            key = layout, wanted
            if key not in local:
                local[key] = set(_needed(layout, wanted, rank % target.devices_per_stage))
            found.update(stage * source.devices_per_stage + each for each in local[key])
    return found


def needed_for_whole(source: Strategy) -> set[int]:
    """Global ranks that hold every parameter of the source, together: what one device needs."""
    found: set[int] = set()
    for stages in source.layouts.values():
        for stage, layout in stages.items():
            needed = _needed(layout, whole(len(layout.parts)), 0)
            found.update(stage * source.devices_per_stage + each for each in needed)
    return found


def same_cut(source: Strategy, target: Strategy) -> bool:
    """Whether both are of the same ranks, and each rank has the same slice of every parameter that both list.

    Optimizer shards are left aside. False when they have no parameter in common, for then nothing tells.
    """
    both = source.layouts.keys() & target.layouts.keys()
    jobs = ((job.devices_per_stage, job.stages) for job in (source, target))
    known: dict[tuple[Layout, Layout], bool] = {}

    def same(one: Layout, two: Layout) -> bool:
        if (one, two) not in known:
            plain = [Layout(layout.dev_matrix, layout.tensor_map) for layout in (one, two)]
            known[one, two] = plain[0].parts == plain[1].parts and plain[0].cells == plain[1].cells
        return known[one, two]

    return bool(both) and len(set(jobs)) == 1 and all(_alike(source, target, name, same) for name in both)


def _alike(source: Strategy, target: Strategy, name: str, same: Callable[[Layout, Layout], bool]) -> bool:
    one, two = source.layouts[name], target.layouts[name]
    return one.keys() == two.keys() and all(same(layout, two[stage]) for stage, layout in one.items())


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
