"""Plans played out on arrays: every byte that a rank wants comes to it once, and the totals say what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid, LocalPiece, Sees, Ways, local_pieces
from ms_ckpt_ext.core.exchange.one_rank import completed_by, turns_of
from ms_ckpt_ext.core.exchange.plan import ExchangePlan, ExchangeTable, decide, plan_of
from ms_ckpt_ext.core.exchange.tiers import broadcast_crossing
from ms_ckpt_ext.core.exchange.totals import MATRIX, RankTotals, tally
from ms_ckpt_ext.core.geometry.array import DTYPES, DType
from ms_ckpt_ext.core.geometry.layout import Cell, Layout, cell_region
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.assembly import assembled
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.rules import QKV, AddProduct, Concat, Scale, Stack, Transpose
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
    """Buffers of two rounds, and the chunks that are held at once when so many rounds are read ahead."""
    buffers = min(2, len(plan.rounds)) * sum(made.buffers.values(), np.zeros(plan.world, np.int64))
    last = plan.last_use()
    first = {number: at for at, each in enumerate(plan.rounds) for number in each.chunks}
    read = () if in_memory else range(len(plan.chunks))
    most = np.zeros(plan.world, np.int64)
    for at in range(len(plan.rounds)):
        held = [plan.chunks[n].reader for n in read if first[n] <= at + ahead and last[n] >= at]
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


@pytest.mark.parametrize("tiered", [False, True])
@given(cuts(), st.lists(DTYPE, min_size=1, max_size=3), st.sampled_from([512, 4096, 1 << 16]), st.data())
@settings(max_examples=40)
def test_any_layout_to_any_layout(
    tiered: bool, case: Pair, dtypes: list[DType], bucket: int, data: st.DataObject
) -> None:
    """Any layouts, replicas, servers, ways and views of the storage; slices in one stretch or two."""
    before, after, shape = case
    world = after.devices
    ranks = st.sets(st.integers(0, world - 1), min_size=1)
    metas = [TensorMeta(f"w{n}", dtype, shape) for n, dtype in enumerate(dtypes)]
    kept = data.draw(st.none() | st.lists(st.integers(0, before.devices - 1)))
    source = source_of(before, metas, kept, data.draw(st.booleans()), len(dtypes))
    seen = data.draw(st.none() | st.lists(ranks, min_size=before.devices, max_size=before.devices))
    sees = None if seen is None else {file: frozenset(some) for file, some in enumerate(seen)}
    wanting = sorted(data.draw(st.just(set(range(world))) | ranks))
    limits = ExchangeLimits(bucket, data.draw(st.sampled_from([64, 1024])))
    demands = demands_for(source.tensors, after, wanting)
    ways = data.draw(all_ways(world))
    ways = ways._replace(tiered=tiered, servers=ways.servers or (0,) * world)
    assert_played(decide(demands, world, source.stored, limits, sees, ways), source, source.whole, bucket, sees)


@pytest.mark.parametrize(("dtype", "whole"), [("F4", 2), ("F6_E2M3", 4)])
@given(cuts(), st.sampled_from([512, 1 << 16]), st.data())
@settings(max_examples=20)
def test_packed_types(dtype: str, whole: int, case: Pair, bucket: int, data: st.DataObject) -> None:
    """Several elements are whole bytes; layouts cut between bytes."""
    before, after, shape = case
    source = source_of(before, [TensorMeta("w", DTYPES[dtype], (*shape[:-1], shape[-1] * whole))])
    demands = demands_for(source.tensors, after, range(after.devices))
    ways = data.draw(all_ways(after.devices))
    table = decide(demands, after.devices, source.stored, ExchangeLimits(bucket, 64), None, ways)
    assert_played(table, source, source.whole, bucket)


@given(cuts(), st.data())
@settings(max_examples=30)
def test_boxes_that_are_no_slices(case: Pair, data: st.DataObject) -> None:
    """Every rank wants a box of its own, or has a grid of its own; the slices lie in two grids, with holes in one."""
    before, _, shape = case
    world = 4
    meta = TensorMeta("w", DTYPES["F32"], shape)
    source = source_of(before, [meta])
    whole = source_of(Layout((1,), ((),) * len(shape)), [meta])
    first = source.tensors["w"].placements[0]
    lost = data.draw(st.sets(st.sampled_from(sorted(first.holders))))
    holed = first._replace(holders={cell: files for cell, files in first.holders.items() if cell not in lost})
    beside = {(0,) * len(shape): (before.devices,)}
    tensor = source.tensors["w"]._replace(placements=(holed, Placement((1,) * len(shape), beside, beside)))
    source.files[before.devices] = whole.files[0]
    source.extents[before.devices, "w"] = whole.extents[0, "w"]
    source.whole["w"] = whole.whole["w"]
    boxes: dict[Cell, tuple[int, ...]] = {}
    for rank in range(world - 1):
        ends = [sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
        cell = (*(low for low, _ in ends), *(high for _, high in ends))
        boxes[cell] = (*boxes.get(cell, ()), rank)
    grids = (Grid((), boxes, uneven=True), Grid((1,) * len(shape), {(0,) * len(shape): (world - 1,)}))
    limits = ExchangeLimits(4096, 256)
    ways = data.draw(all_ways(world))
    table = decide([Demand("w", tensor, grids)], world, source.stored, limits, None, ways)
    assert_played(table, source, source.whole, 4096)


def moved(whole: Mapping[str, np.ndarray]) -> dict[str, tuple[Any, np.ndarray]]:
    """Rules that move, and what they make of matrices `a`, `b` and `c` of one shape."""
    a, b, c = (whole[name] for name in "abc")
    groups = [np.split(each, 2) for each in (a, b, c)]
    fused = np.concatenate([each[group] for group in range(2) for each in groups])
    return {
        "transposed": (Transpose("a", "t"), a.swapaxes(0, 1)),
        "joined": (Concat(["a", "b"], "t", axis=1), np.concatenate([a, b], 1)),
        "stacked": (Stack(["a", "b", "c"], "t", axis=1), np.stack([a, b, c], 1)),
        "fused": (QKV(["a", "b", "c"], "t", groups=2), fused),
        "scaled": (Scale("a", "t", 2.0), a),
        "added": (AddProduct(["a", "b", "c"], "t"), a),
    }


@pytest.mark.parametrize("rule", ["transposed", "joined", "stacked", "fused", "scaled", "added"])
@pytest.mark.parametrize("tiered", [False, True])
def test_what_rules_make(rule: str, tiered: bool) -> None:
    """Boxes that are seen otherwise, and boxes that are only computed with."""
    layout = Layout((2, 3), ((1,), (0,)))
    source = source_of(layout, [TensorMeta(name, DTYPES["F32"], (12, 12)) for name in "abc"])
    made, expected = moved(source.whole)[rule]
    tensors = {"t": apply_rules(source.tensors, [made])["t"]}
    ndim = len(tensors["t"].meta.shape)
    after = Layout((2, 2), ((0,), *((),) * (ndim - 2), (1,)))
    ways = Ways(groups=True, servers=(0, 0, 1, 1), tiered=tiered)
    for bucket in (512, 1 << 16):
        demands = demands_for(tensors, after, range(4))
        table = decide(demands, 4, source.stored, ExchangeLimits(bucket, 256), None, ways)
        assert_played(table, source, {**source.whole, "t": expected}, bucket)


@given(cuts(), st.lists(DTYPE, min_size=1, max_size=2), st.data())
@settings(max_examples=40)
def test_memory_to_memory(case: Pair, dtypes: list[DType], data: st.DataObject) -> None:
    """What a rank holds itself never travels; what its server holds does not cross to it."""
    before, after, shape = case
    world = max(before.devices, after.devices)
    metas = [TensorMeta(f"w{n}", dtype, shape) for n, dtype in enumerate(dtypes)]
    source = source_of(before, metas)
    servers = tuple(data.draw(st.just(()) | st.lists(st.integers(0, 1), min_size=world, max_size=world)))
    ways = Ways(gather=False, servers=servers)
    demands = demands_for(source.tensors, after, range(after.devices))
    table = decide(demands, world, source.stored, ExchangeLimits(4096, 256), None, ways, in_memory=True)
    plan = plan_of(table)
    played = Played(plan, source.files, in_memory=True)
    local = [[p for n, demand in enumerate(demands) for p in local_pieces(demand, n, rank)] for rank in range(world)]
    for rank, pieces in enumerate(local):
        for piece in pieces:
            played.take(rank, piece, source.slice(rank, piece.name))
    played.play()
    assert_told_when_complete(played, dict(enumerate(local)))
    assert_contents(played, source.whole)
    assert_totals(tally(table), played.counted, plan, ways, in_memory=True)
    width = sum(dtype.bits // 8 for dtype in dtypes)
    held = np.zeros((world, *shape), bool)
    for rank in range(before.devices):
        held[rank][before.region(rank, shape).slices] = True
    for rank in range(after.devices):
        wanted = np.zeros(shape, bool)
        wanted[after.region(rank, shape).slices] = True
        assert played.counted.received[rank] == (wanted & ~held[rank]).sum() * width
        near = [peer for peer in range(world) if not servers or servers[peer] == servers[rank]]
        far = [peer for peer in range(world) if peer not in near]
        assert played.counted.payload[far, rank].sum() == (wanted & ~held[near].any(0)).sum() * width


@pytest.mark.parametrize("tiered", [False, True])
def test_more_ranks_and_files_than_the_matrix_shows(tiered: bool) -> None:
    """Totals of groups of neighbours."""
    before, after = Layout((130,), ((0,), ())), Layout((65, 2), ((), (0,)))
    source = source_of(before, [TensorMeta("w", DTYPES["F32"], (130, 66))])
    ways = Ways(gather=False, servers=tuple(rank // 8 for rank in range(130)), tiered=tiered)
    demands = demands_for(source.tensors, after, range(130))
    limits = ExchangeLimits(1 << 20, 1 << 12)
    plan = assert_played(decide(demands, 130, source.stored, limits, None, ways), source, source.whole, 1 << 20)
    assert len({chunk.reader for chunk in plan.chunks}) > 64


def test_where_all_files_are_alike_one_table_says_where_tensors_lie() -> None:
    """The plan is the same as of a function of file and name."""
    layout = Layout((2, 3), ((1,), (0,)))
    source = source_of(layout, [TensorMeta(name, DTYPES["F32"], (12, 12)) for name in ("v", "w")])
    demands = demands_for(source.tensors, Layout((4,), ((0,), ())), range(4))
    table = {name: source.extents[0, name][0] for name in source.tensors}
    limits = ExchangeLimits(512, 256)
    assert plan_of(decide(demands, 4, table, limits)) == plan_of(decide(demands, 4, source.stored, limits))


def test_more_ranks_that_gather_than_the_matrix_shows() -> None:
    source = source_of(Layout((1,), ((),)), [TensorMeta("w", DTYPES["U8"], (70 * 16,))])
    demands = demands_for(source.tensors, Layout((70,), ((),)), range(70))
    plan = assert_played(decide(demands, 70, source.stored, ExchangeLimits(1 << 16)), source, source.whole, 1 << 16)
    assert [len(gather.ranks) for gather in plan.gathers] == [70]


def test_buffers_of_ranks_that_gather_with_two_groups() -> None:
    """Each rank numbers what it gathers itself: two of them gather with all first, two with a group of their own."""
    source = source_of(Layout((1,), ((),)), [TensorMeta(name, DTYPES["U8"], (2048,)) for name in ("v", "w")])
    groups, everybody = Layout((2, 2), ((1,),)), Layout((4,), ((),))
    demands = [
        *demands_for({"v": source.tensors["v"]}, groups, range(4)),
        *demands_for({"w": source.tensors["w"]}, everybody, range(4)),
    ]
    table = decide(demands, 4, source.stored, ExchangeLimits(512, 256), None, Ways(groups=True))
    plan = assert_played(table, source, source.whole, 512)
    orders = [[gather.ranks for gather in each.gathers] for each in plan.rounds]
    assert [(0, 1), (0, 1, 2, 3), (2, 3)] in orders


@pytest.mark.parametrize("world", [2, 3, 8])
def test_readers_have_alike_to_read(world: int) -> None:
    """Of what all want, and may not gather, each reads as much as any other."""
    source = source_of(Layout((1,), ((), ())), [TensorMeta("w", DTYPES["U8"], (48, 64))])
    demands = demands_for(source.tensors, Layout((world,), ((), ())), range(world))
    table = decide(demands, world, source.stored, ExchangeLimits(1 << 16, 64), None, Ways(gather=False))
    plan = assert_played(table, source, source.whole, 1 << 16)
    assert plan.bytes_read() == [48 * 64 // world] * world


@pytest.mark.parametrize(("blind", "roots"), [((), False), ((2,), True)])
def test_one_rank_broadcasts_where_another_does_not_see_the_file(blind: tuple[int, ...], roots: bool) -> None:
    """Also of the first set of ranks that there is."""
    source = source_of(Layout((1,), ((), ())), [TensorMeta("w", DTYPES["F32"], (48, 64))])
    demands = demands_for(source.tensors, Layout((4,), ((), ())), range(4))
    sees = {0: frozenset(range(4)) - frozenset(blind)}
    table = decide(demands, 4, source.stored, ExchangeLimits(1 << 16, 256), sees, Ways(broadcast=True))
    plan = assert_played(table, source, source.whole, 1 << 16, sees)
    assert {gather.root != EVERYBODY for gather in plan.gathers} == {roots}


@pytest.mark.parametrize("blind", [(), (3,)])
@pytest.mark.parametrize("servers", [(0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 1), (0, 1, 2, 2)])
def test_what_groups_are_fed_crosses_between_servers(servers: tuple[int, ...], blind: tuple[int, ...]) -> None:
    """By gathers, or by broadcasts where a rank does not see the file: what leaves a server comes to another."""
    source = source_of(Layout((1,), ((), ())), [TensorMeta("w", DTYPES["F32"], (48, 64))])
    demands = demands_for(source.tensors, Layout((4,), ((), ())), range(4))
    sees = {0: frozenset(range(4)) - frozenset(blind)}
    ways = Ways(broadcast=True, servers=servers)
    table = decide(demands, 4, source.stored, ExchangeLimits(1 << 14, 256), sees, ways)
    assert_played(table, source, source.whole, 1 << 14, sees)
    total = tally(table)
    assert total.between.sum() == total.crossing.sum() >= max(servers) * 48 * 64 * 4
