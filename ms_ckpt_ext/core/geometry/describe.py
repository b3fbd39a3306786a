"""A layout as values that explain themselves: what reports show, and machines read."""

from __future__ import annotations

from math import prod
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import Shape
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import Strategy


class AxisSplit(NamedTuple):
    """How one tensor axis is cut.

    Attributes:
        axis: of the tensor.
        ways: number of parts, all together.
        device_axes: axes of the device matrix that cut it, counted from the left, major first.
        optimizer_ways: the factor of `ways` that the optimizer shard adds.
    """

    axis: int
    ways: int
    device_axes: tuple[int, ...]
    optimizer_ways: int

    def __str__(self) -> str:
        by = [f"device axis {axis}" for axis in self.device_axes]
        if self.optimizer_ways > 1:
            by.append(f"optimizer {self.optimizer_ways}")
        return f"axis {self.axis} in {self.ways} ({', '.join(by)})"


class LayoutInfo(NamedTuple):
    """A layout of one pipeline stage.

    Attributes:
        stage: pipeline stage.
        device_matrix: extent of every device axis, outermost first.
        split: the tensor axes that are cut.
        parts: number of slices along every tensor axis.
        copies: ranks that hold the same slice.
        optimizer_shard: step and size as MindSpore writes them; None when it is not active.
    """

    stage: int
    device_matrix: tuple[int, ...]
    split: tuple[AxisSplit, ...]
    parts: Shape
    copies: int
    optimizer_shard: Optional[tuple[int, int]]

    @property
    def words(self) -> str:
        """What is cut, in words."""
        return "; ".join(map(str, self.split)) or "whole"

    def __str__(self) -> str:
        copies = "1 copy" if self.copies == 1 else f"{self.copies} copies"
        return f"{self.words}; {copies}; device matrix {list(self.device_matrix)}"


class StrategyInfo(NamedTuple):
    """A strategy as a whole: `parameters` have a layout in it."""

    origin: str
    world: int
    stages: int
    devices_per_stage: int
    parameters: int


def describe(layout: Layout, stage: int) -> LayoutInfo:
    """A layout in words.

    >>> str(describe(Layout((2, 4), ((0,), ())), 0))
    'axis 0 in 4 (device axis 1); 2 copies; device matrix [2, 4]'
    """
    last = len(layout.dev_matrix) - 1
    split = []
    for axis, (group, ways) in enumerate(zip(layout.tensor_map, layout.parts)):
        axes = tuple(last - value for value in group)
        by_devices = prod(layout.dev_matrix[a] for a in axes)
        if ways > 1:
            split.append(AxisSplit(axis, ways, axes, ways // by_devices))
    shard = (layout.opt_shard_step, layout.opt_shard_size) if layout.opt_sharded else None
    return LayoutInfo(stage, layout.dev_matrix, tuple(split), layout.parts, layout.devices // prod(layout.parts), shard)


def describe_strategy(strategy: Strategy) -> StrategyInfo:
    """The numbers of a strategy."""
    return StrategyInfo(
        strategy.origin, strategy.world, strategy.stages, strategy.devices_per_stage, len(strategy.layouts)
    )
