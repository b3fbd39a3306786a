"""Checkpoints in arrays, what ranks want of them, and exchanges of them played out, with all there is to compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import NamedTuple, Optional

import numpy as np
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.demand import ALIGNMENT, SLAB, Demand, Grid, LocalPiece, Sees, Ways
from ms_ckpt_ext.core.exchange.one_rank import completed_by, turns_of
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, ExchangeTable, plan_of
from ms_ckpt_ext.core.exchange.tiers import broadcast_crossing
from ms_ckpt_ext.core.exchange.totals import MATRIX, RankTotals, tally
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, cell_region
from ms_ckpt_ext.core.planning.assembly import assembled
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from tests.support.played import Bytes, Counted, Played, hops_of, scaled, scaled_box
from tests.support.strategies import pairs

GAP = 40
"""Bytes between the tensors of a file."""


class Source(NamedTuple):
    """What is stored.

    Attributes:
        tensors, whole: by name: where a parameter is, and its elements as rows of bytes.
        files: the bytes of every file.
        extents: where every slice lies in a file.
    """

    tensors: dict[str, SourceTensor]
    whole: dict[str, np.ndarray]
    files: dict[int, Bytes]
    extents: dict[tuple[int, str], tuple[Extent, ...]]

    def stored(self, file: int, name: str) -> tuple[Extent, ...]:
        return self.extents[file, name]

    def slice(self, file: int, name: str) -> Bytes:
        """The slice of a parameter that a file holds."""
        return np.concatenate([self.files[file][at : at + length] for at, length in self.extents[file, name]])


def holders_of(layout: Layout, kept: Optional[Sequence[int]] = None) -> dict[Cell, tuple[int, ...]]:
    """Cell -> ranks that hold it; of replicas only those in `kept`, where any is."""
    found: dict[Cell, tuple[int, ...]] = {}
    for rank in range(layout.devices):
        found[layout.cells[rank]] = (*found.get(layout.cells[rank], ()), rank)
    return {cell: tuple(r for r in ranks if kept is None or r in kept) or ranks for cell, ranks in found.items()}


def source_of(
    layout: Layout,
    metas: Sequence[TensorMeta],
    kept: Optional[Sequence[int]] = None,
    halved: bool = False,
    seed: int = 0,
) -> Source:
    """Parameters that are cut by one layout; `halved`: every slice lies in two stretches."""
    rng = np.random.default_rng(seed)
    holders = holders_of(layout, kept)
    found = Source({}, {}, {}, {})
    pieces: dict[int, list[Bytes]] = {}
    for meta in metas:
        found.tensors[meta.name] = SourceTensor(meta, meta.name, (Placement(layout.parts, holders, holders),))
        whole = rng.integers(0, 256, (*scaled(meta.shape, meta.dtype), meta.dtype.bits // 8 or 1), np.uint8)
        found.whole[meta.name] = whole
        for cell, files in holders.items():
            box = cell_region(cell, layout.parts, meta.shape)
            data = whole[scaled_box(box, meta.dtype).slices].reshape(-1)
            for file in files:
                parts = np.split(data, [data.size // 2]) if halved and data.size > 1 else [data]
                laid = []
                for part in parts:
                    at = sum(each.size for each in pieces.setdefault(file, []))
                    laid.append(Extent(at, part.size))
                    pieces[file] += [part, np.full(GAP, 0xEE, np.uint8)]
                found.extents[file, meta.name] = tuple(laid)
    found.files.update({file: np.concatenate(some) for file, some in pieces.items()})
    return found


def demands_for(tensors: Mapping[str, SourceTensor], layout: Layout, wanting: Sequence[int]) -> list[Demand]:
    """Every tensor under a layout, for some ranks."""
    cells = {cell: tuple(r for r in ranks if r in wanting) for cell, ranks in holders_of(layout).items()}
    grid = Grid(layout.parts, {cell: ranks for cell, ranks in cells.items() if ranks})
    return [Demand(name, tensor, (grid,)) for name, tensor in tensors.items()]


def assert_contents(played: Played, whole: Mapping[str, np.ndarray]) -> None:
    """Every element of every box was placed once, and is right; of what is computed, the boxes that are moved."""
    for number, demand in enumerate(played.plan.demands):
        for grid in demand.grids:
            for cell, ranks in grid.ranks.items():
                region = grid.region(cell, demand.tensor.meta.shape)
                for each in assembled(demand.tensor, region).every():
                    for rank in ranks if not each.steps else ():
                        box = played.boxes[rank, number, each.number]
                        assert (box.times == 1).all(), "placed once"
                        where = scaled_box(each.region, each.tensor.meta.dtype)
                        expected = whole[each.tensor.meta.name][where.slices]
                        assert box.contents.tobytes() == expected.tobytes()


def assert_told_when_complete(played: Played, local: Mapping[int, Sequence[LocalPiece]] = MappingProxyType({})) -> None:
    """Every rank knows in which round the last piece of a parameter comes to it."""
    for rank in range(played.plan.world):
        told = completed_by(turns_of(played.plan, rank), local.get(rank, ()))
        found = {(rank, demand): number for number, demands in told.items() for demand in demands}
        assert found == {key: number for key, number in played.last.items() if key[0] == rank}


def assert_reads(plan: ExchangePlan, sees: Optional[Sees]) -> None:
    """No byte is read twice, by ranks that see its file."""
    read = sorted((chunk.file, at, at + length) for chunk in plan.chunks for at, length in chunk.extents)
    for (file, _, stop), (other, start, _) in zip(read, read[1:]):
        assert file != other or stop <= start
    assert all(sees is None or chunk.reader in sees[chunk.file] for chunk in plan.chunks)


def assert_allowed(plan: ExchangePlan, table: ExchangeTable, sees: Optional[Sees]) -> None:
    """Groups gather where they may; one rank broadcasts where that may be, and where not all of them see a file. Parts
    are read together up to a limit."""
    for gather in plan.gathers:
        assert table.ways.may_gather(gather.ranks, plan.world)
        files = {plan.chunks[number].file for number in gather.chunks}
        seen = sees is None or all(sees[file].issuperset(gather.ranks) for file in files)
        assert seen if gather.root == EVERYBODY else table.ways.broadcast and not seen
    together = Counter(part.chunk for part in plan.parts if not part.gathered)
    for number, count in together.items():
        assert count == 1 or plan.chunks[number].nbytes <= table.read


def assert_totals(total: RankTotals, made: Counted, plan: ExchangePlan, ways: Ways, in_memory: bool = False) -> None:
    """The columns of a plan say what playing it out counted."""
    world = plan.world
    assert total.wanted.tolist() == made.wanted.tolist() == plan.bytes_wanted()
    assert total.received.tolist() == made.received.tolist() == plan.bytes_received()
    assert total.read.tolist() == made.read.tolist()
    assert total.reads.tolist() == made.reads.tolist()
    assert total.sent.tolist() == made.sent.tolist()
    assert total.messages.tolist() == made.messages.tolist()
    assert total.calls == made.collectives.max()
    assert [each[:5] for each in total.rounds] == made.rounds
    servers = np.array(ways.servers or [0] * world)
    inside, between = np.zeros(world, np.int64), np.zeros(world, np.int64)
    crossing = np.zeros(servers.max() + 1, np.int64)
    hops = list(made.wire)
    for call in made.calls:
        if call.root is None:
            hops += hops_of(call, servers.tolist().__getitem__)
            continue
        moved = broadcast_crossing(call.nbytes, servers[list(call.ranks)], call.ranks.index(call.root))
        inside[list(call.ranks)] += moved.inside
        between[list(call.ranks)] += moved.between
        np.add.at(crossing, servers[list(call.ranks)], moved.arriving)
    for sender, receiver, nbytes in hops:
        (inside if servers[sender] == servers[receiver] else between)[sender] += nbytes
        crossing[servers[receiver]] += nbytes if servers[sender] != servers[receiver] else 0
    assert total.inside.tolist() == inside.tolist()
    assert total.between.tolist() == between.tolist()
    assert total.crossing.tolist() == crossing.tolist()
    assert sum(each.between for each in total.rounds) == between.sum()
    group = -(-world // MATRIX)
    ends = range(0, world, group)
    matrix = np.add.reduceat(np.add.reduceat(made.payload, ends, 0), ends, 1)
    assert (total.group, total.matrix.tolist()) == (group, matrix.tolist())
    read = [] if in_memory else plan.chunks
    files = np.zeros((len(ends), 1 + max((chunk.file for chunk in read), default=0)), np.int64)
    for chunk in read:
        files[chunk.reader // group, chunk.file] += chunk.nbytes
    assert total.file_group == -(-files.shape[1] // MATRIX)
    assert total.files.tolist() == np.add.reduceat(files, range(0, files.shape[1], total.file_group), 1).tolist()
    assert total.staging.tolist() == staging(made, plan, in_memory).tolist()


def staging(made: Counted, plan: ExchangePlan, in_memory: bool, ahead: int = 1) -> np.ndarray:
    """Buffers of two rounds, and the slabs that are held when so many rounds are read ahead and one is under way."""
    buffers = min(2, len(plan.rounds)) * sum(made.buffers.values(), np.zeros(plan.world, np.int64))
    return buffers if in_memory else buffers + [slab_bytes(plan, rank, ahead) for rank in range(plan.world)]


def slab_bytes(plan: ExchangePlan, rank: int, ahead: int) -> int:
    """Chunk after chunk is laid into a slab of a round until one does not fit."""
    last = plan.last_use()
    mine = [[n for n in each.chunks if plan.chunks[n].reader == rank] for each in plan.rounds]
    sizes = [[plan.chunks[n].nbytes for n in chunks] for chunks in mine]
    padded = [[nbytes + -nbytes % ALIGNMENT for nbytes in some] for some in sizes]
    size = max([min(SLAB, max(map(sum, padded), default=0)), *(nbytes for some in sizes for nbytes in some)])
    slabs: list[tuple[int, int]] = []
    for at, chunks in enumerate(mine):
        filled = size + 1
        for number, nbytes, width in zip(chunks, sizes[at], padded[at]):
            if filled + nbytes > size:
                filled = 0
                slabs.append((at, last[number]))
            filled += width
            slabs[-1] = (at, max(slabs[-1][1], last[number]))
    held = [sum(low <= at + ahead and high >= at - 1 for low, high in slabs) for at in range(len(mine))]
    return max(held, default=0) * size


def assert_within(plan: ExchangePlan, played: Sequence[Sequence[object]], bucket: int) -> None:
    """What a rank reads, sends and receives in a round fits its bucket, but for padding and a part's worth."""
    for turns in played:
        for turn in turns:
            read = sum(plan.chunks[chunk].nbytes for chunk in turn.chunks)
            passed = [*turn.send_counts, *turn.receive_counts, *(g.gives + g.nbytes for g in turn.gathers)]
            if turn.spread is not None:
                passed += [*turn.spread.send_counts, *turn.spread.receive_counts]
            padding = 16 * (2 * len(turns) + len(turn.gathers) * len(turns)) * 2
            assert read + sum(passed) <= bucket + padding


