"""A parameter that pipeline stages hold in different cuts, tied embeddings above all: its copies, and what they share.

Stages that cut alike share a placement, where files with the same cell are copies of each other. Placements of other
cuts have no cell in common, but regions, so that is where they are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from ms_ckpt_ext.core.geometry.array import Region
from ms_ckpt_ext.core.geometry.layout import cell_region
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, pieces
from ms_ckpt_ext.errors import name_ranks


class Overlap(NamedTuple):
    """A region that two copies hold, and the numbers of the files that hold it in either."""

    region: Region
    one: SourceTensor
    other: SourceTensor
    files: tuple[tuple[int, ...], tuple[int, ...]]


def copies_of(tensor: SourceTensor) -> tuple[SourceTensor, ...]:
    """The parameter in every cut of which there is a file, each alone."""
    return tuple(tensor._replace(placements=(placement,)) for placement in tensor.placements if placement.holders)


def regions_of(copy: SourceTensor) -> tuple[Region, ...]:
    """What is held of a copy; nothing of a parameter without elements."""
    (placement,) = copy.placements
    if not all(copy.meta.shape):
        return ()
    return tuple(cell_region(cell, placement.parts, copy.meta.shape) for cell in sorted(placement.holders))


def holders_of(copy: SourceTensor) -> str:
    """The ranks that hold a copy, in words."""
    (placement,) = copy.placements
    return name_ranks(sorted({rank for cell in placement.holders for rank in placement.expected.get(cell, ())}))


def overlaps(tensor: SourceTensor) -> Iterator[Overlap]:
    """Where two copies hold the same, for any two of them."""
    for one, other in combinations(copies_of(tensor), 2) if all(tensor.meta.shape) else ():
        mine, theirs = one.placements[0], other.placements[0]
        for cell, files in sorted(theirs.holders.items()):
            region = cell_region(cell, theirs.parts, tensor.meta.shape)
            for common, held in _within(tensor, mine, region):
                yield Overlap(common, one, other, (held, files))


def _within(tensor: SourceTensor, placement: Placement, region: Region) -> Iterator[tuple[Region, tuple[int, ...]]]:
    """What a placement holds of a region, and in which files."""
    for piece in pieces(tensor.meta.shape, placement.parts, region):
        common = cell_region(piece.cell, placement.parts, tensor.meta.shape).intersect(region)
        files = placement.holders.get(piece.cell, ())
        if files and common is not None:
            yield common, files
