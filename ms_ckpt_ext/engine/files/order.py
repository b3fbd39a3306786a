"""In which order parameters stand in the `.ckpt` files of a re-cut: that in which MindSpore's functions write them.

`transform_checkpoints` takes names as they come in the source's files, the highest rank's file first;
`transform_checkpoint_by_rank` takes files as its map has them. What both strategies list comes before all else. From
safetensors, pipeline stages that become one are done one after another, and one device's parameters are written in the
order of the target's strategy, as `load_distributed_checkpoint` writes them.

Safetensors files have an order of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional

from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.source.rank_boxes import RankBox
from ms_ckpt_ext.formats.table import CKPT

Files = Sequence[Sequence[int]]
"""Numbers of source files, in groups that are written one after another; () for the order of the target's strategy."""


def arranged(catalog: Catalog, listed: Iterable[RankBox], others: Iterable[RankBox], files: Files) -> list[RankBox]:
    """What one file of the target holds, in order; `others` are what its strategy does not list."""
    places: dict[str, tuple[int, int]] = {}
    for number, group in enumerate(files):
        for file in group:
            for name in catalog.files[file].tensors:
                places.setdefault(name, (number, len(places)))

    def place(found: tuple[RankBox, bool]) -> tuple[int, bool, int]:
        box, unlisted = found
        group, at = places.get(box.tensor.stored_name, (len(files), 0))
        return group, unlisted, at

    told = [(box, box.name not in catalog.tensors) for box in listed]
    return [box for box, _ in sorted([*told, *((box, True) for box in others)], key=place)]


def of_ranks(catalog: Catalog, ranks: Iterable[int]) -> Files:
    """The files of these ranks, in this order; the only file there is where files are not those of ranks."""
    return (tuple(catalog.ranks[rank] for rank in ranks if rank in catalog.ranks) or (0,),)


def of_transform(catalog: Catalog, kind: str, target: Optional[Strategy], stage_alone: bool, rank: int) -> Files:
    """As `transform_checkpoints` reads them for a rank of the target.

    Args:
        kind: the source's format.
        stage_alone: the source is one stage of a pipeline, of which MindSpore writes that part of the target only.
    """
    source, stages = catalog.strategy, 1 if target is None else target.stages
    if source is None:
        return of_ranks(catalog, []) if kind == CKPT.name or stages == 1 else ()
    needed = _stages(source, target, rank)
    descending = [each for each in sorted(catalog.ranks, reverse=True) if source.stage_of(each) in needed]
    if kind == CKPT.name:
        return of_ranks(catalog, reversed(descending) if stage_alone else descending)
    if source.world == 1 and stages > 1:
        return ()
    if source.stages > 1 and stages == 1:
        by_stage = ([each for each in descending if source.stage_of(each) == stage] for stage in sorted(needed))
        return tuple(of_ranks(catalog, ranks)[0] for ranks in by_stage if ranks)
    return of_ranks(catalog, descending)


def _stages(source: Strategy, target: Optional[Strategy], rank: int) -> set[int]:
    """Stages of the source of which a rank of the target needs files: not those of what only its other stages have."""
    found: set[int] = set()
    for name, held in source.layouts.items():
        if target is None or name not in target.layouts or target.layout(name, rank) is not None:
            found.update(held)
    return found
