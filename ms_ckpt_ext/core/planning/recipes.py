"""Parameters made of others, as sources that planning can locate like any other.

1. A rule sees every source tensor in some shape (its axes split or joined), lays it as a box into a view of the target,
   and permutes axes on the way: a `Recipe`. Slices of a source that is itself sharded are seen in that shape too, as
   long as the cuts fall between its rows there.
2. A parameter may be computed from others: a `Computation`. A box of it is one piece, which says what computes it; what
   that takes of the operands is located in turn (`core.planning.assembly`).
3. A tensor that is made of others may be seen with its axes split further: `SplitAxes`.

Each tells the tensors that it is made of (`sources`), whether anything of it is computed (`is_computed`), all that
decides the result apart from the sources (`how`), itself made of other stored tensors (`remade`), and its pieces
(`locate`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Callable, NamedTuple, Optional, Protocol

from ms_ckpt_ext.core.geometry.arrangement import Arrangement, Setting, arrangement
from ms_ckpt_ext.core.geometry.array import DTYPES, Region, Shape, View
from ms_ckpt_ext.core.geometry.layout import Cell, digits
from ms_ckpt_ext.core.geometry.strided import strides_of
from ms_ckpt_ext.core.geometry.view import split_axes, unsplit
from ms_ckpt_ext.core.planning.pieces import Computed, Piece, Placement, Sourced, SourceTensor, TensorMeta, locate
from ms_ckpt_ext.errors import LayoutMismatchError

_Change = Callable[[SourceTensor], SourceTensor]
_WHOLE = "apply the rules to a merged checkpoint, or to a network that holds it whole or cut along another axis"


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
        settings = tuple(Setting(block.region, block.axes, block.start) for block in blocks)
        return cls(view, tuple(blocks), arrangement(shape, view, settings))

    @property
    def how(self) -> str:
        """See above."""
        return self.arrangement.text

    @property
    def sources(self) -> tuple[SourceTensor, ...]:
        """See above."""
        return tuple(block.tensor for block in self.blocks)

    @property
    def is_computed(self) -> bool:
        """See above."""
        return any(block.tensor.is_computed for block in self.blocks)

    def remade(self, change: _Change) -> Recipe:
        """See above."""
        return self._replace(blocks=tuple(b._replace(tensor=b.tensor.remade(change)) for b in self.blocks))

    def locate(self, target: Region) -> list[Sourced]:
        """See above."""
        return list(self._located(target))

    def _located(self, target: Region) -> Iterator[Sourced]:
        blocks = self.blocks
        for bit in self.arrangement.bits(target):
            tensor = blocks[bit.block].tensor
            if tensor.recipe is not None:
                yield from _through(tensor, bit.wanted, bit.view)
                continue
            for piece, files, stored_name, _ in locate(tensor, bit.wanted):
                known, seen = bit.known
                if known is not piece:
                    seen = _viewed(piece, bit.view)
                    bit.known = piece, seen
                yield Sourced(seen, files, stored_name)


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
        """See above."""
        return repr(self.operation)

    @property
    def sources(self) -> tuple[SourceTensor, ...]:
        """See above."""
        return self.operands

    @property
    def is_computed(self) -> bool:
        """See above."""
        return True

    def remade(self, change: _Change) -> Computation:
        """See above."""
        return self._replace(operands=tuple(operand.remade(change) for operand in self.operands))

    def locate(self, target: Region) -> list[Sourced]:
        """A box that is computed, when all that it takes is there."""
        for operand, taken in zip(self.operands, self.operation.takes(target)):
            locate(operand, taken)
        whole = Region.whole(target.shape)
        return [Sourced(Piece((), target.shape, whole, whole), (), "", Computed(self, target))]


class SplitAxes(NamedTuple):
    """Another tensor whose axes are split further: it is seen in `shape`."""

    tensor: SourceTensor
    shape: Shape

    @property
    def how(self) -> str:
        """See above."""
        return "split"

    @property
    def sources(self) -> tuple[SourceTensor, ...]:
        """See above."""
        return (self.tensor,)

    @property
    def is_computed(self) -> bool:
        """See above."""
        return self.tensor.is_computed

    def remade(self, change: _Change) -> SplitAxes:
        """See above."""
        return self._replace(tensor=self.tensor.remade(change))

    def locate(self, target: Region) -> list[Sourced]:
        """See above."""
        return list(self.through(target, View(0, strides_of(target.shape))))

    def through(self, wanted: Region, view: View) -> Iterator[Sourced]:
        """The pieces of a box, for a target that sees it through `view`."""
        for box, seen in unsplit(self.tensor.meta.shape, self.shape, wanted, view):
            yield from _through(self.tensor, box, seen)


def _through(tensor: SourceTensor, wanted: Region, view: View) -> Iterator[Sourced]:
    """The pieces of a box, for a target that sees it through `view`."""
    if isinstance(tensor.recipe, SplitAxes):
        yield from tensor.recipe.through(wanted, view)
        return
    for sourced in locate(tensor, wanted):
        yield sourced._replace(piece=_viewed(sourced.piece, view))


def _viewed(piece: Piece, view: View) -> Piece:
    """A piece of a box, as a piece of a target that sees the box through `view`."""
    if piece.view is not None:
        raise ValueError("a tensor that is made of others cannot be part of another one")
    return Piece(piece.cell, piece.source_shape, piece.in_source, piece.in_target, view)


def box_of_stored(tensor: SourceTensor) -> Optional[tuple[SourceTensor, Region]]:
    """The stored tensor, and the box of it, that has the same bytes in the same order; None where no box has."""
    recipe = tensor.recipe
    if not isinstance(recipe, Recipe) or len(recipe.blocks) != 1:
        return None
    (block,) = recipe.blocks
    thick = [axis for axis, extent in zip(block.axes, block.region.shape) if extent > 1]
    return (block.tensor, block.region) if block.tensor.recipe is None and thick == sorted(thick) else None


def seen_as(tensor: SourceTensor, view: Shape) -> SourceTensor:
    """A tensor in another shape of the same row-major order: its axes split, or neighbours joined.

    Raises:
        LayoutMismatchError: the shapes have different sizes, or a slice of the tensor is not a box in the new shape.
    """
    shape = tensor.meta.shape
    if prod(shape) != prod(view):
        raise LayoutMismatchError(f"{tensor.meta.name!r} of shape {list(shape)} cannot be seen as {list(view)}")
    recipe, meta = tensor.recipe, tensor.meta._replace(shape=view)
    if recipe is not None:
        try:
            if isinstance(recipe, Recipe):
                split_axes(view, recipe.view)
                return tensor._replace(meta=meta, recipe=Recipe.of(view, recipe.view, recipe.blocks))
            split_axes(shape, view)
        except ValueError as error:
            raise LayoutMismatchError(f"{tensor.meta.name!r}, which is made by a rule: {error}") from error
        return SourceTensor(meta, "", (), SplitAxes(tensor, view))
    placements = tuple(_seen(tensor, placement, view) for placement in tensor.placements)
    return SourceTensor(meta, tensor.stored_name, placements)


def _seen(tensor: SourceTensor, placement: Placement, view: Shape) -> Placement:
    shape, parts = tensor.meta.shape, placement.parts
    if shape == view:
        return placement
    if all(count == 1 for count in parts):
        only, all_of_it = (0,) * len(shape), (0,) * len(view)
        return Placement(
            (1,) * len(view),
            {all_of_it: placement.holders[only]} if only in placement.holders else {},
            {all_of_it: placement.expected[only]} if only in placement.expected else {},
        )
    try:
        cuts = [_split(count, group) for count, group in zip(parts, split_axes(shape, view))]
    except ValueError as error:
        raise LayoutMismatchError(
            f"{tensor.meta.name!r} of shape {list(shape)} lies in slices {list(parts)} and is to be seen as "
            f"{list(view)}, where these are no boxes ({error}): {_WHOLE}"
        ) from error

    def move(cell: Cell) -> Cell:
        return tuple(index for number, cut in zip(cell, cuts) for index in digits(number, cut))

    return Placement(
        tuple(count for cut in cuts for count in cut),
        {move(cell): files for cell, files in placement.holders.items()},
        {move(cell): ranks for cell, ranks in placement.expected.items()},
    )


def joined_axes(tensor: SourceTensor) -> SourceTensor:
    """A tensor whose last two axes are one. Raises LayoutMismatchError: a slice of it is no box then."""
    *outer, many, few = tensor.meta.shape
    meta = tensor.meta._replace(shape=(*outer, many * few))
    if tensor.recipe is not None or any(placement.parts[-1] != 1 for placement in tensor.placements):
        raise LayoutMismatchError(
            f"the last two axes of {tensor.meta.name!r} of shape {list(tensor.meta.shape)} are to be one, but it is "
            f"cut along the last one, or made by another rule: {_WHOLE}"
        )
    return SourceTensor(meta, tensor.stored_name, tuple(_without_last(each) for each in tensor.placements))


def _without_last(placement: Placement) -> Placement:
    return Placement(
        placement.parts[:-1],
        {cell[:-1]: files for cell, files in placement.holders.items()},
        {cell[:-1]: ranks for cell, ranks in placement.expected.items()},
    )


def packed_as_bytes(tensor: SourceTensor) -> SourceTensor:
    """A tensor of 4-bit elements as the bytes that hold two each. Raises LayoutMismatchError: it is cut inside one."""
    *outer, last = tensor.meta.shape
    if tensor.recipe is not None or any(last % (2 * placement.parts[-1]) for placement in tensor.placements):
        raise LayoutMismatchError(
            f"{tensor.meta.name!r} of shape {list(tensor.meta.shape)} holds two {tensor.meta.dtype.name} a byte, and "
            "is cut inside one, or made by another rule"
        )
    return tensor._replace(meta=TensorMeta(tensor.meta.name, DTYPES["U8"], (*outer, last // 2)))


def _split(count: int, extents: Shape) -> Shape:
    """Cuts of the axes that `extents` split, when the axis as a whole is cut into `count`."""
    cuts = []
    for extent in extents:
        here = count if extent % count == 0 else extent
        if count % here:
            raise ValueError(f"{count} slices do not fall between {list(extents)}")
        cuts.append(here)
        count //= here
    return tuple(cuts)


def made_of(name: str, shape: Shape, view: Shape, blocks: Sequence[Block]) -> SourceTensor:
    """A parameter of `shape` whose `view` the blocks fill.

    Raises:
        LayoutMismatchError: the sources have different dtypes, or do not fill the parameter exactly.
    """
    dtypes = {block.tensor.meta.dtype: block.tensor.meta.name for block in blocks}
    if len(dtypes) > 1:
        told = ", ".join(f"{source!r} is {dtype.name}" for dtype, source in dtypes.items())
        raise LayoutMismatchError(f"{name!r} is made of tensors of different dtypes: {told}; convert one of them first")
    recipe = Recipe.of(shape, view, blocks)
    boxes = recipe.arrangement.boxes
    inside = all(high <= extent for box in boxes for high, extent in zip(box.stop, view))
    if not inside or sum(box.size for box in boxes) != prod(view):
        sources = ", ".join(f"{block.tensor.meta.name!r} {list(block.tensor.meta.shape)}" for block in blocks[:4])
        raise LayoutMismatchError(
            f"{name!r} of shape {list(shape)} is not filled exactly by its {len(blocks)} sources ({sources}, ...): "
            "check the rule's numbers of heads, groups and experts against the checkpoint"
        )
    split_axes(shape, view)
    (dtype,) = dtypes
    return SourceTensor(TensorMeta(name, dtype, shape), "", (), recipe)
