"""A piece as bytes: one strided copy from a row-major array into another.

Boxes become byte boxes by one more axis of item size (packed types below a byte scale the last axis instead). Axes
that are contiguous on both sides are merged, so what remains is the fewest, longest runs: a row split is one run, a
column split one run a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
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

    @property
    def form(self) -> Form:
        """This copy without its offsets."""
        return Form(self.run, self.counts, self.source_strides, self.target_strides, self.nbytes)

    def bounded(self, most: int) -> Iterator[StridedCopy]:
        """This copy cut along its outer axes, so that each part spans at most `most` bytes of the source.

        A single run is not cut.
        """
        if not self.counts or self.source_span <= most:
            yield self
            return
        count, stride, landing = self.counts[0], self.source_strides[0], self.target_strides[0]
        one = self.source_span - (count - 1) * stride
        step = max(1, (most - one) // stride + 1)
        for first in range(0, count, step):
            part = self._replace(source=self.source + first * stride, target=self.target + first * landing)
            if step > 1:
                yield part._replace(counts=(min(step, count - first), *self.counts[1:]))
                continue
            inner = part._replace(
                counts=self.counts[1:], source_strides=self.source_strides[1:], target_strides=self.target_strides[1:]
            )
            yield from inner.bounded(most)

    def repeated(self, count: int, step: int, landing: int) -> StridedCopy:
        """This copy made `count` times, `step` bytes further in the source and `landing` in the target each time."""
        if count == 1:
            return self
        if not self.counts and step == landing == self.run:
            return self._replace(run=count * self.run)
        return self._replace(
            counts=(count, *self.counts),
            source_strides=(step, *self.source_strides),
            target_strides=(landing, *self.target_strides),
        )


class Form(NamedTuple):
    """What copies that differ in their offsets only have in common; `nbytes` of one."""

    run: int
    counts: Shape
    source_strides: Shape
    target_strides: Shape
    nbytes: int

    def at(self, source: int, target: int) -> StridedCopy:
        """The copy that begins there."""
        return StridedCopy(self.run, self.counts, source, self.source_strides, target, self.target_strides)

    def gap(self) -> int:
        """Bytes between neighbouring stretches of the source that are contiguous; 0 when it is one stretch."""
        depth, length = self._solid()
        return self.source_strides[depth - 1] - length if depth else 0

    def apart(self, source: int, target: int) -> tuple[Form, list[tuple[int, int]]]:
        """The copy that begins there, one contiguous stretch of the source at a time: their form, and their offsets."""
        depth, length = self._solid()
        strides = self.source_strides[:depth], self.target_strides[:depth]
        outer = StridedCopy(length, self.counts[:depth], source, strides[0], target, strides[1])
        inner = Form(self.run, self.counts[depth:], self.source_strides[depth:], self.target_strides[depth:], length)
        return inner, [*outer.runs()]

    def _solid(self) -> tuple[int, int]:
        """(axes with gaps between them in the source, bytes without one).

        Axes count from the outermost one: where axes are permuted, no inner one is contiguous behind a gap.
        """
        depth, length = len(self.counts), self.run
        while depth and self.source_strides[depth - 1] == length:
            depth -= 1
            length *= self.counts[depth]
        return depth, length


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
    axes: list[tuple[int, int, int]] = []  # (count, source stride, target stride), innermost first: that is the run
    length, step, landing = 1, 1, 1
    for count, s, t in reversed(list(zip(shape, source_strides, target_strides))):
        if count == 1:
            continue
        if s == length * step and t == length * landing:
            length *= count
        else:
            axes.append((length, step, landing))
            length, step, landing = count, s, t
    axes.append((length, step, landing))
    (run, _, _), *outer = axes
    outer.reverse()
    return StridedCopy(
        run,
        tuple(count for count, _, _ in outer),
        source,
        tuple(s for _, s, _ in outer),
        target,
        tuple(t for _, _, t in outer),
    )
