"""Who reads what, and who sends what to whom: the plan of a cooperative load.

1. *Parts* (`core.exchange.parts`). Every distinct target box is located in the source; the needed rows of every source
   slice are cut into parts: contiguous in their file, small enough that all copies of one fit a round. A part knows its
   deliveries: which ranks want which box of it, and where it lands there.
2. *Chunks and readers* (`core.exchange.chunks`). Neighbouring parts of a file, several MiB together, are one read,
   made by exactly one rank: of those that need it and see its file, the one with the least to read so far. What all
   ranks of a group want whole is read by all of them, in equal shares.
3. *Rounds* (`core.exchange.rounds`). Every reader contributes parts until its own or a receiver's share of the bucket
   is full. What a group reads in shares goes by an all-gather of equal shares (`core.exchange.rounds`), all else by
   all-to-all; what the reader wants itself stays with it.

All ranks compute the same plan from the same values; nothing here depends on the rank that asks. Decisions are columns
(`ExchangeTable`), which a dry run of any size counts (`core.exchange.totals`); a load makes objects of them
(`ExchangePlan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Optional

import numpy as np

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY, Chunks, FedGroup, Moving, chunks_of, concerning, moving
from ms_ckpt_ext.core.exchange.demand import ALL_RANKS, Demand, ExchangeLimits, Sees, Ways
from ms_ckpt_ext.core.exchange.parts import Located, parts_of
from ms_ckpt_ext.core.exchange.ragged import Ints
from ms_ckpt_ext.core.exchange.rounds import Classes, classes_of, rounds_of
from ms_ckpt_ext.core.exchange.streams import Gathering, gatherings
from ms_ckpt_ext.core.exchange.tiers import turns
from ms_ckpt_ext.core.geometry.array import DType, Region, Shape, View
from ms_ckpt_ext.core.planning.io_units import Extent


class Delivery(NamedTuple):
    """A box of a part, wanted at the same place of the target box of each of `ranks`, seen through `view` if any.

    The target box is the one wanted where `into` is 0, else one that it is computed with: see `Assembly.number`.
    """

    ranks: tuple[int, ...]
    in_part: Region
    in_target: Region
    target_shape: Shape
    view: Optional[View]
    into: int


class SlicePart(NamedTuple):
    """A box of a source slice, contiguous in its file.

    Attributes:
        demand: number of the parameter in the list of demands.
        chunk: number of the chunk that holds it; -1 where a group reads it in shares.
        offset: where it starts in the chunk, in bytes; in the stream of its group, where there is no chunk.
        nbytes: its length in bytes.
        shape: its shape in elements.
        deliveries: who wants what of it.
        dtype: of its elements: the parameter's, or of what that is computed with.
    """

    demand: int
    chunk: int
    offset: int
    nbytes: int
    shape: Shape
    deliveries: tuple[Delivery, ...]
    dtype: DType
    turn: float
    """Who carries it, in a tiered plan: see `core.exchange.tiers`."""

    @property
    def gathered(self) -> bool:
        """A group reads it in shares, and gathers it."""
        return self.chunk < 0


class Chunk(NamedTuple):
    """One read: `extents` of a file, one after another, by one rank; or a stretch of what it has in memory."""

    file: int
    extents: tuple[Extent, ...]
    nbytes: int
    reader: int


class GroupGather(NamedTuple):
    """A stream that `ranks` put together of equal shares in a round, or that one of them broadcasts.

    Attributes:
        ranks: the group, ascending.
        share: bytes of everyone's share; of the stream, where one broadcasts it.
        parts: what is in the stream, by number.
        chunks, places: the reads that fill it, by number, and where each begins in the stream.
    """

    ranks: tuple[int, ...]
    share: int
    parts: tuple[int, ...]
    chunks: tuple[int, ...]
    places: tuple[int, ...]
    root: int = EVERYBODY
    """The rank that broadcasts."""


class Round(NamedTuple):
    """Parts (by number) that travel together, the chunks that must be read before, and what groups gather.

    Attributes:
        exchanges: some rank sends another some by all-to-all.
        spreads: some rank sends on what it got, in a tiered plan.
    """

    parts: tuple[int, ...]
    chunks: tuple[int, ...]
    gathers: tuple[GroupGather, ...] = ()
    exchanges: bool = True
    spreads: bool = False


@dataclass(frozen=True)
class ExchangeTable:
    """The decisions of a load, as columns: the chunks with their parts, which ranks are alike, every part's round."""

    world: int
    demands: tuple[Demand, ...]
    chunks: Chunks
    classes: Classes
    round_of: Ints
    read: int
    """Bytes of one read of a share at most."""
    ways: Ways

    def turns(self) -> Ints:
        """The turn of every part, see `core.exchange.tiers`."""
        parts = self.chunks.parts
        return turns(self.round_of, parts.rows.interest[parts.row], parts.rows.nbytes[parts.row])

    def digest(self) -> str:
        """The same where the same was decided."""
        state, parts = blake2b(digest_size=16), self.chunks.parts
        columns = (self.chunks.start, self.chunks.file, self.chunks.reader, self.round_of)
        for column in (*columns, parts.demand, parts.row, parts.file, parts.offset, parts.rows.ranks, parts.rows.moved):
            state.update(column.astype(np.int64).tobytes())
        state.update(repr((self.chunks.groups, parts.sets.members, parts.holders, self.ways)).encode())
        return state.hexdigest()

    def is_of_some(self, group: FedGroup) -> bool:
        """Whether a group is of some ranks only."""
        return len(self.chunks.parts.sets.members[group.ranks]) < self.world

    def gatherings(self) -> Iterator[Gathering]:
        """What groups gather, by round."""
        return gatherings(self.chunks, self.round_of, self.world, self.read)


