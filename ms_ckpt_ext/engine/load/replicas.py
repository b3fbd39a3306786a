"""Do ranks that hold the same region hold the same bytes? Digested while the load goes on, compared at its end.

A slice that has landed is digested (xxh3-128) on a thread of its own, so hashing costs no time of reading and
exchanging. What lies in host memory is digested where it is; what lies on a device comes down in pieces, of which a few
wait at a time, so the memory for it is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Optional

import xxhash

from ms_ckpt_ext.core.exchange.demand import Demand
from ms_ckpt_ext.errors import ChecksumError, name_ranks
from ms_ckpt_ext.log import Trace
from ms_ckpt_ext.storage.threads import Pending, ThreadPool
from ms_ckpt_ext.transport.agree import NATURAL, share_values, told_of
from ms_ckpt_ext.transport.base import Bytes, Transport

_WAITING = 2
"""Pieces copied from a device that wait for their digest at a time."""


class SliceBytes(NamedTuple):
    """The bytes of a slice, row-major.

    Attributes:
        dtype: what they are; bytes of different dtypes are not compared.
        pieces: flat bytes, in order. Unless `copied` they are views of the slice's memory.
        copied: each piece is a copy that exists for its digest only, made when it is asked for.
    """

    dtype: str
    pieces: Iterator[Bytes]
    copied: bool = False


class Digest(NamedTuple):
    """xxh3-128 of a slice as hex, and the dtype of what was digested."""

    dtype: str
    value: str


class Digester:
    """Digests slices on a thread, in the order in which they were added. `add` may be called by any thread."""

    def __init__(self, trace: Optional[Trace] = None) -> None:
        self._trace = trace or Trace()
        self._pool = ThreadPool(1, "digest")
        self._room = threading.Semaphore(_WAITING)
        self._states: dict[int, tuple[str, Any]] = {}
        self._pieces: list[Pending[None]] = []

    def __enter__(self) -> Digester:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def add(self, number: int, contents: SliceBytes) -> None:
        """Digest a slice that nobody writes to any more. Waits while too many copied pieces are pending."""
        state = xxhash.xxh3_128()
        self._states[number] = contents.dtype, state
        for piece in contents.pieces:
            if contents.copied:
                self._room.acquire()
            self._pieces.append(self._pool.submit(partial(self._update, number, state, piece, contents.copied)))

    def _update(self, number: int, state: Any, piece: Bytes, copied: bool) -> None:
        try:
            with self._trace.span("digest", demand=number, nbytes=piece.size):
                state.update(piece)
        finally:
            if copied:
                self._room.release()

    def wait(self) -> dict[int, Digest]:
        """The digests of all that was added, by number."""
        for piece in self._pieces:
            piece.result()
        return {number: Digest(dtype, state.hexdigest()) for number, (dtype, state) in self._states.items()}


def _heard(told: Sequence[tuple[int, Sequence[str]]]) -> dict[int, Digest]:
    """What a rank told, by the number of the demand."""
    return {number: Digest(*each) for number, each in told}


def compare_replicas(transport: Transport[Any], demands: Sequence[Demand], digests: Mapping[int, Digest]) -> None:
    """Compare what ranks hold of the same region, in the same dtype. Collective.

    Args:
        digests: number of a demand -> digest of this rank's slice; all that this rank wants are there.

    Raises:
        ChecksumError: on all ranks; names the parameter, the ranks, and both digests.
    """
    theirs = share_values(transport, [*digests.items()], [(NATURAL, (str, str))], _heard)
    for number, demand in enumerate(demands):
        for grid in demand.grids:
            for cell, ranks in grid.ranks.items():
                held = {rank: told_of(theirs[rank], number, rank) for rank in ranks}
                first = {digest.dtype: rank for rank, digest in reversed(held.items())}
                for dtype, one in first.items():
                    odd = [rank for rank, other in held.items() if other.dtype == dtype and other != held[one]]
                    if odd:
                        region = grid.region(cell, demand.tensor.meta.shape)
                        raise ChecksumError(
                            f"parameter {demand.name!r}, region {region}: {name_ranks([one])} holds digest "
                            f"{held[one].value}, {name_ranks(odd)} {held[odd[0]].value}; replicas must be equal: "
                            "the source files differ or a transfer was damaged, load again with mode='cooperative'"
                        )
