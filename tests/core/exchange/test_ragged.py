"""Tables of rows of different lengths, and ranks that are in the same sets."""

from __future__ import annotations

import numpy as np
import pytest

from ms_ckpt_ext.core.exchange import ragged
from ms_ckpt_ext.core.exchange.ragged import (
    Sets,
    by_number,
    classes_of_ranks,
    entries_of,
    joined,
    mixed,
    narrow,
    ranks_alike,
    starts,
    sums,
)


@pytest.mark.parametrize(
    ("most", "dtype"),
    [
        (0, "int8"),
        (127, "int8"),
        (128, "int16"),
        ((1 << 15) - 1, "int16"),
        (1 << 15, "int32"),
        ((1 << 31) - 1, "int32"),
        (1 << 31, "int64"),
    ],
)
def test_the_shortest_type(most: int, dtype: str) -> None:
    assert narrow(most) == dtype


@pytest.mark.parametrize(
    ("lengths", "rows", "owner", "entries"),
    [
        ([2, 0, 3], [0, 1, 2], [0, 0, 2, 2, 2], [0, 1, 2, 3, 4]),
        ([2, 0, 3], [2, 0], [0, 0, 0, 1, 1], [2, 3, 4, 0, 1]),
        ([2, 0, 3], [1, 1], [], []),
        ([2, 0, 3], [0, 0], [0, 0, 1, 1], [0, 1, 0, 1]),
        ([2, 0, 3], [], [], []),
        ([], [], [], []),
    ],
)
def test_entries_of_rows(lengths: list[int], rows: list[int], owner: list[int], entries: list[int]) -> None:
    start = starts(lengths)
    assert start.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    found_owner, found = entries_of(start, np.array(rows, np.int64))
    assert (found_owner.tolist(), found.tolist()) == (owner, entries)


def test_sums_of_more_than_one_block() -> None:
    """Every value is counted once, and rows without any are 0."""
    count = ragged.ROWS_AT_ONCE + 3
    assert [(block.start, block.stop) for block in ragged.blocks(count)] == [(0, count - 3), (count - 3, count)]
    assert [*ragged.blocks(0)] == []
    owner = np.zeros(count, np.int8)
    owner[-2:] = 2
    assert sums(owner, np.full(count, 7, np.int8), 4).tolist() == [7 * (count - 2), 0, 14, 0]
    assert sums(owner[:0], owner[:0], 2).tolist() == [0, 0]


def test_places_by_number() -> None:
    order, begins = by_number(np.array([2, 0, 2, 0, 3]), 5)
    assert (order.tolist(), begins) == ([1, 3, 0, 2, 4], [0, 2, 2, 4, 5, 5])


def test_numbers_are_mixed_as_splitmix64_does() -> None:
    """The first outputs of the generator that begins with 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert mixed(np.arange(4, dtype=np.int8)).tolist() == expected


def sets_of(*members: tuple[int, ...]) -> Sets:
    sets = Sets()
    assert sets.numbers(members).tolist() == [list(dict.fromkeys(members)).index(each) for each in members]
    return sets


@pytest.mark.parametrize(
    ("members", "groups"),
    [
        ([], [[0, 1, 2, 3, 4]]),
        ([(0, 1, 2, 3, 4)], [[0, 1, 2, 3, 4]]),
        ([(0, 3)], [[0, 3], [1, 2, 4]]),
        ([(0, 3), (3, 4), (0, 3)], [[0], [1, 2], [3], [4]]),
        ([(1, 2), (1, 2, 4)], [[0, 3], [1, 2], [4]]),
    ],
)
def test_ranks_that_are_in_the_same_sets(members: list[tuple[int, ...]], groups: list[list[int]]) -> None:
    sets = sets_of(*members)
    assert sorted(ranks_alike(sets, 5)) == groups
    of_rank, first = classes_of_ranks(sets, 5)
    assert sorted([np.flatnonzero(of_rank == number).tolist() for number in range(len(first))]) == groups
    assert [int(of_rank[rank]) for rank in first] == list(range(len(groups)))


def test_columns_one_after_another() -> None:
    assert joined([]).tolist() == []
    found = joined([np.array([1], np.int8), np.array([2, 3], np.int16)], np.int32)
    assert (found.tolist(), found.dtype) == ([1, 2, 3], np.int32)
