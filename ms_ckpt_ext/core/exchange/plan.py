"""Who reads what, and who sends what to whom: the plan of a cooperative load.

1. *Parts* (`core.exchange.parts`). Every distinct target box is located in the source; the needed rows of every source
   slice are cut into parts: contiguous in their file, small enough that all copies of one fit a round. A part knows its
   deliveries: which ranks want which box of it, and where it lands there.
2. *Chunks and readers* (`core.exchange.chunks`). Neighbouring parts of a file, several MiB together, are one read,
   made by exactly one rank: of those that need it and see its file, the one with the least to read so far.
3. *Rounds* (`core.exchange.rounds`). Every reader contributes parts until its own or a receiver's share of the bucket
   is full. What every rank of the group wants whole goes by all-gather, all else by all-to-all; what the reader wants
   itself stays with it.

All ranks compute the same plan from the same values; nothing here depends on the rank that asks. Decisions are columns
(`ExchangeTable`), which a dry run of any size counts (`core.exchange.totals`); a load makes objects of them
(`ExchangePlan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import Chunks, chunks_of
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Sees
from ms_ckpt_ext.core.exchange.parts import Located, parts_of
from ms_ckpt_ext.core.exchange.ragged import Ints
from ms_ckpt_ext.core.exchange.rounds import Classes, classes_of, rounds_of
from ms_ckpt_ext.core.geometry.dtype import DType
from ms_ckpt_ext.core.geometry.region import Region, Shape
from ms_ckpt_ext.core.geometry.view import View
from ms_ckpt_ext.core.planning.io_units import Extent


class Delivery(NamedTuple):
    """A box of a part, wanted at the same place of the target box of each of `ranks`, seen through `view` if any."""

    ranks: tuple[int, ...]
    in_part: Region
    in_target: Region
    target_shape: Shape
    view: Optional[View]


class SlicePart(NamedTuple):
    """A box of a source slice, contiguous in its file.

    Attributes:
        demand: number of the parameter in the list of demands.
        chunk: number of the chunk that holds it.
        offset: where it starts in the chunk, in bytes.
        nbytes: its length in bytes.
        shape: its shape in elements.
        deliveries: who wants what of it.
        gathered: every rank wants all of it.
    """

    demand: int
    chunk: int
    offset: int
    nbytes: int
    shape: Shape
    deliveries: tuple[Delivery, ...]
    gathered: bool


class Chunk(NamedTuple):
    """One read: `extents` of a file, one after another, by one rank."""

    file: int
    extents: tuple[Extent, ...]
    nbytes: int
    reader: int


class Round(NamedTuple):
    """Parts (by number) that travel together, and the chunks that must be read before."""

    parts: tuple[int, ...]
    chunks: tuple[int, ...]


@dataclass(frozen=True)
class ExchangeTable:
    """The decisions of a load, as columns: the chunks with their parts, which ranks are alike, every part's round."""

    world: int
    demands: tuple[Demand, ...]
    chunks: Chunks
    classes: Classes
    round_of: Ints


@dataclass(frozen=True)
class ExchangePlan:
    """The whole load, for all ranks."""

    world: int
    demands: tuple[Demand, ...]
    chunks: tuple[Chunk, ...]
    parts: tuple[SlicePart, ...]
    rounds: tuple[Round, ...]

    def bytes_read(self) -> list[int]:
        """Bytes every rank reads."""
        totals = [0] * self.world
        for chunk in self.chunks:
            totals[chunk.reader] += chunk.nbytes
        return totals

    def bytes_received(self) -> list[int]:
        """Payload bytes every rank gets from others."""
        totals = [0] * self.world
        for part in self.parts:
            reader = self.chunks[part.chunk].reader
            for delivery in part.deliveries:
                nbytes = self.dtype(part).nbytes(delivery.in_part.size)
                for rank in delivery.ranks:
                    totals[rank] += nbytes if rank != reader else 0
        return totals

    def dtype(self, part: SlicePart) -> DType:
        """Element type of a part."""
        return self.demands[part.demand].tensor.meta.dtype


def decide(
    demands: Sequence[Demand],
    world: int,
    stored: Located,
    limits: ExchangeLimits,
    sees: Optional[Sees] = None,
) -> ExchangeTable:
    """Decide a cooperative load.

    Args:
        demands: what all ranks want.
        world: number of ranks.
        stored: (file, stored name) -> extents; or name -> extent, where all files are alike.
        limits: bucket and chunk sizes.
        sees: file -> ranks that can open it; None when all see all.

    Raises:
        CoverageError: a region that a rank needs is in no file.
    """
    chunks = chunks_of(parts_of(demands, world, stored, limits), world, limits, sees)
    classes = classes_of(chunks, world)
    return ExchangeTable(world, tuple(demands), chunks, classes, rounds_of(chunks, classes, limits.quarter))


def plan_exchange(
    demands: Sequence[Demand],
    world: int,
    stored: Located,
    limits: ExchangeLimits,
    sees: Optional[Sees] = None,
) -> ExchangePlan:
    """Plan a cooperative load. Arguments and errors are those of `decide`."""
    table = decide(demands, world, stored, limits, sees)
    chunks = tuple(_chunks(table.chunks))
    return ExchangePlan(world, table.demands, chunks, tuple(_parts(table.chunks)), tuple(_rounds(table)))


def _chunks(table: Chunks) -> Iterator[Chunk]:
    parts = table.parts
    columns = (table.start[:-1], table.file, table.nbytes, table.reader)
    for first, file, nbytes, reader in zip(*(column.tolist() for column in columns)):
        extents = parts.scattered.get(first) or (Extent(int(parts.offset[first]), nbytes),)
        yield Chunk(file, extents, nbytes, reader)


def _parts(table: Chunks) -> Iterator[SlicePart]:
    parts, rows = table.parts, table.parts.rows
    chunk_of = table.of_part
    stops = np.cumsum(rows.nbytes[parts.row])
    offset = stops - rows.nbytes[parts.row]
    offset -= offset[table.start[:-1]][chunk_of] if len(offset) else 0
    for demand, chunk, at, row in zip(*(c.tolist() for c in (parts.demand, chunk_of, offset, parts.row))):
        cut = rows.cuts[row]
        ranks = rows.ranks[rows.start[row] : rows.start[row + 1]].tolist()
        deliveries = tuple(
            Delivery(parts.sets.members[number], share.in_part, share.in_target, share.target_shape, share.view)
            for number, share in zip(ranks, cut.shares)
        )
        yield SlicePart(demand, chunk, at, cut.nbytes, cut.shape, deliveries, cut.gathered)


def _rounds(table: ExchangeTable) -> Iterator[Round]:
    loaded: set[int] = set()
    chunk_of = table.chunks.of_part
    order = np.argsort(table.round_of, kind="stable")
    for numbers in np.split(order, np.flatnonzero(np.diff(table.round_of[order])) + 1):
        touched = set(chunk_of[numbers].tolist())
        if touched:
            yield Round(tuple(numbers.tolist()), tuple(sorted(touched - loaded)))
        loaded |= touched
