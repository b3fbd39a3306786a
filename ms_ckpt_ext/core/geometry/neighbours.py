"""Which ranks stand for all when copies of one tensor are compared, though nobody says how it is cut.

A tensor that is cut along an axis of the device matrix differs between two ranks whose coordinates on that axis
differ. So the first holder of a stage and, for every such axis, one holder beside it tell whether the tensor is cut at
all; a thousand ranks need not be looked at.

1. The axes are those of every device matrix that the strategy has.
2. A tensor that the strategy does not list may be cut along axes that no listed one shows: (2, 2) where the listed ones
   have (4,). Whatever the matrix, the stride of its axes divides the number of devices, so a neighbour at every other
   such stride is looked at as well, though only in samples.
3. Stages are compared by their first holders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.layout import Layout


class Axis(NamedTuple):
    """A device axis by the ranks it counts: a rank's coordinate on it is `rank // stride % extent`."""

    stride: int
    extent: int

    def coordinate(self, local: int) -> int:
        """Of a rank within its stage."""
        return local // self.stride % self.extent


class Representatives(NamedTuple):
    """Ranks that stand for all holders of a tensor.

    Attributes:
        whole: those whose contents are compared whole.
        sampled: more of them, of which samples are compared.
    """

    whole: tuple[int, ...]
    sampled: tuple[int, ...]


def axes_of(layouts: Mapping[str, Mapping[int, Layout]]) -> tuple[Axis, ...]:
    """The axes, longer than 1, of all device matrices of a strategy."""
    matrices = {layout.dev_matrix for stages in layouts.values() for layout in stages.values()}
    found = {
        Axis(prod(matrix[axis + 1 :]), extent)
        for matrix in matrices
        for axis, extent in enumerate(matrix)
        if extent > 1
    }
    return tuple(sorted(found))


def representatives(holders: Sequence[int], devices: int, axes: Sequence[Axis]) -> Representatives:
    """Who stands for the holders of a tensor.

    Args:
        holders: global ranks, ascending.
        devices: of a pipeline stage.
        axes: those of `axes_of`.

    >>> representatives(range(8), 8, [Axis(1, 2), Axis(2, 4)])      # the device matrix is (4, 2)
    Representatives(whole=(0, 1, 2), sampled=(4,))
    """
    known = {axis.stride for axis in axes}
    strides = (stride for stride in range(1, devices) if not devices % stride and stride not in known)
    others = [Axis(stride, devices // stride) for stride in strides]
    whole: dict[int, None] = {}
    sampled: dict[int, None] = {}
    for base, local in _by_stage(holders, devices):
        whole.update(dict.fromkeys(base + rank for rank in (local[0], *_beside(local, axes))))
        sampled.update(dict.fromkeys(base + rank for rank in _beside(local, others)))
    return Representatives(tuple(sorted(whole)), tuple(sorted(sampled.keys() - whole.keys())))


def unseen_axes(holders: Sequence[int], devices: int, axes: Iterable[Axis]) -> bool:
    """Whether there is an axis of some stage along which the holders have one coordinate only, so that nothing tells
    whether a tensor is cut along it."""
    axes = tuple(axes)
    return any(
        len({axis.coordinate(rank) for rank in local}) == 1 for _, local in _by_stage(holders, devices) for axis in axes
    )


def _by_stage(holders: Sequence[int], devices: int) -> Iterator[tuple[int, list[int]]]:
    """(first rank of a stage, its holders by their numbers within it)."""
    found: dict[int, list[int]] = {}
    for rank in holders:
        found.setdefault(rank // devices, []).append(rank % devices)
    return ((stage * devices, local) for stage, local in found.items())


def _beside(local: Sequence[int], axes: Iterable[Axis]) -> Iterator[int]:
    """For every axis a holder at another coordinate than the first one's, if there is one: beside it, if possible."""
    held, first = set(local), local[0]
    for axis in axes:
        near: Optional[int] = first + axis.stride
        if near not in held:
            near = next((r for r in local if axis.coordinate(r) != axis.coordinate(first)), None)
        if near is not None:
            yield near
