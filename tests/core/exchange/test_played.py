"""Plans played out on arrays: every byte that a rank wants comes to it once, and the totals say what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.demand import (
    Demand,
    ExchangeLimits,
    Grid,
    InMemory,
    Sees,
    Ways,
    boxes_moved,
    local_pieces,
)
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, ExchangeTable, decide, plan_of
from ms_ckpt_ext.core.exchange.tiers import broadcast_crossing
from ms_ckpt_ext.core.exchange.totals import MATRIX, RankTotals, tally
from ms_ckpt_ext.core.geometry.dtype import DTYPES, DType
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, cell_region
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.assembly import assembled
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.errors import LayoutMismatchError
from ms_ckpt_ext.rules import QKV, AddProduct, Concat, Scale, Stack, Transpose
from tests.support.played import Bytes, Counted, Hop, Played, elements
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
        whole = rng.integers(0, 256, (*meta.shape, meta.dtype.bits // 8), np.uint8)
        found.whole[meta.name] = whole
        for cell, files in holders.items():
            data = whole[cell_region(cell, layout.parts, meta.shape).slices].reshape(-1)
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
    """Every element of every box was placed once, and is right; what is computed with is compared where it is stored."""
    for number, demand in enumerate(played.plan.demands):
        for grid in demand.grids:
            for cell, ranks in grid.ranks.items():
                region = grid.region(cell, demand.tensor.meta.shape)
                for each in assembled(demand.tensor, region).every():
                    for rank in ranks if not each.steps else ():
                        box = played.boxes[rank, number, each.number]
                        assert (box.times == 1).all(), "placed once"
                        expected = whole[each.tensor.meta.name][each.region.slices]
                        assert box.contents.tobytes() == expected.tobytes()


def assert_reads(plan: ExchangePlan, sees: Optional[Sees]) -> None:
    """No byte is read twice, by ranks that see its file."""
    read = sorted((chunk.file, at, at + length) for chunk in plan.chunks for at, length in chunk.extents)
    for (file, _, stop), (other, start, _) in zip(read, read[1:]):
        assert file != other or stop <= start
    assert all(sees is None or chunk.reader in sees[chunk.file] for chunk in plan.chunks)


def gather_hops(ranks: tuple[int, ...], nbytes: int, servers: Sequence[int]) -> list[Hop]:
    """An all-gather of shares as HCCL makes it, step by step: over servers with as many ranks each a share crosses to
    the rank at its place, which passes it on; else it goes round a ring."""
    teams: dict[int, list[int]] = {}
    for rank in ranks:
        teams.setdefault(servers[rank], []).append(rank)
    if len({len(team) for team in teams.values()}) > 1:
        return [Hop(rank, ranks[(n + 1) % len(ranks)], nbytes) for n, rank in enumerate(ranks)] * (len(ranks) - 1)
    made = []
    for origin in ranks:
        place = teams[servers[origin]].index(origin)
        for server, team in teams.items():
            carries = origin if server == servers[origin] else team[place]
            made += [Hop(origin, carries, nbytes)] if carries != origin else []
            made += [Hop(carries, rank, nbytes) for rank in team if rank != carries]
    return made


def assert_totals(total: RankTotals, made: Counted, plan: ExchangePlan, ways: Ways, in_memory: int) -> None:
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
            hops += gather_hops(call.ranks, call.nbytes, servers.tolist())
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
    files = np.zeros((len(ends), -(-(max((c.file for c in plan.chunks), default=0) + 1) // 1)), np.int64)
    for chunk in plan.chunks:
        files[chunk.reader // group, chunk.file] += chunk.nbytes if chunk.file < in_memory else 0
    grouped = np.add.reduceat(files, range(0, files.shape[1], total.file_group), 1)
    if in_memory > files.shape[1]:
        assert total.files.tolist() == grouped.tolist()
    assert total.staging.tolist() == staging(made, plan, in_memory).tolist()


def staging(made: Counted, plan: ExchangePlan, in_memory: int) -> np.ndarray:
    """Buffers of two rounds, and the chunks that are held at once when one round is read ahead."""
    buffers = min(2, len(plan.rounds)) * sum(made.buffers.values(), np.zeros(plan.world, np.int64))
    last = plan.last_use()
    first = {number: at for at, each in enumerate(plan.rounds) for number in each.chunks}
    read = [n for n, chunk in enumerate(plan.chunks) if chunk.file < in_memory]
    most = np.zeros(plan.world, np.int64)
    for at in range(len(plan.rounds)):
        held = [plan.chunks[n].reader for n in read if first[n] <= at + 1 and last[n] >= at]
        most = np.maximum(most, np.bincount(held, minlength=plan.world))
    return buffers + most * max((plan.chunks[n].nbytes for n in read), default=0)


def assert_within(plan: ExchangePlan, played: Sequence[Sequence[object]], bucket: int) -> None:
    """What a rank reads, sends and receives in a round fits its bucket, but for padding and a part's worth."""
    for turns in played:
        for turn in turns:
            read = sum(plan.chunks[chunk].nbytes for chunk in turn.chunks)
            passed = [*turn.send_counts, *turn.receive_counts, *(g.gives + g.nbytes for g in turn.gathers)]
            if turn.spread is not None:
                passed += [*turn.spread.send_counts, *turn.spread.receive_counts]
            padding = 16 * (2 * len(turns) + len(turn.gathers) * len(turns)) * 2
            assert read + sum(passed) <= bucket * 9 / 8 + padding


