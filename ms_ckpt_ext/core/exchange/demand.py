"""What the ranks of a cooperative load want, what they have in memory already, and the sizes that bound the exchange.

Source slices may lie in the memory of ranks rather than in files: in Parameters of a network, from which another is to
be filled. Then every rank counts as a file: number r is what rank r holds.

1. What a rank holds itself it takes from itself: that never travels, and is no part of the exchange (`local_pieces`).
2. What it lacks it gets from a rank of its own server that holds it, where there is one.
3. Else any holder will do; which one gives is settled when it is known what each has to give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
from ms_ckpt_ext.core.geometry.layout import Cell, cell_region
from ms_ckpt_ext.core.planning.pieces import Sourced, SourceTensor, locate

Sees = Mapping[int, frozenset[int]]
"""File number -> ranks that can open it."""
Servers = tuple[int, ...]
"""The number of every rank's server; none where there is one for all."""
ALIGNMENT = 16
"""Blocks of a collective start at multiples of this (the widest element); pieces inside go widest element first."""
SLAB = 4 << 20
"""Small chunks share slabs of this size: a copy to a device has a price of its own, and bandwidth from here on."""


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

    `into` and `kept` are those of `Assembly`; `dtype` and `shape` are of the box.
    """

    into: int
    dtype: DType
    shape: Shape
    pieces: Sequence[Sourced]
    kept: bool = False


def boxes_moved(tensor: SourceTensor, target: Region) -> Iterator[MovedBox]:
    """What is moved for a box. Raises CoverageError: a region is in no file."""
    if not tensor.is_computed:
        yield MovedBox(0, tensor.meta.dtype, target.shape, locate(tensor, target))
        return
    from ms_ckpt_ext.core.planning.assembly import assembled

    for each in assembled(tensor, target).every():
        yield MovedBox(each.number, each.tensor.meta.dtype, each.region.shape, each.moved, each.kept)


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
        servers: where the ranks are.
        tiered: what several ranks of a server want crosses to it once.
    """

    gather: bool = True
    groups: bool = False
    known: frozenset[tuple[int, ...]] = frozenset()
    broadcast: bool = False
    servers: Servers = ()
    tiered: bool = False

    def may_gather(self, ranks: tuple[int, ...], world: int) -> bool:
        """Whether these ranks may gather, or be sent a broadcast, if they want the same."""
        return self.gather if len(ranks) == world else self.groups or ranks in self.known


ALL_RANKS = Ways()


class Leg(NamedTuple):
    """Ranks that get something, and those that may give it to them."""

    holders: tuple[int, ...]
    receivers: tuple[int, ...]


@lru_cache(maxsize=1 << 16)
def legs(wanting: tuple[int, ...], holders: tuple[int, ...], servers: Servers) -> tuple[Leg, ...]:
    """How what `holders` have comes to `wanting`, whoever has it himself left out.

    >>> legs((0, 1, 2, 3), (0, 2), ())
    (Leg(holders=(0, 2), receivers=(1, 3)),)
    >>> legs((0, 1, 2, 3), (0, 2), (0, 0, 1, 1))
    (Leg(holders=(0,), receivers=(1,)), Leg(holders=(2,), receivers=(3,)))
    """
    lacking = [rank for rank in wanting if rank not in set(holders)]
    if not servers:
        return (Leg(holders, tuple(lacking)),) if lacking else ()
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in lacking:
        near = tuple(holder for holder in holders if servers[holder] == servers[rank])
        found.setdefault(near or holders, []).append(rank)
    return tuple(Leg(giving, tuple(ranks)) for giving, ranks in found.items())


class LocalPiece(NamedTuple):
    """What a rank takes of its own memory: a box of a slice of `shape` that it holds under a name.

    Attributes:
        demand: number of the parameter in the list of demands.
        name: what the slice is called where it is held.
        shape, in_source: of the slice, and the box of it.
        in_target, view: where that lands in the target's box, and how that is seen, see `core.planning.pieces`.
        into, dtype: which box that is, see `MovedBox`.
    """

    demand: int
    name: str
    shape: Shape
    in_source: Region
    in_target: Region
    view: Optional[View]
    into: int
    dtype: DType


def local_pieces(demand: Demand, number: int, rank: int) -> list[LocalPiece]:
    """What of a demand, the `number`-th, a rank takes of its own memory.

    Raises:
        CoverageError: a region that it wants is nowhere.
    """
    found = []
    for grid in demand.grids:
        for cell, ranks in grid.ranks.items():
            if rank not in ranks:
                continue
            for box in boxes_moved(demand.tensor, grid.region(cell, demand.tensor.meta.shape)):
                for piece, files, name, _ in box.pieces:
                    if rank in files:
                        landing = (piece.in_target, piece.view, box.into, box.dtype)
                        found.append(LocalPiece(number, name, piece.source_shape, piece.in_source, *landing))
    return found
