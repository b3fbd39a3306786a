"""Views: a box of an array, seen with its axes split, as boxes again.

A fused parameter is simple in a view of it: rows of gate and up alternate in `(rows, 2, columns)`, grouped QKV heads in
`(groups, heads, columns)`, transposed experts in `(experts, columns, rows)`. A target box of the parameter itself need
not be a box of the view, but it is a few: `frames` finds them, and where each lies in the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from ms_ckpt_ext.core.geometry.array import Region, Shape, View


class Frame(NamedTuple):
    """A part of a target box that is a box of the view, and where the box's first element and axes lie in the target.

    Attributes:
        box: in the view of the whole parameter.
        offset: element of the target box where `box.start` lies.
        strides: distance, in elements of the target box, of neighbours along every axis of the view.
    """

    box: Region
    offset: int
    strides: Shape


@lru_cache(maxsize=8192)
def frames(shape: Shape, view: Shape, target: Region) -> tuple[Frame, ...]:
    """Cut `target`, a box of an array of `shape`, into boxes of its `view`.

    An axis whose range begins or ends inside the inner axes of its view gives a box for the head, one for the body and
    one for the tail; a range that does not gives one box.
    """
    groups = split_axes(shape, view)
    steps = _row_major(target.shape)
    strides = [stride * step for group, step in zip(groups, steps) for stride in _row_major(group)]
    ranges = [tuple(_axis_boxes(low, high, group)) for group, low, high in zip(groups, target.start, target.stop)]
    found = []
    for choice in product(*ranges):
        offset = sum((flat - low) * step for (flat, _, _), low, step in zip(choice, target.start, steps))
        start = tuple(low for _, lows, _ in choice for low in lows)
        stop = tuple(high for _, _, highs in choice for high in highs)
        found.append(Frame(Region(start, stop), offset, tuple(strides)))
    return tuple(found)


def split_axes(shape: Shape, view: Shape) -> tuple[Shape, ...]:
    """Which axes of `view` make up every axis of `shape`. Raises ValueError when they do not."""
    groups, rest = [], list(view)
    for extent in shape:
        group: list[int] = []
        size = 1
        while rest and (size < extent or (not group and rest[0] == extent)):
            group.append(rest.pop(0))
            size *= group[-1]
        if size != extent:
            raise ValueError(f"{list(view)} does not split the axes of {list(shape)}")
        groups.append(tuple(group))
    if any(extent != 1 for extent in rest) or (rest and not groups):
        raise ValueError(f"{list(view)} does not split the axes of {list(shape)}")
    if rest:
        groups[-1] += tuple(rest)
    return tuple(groups)


def unsplit(shape: Shape, seen: Shape, box: Region, view: View) -> Iterator[tuple[Region, View]]:
    """Cut `box`, of an array of `shape` that is seen as `seen`, into boxes of the array as it is.

    Args:
        view: how the box lies in a target; each of the boxes comes with how it lies there.

    >>> [found.start for found, _ in unsplit((6,), (3, 2), Region((0, 1), (2, 2)), View(0, (1, 1)))]
    [(1,), (3,)]
    """
    axes, at = [], 0
    for group in split_axes(shape, seen):
        here = slice(at, at + len(group))
        axes.append([*_axis_runs(group, box.start[here], box.stop[here], view.strides[here])])
        at += len(group)
    for choice in product(*axes):
        start, stop = tuple(run.low for run in choice), tuple(run.high for run in choice)
        offset = view.offset + sum(run.offset for run in choice)
        yield Region(start, stop), View(offset, tuple(run.stride for run in choice))


class _Run(NamedTuple):
    """A range of an axis that lies at even distances in the target."""

    low: int
    high: int
    offset: int
    stride: int


def _axis_runs(extents: Shape, start: Shape, stop: Shape, strides: Shape) -> Iterator[_Run]:
    """A box of the axes that make up one axis, as ranges of that."""
    if not extents:
        yield _Run(0, 1, 0, 0)
        return
    steps = _row_major(extents)
    for outer in product(*(range(low, high) for low, high in zip(start[:-1], stop[:-1]))):
        base = sum(index * step for index, step in zip(outer, steps))
        offset = sum((index - low) * stride for index, low, stride in zip(outer, start, strides))
        yield _Run(base + start[-1], base + stop[-1], offset, strides[-1])


def _row_major(extents: Shape) -> list[int]:
    return [prod(extents[axis + 1 :]) for axis in range(len(extents))]


def _axis_boxes(low: int, high: int, extents: Shape) -> Iterator[tuple[int, Shape, Shape]]:
    """(first number, start, stop) of boxes that make up `low .. high` of the axis that `extents` split."""
    if not extents:
        yield 0, (), ()
        return
    inner = prod(extents[1:])
    first, last = -(-low // inner), high // inner
    if first > last:  # begins and ends inside one outer index
        yield from _within(last, low, high, extents)
        return
    if low < first * inner:
        yield from _within(first - 1, low, first * inner, extents)
    if first < last:
        yield first * inner, (first, *(0 for _ in extents[1:])), (last, *extents[1:])
    if last * inner < high:
        yield from _within(last, last * inner, high, extents)


def _within(index: int, low: int, high: int, extents: Shape) -> Iterator[tuple[int, Shape, Shape]]:
    base = index * prod(extents[1:])
    for flat, start, stop in _axis_boxes(low - base, high - base, extents[1:]):
        yield base + flat, (index, *start), (index + 1, *stop)


class Nest(NamedTuple):
    """A strided box in terms that need no strides: what a tensor's `narrow`, `view` and `permute` can express.

    Attributes:
        start: first element of the flat array to take.
        shape: what is taken, seen row-major.
        box: part of that which is the strided box.
        order: axes of `shape`, permuted: those of the strided box, then one more that is one thick.
        part: the part of the strided box that this is.
    """

    start: int
    shape: Shape
    box: Region
    order: tuple[int, ...]
    part: Region


def nests(size: int, view: View, region: Region) -> Iterator[Nest]:
    """Express `region`, a box of a view of a flat array of `size` elements, without strides.

    One nest, unless the box ends where a whole row of the view would not: then one for each index of an outer axis.
    """
    offset = view.offset + sum(low * stride for low, stride in zip(region.start, view.strides))
    yield from _nests(size, offset, view.strides, Region.whole(region.shape))


def _nests(size: int, offset: int, strides: Shape, part: Region) -> Iterator[Nest]:
    counts = part.shape
    order = sorted((axis for axis, count in enumerate(counts) if count > 1), key=lambda axis: -strides[axis])
    steps = [*(strides[axis] for axis in order), 1]
    if all(outer % inner == 0 for outer, inner in zip(steps, steps[1:])):
        shape = (counts[order[0]] if order else 1, *(outer // inner for outer, inner in zip(steps, steps[1:])))
        for start in (offset, size - prod(shape)):
            low = tuple((offset - start) // step % extent for step, extent in zip(steps, shape))
            high = tuple(a + b for a, b in zip(low, (*(counts[axis] for axis in order), 1)))
            fits = all(a <= b for a, b in zip(high, shape))
            if 0 <= start <= offset and start + prod(shape) <= size and fits:
                thin = [axis for axis in range(len(counts)) if axis not in order]
                place = {axis: number for number, axis in enumerate((*order, None, *thin))}
                ones = (1,) * len(thin)
                box = Region((*low, *(0 for _ in thin)), (*high, *ones))
                axes = (*(place[axis] for axis in range(len(counts))), place[None])
                yield Nest(start, (*shape, *ones), box, axes, part)
                return
    outermost = order[0]
    for index in range(counts[outermost]):
        first, last = list(part.start), list(part.stop)
        first[outermost] += index
        last[outermost] = first[outermost] + 1
        inside = Region(tuple(first), tuple(last))
        yield from _nests(size, offset + index * strides[outermost], strides, inside)
