"""What ranks have in memory already: who takes what from whom.

A source slice may lie in the memory of ranks rather than in files: in Parameters of a network, from which another is to
be filled. Such a slice is placed in *files* of its own kind, one for every rank, numbered behind all files.

1. What a rank holds itself it takes from itself: that never travels, and is no part of the exchange (`local_pieces`).
2. What it lacks it gets from a rank of its own server that holds it, where there is one.
3. Else any holder will do; which one gives is settled when it is known what each has to give.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Optional

from ms_ckpt_ext.core.exchange.demand import Demand, boxes_moved
from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.region import Region, Shape, View


class InMemory(NamedTuple):
    """Which files are the memory of ranks.

    Attributes:
        first: file number `first + r` is what rank r has in memory; those below are files.
        servers: the number of every rank's server; none where there is one for all.
    """

    first: int = 0
    servers: tuple[int, ...] = ()


class Leg(NamedTuple):
    """Ranks that get something, and those that may give it to them."""

    holders: tuple[int, ...]
    receivers: tuple[int, ...]


@lru_cache(maxsize=1 << 16)
def legs(wanting: tuple[int, ...], holders: tuple[int, ...], servers: tuple[int, ...]) -> tuple[Leg, ...]:
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


def local_pieces(demand: Demand, number: int, rank: int, memory: InMemory) -> list[LocalPiece]:
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
                    if memory.first + rank in files:
                        landing = (piece.in_target, piece.view, box.into, box.dtype)
                        found.append(LocalPiece(number, name, piece.source_shape, piece.in_source, *landing))
    return found
