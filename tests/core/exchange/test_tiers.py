"""What servers send each other, in tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ms_ckpt_ext.core.exchange.tiers import (
    broadcast_crossing,
    carrier,
    gather_crossing,
    shares_a_server,
    teams_of,
    turns,
)


def test_turns_are_middles_among_parts_that_the_same_ranks_want() -> None:
    found = turns(np.array([0, 0, 1, 0]), np.array([5, 5, 5, 7]), np.array([30, 10, 8, 2]))
    assert found.tolist() == [15 / 40, 35 / 40, 0.5, 0.5]
    assert turns(*(np.empty(0, np.int64),) * 3).tolist() == []
    assert turns(np.zeros(2, int), np.arange(2), np.ones(2, np.int8)).tolist() == [0.5, 0.5]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_the_ranks_of_a_server_carry_alike(sizes: list[int], ranks: int) -> None:
    """Of parts that the same ranks want, each carries as much as any other but for a part at either end of its run."""
    found = turns(np.zeros(len(sizes), int), np.zeros(len(sizes), int), np.array(sizes))
    carriers = [carrier(range(ranks), turn) for turn in found.tolist()]
    assert carriers == sorted(carriers), "runs"
    for rank in range(ranks):
        carried = sum(size for size, by in zip(sizes, carriers) if by == rank)
        assert abs(carried - sum(sizes) / ranks) <= max(sizes)


def test_teams() -> None:
    assert teams_of((5, 0, 2), (0, 0, 1, 1, 1, 0)) == {0: (0, 5), 1: (2,)}


@pytest.mark.parametrize(
    ("ranks", "shares"),
    [((), False), ((0,), False), ((0, 2), False), ((0, 1), True), ((1, 2, 4), False), ((2, 3, 4), True)],
)
def test_ranks_that_share_a_server(ranks: tuple[int, ...], shares: bool) -> None:
    assert shares_a_server(ranks, (0, 0, 1, 1, 2)) is shares


@pytest.mark.parametrize(
    ("servers", "inside", "between", "arriving"),
    [
        ((0, 0, 0), [20, 20, 20], [0, 0, 0], [0, 0, 0]),
        ((0, 1, 2), [0, 0, 0], [20, 20, 20], [20, 20, 20]),
        ((0, 0, 1, 1), [20, 20, 20, 20], [10, 10, 10, 10], [20, 0, 20, 0]),
        ((0, 0, 1, 1, 2, 2), [30] * 6, [20] * 6, [40, 0, 40, 0, 40, 0]),
        ((0, 0, 1), [20, 0, 0], [0, 20, 20], [20, 0, 20]),  # a ring: every share but its own passes each edge
        ((0, 1, 0, 0), [0, 0, 30, 30], [30, 30, 0, 0], [30, 30, 0, 0]),
        ((0, 1, 0, 1, 0), [0, 0, 0, 0, 40], [40, 40, 40, 40, 0], [80, 80, 0, 0, 0]),  # it comes to both servers twice
    ],
)
def test_what_a_gather_of_shares_of_ten_bytes_moves(
    servers: tuple[int, ...], inside: list[int], between: list[int], arriving: list[int]
) -> None:
    found = gather_crossing(10, np.array(servers))
    assert [column.tolist() for column in found] == [inside, between, arriving]


@pytest.mark.parametrize(
    ("servers", "root", "inside", "between", "arriving"),
    [
        ((0, 0, 0, 0), 1, [9, 9, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]),  # 12 bytes to three, in four equal pieces
        ((0, 0, 1, 1), 1, [6, 6, 6, 6], [6, 6, 0, 0], [0, 0, 12, 0]),
        ((0, 1, 2), 2, [0, 0, 0], [0, 0, 24], [12, 12, 0]),
        ((0, 0, 1), 2, [6, 6, 0], [0, 0, 12], [12, 0, 0]),
    ],
)
def test_what_a_broadcast_of_twelve_bytes_moves(
    servers: tuple[int, ...], root: int, inside: list[int], between: list[int], arriving: list[int]
) -> None:
    found = broadcast_crossing(12, np.array(servers), root)
    assert [column.tolist() for column in found] == [inside, between, arriving]
    assert sum(inside) + sum(between) == 12 * (len(servers) - 1), "every rank but the root gets it once"
    assert sum(between) == sum(arriving)
