"""A piece as bytes: one strided copy from a row-major array into another.

Boxes become byte boxes by one more axis of item size (packed types below a byte scale the last axis instead). Axes
that are contiguous on both sides are merged, so what remains is the fewest, longest runs: a row split is one run, a
column split one run a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.region import Region, Shape, View
from ms_ckpt_ext.errors import LayoutMismatchError

if TYPE_CHECKING:
    from ms_ckpt_ext.core.planning.pieces import Piece


class StridedCopy(NamedTuple):
    """Copy `counts` runs of `run` bytes.

    Attributes:
        run: length of the contiguous stretch, in bytes.
        counts: extents of the outer axes, outermost first; () for a single run.
        source, target: byte offset of the first run in each array.
        source_strides, target_strides: byte distance of neighbours on every outer axis.
    """

    run: int
    counts: Shape
    source: int
    source_strides: Shape
    target: int
    target_strides: Shape

    @property
    def nbytes(self) -> int:
        """Bytes copied."""
        total = self.run
        for count in self.counts:
            total *= count
        return total

    @property
    def source_span(self) -> int:
        """Bytes from the first to the last one touched in the source."""
        return self._span(self.source_strides)

    @property
    def target_span(self) -> int:
        """Bytes from the first to the last one touched in the target."""
        return self._span(self.target_strides)

    def _span(self, strides: Shape) -> int:
        return self.run + sum((count - 1) * stride for count, stride in zip(self.counts, strides))

    def runs(self) -> Iterator[tuple[int, int]]:
        """(source offset, target offset) of every run, in row-major order."""
        sources = offsets_of(self.source, self.counts, self.source_strides)
        return zip(sources, offsets_of(self.target, self.counts, self.target_strides))


def offsets_of(start: int, counts: Shape, strides: Shape) -> list[int]:
    """Where every element of a strided array lies, in row-major order."""
    offsets = [start]
    for count, stride in zip(counts, strides):
        steps = range(0, count * stride, stride) if stride else (0,) * count
        offsets = [offset + step for offset in offsets for step in steps]
    return offsets


def byte_box(shape: Shape, region: Region, dtype: DType) -> tuple[Shape, Region]:
    """Shape and region in bytes. Raises LayoutMismatchError when a packed type is cut inside a byte."""
    if dtype.bits % 8 == 0:
        width = dtype.bits // 8
        return (*shape, width), Region((*region.start, 0), (*region.stop, width))
    scaled = (
        [extent * dtype.bits for extent in (shape[-1], region.start[-1], region.stop[-1])] if shape else [dtype.bits]
    )
    if not shape or any(bits % 8 for bits in scaled):
        raise LayoutMismatchError(
            f"a box {region} of shape {list(shape)} cuts {dtype.name} elements ({dtype.bits} bits) inside a byte; "
            "split another axis, or the last one at a byte boundary"
        )
    last, low, high = (bits // 8 for bits in scaled)
    return (*shape[:-1], last), Region((*region.start[:-1], low), (*region.stop[:-1], high))


def strides_of(shape: Shape) -> Shape:
    """Row-major strides of a byte array."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


@lru_cache(maxsize=8192)
def strided_copy(piece: Piece, target_shape: Shape, dtype: DType) -> StridedCopy:
    """The copy that moves `piece` from its source slice into a target array of `target_shape`."""
    return copy_box(piece.source_shape, piece.in_source, target_shape, piece.in_target, dtype, piece.view)


def copy_box(
    source_shape: Shape,
    in_source: Region,
    target_shape: Shape,
    in_target: Region,
    dtype: DType,
    view: Optional[View] = None,
) -> StridedCopy:
    """The copy of a box of one array to an equal box of another, both row-major, offsets from the arrays' starts.

    With a view, `in_target` is a box of the view of the target, which may lie in it with any strides.
    """
    source_bytes, source_box = byte_box(source_shape, in_source, dtype)
    source_strides = strides_of(source_bytes)
    source = sum(low * stride for low, stride in zip(source_box.start, source_strides))
    if view is None:
        target_bytes, target_box = byte_box(target_shape, in_target, dtype)
        target_strides, target = strides_of(target_bytes), 0
    else:
        target_box, target_strides, target = _viewed(in_target, view, dtype)
    target += sum(low * stride for low, stride in zip(target_box.start, target_strides))
    return _merged(source_box.shape, source, source_strides, target, target_strides)


def _viewed(region: Region, view: View, dtype: DType) -> tuple[Region, Shape, int]:
    """Region, strides and offset of a view in bytes."""
    if dtype.bits % 8:
        raise LayoutMismatchError(
            f"{dtype.name} elements ({dtype.bits} bits) lie inside bytes and cannot be fused or transposed: "
            "merge or load such a parameter without a rule"
        )
    width = dtype.bits // 8
    box = Region((*region.start, 0), (*region.stop, width))
    return box, (*(stride * width for stride in view.strides), 1), view.offset * width


def _merged(shape: Shape, source: int, source_strides: Shape, target: int, target_strides: Shape) -> StridedCopy:
    """A copy of byte boxes, with axes that are contiguous on both sides made one."""
    run = 1
    axes: list[tuple[int, int, int]] = []  # (count, source stride, target stride), innermost first
    for count, s, t in reversed(list(zip(shape, source_strides, target_strides))):
        if count == 1:
            continue
        if not axes and s == run and t == run:
            run *= count
        elif axes and s == axes[-1][0] * axes[-1][1] and t == axes[-1][0] * axes[-1][2]:
            axes[-1] = (axes[-1][0] * count, axes[-1][1], axes[-1][2])
        else:
            axes.append((count, s, t))
    axes.reverse()
    return StridedCopy(
        run,
        tuple(count for count, _, _ in axes),
        source,
        tuple(s for _, s, _ in axes),
        target,
        tuple(t for _, _, t in axes),
    )
