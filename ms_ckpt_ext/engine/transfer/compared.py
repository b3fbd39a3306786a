"""Do the Parameters that were filled hold what those of the source hold? Compared after a run, at both ends.

1. What a rank wants of a parameter comes in pieces, each a box of a slice that ranks of the source hold. Every rank
   digests (xxh3-128) its pieces as they lie in what was filled, and shares the digests and the dtype that it holds.
2. Every rank that holds such a piece digests it as it lies there, cast to that dtype, and compares.

So a piece that was damaged, misplaced or not moved at all is found, and so are ranks of the source that hold other
bytes than the rank that sent. Every byte is read once more, on the host, one slice at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Callable, NamedTuple, Optional

import numpy as np
import xxhash

from ms_ckpt_ext.core.exchange.demand import Demand
from ms_ckpt_ext.core.geometry.array import DTYPES, Region, Shape, View
from ms_ckpt_ext.core.geometry.strided import strides_of
from ms_ckpt_ext.core.planning.pieces import Sourced, locate
from ms_ckpt_ext.errors import ChecksumError, TransportError, UsageError, name_ranks, some
from ms_ckpt_ext.transport.agree import NATURAL, on_all, told_by_all, told_of
from ms_ckpt_ext.transport.base import SAME_VERSION, Bytes, Transport

_SHOWN = 3


class TakenSlice(NamedTuple):
    """A slice in host memory, as flat bytes.

    Attributes:
        dtype: of the elements, as safetensors names it.
    """

    dtype: str
    bytes: Bytes


class _Told(NamedTuple):
    """What a rank reports of a parameter that it took: its dtype there, and digests of its pieces in order."""

    dtype: str
    digests: Sequence[str]


def require_moved(demands: Sequence[Demand]) -> None:
    """Raise UsageError for computed parameters, which do not hold bytes of the source."""
    computed = [demand.name for demand in demands if demand.tensor.is_computed]
    if computed:
        raise UsageError(
            f"verify='full' compares the bytes of both sides, and a rule computes {some(computed)}: "
            "use verify='replicas', or leave the rule out"
        )


def compare_with_source(
    transport: Transport[Any],
    demands: Sequence[Demand],
    taken: Callable[[int], TakenSlice],
    held: Callable[[str, str], Bytes],
) -> None:
    """Compare what was filled with the source. Collective.

    Args:
        demands: what all ranks want; none is computed.
        taken: number of a demand of this rank -> what its slice holds now.
        held: name in the source, dtype -> the slice that this rank holds, cast to it.

    Raises:
        ChecksumError: on the ranks that hold other bytes than a rank took; names the parameter, its region, and the
            ranks. PeerError on the others.
    """
    rank = transport.rank

    def digested() -> list[tuple[int, _Told]]:
        return [(number, _digested(demand, rank, taken(number))) for number, demand in _wanted(demands, rank)]

    def heard(answer: list[Any]) -> dict[int, _Told]:
        return {number: _Told(DTYPES[dtype].name, digests) for number, (dtype, digests) in answer}

    told = told_by_all(transport, digested, [(NATURAL, (str, [str]))], heard)
    on_all(transport, lambda: _compare(demands, rank, told, held))


def _wanted(demands: Sequence[Demand], rank: int) -> Iterator[tuple[int, Demand]]:
    for number, demand in enumerate(demands):
        if any(rank in ranks for grid in demand.grids for ranks in grid.ranks.values()):
            yield number, demand


def _digested(demand: Demand, rank: int, taken: TakenSlice) -> _Told:
    """Digests of the pieces of a rank's slice."""
    digests: list[str] = []
    for region, ranks, pieces in _slices(demand):
        if rank in ranks:
            width = DTYPES[taken.dtype].bits // 8
            digests += (
                _digest(taken.bytes, width, region.shape, each.piece.in_target, each.piece.view) for each in pieces
            )
    return _Told(taken.dtype, digests)


def _slices(demand: Demand) -> Iterator[tuple[Region, Sequence[int], Sequence[Sourced]]]:
    """Every box that is wanted, the ranks that want it, and its pieces."""
    shape = demand.tensor.meta.shape
    for grid in demand.grids:
        for cell, ranks in grid.ranks.items():
            region = grid.region(cell, shape)
            yield region, ranks, locate(demand.tensor, region)


def _compare(
    demands: Sequence[Demand], rank: int, told: Sequence[Mapping[int, _Told]], held: Callable[[str, str], Bytes]
) -> None:
    """Compare what this rank holds with what others took of it. Raises ChecksumError."""
    odd = [text for n, demand in enumerate(demands) for text in _complaints(demand, n, rank, told, held)]
    if odd:
        more = f"; and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise ChecksumError(
            f"{'; '.join(odd[:_SHOWN])}{more}: the transfer was damaged, or ranks of the source that hold the same "
            "slice hold different bytes; run it again"
        )


def _complaints(
    demand: Demand, number: int, rank: int, told: Sequence[Mapping[int, _Told]], held: Callable[[str, str], Bytes]
) -> Iterator[str]:
    """Messages about what others took of this rank's slices and differs from them."""
    slices = lru_cache(maxsize=None)(held)  # for this parameter
    for region, ranks, pieces in _slices(demand):
        takers: dict[str, list[int]] = {}
        for taker in ranks:
            theirs = told_of(told[taker], number, taker)
            if len(theirs.digests) != len(pieces):
                raise TransportError(
                    f"rank {taker} told {len(theirs.digests)} digests of parameter {demand.name!r}, which it took in "
                    f"{len(pieces)} pieces; {SAME_VERSION}"
                )
            takers.setdefault(theirs.dtype, []).append(taker)
        mine = [(place, each) for place, each in enumerate(pieces) if rank in each.files]
        for (place, each), (dtype, taking) in product(mine, takers.items()):
            piece, width = each.piece, DTYPES[dtype].bits // 8
            digest = _digest(slices(each.stored_name, dtype), width, piece.source_shape, piece.in_source, None)
            wrong = [taker for taker in taking if told[taker][number].digests[place] != digest]
            if wrong:
                yield (
                    f"parameter {demand.name!r}, region {region}: rank {rank} holds digest {digest} of its box "
                    f"{piece.in_target}, in {each.stored_name!r} of the source, and {name_ranks(wrong)} took "
                    f"{told[wrong[0]][number].digests[place]}"
                )


def _digest(held: Bytes, width: int, shape: Shape, box: Region, view: Optional[View]) -> str:
    """The digest of a box of an array, or of a view of it, row-major."""
    seen = View(0, strides_of(shape)) if view is None else view
    start = seen.offset + sum(low * stride for low, stride in zip(box.start, seen.strides))
    elements = held.view(f"V{width}")[start:]
    strides = tuple(stride * width for stride in seen.strides)
    part = np.lib.stride_tricks.as_strided(elements, box.shape, strides, writeable=False)
    return xxhash.xxh3_128(np.ascontiguousarray(part).reshape(-1).view(np.uint8)).hexdigest()
