"""What the ranks of the source hold, as parameters that planning can locate: their placements name ranks.

Cells of layouts, and boxes that are equal slices, are placements. Other boxes are the blocks of a parameter that is
made of them. A tensor without layout and box is whole on every rank that holds it.

Ranks that hold the same in the same layouts are one group, and parameters that lie alike share the mapping that says
so: planning works out such a mapping once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import DTYPES, Region, Shape
from ms_ckpt_ext.core.geometry.layout import Cell, Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta, stored_whole
from ms_ckpt_ext.core.planning.recipes import Block, Recipe
from ms_ckpt_ext.engine.source.catalog import Catalog
from ms_ckpt_ext.engine.transfer.held import HeldSlice, Holds
from ms_ckpt_ext.errors import CoverageError, LayoutMismatchError, StrategyError, name_ranks

Cells = Mapping[Cell, tuple[int, ...]]
Members = tuple[tuple[int, int], ...]
"""Ranks of a side with their places in its layouts."""


class Holders(NamedTuple):
    """Ranks that hold slices of one shape under one layout, or one box, or whole copies.

    Attributes:
        slice: what each of them holds.
        members: the ranks with their places.
    """

    slice: HeldSlice
    members: Members

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks, ascending."""
        return tuple(sorted(rank for rank, _ in self.members))

    def full_shape(self, name: str) -> Shape:
        """Shape of the whole parameter. Raises LayoutMismatchError: the layout, or the box, does not fit the slice."""
        held = self.slice
        if held.box is not None:
            if held.box.shape != held.shape:
                raise LayoutMismatchError(
                    f"parameter {name!r} of the source has shape {list(held.shape)} on {name_ranks(self.ranks)}, and "
                    f"its box there {list(held.box.shape)}"
                )
            return held.box.global_shape
        if held.layout is None:
            return held.shape
        try:
            return held.layout.over(len(held.shape)).full_shape(held.shape)
        except LayoutMismatchError as error:
            raise LayoutMismatchError(f"parameter {name!r} of the source, {name_ranks(self.ranks)}: {error}") from error

    def cells(self) -> tuple[Optional[Shape], Cells]:
        """Number of slices per axis, and which ranks hold which cell; None where the box is no equal slice."""
        held = self.slice
        if held.box is not None:
            parts = held.box.parts
            return parts, {} if parts is None else {held.box.cell: self.ranks}
        ndim = len(held.shape)
        if held.layout is None:
            return (1,) * ndim, _whole(ndim, self.ranks)
        layout = held.layout.over(ndim)
        return layout.parts, cells_of_members(layout, self.members)


@lru_cache(maxsize=4096)
def cells_of_members(layout: Layout, members: Members) -> Cells:
    """Cell -> the ranks that have it by their places in the layout, ascending."""
    found: dict[Cell, list[int]] = {}
    for rank, place in members:
        found.setdefault(layout.cells[place % layout.devices], []).append(rank)
    return {cell: tuple(sorted(ranks)) for cell, ranks in found.items()}


@lru_cache(maxsize=4096)
def _whole(ndim: int, ranks: tuple[int, ...]) -> Cells:
    return {(0,) * ndim: ranks}


def slice_holders(holds: Sequence[Holds], ranks: Sequence[int]) -> dict[str, list[Holders]]:
    """Name -> its holders. Where some ranks say how it lies, the others are not counted.

    Args:
        holds: what every rank of the job holds; ranks that hold the same may share the mapping.
        ranks: those of the source, in the order of their places.
    """
    alike: dict[int, list[tuple[int, int]]] = {}
    for place, rank in enumerate(ranks):
        alike.setdefault(id(holds[rank]), []).append((rank, place))
    found: dict[str, dict[HeldSlice, Members]] = {}
    for members in alike.values():
        for name, held in holds[members[0][0]].items():
            slices = found.setdefault(name, {})
            slices[held] = (*slices.get(held, ()), *members)
    groups = {name: [Holders(*each) for each in slices.items()] for name, slices in found.items()}
    told = {name: [each for each in some if each.slice.listed] for name, some in groups.items()}
    return {name: told[name] or some for name, some in groups.items()}


