"""From two grids of slices to pieces: which part of which source slice lands in which part of a target box.

1. A source parameter lies in files under one or more *placements*: a grid of cells, and for every cell the files
   that hold it (replicas are alternatives).
2. A target is any box of the parameter. The cells it touches follow from division, axis by axis; no search.
3. Every touched cell gives one *piece*: the common box, once as it lies in the source slice and once as it lands in
   the target. The pieces of a target are disjoint and cover it, or planning fails by name.
4. A parameter may be *made* of others (fused, stacked, transposed: `core.planning.recipes`). Its pieces come from
   several stored tensors, and where one lands is a box of a view of the target: axes split, interleaved or permuted.
5. A parameter may be *computed* from others (`core.computing.operation`). A box of it is one piece, which says what
   computes it; what that takes of the operands is located in turn (`core.planning.assembly`).

The geometry depends on shapes only, so it is computed once for all parameters that share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Callable, NamedTuple, Optional, Protocol, Union

from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.layout import Cell, cell_region, slice_shape
from ms_ckpt_ext.core.geometry.region import Region, Shape, View
from ms_ckpt_ext.errors import CoverageError

if TYPE_CHECKING:
    from ms_ckpt_ext.core.geometry.arrangement import Arrangement


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


class Block(NamedTuple):
    """A box of a source tensor that is a box of the view of a parameter made of several.

    Attributes:
        tensor: the source; its shape is the one it is seen in.
        region: the box of it that is used.
        axes: for every axis of the source the axis of the view along which it runs; strictly one to one.
        start: corner of its box in the view; the box is one thick along axes that `axes` does not name.
    """

    tensor: SourceTensor
    region: Region
    axes: tuple[int, ...]
    start: Shape


class Recipe(NamedTuple):
    """How a parameter is made: `view` is its shape with axes split further; the blocks fill the view exactly once.

    `arrangement` is where they are in it, apart from what they are of.
    """

    view: Shape
    blocks: tuple[Block, ...]
    arrangement: Arrangement

    @classmethod
    def of(cls, shape: Shape, view: Shape, blocks: Sequence[Block]) -> Recipe:
        """A recipe of a parameter of `shape`."""
        from ms_ckpt_ext.core.geometry.arrangement import Setting, arrangement  # rules only

        settings = tuple(Setting(block.region, block.axes, block.start) for block in blocks)
        return cls(view, tuple(blocks), arrangement(shape, view, settings))

    @property
    def how(self) -> str:
        """All that decides the result, apart from the sources."""
        return self.arrangement.text


class Operand(NamedTuple):
    """A box of an operand: its flat bytes, row-major, and where it lies in the operand."""

    bytes: memoryview
    region: Region


class Operation(Protocol):
    """What computes a box of a parameter from boxes of others. Its `repr` tells all that decides the result.

    It computes any box on its own, so that tiles, ranks and layouts do not change a bit of the result.
    """

    def takes(self, box: Region) -> tuple[Region, ...]:
        """The box of every operand that a box of the result takes."""

    def gives(self, first: Region) -> Region:
        """The box of the result that a box of the first operand is needed for; it may reach over the result's end."""

    def compute(self, box: Region, operands: Sequence[Operand], out: memoryview) -> None:
        """Fill `out`, flat bytes, with a box of the result; every operand holds at least what `takes` says."""


class Computation(NamedTuple):
    """How a parameter is computed, and from what."""

    operation: Operation
    operands: tuple[SourceTensor, ...]

    @property
    def how(self) -> str:
        """All that decides the result, apart from the sources."""
        return repr(self.operation)


class SplitAxes(NamedTuple):
    """Another tensor whose axes are split further, so that it has more of them."""

    tensor: SourceTensor

    @property
    def how(self) -> str:
        """All that decides the result, apart from the source."""
        return "split"


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
        if isinstance(self.recipe, Recipe):
            return tuple(block.tensor for block in self.recipe.blocks)
        if isinstance(self.recipe, Computation):
            return self.recipe.operands
        return () if self.recipe is None else (self.recipe.tensor,)

    @property
    def is_computed(self) -> bool:
        """Whether something of it is computed."""
        return isinstance(self.recipe, Computation) or any(source.is_computed for source in self.sources)

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
        recipe = self.recipe
        if recipe is None:
            return change(self)
        if isinstance(recipe, Recipe):
            blocks = (block._replace(tensor=block.tensor.remade(change)) for block in recipe.blocks)
            return self._replace(recipe=recipe._replace(blocks=tuple(blocks)))
        if isinstance(recipe, Computation):
            operands = tuple(operand.remade(change) for operand in recipe.operands)
            return self._replace(recipe=recipe._replace(operands=operands))
        return self._replace(recipe=SplitAxes(recipe.tensor.remade(change)))


