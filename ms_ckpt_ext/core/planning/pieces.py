"""From two grids of slices to pieces: which part of which source slice lands in which part of a target box.

1. A source parameter lies in files under one or more *placements*: a grid of cells, and for every cell the files
   that hold it (replicas are alternatives).
2. A target is any box of the parameter. The cells it touches follow from division, axis by axis; no search.
3. Every touched cell gives one *piece*: the common box, once as it lies in the source slice and once as it lands in
   the target. The pieces of a target are disjoint and cover it, or planning fails by name.
4. A parameter may be *made* of others (fused, stacked, transposed, computed: `core.planning.recipes`). Its pieces come
   from several stored tensors, and where one lands is a box of a view of the target: axes split, interleaved or
   permuted. A box that is computed is one piece, which says what computes it.

The geometry depends on shapes only, so it is computed once for all parameters that share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Union

from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
from ms_ckpt_ext.core.geometry.layout import Cell, cell_region, slice_shape
from ms_ckpt_ext.errors import CoverageError

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.recipes import Computation, Recipe, SplitAxes


class TensorMeta(NamedTuple):
    """A parameter as the model knows it: unsharded."""

    name: str
    dtype: DType
    shape: Shape


class Placement(NamedTuple):
    """One way in which a parameter's slices lie over files.

    Attributes:
        parts: number of slices along every axis.
        holders: cell -> numbers of the files that hold it, any of which will do; a cell may be absent.
        expected: cell -> ranks that should hold it, for messages.
    """

    parts: Shape
    holders: Mapping[Cell, tuple[int, ...]]
    expected: Mapping[Cell, tuple[int, ...]]


class SourceTensor(NamedTuple):
    """A parameter and where its bytes are.

    Attributes:
        stored_name: its name inside the files; "" when it is made of others.
        placements: how its slices lie over files; () when it is made of others.
        recipe: how it is made of other tensors; None when it is stored.
    """

    meta: TensorMeta
    stored_name: str
    placements: tuple[Placement, ...]
    recipe: Optional[Union[Recipe, Computation, SplitAxes]] = None

    @property
    def sources(self) -> tuple[SourceTensor, ...]:
        """The tensors that it is made of; () when it is stored."""
        return () if self.recipe is None else self.recipe.sources

    @property
    def is_computed(self) -> bool:
        """Whether something of it is computed."""
        return self.recipe is not None and self.recipe.is_computed

    def stored(self) -> Iterator[SourceTensor]:
        """The stored tensors that it is made of, in the end; itself when it is one."""
        if self.recipe is None:
            yield self
            return
        for source in self.sources:
            if source.recipe is None:
                yield source
            else:
                yield from source.stored()

    def remade(self, change: Callable[[SourceTensor], SourceTensor]) -> SourceTensor:
        """The same of other stored tensors: each is given to `change`."""
        return change(self) if self.recipe is None else self._replace(recipe=self.recipe.remade(change))


def stored_whole(meta: TensorMeta, files: tuple[int, ...]) -> SourceTensor:
    """A parameter that each of these files holds whole, under its own name."""
    return SourceTensor(meta, meta.name, _whole_placements(len(meta.shape), files))


@lru_cache(maxsize=1024)
def _whole_placements(axes: int, files: tuple[int, ...]) -> tuple[Placement, ...]:
    """Those of all parameters with so many axes that these files hold whole: one value for all of them."""
    cell = (0,) * axes
    return (Placement((1,) * axes, {cell: files}, {cell: (0,)}),)


def whole_box(tensor: SourceTensor) -> Optional[Region]:
    """All of a parameter as a box; None when it has no elements."""
    return Region.whole(tensor.meta.shape) if all(tensor.meta.shape) else None


class _Projections(NamedTuple):
    cell: Cell
    source_shape: Shape
    in_source: Region
    in_target: Region
    view: Optional[View] = None


class Piece(_Projections):
    """One region of a parameter, as it lies in a source slice and as it lands in a target box.

    Attributes:
        cell: the source slice's place in its grid.
        source_shape: shape of the source slice.
        in_source: the region, relative to the source slice.
        in_target: the same region, relative to the target box.
        view: how the target box is seen when `in_target` is not a box of it as it is; None when it is.

    Raises:
        ValueError: at birth, when the two projections have different shapes.
    """

    __slots__ = ()

    def __new__(
        cls, cell: Cell, source_shape: Shape, in_source: Region, in_target: Region, view: Optional[View] = None
    ) -> Piece:
        if in_source.shape != in_target.shape:
            raise ValueError(f"projections of different shape: {in_source} and {in_target}")
        return super().__new__(cls, cell, source_shape, in_source, in_target, view)


class Computed(NamedTuple):
    """A box of a parameter that is computed."""

    computation: Computation
    box: Region


class Sourced(NamedTuple):
    """A piece, the files that can serve it, and the name of its tensor inside them.

    Where it is `computed` there are none, and its source is the box that is computed.
    """

    piece: Piece
    files: tuple[int, ...]
    stored_name: str
    computed: Optional[Computed] = None


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
    if tensor.recipe is not None:
        return tensor.recipe.locate(target)
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


def require(tensor: SourceTensor, targets: Iterable[Region]) -> None:
    """Raise CoverageError as `locate`, which need not be asked where all that a parameter is made of is there."""
    if not all(any(map(_complete, each.placements)) for each in tensor.stored()):
        for target in targets:
            locate(tensor, target)


def _complete(placement: Placement) -> bool:
    return sum(map(bool, placement.holders.values())) == prod(placement.parts)


def _locate(tensor: SourceTensor, target: Region, rest: Region, first: int, found: list[Sourced]) -> Region | None:
    """Cover `rest`, a part of `target`, from placement `first` on; return a region that nothing holds."""
    if first == len(tensor.placements):
        return rest
    placement = tensor.placements[first]
    inside_all = rest is target
    for piece in pieces(tensor.meta.shape, placement.parts, rest):
        files = placement.holders.get(piece.cell, ())
        if files:
            found.append(Sourced(piece if inside_all else _shift(piece, rest, target), files, tensor.stored_name))
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
    (piece,) = pieces(tensor.meta.shape, placement.parts, region)  # what is missing lies in one cell of each placement
    return piece.cell