def untold(holders: Mapping[str, Sequence[Holders]]) -> list[str]:
    """Names without layout or box that several ranks hold: whether they are alike is to be checked."""
    several = {name: sum(len(each.members) for each in some) > 1 for name, some in holders.items()}
    return [name for name, some in holders.items() if several[name] and not some[0].slice.listed]


def catalog_of_holders(
    holders: Mapping[str, Sequence[Holders]], ranks: Sequence[int], differing: Mapping[str, str], complete: bool = True
) -> Catalog:
    """The source as a catalog, in which ranks of the job stand for files.

    Args:
        ranks: those of the source.
        differing: names to leave out, as ranks hold different contents.
        complete: every rank of the source holds its part; else layouts of some pipeline stages may be unknown.

    Raises:
        LayoutMismatchError: ranks contradict each other in a dtype, a shape, or a box.
        CoverageError: no rank holds some part of a parameter whose boxes were given.
        StrategyError: the layouts are for another number of ranks than the source has.
    """
    tensors: dict[str, SourceTensor] = {}
    extras: dict[str, SourceTensor] = {}
    for name, some in holders.items():
        if name not in differing:
            (tensors if some[0].slice.listed else extras)[name] = _tensor(name, some)
    places = {place: place for place in range(len(ranks))}
    strategy = _strategy(holders, len(ranks)) if complete else None
    return Catalog((), tensors, extras, {}, strategy=strategy, ranks=places)


def _tensor(name: str, holders: Sequence[Holders]) -> SourceTensor:
    first = holders[0]
    meta = TensorMeta(name, DTYPES[first.slice.dtype], first.full_shape(name))
    for each in holders[1:]:
        full = each.full_shape(name)
        if (each.slice.dtype, full) != (first.slice.dtype, meta.shape):
            raise LayoutMismatchError(
                f"parameter {name!r} of the source is {each.slice.dtype} of full shape {list(full)} on "
                f"{name_ranks(each.ranks)}, and {first.slice.dtype} of {list(meta.shape)} on "
                f"{name_ranks(first.ranks)}: check its layout on both"
            )
    if not all(meta.shape):
        return stored_whole(meta, tuple(sorted(rank for each in holders for rank in each.ranks)))
    found = [each.cells() for each in holders]
    by_parts: dict[Shape, list[Cells]] = {}
    for parts, cells in found:
        if parts is None:
            return _of_boxes(meta, holders)
        by_parts.setdefault(parts, []).append(cells)
    placements = (Placement(parts, joined_cells(some), {}) for parts, some in by_parts.items())
    return SourceTensor(meta, name, tuple(placements))


def joined_cells(several: Sequence[Cells]) -> Cells:
    """The holders of every cell in all groups together."""
    if len(several) == 1:
        return several[0]
    found: dict[Cell, set[int]] = {}
    for cells in several:
        for cell, ranks in cells.items():
            found.setdefault(cell, set()).update(ranks)
    return {cell: tuple(sorted(ranks)) for cell, ranks in found.items()}


def _of_boxes(meta: TensorMeta, holders: Sequence[Holders]) -> SourceTensor:
    """A parameter whose slices are not equal, assembled from its boxes, which must fill it exactly once."""
    by_box: dict[Region, tuple[int, ...]] = {}
    for region, rank in _regions(holders, meta.shape):
        by_box[region] = (*by_box.get(region, ()), rank)
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


def _regions(holders: Sequence[Holders], shape: Shape) -> list[tuple[Region, int]]:
    """(region, rank) for every rank that holds elements."""
    found = []
    for each in holders:
        for rank, place in each.members:
            held = each.slice
            layout = None if held.layout is None else held.layout.over(len(shape))
            if held.box is not None:
                region = held.box.region
            else:
                region = Region.whole(shape) if layout is None else layout.region(place % layout.devices, shape)
            if region is not None:
                found.append((region, rank))
    return found


def _strategy(holders: Mapping[str, Sequence[Holders]], world: int) -> Optional[Strategy]:
    """The layouts of all ranks of the source as one; None where none are given."""
    items = [
        LayoutItem(name, stage, each.slice.layout)
        for name, some in holders.items()
        for each in some
        if each.slice.layout is not None
        for stage in sorted({place // each.slice.layout.devices for _, place in each.members})
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
