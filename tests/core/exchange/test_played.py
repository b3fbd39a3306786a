"""Plans played out on arrays: every byte that a rank wants comes to it once, and the totals say what was done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY
from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid, Ways, local_pieces
from ms_ckpt_ext.core.exchange.plan import decide, plan_of
from ms_ckpt_ext.core.exchange.totals import tally
from ms_ckpt_ext.core.geometry.array import DTYPES, DType
from ms_ckpt_ext.core.geometry.layout import Cell, Layout
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.pieces import Placement, TensorMeta
from ms_ckpt_ext.rules import QKV, AddProduct, Concat, Scale, Stack, Transpose
from tests.support.exchanges import (
    DTYPE,
    Pair,
    all_ways,
    assert_contents,
    assert_played,
    assert_told_when_complete,
    assert_totals,
    cuts,
    demands_for,
    source_of,
)
from tests.support.played import Played


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
    before, after = Layout((65,), ((0,), ())), Layout((13, 5), ((), (0,)))
    source = source_of(before, [TensorMeta("w", DTYPES["F32"], (65, 20))])
    ways = Ways(gather=False, servers=tuple(rank // 8 for rank in range(65)), tiered=tiered)
    demands = demands_for(source.tensors, after, range(65))
    limits = ExchangeLimits(1 << 20, 1 << 12)
    plan = assert_played(decide(demands, 65, source.stored, limits, None, ways), source, source.whole, 1 << 20)
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


def test_a_bucket_holds_for_what_a_rank_reads_alone_and_with_all_together() -> None:
    source = source_of(Layout((1,), ((), ())), [TensorMeta(name, DTYPES["U8"], (512, 256)) for name in "ab"])
    halves = Grid((), {(0, 0, 512, 176): (0, 1), (0, 80, 512, 256): (2, 3)}, uneven=True)
    demands = [
        Demand("a", source.tensors["a"], (Grid((1, 1), {(0, 0): (0, 1, 2, 3)}),)),
        Demand("b", source.tensors["b"], (halves,)),
    ]
    table = decide(demands, 4, source.stored, ExchangeLimits(1 << 16, 1 << 12))
    plan = assert_played(table, source, source.whole, 1 << 16)
    assert any(each.gathers and each.parts for each in plan.rounds)
