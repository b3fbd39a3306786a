"""Small plans, written out."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid, Ways
from ms_ckpt_ext.core.exchange.plan import (
    Chunk,
    Delivery,
    ExchangePlan,
    ExchangeTable,
    GroupGather,
    Round,
    SlicePart,
    decide,
    plan_of,
)
from ms_ckpt_ext.core.exchange.totals import tally
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta

U8 = DTYPES["U8"]
LIMITS = ExchangeLimits(bucket=1 << 10, chunk=32)
Wanted = dict[tuple[int, int], tuple[int, ...]]
TWO: Wanted = {(0, 32): (0, 1), (32, 64): (2,)}


def table_of(
    wanted: Wanted = TWO,
    ways: Ways = Ways(),  # noqa: B008
    where: tuple[Extent, ...] = (Extent(100, 64),),
    file: int = 3,
    limits: ExchangeLimits = LIMITS,
    count: int = 1,
    world: int = 3,
) -> ExchangeTable:
    """Vectors of 64 bytes, ranges of which the first three ranks want."""
    cells = {(0,): (file,)}
    tensor = SourceTensor(TensorMeta("w", U8, (64,)), "w", (Placement((1,), cells, cells),))
    demands = [Demand("w", tensor, (Grid((), wanted, uneven=True),))] * count
    return decide(demands, world, lambda _file, _name: where, limits, None, ways)


def delivery(*ranks: int, low: int = 0, high: int = 32) -> Delivery:
    """A range of a part that is a target by itself."""
    return Delivery(ranks, Region((low,), (high,)), Region((low,), (high,)), (high - low,), None, 0)


LEFT = SlicePart(0, 0, 0, 32, (32,), (delivery(0, 1),), U8, 0.0)
RIGHT = SlicePart(0, 1, 0, 32, (32,), (delivery(2),), U8, 0.0)
FIRST, SECOND = Chunk(3, (Extent(100, 32),), 32, 0), Chunk(3, (Extent(132, 32),), 32, 2)


def test_two_ranges() -> None:
    table = table_of()
    rounds = (Round((0, 1), (0, 1)),)
    assert plan_of(table) == ExchangePlan(3, table.demands, (FIRST, SECOND), (LEFT, RIGHT), rounds)


@pytest.mark.parametrize(
    ("rank", "chunks", "parts"),
    [
        (0, (FIRST,), (LEFT,)),  # as the reader it needs all of it
        (1, (FIRST,), (LEFT,)),
        (2, (SECOND,), (RIGHT._replace(chunk=0),)),
    ],
)
def test_what_of_them_concerns_a_rank(rank: int, chunks: tuple[Chunk, ...], parts: tuple[SlicePart, ...]) -> None:
    table = table_of()
    assert plan_of(table, rank) == ExchangePlan(3, table.demands, chunks, parts, (Round((0,), (0,)),))


def test_of_a_part_that_another_reads_a_rank_knows_its_own_deliveries() -> None:
    table = table_of({(0, 64): (0,), (20, 26): (1,), (40, 45): (2,)})
    whole = plan_of(table)
    assert {chunk.reader for chunk in whole.chunks} == {0}
    for rank in (1, 2):
        mine = plan_of(table, rank)
        assert [part.deliveries for part in mine.parts] == [
            tuple(each for each in part.deliveries if rank in each.ranks)
            for part in whole.parts
            if any(rank in each.ranks for each in part.deliveries)
        ]
    assert [part.deliveries for part in plan_of(table, 0).parts] == [part.deliveries for part in whole.parts]


def test_a_rank_in_a_world_in_which_nothing_concerns_it() -> None:
    table = table_of({(0, 64): (0, 2)})
    assert plan_of(table, 1) == ExchangePlan(3, table.demands, (), (), (Round((), ()),))


def test_what_all_want_they_gather() -> None:
    """64 bytes of three ranks: shares of 32, of which the last has nothing to read."""
    plan = plan_of(table_of({(0, 64): (0, 1, 2)}))
    gather = GroupGather((0, 1, 2), 32, (0, 1), (0, 1), (0, 32))
    assert plan.rounds == (Round((0, 1), (0, 1), (gather,), exchanges=False),)
    assert plan.chunks == (FIRST, SECOND._replace(reader=1))
    assert [(part.chunk, part.offset, part.gathered) for part in plan.parts] == [(-1, 0, True), (-1, 32, True)]
    assert (plan.bytes_read(), plan.bytes_received()) == ([32, 32, 0], [32, 32, 64])
    assert plan.bytes_wanted() == [64, 64, 64]
    assert plan.last_use() == {0: 0, 1: 0, -1: 0}


@pytest.mark.parametrize(("wanted", "some"), [({(0, 64): (0, 1, 2)}, [False]), ({(0, 64): (1, 2)}, [True]), (TWO, [])])
def test_groups_of_some_ranks(wanted: Wanted, some: list[bool]) -> None:
    table = table_of(wanted, Ways(groups=True), limits=ExchangeLimits(48, 16))
    assert [table.is_of_some(group) for group in table.chunks.groups] == some


def test_every_round_gathers_its_own_parts() -> None:
    """Of 64 bytes that three ranks want each may receive 25 a round: one part of 16."""
    plan = plan_of(table_of({(0, 64): (0, 1, 2)}, limits=ExchangeLimits(64, 16)))
    assert [(each.parts, [(g.parts, g.share) for g in each.gathers]) for each in plan.rounds] == [
        ((n,), [((n,), 16)]) for n in range(4)
    ]
    assert [(chunk.extents, chunk.reader) for chunk in plan.chunks] == [
        ((Extent(100 + 16 * n, 16),), 0) for n in range(4)
    ]


def test_parts_of_a_chunk_lie_behind_each_other() -> None:
    plan = plan_of(table_of({(0, 64): (1,)}, limits=ExchangeLimits(128, 64), where=(Extent(0, 64),)))
    assert [(part.chunk, part.offset) for part in plan.parts] == [(0, 0), (1, 0), (2, 0), (3, 0)]
    plan = plan_of(table_of({(0, 64): (1,)}, limits=ExchangeLimits(1 << 10, 24), where=(Extent(0, 64),)))
    assert [(part.chunk, part.offset, part.nbytes) for part in plan.parts] == [(0, 0, 24), (1, 0, 24), (2, 0, 16)]


@pytest.mark.parametrize(("world", "group"), [(64, 1), (65, 2), (128, 2), (129, 3)])
def test_up_to_64_ranks_have_a_row_of_the_matrix_each(world: int, group: int) -> None:
    total = tally(table_of(world=world))
    assert (total.group, total.matrix.shape[0]) == (group, -(-world // group))
    assert total.matrix.sum() == 32


@pytest.mark.parametrize(
    ("files", "group", "columns"), [(64, 1, [16] * 64), (129, 3, [48] * 43), (130, 3, [48] * 43 + [16])]
)
def test_up_to_64_files_have_a_column_each(files: int, group: int, columns: list[int]) -> None:
    """Vectors of 16 bytes, each in a file of its own, that rank 1 wants."""
    cells = [{(0,): (file,)} for file in range(files)]
    tensors = [SourceTensor(TensorMeta("w", U8, (16,)), "w", (Placement((1,), held, held),)) for held in cells]
    demands = [Demand("w", tensor, (Grid((1,), {(0,): (1,)}),)) for tensor in tensors]
    total = tally(decide(demands, 3, lambda _file, _name: (Extent(0, 16),), LIMITS))
    assert (total.file_group, total.files.tolist()) == (group, [[0] * len(columns), columns, [0] * len(columns)])


def test_a_load_in_which_nothing_is_wanted() -> None:
    table = table_of(count=0)
    assert plan_of(table) == plan_of(table, 1) == ExchangePlan(3, (), (), (), ())
    total = tally(table)
    for column in (total.wanted, total.read, total.reads, total.sent, total.received, total.messages, total.staging):
        assert column.tolist() == [0] * 3
    assert (total.rounds, total.calls, total.crossing.tolist()) == ((), 0, [0])
    assert (total.matrix.tolist(), total.files.tolist(), total.file_group) == ([[0] * 3] * 3, [[0]] * 3, 1)


def test_rows_that_several_parameters_share_count_as_often() -> None:
    """Of 256 bytes a rank may read, keep and receive 85 each, of four vectors that it wants: two parts a round."""
    table = table_of({(0, 64): (1,)}, limits=ExchangeLimits(256, 32), count=4)
    assert sorted(table.round_of.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_parts_of_one_read_lie_in_it_as_they_lie_in_the_file() -> None:
    lying = {"v": Extent(100, 8), "w": Extent(108, 16), "x": Extent(124, 4)}
    cells = {(0,): (0,)}
    demands = [
        Demand(
            name,
            SourceTensor(TensorMeta(name, U8, (length,)), name, (Placement((1,), cells, cells),)),
            (Grid((1,), {(0,): (1,)}),),
        )
        for name, (_, length) in lying.items()
    ]
    plan = plan_of(decide(demands, 3, lambda _file, name: (lying[name],), LIMITS))
    assert plan.chunks == (Chunk(0, (Extent(100, 28),), 28, 1),)
    assert [(part.chunk, part.offset, part.nbytes) for part in plan.parts] == [(0, 0, 8), (0, 8, 16), (0, 24, 4)]


def test_the_last_round_in_which_a_chunk_is_used() -> None:
    plan = plan_of(table_of({(0, 64): (0, 1)}, Ways(gather=False), limits=ExchangeLimits(96, 32), count=2))
    found = plan.last_use()
    used = [{plan.parts[number].chunk for number in each.parts} for each in plan.rounds]
    assert len(used) > 1
    assert found == {n: max(at for at, chunks in enumerate(used) if n in chunks) for n in range(len(plan.chunks))}
    assert sorted(number for each in plan.rounds for number in each.chunks) == list(range(len(plan.chunks)))


@pytest.mark.parametrize(
    "other",
    [
        table_of({(0, 32): (0, 1), (32, 63): (2,)}),
        table_of({(0, 32): (0, 2), (32, 64): (1,)}),
        table_of(where=(Extent(101, 64),)),
        table_of(file=2),
        table_of(ways=Ways(servers=(0, 0, 1))),
        table_of(limits=ExchangeLimits(1 << 10, 16)),
        table_of(limits=ExchangeLimits(64, 32)),
        table_of(count=2),
    ],
)
def test_plans_that_differ_have_other_digests(other: ExchangeTable) -> None:
    digest = table_of().digest()
    assert len(digest) == 32, "16 bytes"
    assert (table_of().digest() == digest, other.digest() == digest) == (True, False)