@dataclass(frozen=True)
class ExchangePlan:
    """The whole load, for all ranks; or what of it concerns one, with the same rounds."""

    world: int
    demands: tuple[Demand, ...]
    chunks: tuple[Chunk, ...]
    parts: tuple[SlicePart, ...]
    rounds: tuple[Round, ...]
    servers: tuple[int, ...] = ()
    """The server of every rank in a tiered plan; none in a flat one."""

    def bytes_read(self) -> list[int]:
        """Bytes every rank reads."""
        totals = [0] * self.world
        for chunk in self.chunks:
            totals[chunk.reader] += chunk.nbytes
        return totals

    def bytes_received(self) -> list[int]:
        """Payload bytes every rank gets from others."""
        alike: dict[
            tuple[int, Optional[int]], list[int]
        ] = {}  # parts of one row read by one rank -> which, and how many
        for number, part in enumerate(self.parts):
            reader = None if part.gathered else self.chunks[part.chunk].reader
            alike.setdefault((id(part.deliveries), reader), [number, 0])[1] += 1
        totals = [0] * self.world
        for (_, reader), (number, count) in alike.items():
            part = self.parts[number]
            for delivery in part.deliveries:
                nbytes = count * part.dtype.nbytes(delivery.in_part.size)
                for rank in delivery.ranks:
                    totals[rank] += nbytes if rank != reader else 0
        for gather in self.gathers:
            for number in gather.chunks:
                totals[self.chunks[number].reader] -= self.chunks[number].nbytes
        return totals

    def bytes_wanted(self) -> list[int]:
        """Bytes of what every rank gets, from itself or from others."""
        alike: dict[int, list[int]] = {}
        for number, part in enumerate(self.parts):
            alike.setdefault(id(part.deliveries), [number, 0])[1] += 1
        totals = [0] * self.world
        for number, count in alike.values():
            part = self.parts[number]
            for delivery in part.deliveries:
                nbytes = count * part.dtype.nbytes(delivery.in_part.size)
                for rank in delivery.ranks:
                    totals[rank] += nbytes
        return totals

    @property
    def gathers(self) -> Iterator[GroupGather]:
        """What groups gather, in all rounds."""
        return (gather for each in self.rounds for gather in each.gathers)

    def last_use(self) -> dict[int, int]:
        """The last round in which something is cut out of every chunk."""
        found = {self.parts[n].chunk: at for at, each in enumerate(self.rounds) for n in each.parts}
        found.update((n, at) for at, each in enumerate(self.rounds) for gather in each.gathers for n in gather.chunks)
        return found


def decide(
    demands: Sequence[Demand],
    world: int,
    stored: Located,
    limits: ExchangeLimits,
    sees: Optional[Sees] = None,
    ways: Ways = ALL_RANKS,
    in_memory: bool = False,
) -> ExchangeTable:
    """Decide a cooperative load.

    Args:
        demands: what all ranks want.
        world: number of ranks.
        stored: (file, stored name) -> extents; or name -> extent, where all files are alike.
        limits: bucket and chunk sizes.
        sees: file -> ranks that can open it; None when all see all.
        ways: how bytes may travel.
        in_memory: files are the memory of ranks; then all see all.

    Raises:
        CoverageError: a region that a rank needs is in no file.
    """
    parts = parts_of(demands, world, stored, limits, ways.servers if in_memory else None)
    chunks = chunks_of(parts, world, limits, sees, ways)
    classes = classes_of(chunks, world)
    round_of = rounds_of(chunks, classes, limits, ways)
    return ExchangeTable(world, tuple(demands), chunks, classes, round_of, limits.read, ways)


def plan_of(table: ExchangeTable, rank: Optional[int] = None) -> ExchangePlan:
    """Objects of what was decided; of a `rank` only of what it reads, and of what it gets."""
    kept = np.ones(len(table.round_of), bool) if rank is None else concerning(table.chunks, rank)
    read, number = _chunks(table, kept)
    chunks, gathers = list(read), _Gathers(np.cumsum(kept) - 1)
    for each in table.gatherings():
        if rank is None or rank in table.chunks.parts.sets.members[each.group.ranks]:
            gathers.add(table, each, chunks)
    turn = table.turns()[kept].tolist() if table.ways.tiered else ()
    parts = tuple(_parts(table.chunks, kept, number, gathers.places, turn, rank))
    servers = table.ways.servers if table.ways.tiered else ()
    rounds = tuple(_rounds(table, kept, number, gathers, moving(table.chunks, table.world, table.round_of, servers)))
    return ExchangePlan(table.world, table.demands, tuple(chunks), parts, rounds, servers)


