"""What the ranks of the source hold, as parameters that planning can locate: their placements name ranks.

Cells of layouts, and boxes that are equal slices, are placements. Other boxes are the blocks of a parameter that is
made of them. What nothing is said of is whole on every rank that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.box import Box
from ms_ckpt_ext.core.geometry.dtype import DTYPES
from ms_ckpt_ext.core.geometry.layout import Cell
from ms_ckpt_ext.core.geometry.region import Region, Shape
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.core.planning.pieces import Block, Placement, Recipe, SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.transfer.held import HeldSlice, Holds
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, StrategyError, name_ranks


class _Holder(NamedTuple):
    """A rank that holds a slice: its number in the job, its place in the side's layouts, and the slice."""

    rank: int
    place: int
    slice: HeldSlice

    def box(self, name: str) -> Box:
        """Which box of the parameter it is. Raises LayoutMismatchError: its layout does not fit."""
        held = self.slice
        if held.box is not None:
            return held.box
        if held.layout is None:
            return Box(held.shape, (0,) * len(held.shape), held.shape)
        layout = held.layout.over(len(held.shape))
        try:
            full = layout.full_shape(held.shape)
        except LayoutMismatchError as error:
            raise LayoutMismatchError(
                f"parameter {name!r} of the source, {name_ranks([self.rank])}: {error}"
            ) from error
        cell = layout.cells[self.place % layout.devices]
        return Box(full, tuple(n * extent for n, extent in zip(cell, held.shape)), held.shape)


def slice_holders(holds: Sequence[Holds], ranks: Sequence[int]) -> dict[str, list[_Holder]]:
    """Name -> who holds it. Where some ranks say how it lies, those that do not hold none of it.

    Args:
        holds: what every rank of the job holds.
        ranks: those of the source, in the order of their places.
    """
    found: dict[str, list[_Holder]] = {}
    for place, rank in enumerate(ranks):
        for name, held in holds[rank].items():
            found.setdefault(name, []).append(_Holder(rank, place, held))
    told = {name: [each for each in some if each.slice.listed] for name, some in found.items()}
    return {name: told[name] or some for name, some in found.items()}


def untold(holders: Mapping[str, Sequence[_Holder]]) -> list[str]:
    """Names of which nothing is said, and that several ranks hold: whether they are alike is to be looked at."""
    return [name for name, some in holders.items() if len(some) > 1 and not some[0].slice.listed]


def catalog_of_holders(
    holders: Mapping[str, Sequence[_Holder]], ranks: Sequence[int], differing: Mapping[str, str]
) -> Catalog:
    """The source as jobs know one; its files are the ranks of the job.

    Args:
        ranks: of the source.
        differing: names that are left out, for ranks hold different contents.

    Raises:
        LayoutMismatchError: ranks contradict each other in a dtype, a shape, or a box.
        CoverageError: no rank holds some part of a parameter whose boxes were given.
    """
    tensors: dict[str, SourceTensor] = {}
    extras: dict[str, SourceTensor] = {}
    for name, some in holders.items():
        if name not in differing:
            (tensors if some[0].slice.listed else extras)[name] = _tensor(name, some)
    places = {place: place for place in range(len(ranks))}
    return Catalog((), tensors, extras, {}, strategy=_strategy(holders, len(ranks)), ranks=places)


def _tensor(name: str, holders: Sequence[_Holder]) -> SourceTensor:
    boxes = [each.box(name) for each in holders]
    for each, box in zip(holders, boxes):
        facts = (each.slice.dtype, box.global_shape)
        if facts != (holders[0].slice.dtype, boxes[0].global_shape):
            raise LayoutMismatchError(
                f"parameter {name!r} of the source is {facts[0]} of full shape {list(facts[1])} on rank {each.rank}, "
                f"and {holders[0].slice.dtype} of {list(boxes[0].global_shape)} on rank {holders[0].rank}: check its "
                "layout on both"
            )
        if box.shape != each.slice.shape:
            raise LayoutMismatchError(
                f"parameter {name!r} of the source has shape {list(each.slice.shape)} on rank {each.rank}, and its box "
                f"there {list(box.shape)}"
            )
    meta = TensorMeta(name, DTYPES[holders[0].slice.dtype], boxes[0].global_shape)
    if not all(meta.shape):
        return stored_whole(meta, tuple(each.rank for each in holders))
    if all(box.parts is not None for box in boxes):
        return SourceTensor(meta, name, _placements(holders, boxes))
    return _of_boxes(meta, holders, boxes)


def _placements(holders: Sequence[_Holder], boxes: Sequence[Box]) -> tuple[Placement, ...]:
    by_parts: dict[Shape, dict[Cell, tuple[int, ...]]] = {}
    expected: dict[Shape, dict[Cell, tuple[int, ...]]] = {}
    for each, box in zip(holders, boxes):
        parts = box.parts
        assert parts is not None
        cells = by_parts.setdefault(parts, {})
        cells[box.cell] = (*cells.get(box.cell, ()), each.rank)
        expected.setdefault(parts, {})
    return tuple(
        Placement(parts, {c: tuple(sorted(r)) for c, r in cells.items()}, expected[parts])
        for parts, cells in by_parts.items()
    )


def _of_boxes(meta: TensorMeta, holders: Sequence[_Holder], boxes: Sequence[Box]) -> SourceTensor:
    """A parameter whose slices are not equal: put together of its boxes, which must fill it exactly once."""
    by_box: dict[Region, list[int]] = {}
    for each, box in zip(holders, boxes):
        if box.region is not None:
            by_box.setdefault(box.region, []).append(each.rank)
    regions = list(by_box)
    for number, region in enumerate(regions):
        for other in regions[:number]:
            if region.intersect(other) is not None:
                raise LayoutMismatchError(
                    f"parameter {meta.name!r} of the source: the boxes {region} of {name_ranks(by_box[region])} and "
                    f"{other} of {name_ranks(by_box[other])} overlap; unequal boxes must be apart from each other, or "
                    "the same"
                )
    filled = sum(region.size for region in regions)
    if filled != prod(meta.shape):
        raise CoverageError(
            f"parameter {meta.name!r} of the source: the boxes of all ranks have {filled} of the {prod(meta.shape)} "
            f"elements of its shape {list(meta.shape)} together ({', '.join(map(str, regions[:8]))}): some rank's box "
            "is missing"
        )
    blocks = []
    for region, ranks in by_box.items():
        piece = stored_whole(TensorMeta(meta.name, meta.dtype, region.shape), tuple(sorted(ranks)))
        blocks.append(Block(piece, Region.whole(region.shape), tuple(range(len(meta.shape))), region.start))
    return SourceTensor(meta, "", (), Recipe.of(meta.shape, meta.shape, blocks))


def _strategy(holders: Mapping[str, Sequence[_Holder]], world: int) -> Optional[Strategy]:
    """The layouts of all ranks of the source as one; None where none are given.

    Raises StrategyError: they are not of as many ranks as the source has.
    """
    items = [
        LayoutItem(name, each.place // each.slice.layout.devices, each.slice.layout)
        for name, some in holders.items()
        for each in some
        if each.slice.layout is not None
    ]
    if not items:
        return None
    found = Strategy.from_items(items, "the source's strategy")
    if found.world != world:
        raise StrategyError(
            f"the source's strategy is for {found.world} ranks, and the source has {world}: give source_ranks, or the "
            "strategy of this job"
        )
    return found
