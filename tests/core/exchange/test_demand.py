"""Who gives what to whom where slices lie in memory, and which ranks may gather, in tables."""

from __future__ import annotations

import pytest

from ms_ckpt_ext.core.exchange.demand import (
    Demand,
    ExchangeLimits,
    Grid,
    Leg,
    Servers,
    Ways,
    boxes_moved,
    legs,
    local_pieces,
)
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta

TWO_HOSTS = (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("wanting", "holders", "servers", "expected"),
    [
        ((0, 1), (0, 1), (), ()),
        ((0, 1), (0, 1), TWO_HOSTS, ()),
        ((1, 3), (0, 2), (), (Leg((0, 2), (1, 3)),)),
        ((1, 3), (0, 2), TWO_HOSTS, (Leg((0,), (1,)), Leg((2,), (3,)))),  # each from its own server
        ((1, 3), (0,), TWO_HOSTS, (Leg((0,), (1, 3)),)),
        ((2, 3), (0, 1), TWO_HOSTS, (Leg((0, 1), (2, 3)),)),  # none on their server: any
        ((0, 1, 2), (1, 3), TWO_HOSTS, (Leg((1,), (0,)), Leg((3,), (2,)))),
    ],
)
def test_what_is_lacking_comes_from_the_own_server_where_it_is_there(
    wanting: tuple[int, ...], holders: tuple[int, ...], servers: Servers, expected: tuple[Leg, ...]
) -> None:
    assert legs(wanting, holders, servers) == expected


@pytest.mark.parametrize(
    ("ways", "ranks", "expected"),
    [
        (Ways(), (0, 1, 2), True),
        (Ways(gather=False), (0, 1, 2), False),
        (Ways(gather=False, groups=True), (0, 1, 2), False),
        (Ways(), (0, 1), False),
        (Ways(groups=True), (0, 1), True),
        (Ways(known=frozenset({(0, 1)})), (0, 1), True),
        (Ways(known=frozenset({(0, 1)})), (0, 2), False),
        (Ways(groups=True, known=frozenset({(0, 2)})), (0, 1), True),
    ],
)
def test_who_may_gather(ways: Ways, ranks: tuple[int, ...], expected: bool) -> None:
    assert ways.may_gather(ranks, 3) is expected


@pytest.mark.parametrize(
    ("bucket", "chunk", "least", "read"),
    [(800, 1000, 100, 100), (800, 64, 100, 64), (80, 1000, 16, 16), (127, 1000, 16, 16), (136, 1000, 17, 17)],
)
def test_a_round_has_room_for_a_block_at_least(bucket: int, chunk: int, least: int, read: int) -> None:
    limits = ExchangeLimits(bucket, chunk)
    assert (limits.least, limits.read) == (least, read)


def test_sizes_where_none_are_said() -> None:
    assert ExchangeLimits() == ExchangeLimits(bucket=64 << 20, chunk=4 << 20)
    assert Ways() == Ways(gather=True, groups=False, known=frozenset(), broadcast=False, servers=(), tiered=False)


def test_a_rank_takes_of_its_memory_what_of_its_box_it_holds() -> None:
    """Rows 0 to 3 are on rank 0, rows 4 to 7 on ranks 1 and 2; ranks want rows 2 to 5, all rows, or nothing."""
    holders = {(0,): (0,), (1,): (1, 2)}
    tensor = SourceTensor(TensorMeta("w", DTYPES["F32"], (8,)), "held", (Placement((2,), holders, holders),))
    demand = Demand("w", tensor, (Grid((), {(2, 6): (0, 1)}, uneven=True), Grid((1,), {(0,): (2,)})))
    found = [[(p.in_source, p.in_target) for p in local_pieces(demand, 7, rank)] for rank in range(4)]
    assert found == [
        [(Region((2,), (4,)), Region((0,), (2,)))],
        [(Region((0,), (2,)), Region((2,), (4,)))],
        [(Region((0,), (4,)), Region((4,), (8,)))],
        [],
    ]
    assert {(p.demand, p.name, p.shape, p.dtype.name) for p in local_pieces(demand, 7, 0)} == {(7, "held", (4,), "F32")}


def test_what_is_stored_lands_in_the_box_that_is_wanted() -> None:
    """It is not kept for anything that is computed."""
    holders = {(0,): (0,), (1,): (1,)}
    tensor = SourceTensor(TensorMeta("w", DTYPES["F32"], (8,)), "held", (Placement((2,), holders, holders),))
    [box] = boxes_moved(tensor, Region((2,), (6,)))
    assert (box.into, box.dtype, box.shape, box.kept) == (0, DTYPES["F32"], (4,), False)
    assert [(files, piece.in_target) for piece, files, *_ in box.pieces] == [
        ((0,), Region((0,), (2,))),
        ((1,), Region((2,), (4,))),
    ]