def stored_whole(meta: TensorMeta, files: tuple[int, ...]) -> SourceTensor:
    """A parameter that each of these files holds whole, under its own name."""
    cell = (0,) * len(meta.shape)
    return SourceTensor(meta, meta.name, (Placement((1,) * len(meta.shape), {cell: files}, {cell: (0,)}),))


def whole_box(tensor: SourceTensor) -> Optional[Region]:
    """All of a parameter as a box; None when it has no elements."""
    return Region.whole(tensor.meta.shape) if all(tensor.meta.shape) else None


def box_of_stored(tensor: SourceTensor) -> Optional[tuple[SourceTensor, Region]]:
    """The stored tensor, and the box of it, that has the same bytes in the same order; None where no box has."""
    recipe = tensor.recipe
    if not isinstance(recipe, Recipe) or len(recipe.blocks) != 1 or recipe.blocks[0].tensor.recipe is not None:
        return None
    block = recipe.blocks[0]
    thick = [axis for axis, extent in zip(block.axes, block.region.shape) if extent > 1]
    return (block.tensor, block.region) if thick == sorted(thick) else None


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
    if isinstance(tensor.recipe, Recipe):
        return list(_made(tensor.recipe, target))
    if isinstance(tensor.recipe, Computation):
        return [_computed(tensor.recipe, target)]
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
    """Raise CoverageError as `locate`, which need not be asked where all that a parameter is made of is there whole."""
    if not all(any(map(_whole, each.placements)) for each in tensor.stored()):
        for target in targets:
            locate(tensor, target)


def _whole(placement: Placement) -> bool:
    return all(count == 1 for count in placement.parts) and any(placement.holders.values())


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
    return pieces(tensor.meta.shape, placement.parts, region)[0].cell


def _made(recipe: Recipe, target: Region) -> Iterator[Sourced]:
    """The pieces of a parameter that is made of others."""
    blocks = recipe.blocks
    for bit in recipe.arrangement.bits(target):
        tensor = blocks[bit.block].tensor
        if tensor.recipe is not None:
            yield from _through(tensor, bit.wanted, bit.view)
            continue
        for piece, files, stored_name, _ in locate(tensor, bit.wanted):
            known = bit.known
            if known is None or known[0] is not piece:
                known = bit.known = (piece, _viewed(piece, bit.view))
            yield Sourced(known[1], files, stored_name)


def _through(tensor: SourceTensor, wanted: Region, view: View) -> Iterator[Sourced]:
    """The pieces of a box, for a target that sees it through `view`."""
    if isinstance(tensor.recipe, SplitAxes):
        inner = tensor.recipe.tensor
        from ms_ckpt_ext.core.geometry.view import unsplit

        for box, seen in unsplit(inner.meta.shape, tensor.meta.shape, wanted, view):
            yield from _through(inner, box, seen)
        return
    for sourced in locate(tensor, wanted):
        yield sourced._replace(piece=_viewed(sourced.piece, view))


def _computed(computation: Computation, box: Region) -> Sourced:
    """A box that is computed, when all that it takes is there."""
    for operand, taken in zip(computation.operands, computation.operation.takes(box)):
        locate(operand, taken)
    whole = Region.whole(box.shape)
    return Sourced(Piece((), box.shape, whole, whole), (), "", Computed(computation, box))


def _viewed(piece: Piece, view: View) -> Piece:
    """A piece of a box, as a piece of a target that sees the box through `view`."""
    if piece.view is not None:
        raise ValueError("a tensor that is made of others cannot be part of another one")
    return Piece(piece.cell, piece.source_shape, piece.in_source, piece.in_target, view)
