"""From two grids of slices to pieces: which part of which source slice lands in which part of a target box.

1. A source parameter lies in files under one or more *placements*: a grid of cells, and for every cell the files
   that hold it (replicas are alternatives).
2. A target is any box of the parameter. The cells it touches follow from division, axis by axis; no search.
3. Every touched cell gives one *piece*: the common box, once as it lies in the source slice and once as it lands in
   the target. The pieces of a target are disjoint and cover it, or planning fails by name.

The geometry depends on shapes only, so it is computed once for all parameters that share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from ms_ckpt_ext.core.dtype import DType
from ms_ckpt_ext.core.layout import Cell, cell_region, slice_shape
from ms_ckpt_ext.core.region import Region, Shape
from ms_ckpt_ext.errors import CoverageError


class TensorMeta(NamedTuple):
    """A parameter as the model knows it: unsharded."""

    name: str
    dtype: DType
    shape: Shape


@dataclass(frozen=True)
class Placement:
    """One way in which a parameter's slices lie over files.

    Attributes:
        parts: number of slices along every axis.
        holders: cell -> numbers of the files that hold it, any of which will do; a cell may be absent.
        expected: cell -> ranks that should hold it, for messages.
    """

    parts: Shape
    holders: Mapping[Cell, tuple[int, ...]]
    expected: Mapping[Cell, tuple[int, ...]]


@dataclass(frozen=True)
class SourceTensor:
    """A parameter and where its bytes are. `stored_name` is its name inside the files."""

    meta: TensorMeta
    stored_name: str
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class Piece:
    """One region of a parameter, as it lies in a source slice and as it lands in a target box.

    Attributes:
        cell: the source slice's place in its grid.
        source_shape: shape of the source slice.
        in_source: the region, relative to the source slice.
        in_target: the same region, relative to the target box.
    """

    cell: Cell
    source_shape: Shape
    in_source: Region
    in_target: Region

    def __post_init__(self) -> None:
        if self.in_source.shape != self.in_target.shape:
            raise ValueError(f"projections of different shape: {self.in_source} and {self.in_target}")


class Sourced(NamedTuple):
    """A piece and the files that can serve it."""

    piece: Piece
    files: tuple[int, ...]


@lru_cache(maxsize=8192)
def pieces(shape: Shape, parts: Shape, target: Region) -> tuple[Piece, ...]:
    """Cut `target`, a box of an array of `shape`, along the grid of `parts`.

    Raises LayoutMismatchError when the shape cannot be cut that way.
    """
    extents = slice_shape(shape, parts)
    spans = [range(low // e, (high - 1) // e + 1) for low, high, e in zip(target.start, target.stop, extents)]
    found = []
    for cell in product(*spans):
        source = cell_region(cell, parts, shape)
        common = source.intersect(target)
        assert common is not None  # by the division above
        found.append(Piece(cell, extents, common.relative_to(source.start), common.relative_to(target.start)))
    return tuple(found)


def locate(tensor: SourceTensor, target: Region) -> list[Sourced]:
    """The pieces that cover `target` exactly once, each with the files that can serve it.

    Placements are tried in order; what one lacks is looked for in the next.

    Raises:
        CoverageError: no placement holds some region; names parameter, region and the ranks that should hold it.
    """
    found: list[Sourced] = []
    missing = _locate(tensor, target, target, 0, found)
    if missing is not None:
        ranks = sorted({rank for p in tensor.placements for rank in p.expected.get(_cell_at(p, missing, tensor), ())})
        raise CoverageError(
            f"parameter {tensor.meta.name!r}: no file holds region {missing} of its shape "
            f"{list(tensor.meta.shape)}; it should be in the file of "
            f"{'rank' if len(ranks) == 1 else 'one of the ranks'} {', '.join(map(str, ranks)) or '(unknown)'}: "
            "check that every rank's file is there and complete, and that the strategy belongs to this checkpoint"
        )
    return found


def _locate(tensor: SourceTensor, target: Region, rest: Region, first: int, found: list[Sourced]) -> Region | None:
    """Cover `rest`, a part of `target`, from placement `first` on; return a region that nothing holds."""
    if first == len(tensor.placements):
        return rest
    placement = tensor.placements[first]
    inside_all = rest is target
    for piece in pieces(tensor.meta.shape, placement.parts, rest):
        files = placement.holders.get(piece.cell, ())
        if files:
            found.append(Sourced(piece if inside_all else _shift(piece, rest, target), files))
            continue
        start = tuple(a + b for a, b in zip(rest.start, piece.in_target.start))
        gap = Region(start, tuple(a + b for a, b in zip(start, piece.in_target.shape)))
        missing = _locate(tensor, target, gap, first + 1, found)
        if missing is not None:
            return missing
    return None


def _shift(piece: Piece, rest: Region, target: Region) -> Piece:
    """Re-express a piece found for `rest` relative to `target`."""
    offset = tuple(a - b for a, b in zip(rest.start, target.start))
    start = tuple(a + b for a, b in zip(piece.in_target.start, offset))
    stop = tuple(a + b for a, b in zip(piece.in_target.stop, offset))
    return Piece(piece.cell, piece.source_shape, piece.in_source, Region(start, stop))


def _cell_at(placement: Placement, region: Region, tensor: SourceTensor) -> Cell:
    return pieces(tensor.meta.shape, placement.parts, region)[0].cell
