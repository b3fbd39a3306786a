"""What the ranks of a cooperative load want, and the sizes that bound it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.layout import Cell, cell_region
from ms_ckpt_ext.core.geometry.region import Region, Shape
from ms_ckpt_ext.core.planning.pieces import Sourced, SourceTensor, locate

Sees = Mapping[int, frozenset[int]]
"""File number -> ranks that can open it."""
ALIGNMENT = 16
"""Blocks of a collective start at multiples of this (the widest element); pieces inside go widest element first."""


class Grid(NamedTuple):
    """How a set of ranks wants one parameter: a number of slices on every axis, and the ranks of every cell.

    `uneven`: the boxes are no equal slices; a cell is the start of its box, then the stop.
    """

    parts: Shape
    ranks: Mapping[Cell, tuple[int, ...]]
    uneven: bool = False

    def region(self, cell: Cell, shape: Shape) -> Region:
        """The box of a cell, of a parameter of `shape`."""
        if self.uneven:
            return Region(cell[: len(shape)], cell[len(shape) :])
        return cell_region(cell, self.parts, shape)


class Demand(NamedTuple):
    """A parameter and everything the ranks want of it; a rank stands in at most one grid."""

    name: str
    tensor: SourceTensor
    grids: tuple[Grid, ...]


class MovedBox(NamedTuple):
    """A box that stored pieces land in: that which a rank wants (`into` is 0), or one that it is computed with.

    `into` is `Assembly.number`; `dtype` and `shape` are of the box.
    """

    into: int
    dtype: DType
    shape: Shape
    pieces: Sequence[Sourced]


def boxes_moved(tensor: SourceTensor, target: Region) -> Iterator[MovedBox]:
    """What is moved for a box. Raises CoverageError: a region is in no file."""
    if not tensor.is_computed:
        yield MovedBox(0, tensor.meta.dtype, target.shape, locate(tensor, target))
        return
    from ms_ckpt_ext.core.planning.assembly import assembled

    for each in assembled(tensor, target).every():
        yield MovedBox(each.number, each.tensor.meta.dtype, each.region.shape, each.moved)


@dataclass(frozen=True)
class ExchangeLimits:
    """Sizes in bytes.

    Attributes:
        bucket: staging memory of a rank for one round, all buffers together.
        chunk: aim for reads of this length.
    """

    bucket: int = 64 << 20
    chunk: int = 4 << 20

    @property
    def least(self) -> int:
        """The least that a rank may read, send and receive in one round each, however the bucket is shared out."""
        return max(self.bucket // 8, ALIGNMENT)

    @property
    def read(self) -> int:
        """Most that several parts read in one go may have together."""
        return min(self.chunk, self.least)


class Ways(NamedTuple):
    """How bytes may travel beside an all-to-all.

    Attributes:
        gather: all ranks may gather equal shares together.
        groups: so may any group of ranks that want the same.
        known: so may these groups.
        broadcast: where not all of a group see a file, one of them may read it and broadcast it to the group.
        servers: the number of every rank's server; none where there is one for all.
        tiered: what several ranks of a server want crosses to it once.
    """

    gather: bool = True
    groups: bool = False
    known: frozenset[tuple[int, ...]] = frozenset()
    broadcast: bool = False
    servers: tuple[int, ...] = ()
    tiered: bool = False

    def may_gather(self, ranks: tuple[int, ...], world: int) -> bool:
        """Whether these ranks may gather, or be sent a broadcast, if they want the same."""
        return self.gather if len(ranks) == world else self.groups or ranks in self.known


ALL_RANKS = Ways()
