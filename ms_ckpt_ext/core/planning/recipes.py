"""Parameters made of others: what a rule says about shapes, turned into a source that planning can locate.

A rule sees every source tensor in some shape (its axes split or joined), lays it as a box into a view of the target,
and permutes axes on the way. Slices of a source that is itself sharded are seen in that shape too, as long as the cuts
fall between its rows there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ms_ckpt_ext.core.geometry.dtype import DTYPES
from ms_ckpt_ext.core.geometry.layout import Cell
from ms_ckpt_ext.core.geometry.region import Shape
from ms_ckpt_ext.core.geometry.view import split_axes
from ms_ckpt_ext.core.planning.pieces import Block, Placement, Recipe, SourceTensor, SplitAxes, TensorMeta
from ms_ckpt_ext.errors import LayoutMismatchError


def seen_as(tensor: SourceTensor, view: Shape) -> SourceTensor:
    """A tensor in another shape of the same row-major order: its axes split, or neighbours joined.

    Raises:
        LayoutMismatchError: the shapes have different sizes, or a slice of the tensor is not a box in the new shape.
    """
    shape = tensor.meta.shape
    if prod(shape) != prod(view):
        raise LayoutMismatchError(f"{tensor.meta.name!r} of shape {list(shape)} cannot be seen as {list(view)}")
    if tensor.recipe is not None:
        try:
            split_axes(shape, view)
        except ValueError as error:
            raise LayoutMismatchError(f"{tensor.meta.name!r}, which is made by a rule: {error}") from error
        return SourceTensor(tensor.meta._replace(shape=view), "", (), SplitAxes(tensor))
    placements = tuple(_seen(tensor, placement, view) for placement in tensor.placements)
    return SourceTensor(tensor.meta._replace(shape=view), tensor.stored_name, placements)


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
            f"{list(view)}, where these are no boxes ({error}): merge the checkpoint first, then apply the rules"
        ) from error

    def move(cell: Cell) -> Cell:
        return tuple(index for number, cut in zip(cell, cuts) for index in _digits(number, cut))

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
            "cut along the last one, or made by another rule: merge the checkpoint first, then apply the rules"
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


def _digits(number: int, radices: Shape) -> Cell:
    digits = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        digits.append(digit)
    return tuple(reversed(digits))


def made_of(name: str, shape: Shape, view: Shape, blocks: Sequence[Block]) -> SourceTensor:
    """A parameter of `shape` whose `view` the blocks fill.

    Raises:
        LayoutMismatchError: the sources have different dtypes, or do not fill the parameter exactly.
    """
    dtypes = {block.tensor.meta.dtype.name: block.tensor.meta.name for block in blocks}
    if len(dtypes) > 1:
        told = ", ".join(f"{source!r} is {dtype}" for dtype, source in dtypes.items())
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
    return SourceTensor(TensorMeta(name, blocks[0].tensor.meta.dtype, shape), "", (), recipe)
