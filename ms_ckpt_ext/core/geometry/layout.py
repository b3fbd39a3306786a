"""Where each rank's slice of a parameter lies: MindSpore's layout rules, in closed form.

A layout is a device matrix, a tensor map and an optional optimizer shard. The rules (measured on MindSpore 2.10,
proven on the golden shards) are

1. A rank's coordinates are the row-major decomposition of its number within the stage over the device matrix.
2. `tensor_map` names device axes counted from the right: value v is axis `len(dev_matrix) - 1 - v`. Several device
   axes may split one tensor axis, major first; the slice index is their mixed-radix number.
3. An optimizer shard is active when step and size are both non-zero. The device axes that split no tensor axis are
   replicas; they are consumed from the innermost outward until `size` ways are reached (all of them for -1; the last
   may be consumed in part). The mixed-radix number of what was consumed, outer axis major, cuts axis 0 once more.

So the slices of a layout form a regular grid: a number of `parts` on every axis, and a `cell` of that grid for every
rank. Ranks in the same cell hold the same bytes. Nothing downstream knows more about parallelism than this.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from ms_ckpt_ext.core.geometry.array import Region, Shape
from ms_ckpt_ext.errors import LayoutMismatchError, StrategyError

Cell = tuple[int, ...]

MAX_RANKS = 1 << 20
"""More ranks than any cluster has; a guard against damaged strategies, because ranks are enumerated."""
MAX_AXES = 64
"""More axes than any device matrix or tensor has; a guard likewise: a product of a million extents takes hours."""


class _Numbers(NamedTuple):
    dev_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    opt_shard_step: int
    opt_shard_size: int


class Layout(_Numbers):
    """How one parameter is cut over the devices of one pipeline stage.

    Attributes:
        dev_matrix: extent of every device axis, outermost first; their product is the stage's device count.
        tensor_map: for every tensor axis the device axes that split it, major first, counted from the right
            as MindSpore counts them; `()` where the axis is whole.
        opt_shard_step, opt_shard_size: MindSpore's `opt_weight_shard_step` / `_size`; size -1 means all replicas.

    Raises:
        StrategyError: at birth, when the numbers contradict each other.

    >>> layout = Layout((2, 4), ((0,), ()))          # dp2 tp4, split by rows over tp
    >>> layout.region(5, (96, 24))
    Region(start=(24, 0), stop=(48, 24))
    """

    __slots__ = ()

    def __new__(
        cls,
        dev_matrix: tuple[int, ...],
        tensor_map: tuple[tuple[int, ...], ...],
        opt_shard_step: int = 0,
        opt_shard_size: int = 0,
    ) -> Layout:
        layout = super().__new__(cls, dev_matrix, tensor_map, opt_shard_step, opt_shard_size)
        layout._check()
        return layout

    def _check(self) -> None:
        axes = [axis for group in self.tensor_map for axis in group]
        if max(len(self.dev_matrix), len(self.tensor_map), len(axes)) > MAX_AXES:
            raise StrategyError(
                f"device matrix of {len(self.dev_matrix)} axes, tensor map of {len(self.tensor_map)} that names "
                f"{len(axes)} of them: expected at most {MAX_AXES} of each: it is damaged"
            )
        if not self.dev_matrix or any(extent < 1 for extent in self.dev_matrix):
            raise StrategyError(f"device matrix {list(self.dev_matrix)}: expected one or more extents of at least 1")
        if self.devices > MAX_RANKS:
            raise StrategyError(
                f"device matrix {list(self.dev_matrix)} has more than {MAX_RANKS} devices: it is damaged"
            )
        if any(not 0 <= axis < len(self.dev_matrix) for axis in axes):
            raise StrategyError(
                f"tensor map {self.tensor_map} names a device axis that the device matrix {list(self.dev_matrix)} lacks"
            )
        if len(set(axes)) != len(axes):
            raise StrategyError(f"tensor map {self.tensor_map} uses a device axis twice")
        if self.opt_sharded:
            self._check_opt_shard()

    def _check_opt_shard(self) -> None:
        if self.opt_shard_step < 0 or self.opt_shard_size < -1:
            raise StrategyError(
                f"optimizer shard step {self.opt_shard_step}, size {self.opt_shard_size}: "
                "expected step >= 0 and size >= -1"
            )
        if not self.tensor_map:
            raise StrategyError("an optimizer shard cuts axis 0, but this parameter has no axes")
        _consumed(self)

    def over(self, ndim: int) -> Layout:
        """This layout for a tensor of `ndim` axes.

        Strategy files write the several device axes of a tensor's only axis as they write one for each of several
        axes, so a map of more axes than the tensor has may be that of one.

        >>> Layout((2, 4), ((1,), (0,))).over(1).tensor_map
        ((1, 0),)
        """
        if ndim != 1 or len(self.tensor_map) == 1 or not all(self.tensor_map):
            return self
        lone = tuple(axis for group in self.tensor_map for axis in group)
        return Layout(self.dev_matrix, (lone,), self.opt_shard_step, self.opt_shard_size)

    @property
    def opt_sharded(self) -> bool:
        """True when the optimizer shard is active."""
        return self.opt_shard_step != 0 and self.opt_shard_size != 0

    @property
    def shards(self) -> int:
        """Ways in which the optimizer shard cuts axis 0 of every slice once more; 1 when it is not active."""
        return prod(ways for _, ways in _consumed(self))

    @property
    def devices(self) -> int:
        """Devices of the pipeline stage."""
        return prod(self.dev_matrix)

    @property
    def parts(self) -> Shape:
        """Number of slices along every tensor axis."""
        return _parts(self)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """For every rank of the stage, the cell of the slice grid it holds."""
        return _cells(self)

    @property
    def holders(self) -> dict[Cell, tuple[int, ...]]:
        """For every cell, the ranks of the stage that hold it, ascending."""
        return _holders(self)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        """Place of `rank` in the device matrix, outermost axis first; an axis that an optimizer shard consumes is two:
        the replica, then the shard."""
        found: list[int] = []
        ways = dict(_consumed(self))
        for axis in range(len(self.dev_matrix) - 1, -1, -1):
            rank, coordinate = divmod(rank, self.dev_matrix[axis])
            found += reversed(divmod(coordinate, ways[axis])) if axis in ways else [coordinate]
        return tuple(reversed(found))

    def region(self, rank: int, shape: Shape) -> Region:
        """The box that `rank` (within the stage) holds of a parameter of full `shape`.

        Raises:
            LayoutMismatchError: when `shape` cannot be cut this way.
        """
        return _region(self, rank, shape)

    def slice_shape(self, shape: Shape) -> Shape:
        """Shape of every slice of a parameter of full `shape`."""
        return slice_shape(shape, self.parts)

    def full_shape(self, slice_of: Shape) -> Shape:
        """Full shape of a parameter whose slices have the shape `slice_of`."""
        if len(slice_of) != len(self.parts):
            raise LayoutMismatchError(
                f"a slice of shape {list(slice_of)} has {len(slice_of)} axes; the layout has {len(self.parts)}"
            )
        return tuple(extent * parts for extent, parts in zip(slice_of, self.parts))


def same_slices(one: Layout, two: Layout) -> bool:
    """Whether every rank of a stage has the same slice under both; they may be written in other device matrices."""
    ndim = min(len(one.tensor_map), len(two.tensor_map))
    one, two = one.over(ndim), two.over(ndim)
    return one == two or (one.parts == two.parts and one.cells == two.cells)


def layout_from_json(raw: Sequence[Any]) -> Layout:
    """A layout from what JSON makes of one: a list of its four fields."""
    dev_matrix, tensor_map, step, size = raw
    return Layout(tuple(dev_matrix), tuple(map(tuple, tensor_map)), step, size)


def whole(ndim: int) -> Layout:
    """The layout of an uncut parameter on one device."""
    return Layout((1,), ((),) * ndim)


def slice_shape(shape: Shape, parts: Shape) -> Shape:
    """Shape of one cell when `shape` is cut into `parts`. Raises LayoutMismatchError when that is not even."""
    if len(shape) != len(parts):
        raise LayoutMismatchError(f"shape {list(shape)} has {len(shape)} axes; the layout has {len(parts)}")
    for axis, (extent, count) in enumerate(zip(shape, parts)):
        if extent % count:
            raise LayoutMismatchError(
                f"axis {axis} of shape {list(shape)} cannot be cut into {count} equal parts; "
                "check that the strategy belongs to this model"
            )
    return tuple(extent // count for extent, count in zip(shape, parts))


def digits(number: int, radices: Shape) -> Cell:
    """The mixed-radix digits of a number, major first: its place in a row-major grid of `radices` parts per axis.

    >>> digits(5, (2, 3))
    (1, 2)
    """
    found = []
    for radix in reversed(radices):
        number, digit = divmod(number, radix)
        found.append(digit)
    return tuple(reversed(found))


def cell_region(cell: Cell, parts: Shape, shape: Shape) -> Region:
    """The box of one cell of the grid that `parts` makes of `shape`."""
    extents = slice_shape(shape, parts)
    start = tuple(index * extent for index, extent in zip(cell, extents))
    return Region(start, tuple(low + extent for low, extent in zip(start, extents)))


@lru_cache(maxsize=4096)
def _region(layout: Layout, rank: int, shape: Shape) -> Region:
    return cell_region(layout.cells[rank], layout.parts, shape)


def _axis(layout: Layout, value: int) -> int:
    return len(layout.dev_matrix) - 1 - value


@lru_cache(maxsize=4096)
def _consumed(layout: Layout) -> tuple[tuple[int, int], ...]:
    """(device axis, ways taken) of the optimizer shard, outermost first."""
    if not layout.opt_sharded:
        return ()
    used = {_axis(layout, value) for group in layout.tensor_map for value in group}
    replicas = [axis for axis, extent in enumerate(layout.dev_matrix) if axis not in used and extent > 1]
    wanted = layout.opt_shard_size
    if wanted == -1:
        wanted = prod(layout.dev_matrix[axis] for axis in replicas)
    left, taken = wanted, []
    for axis in reversed(replicas):
        ways = min(left, layout.dev_matrix[axis])
        if ways == 1 or left % ways or layout.dev_matrix[axis] % ways:
            break
        taken.append((axis, ways))
        left //= ways
    if left != 1:
        raise StrategyError(
            f"optimizer shard of size {layout.opt_shard_size} does not fit the replicas "
            f"{[layout.dev_matrix[axis] for axis in replicas]} of device matrix {list(layout.dev_matrix)} "
            f"under tensor map {layout.tensor_map}"
        )
    return tuple(reversed(taken))


@lru_cache(maxsize=4096)
def _parts(layout: Layout) -> Shape:
    parts = [prod(layout.dev_matrix[_axis(layout, value)] for value in group) for group in layout.tensor_map]
    if layout.opt_sharded:
        parts[0] *= prod(ways for _, ways in _consumed(layout))
    return tuple(parts)


@lru_cache(maxsize=4096)
def _cells(layout: Layout) -> tuple[Cell, ...]:
    columns = [_column(layout, group, ()) for group in layout.tensor_map]
    if layout.opt_sharded:
        columns[0] = _column(layout, layout.tensor_map[0], _consumed(layout))
    return tuple(zip(*columns)) if columns else ((),) * layout.devices


def _column(layout: Layout, group: Sequence[int], consumed: Sequence[tuple[int, int]]) -> list[int]:
    """For every rank, the index along a tensor axis that `group` splits, and what an optimizer shard consumed.

    Ranks are numbered row-major, so each device axis in turn repeats what there is, a step further for each coordinate.
    """
    ways = [(_axis(layout, value), layout.dev_matrix[_axis(layout, value)]) for value in group]
    steps: dict[int, list[int]] = {}
    weight = 1
    for axis, count in reversed([*ways, *consumed]):
        steps[axis] = [coordinate % count * weight for coordinate in range(layout.dev_matrix[axis])]
        weight *= count
    column = [0]
    for axis, extent in enumerate(layout.dev_matrix):
        further = steps.get(axis, [0] * extent)
        column = [index + step for index in column for step in further]
    return column


@lru_cache(maxsize=4096)
def _holders(layout: Layout) -> dict[Cell, tuple[int, ...]]:
    found: dict[Cell, list[int]] = {}
    for rank, cell in enumerate(_cells(layout)):
        found.setdefault(cell, []).append(rank)
    return {cell: tuple(ranks) for cell, ranks in found.items()}