def assert_played(
    table: ExchangeTable, source: Source, whole: Mapping[str, np.ndarray], bucket: int, sees: Optional[Sees] = None
) -> ExchangePlan:
    """Play a plan of files out, and compare all there is to compare."""
    plan = plan_of(table)
    played = Played(plan, source.files)
    turns = played.play()
    assert_contents(played, whole)
    assert_reads(plan, sees)
    assert_within(plan, turns, bucket)
    assert_totals(tally(table), played.counted, plan, table.ways, 1 << 30)
    return plan


DTYPE = st.sampled_from([DTYPES[name] for name in ("U8", "BF16", "F32", "I64", "C128")])


@given(pairs(12), st.lists(DTYPE, min_size=1, max_size=3), st.sampled_from([512, 4096, 1 << 16]), st.data())
@settings(max_examples=80)
def test_any_layout_to_any_layout(
    case: tuple[Layout, Layout, tuple[int, ...]], dtypes: list[DType], bucket: int, data: st.DataObject
) -> None:
    """Any layouts, replicas, servers, ways and views of the storage; slices in one stretch or two."""
    before, after, shape = case
    if prod(shape) > 3000:
        shape = tuple(max(a, b) for a, b in zip(before.parts, after.parts))
        if any(s % a or s % b for s, a, b in zip(shape, before.parts, after.parts)):
            return
    world = after.devices
    ranks = st.sets(st.integers(0, world - 1), min_size=1)
    metas = [TensorMeta(f"w{n}", dtype, shape) for n, dtype in enumerate(dtypes)]
    kept = data.draw(st.none() | st.lists(st.integers(0, before.devices - 1)))
    source = source_of(before, metas, kept, data.draw(st.booleans()), len(dtypes))
    servers = tuple(data.draw(st.lists(st.integers(0, 2), min_size=world, max_size=world)))
    ways = Ways(
        gather=data.draw(st.booleans()),
        groups=data.draw(st.booleans()),
        broadcast=data.draw(st.booleans()),
        servers=servers,
        tiered=data.draw(st.booleans()),
    )
    seen = data.draw(st.none() | st.lists(ranks, min_size=before.devices, max_size=before.devices))
    sees = None if seen is None else {file: frozenset(some) for file, some in enumerate(seen)}
    wanting = sorted(data.draw(st.just(set(range(world))) | ranks))
    limits = ExchangeLimits(bucket, data.draw(st.sampled_from([64, 1024])))
    demands = demands_for(source.tensors, after, wanting)
    assert_played(decide(demands, world, source.stored, limits, sees, ways), source, source.whole, bucket, sees)