def assert_played(
    table: ExchangeTable, source: Source, whole: Mapping[str, np.ndarray], bucket: int, sees: Optional[Sees] = None
) -> ExchangePlan:
    """Play a plan of files out, and compare all there is to compare."""
    plan = plan_of(table)
    played = Played(plan, source.files)
    turns = played.play()
    assert_told_when_complete(played)
    assert_contents(played, whole)
    assert_reads(plan, sees)
    assert_allowed(plan, table, sees)
    assert_within(plan, turns, bucket)
    assert_totals(tally(table), played.counted, plan, table.ways)
    for ahead in (0, 2):
        assert tally(table, ahead).staging.tolist() == staging(played.counted, plan, False, ahead).tolist()
    return plan


DTYPE = st.sampled_from([DTYPES[name] for name in ("U8", "BF16", "F32", "I64", "C128")])
Pair = tuple[Layout, Layout, tuple[int, ...]]


@st.composite
def cuts(draw: st.DrawFn) -> Pair:
    """Two layouts, and a shape of a few thousand elements at most that both cut."""
    return draw(pairs(12).filter(lambda pair: prod(pair[2]) <= 3000))


@st.composite
def all_ways(draw: st.DrawFn, world: int) -> Ways:
    """Any servers, and any ways of travelling."""
    servers = draw(st.just(()) | st.lists(st.integers(0, 2), min_size=world, max_size=world))
    choice = [draw(st.booleans()) for _ in range(4)]
    return Ways(choice[0], choice[1], frozenset(), choice[2], tuple(servers), choice[3] and bool(servers))