class _Gathers:
    """Gathers by round, and where every part lies in its stream. `number`: of every part of the table, in the plan."""

    def __init__(self, number: Ints) -> None:
        self._number = number
        self.by_round: dict[int, list[GroupGather]] = {}
        self.places: dict[int, int] = {}

    def add(self, table: ExchangeTable, each: Gathering, chunks: list[Chunk]) -> None:
        """Add one, and its reads to `chunks`."""
        ranks, pieces, first = table.chunks.parts.sets.members[each.group.ranks], each.stream.pieces, len(chunks)
        columns = (pieces.member, pieces.file, pieces.offset, pieces.nbytes)
        for member, file, offset, nbytes in zip(*(column.tolist() for column in columns)):
            chunks.append(Chunk(file, (Extent(offset, nbytes),), nbytes, ranks[member]))
        numbers, reads = tuple(self._number[each.parts].tolist()), tuple(range(first, len(chunks)))
        places = tuple(pieces.at.tolist())
        gather = GroupGather(ranks, each.stream.share, numbers, reads, places, each.group.root)
        self.by_round.setdefault(each.round, []).append(gather)
        self.places.update(zip(numbers, each.stream.at.tolist()))


def _chunks(table: ExchangeTable, kept: Ints) -> tuple[Iterator[Chunk], Ints]:
    """The chunks of the parts that are kept and that one rank reads, and the number of each of the table's among them;
    -1 for a group's."""
    columns, parts = table.chunks, table.chunks.parts
    before = np.concatenate([[0], np.cumsum(kept)])[columns.start]
    alone = (columns.reader < table.world) & (np.diff(before) > 0)
    number = np.where(alone, np.cumsum(alone) - 1, -1)

    def found() -> Iterator[Chunk]:
        kept = (columns.start[:-1][alone], columns.file[alone], columns.nbytes[alone], columns.reader[alone])
        for first, file, nbytes, reader in zip(*(column.tolist() for column in kept)):
            extents = parts.scattered.get(first) or (Extent(int(parts.offset[first]), nbytes),)
            yield Chunk(file, extents, nbytes, reader)

    return found(), number


def _parts(
    table: Chunks, kept: Ints, number: Ints, places: Mapping[int, int], turn: Sequence[float], rank: Optional[int]
) -> Iterator[SlicePart]:
    parts, rows = table.parts, table.parts.rows
    chunk_of = table.of_part
    stops = np.cumsum(rows.nbytes[parts.row])
    offset = stops - rows.nbytes[parts.row]
    offset -= offset[table.start[:-1]][chunk_of]
    chunk_of, row_of = chunk_of[kept], parts.row[kept]
    whole = np.ones(len(row_of), bool) if rank is None else table.reader[chunk_of] == rank
    columns = (np.flatnonzero(kept), parts.demand[kept], number[chunk_of], offset[kept], row_of, whole)
    known: dict[tuple[int, bool], tuple[Delivery, ...]] = {}
    for at, (part, demand, chunk, begin, row, all_of_it) in enumerate(zip(*(each.tolist() for each in columns))):
        cut, deliveries = rows.cuts[row], known.get((row, all_of_it))
        if deliveries is None:
            deliveries = known[row, all_of_it] = tuple(_deliveries(table, row, None if all_of_it else rank))
        begin = places.get(part, begin)
        yield SlicePart(demand, chunk, begin, cut.nbytes, cut.shape, deliveries, cut.dtype, turn[at] if turn else 0.0)


def _deliveries(table: Chunks, row: int, rank: Optional[int]) -> Iterator[Delivery]:
    """The deliveries of a row, which all its parts share; of a `rank` those that it gets."""
    rows, members = table.parts.rows, table.parts.sets.members
    ranks = rows.ranks[rows.start[row] : rows.start[row + 1]].tolist()
    for number, each in zip(ranks, rows.cuts[row].shares):
        if rank is None or rank in members[number]:
            yield Delivery(members[number], each.in_part, each.in_target, each.target_shape, each.view, each.into)


def _rounds(table: ExchangeTable, kept: Ints, number: Ints, gathers: _Gathers, moves: Moving) -> Iterator[Round]:
    loaded: set[int] = set()
    chunk_of = number[table.chunks.of_part[kept]]
    round_of = table.round_of[kept]
    order = np.argsort(round_of, kind="stable")
    stops = np.searchsorted(round_of[order], np.arange(len(moves.exchanges)), side="right")
    low = 0
    for at, stop in enumerate(stops.tolist()):
        numbers, low = order[low:stop], stop
        touched = set(chunk_of[numbers].tolist()) - {-1}
        gathered = tuple(gathers.by_round.get(at, ()))
        fresh = sorted((touched - loaded).union(*(gather.chunks for gather in gathered)))
        yield Round(tuple(numbers.tolist()), tuple(fresh), gathered, moves.exchanges[at], moves.spreads[at])
        loaded |= touched
