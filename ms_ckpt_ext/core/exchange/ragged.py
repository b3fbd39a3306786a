"""Ragged rows in flat arrays: row `k` of a table owns the entries `start[k] .. start[k + 1]` of another.

Plans for many thousands of ranks are tables of millions of rows; Python objects are made only of what a rank touches.
Columns that are as long are as narrow as their numbers allow, and what is worked out from them is so in blocks: the
memory of a plan is what it keeps. Arithmetic on a column that may be narrow needs a wider one first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[Any]
"""A one-dimensional array of integers (or of truth values)."""
ROWS_AT_ONCE = 1 << 20
"""Rows of a long table that are worked on together."""


def narrow(most: int) -> Any:
    """The shortest signed type that holds 0 .. `most`.

    >>> narrow(127), narrow(16384), narrow(1 << 20)
    (dtype('int8'), dtype('int16'), dtype('int32'))
    """
    return np.min_scalar_type(-int(most) - 1)


def blocks(rows: int) -> Iterator[slice]:
    """All rows of a table, `ROWS_AT_ONCE` of them at a time."""
    return (slice(low, min(low + ROWS_AT_ONCE, rows)) for low in range(0, rows, ROWS_AT_ONCE))


def starts(lengths: Iterable[int]) -> Ints:
    """Where every row begins; one more entry than rows, the last is the total."""
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)


def entries_of(start: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """The entries of `rows`, one after another: (which of `rows` owns each, number of each).

    >>> [column.tolist() for column in entries_of(np.array([0, 2, 3, 6]), np.array([2, 0]))]
    [[0, 0, 0, 1, 1], [3, 4, 5, 0, 1]]
    """
    lengths = start[rows + 1] - start[rows]
    stops = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(rows)), lengths)
    return owner, np.arange(lengths.sum()) + np.repeat(start[rows] - stops + lengths, lengths)


def sums(owner: Ints, values: Ints, rows: int) -> Ints:
    """Sum of the values that every row owns."""
    some = (np.bincount(owner[block], weights=values[block], minlength=rows) for block in blocks(len(owner)))
    total: Ints = sum(some, np.zeros(rows))  # float64: exact up to 9e15
    return total.astype(np.int64)


def by_number(column: Ints, count: int) -> tuple[Ints, list[int]]:
    """Places of a column in the order of its numbers, all below `count`, and where each number begins among them."""
    order = np.argsort(column, kind="stable").astype(narrow(len(column)))
    return order, starts(sums(column, np.broadcast_to(1, len(column)), count)).tolist()


def mixed(numbers: Ints) -> Ints:
    """A well spread 64-bit number for every number (splitmix64), so that sums of them tell sets apart."""
    x: Ints = (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return np.bitwise_xor(x, x >> np.uint64(31))


class Sets:
    """Tuples of numbers, each different one numbered once."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, ...], int] = {}
        self.members: list[tuple[int, ...]] = []

    def number(self, members: tuple[int, ...]) -> int:
        """The number of a tuple."""
        found = self._numbers.setdefault(members, len(self.members))
        if found == len(self.members):
            self.members.append(members)
        return found

    def numbers(self, several: Iterable[tuple[int, ...]]) -> Ints:
        """The numbers of several tuples."""
        return np.fromiter((self.number(members) for members in several), np.int64)

    def flat(self) -> tuple[Ints, Ints]:
        """(start, members) of all tuples, as a ragged table."""
        return starts(map(len, self.members)), joined([np.array(m, np.int64) for m in self.members])


def classes_of_ranks(sets: Sets, world: int) -> tuple[Ints, Ints]:
    """(class of every rank, one rank of every class): ranks that are in the same sets are alike."""
    start, members = sets.flat()
    owner = np.repeat(np.arange(len(start) - 1), np.diff(start))
    signature = np.zeros(world, np.uint64)
    np.add.at(signature, members, mixed(owner))
    _, first, of_rank = np.unique(signature, return_index=True, return_inverse=True)
    return of_rank, first


def ranks_alike(sets: Sets, world: int) -> list[list[int]]:
    """The ranks of every class, ascending."""
    of_rank, _ = classes_of_ranks(sets, world)
    order = np.argsort(of_rank, kind="stable")
    return [group.tolist() for group in np.split(order, np.flatnonzero(np.diff(of_rank[order])) + 1)]


def joined(columns: Sequence[Ints], dtype: Any = np.int64) -> Ints:
    """Arrays one after another."""
    return np.concatenate([*columns, np.empty(0, dtype)], dtype=dtype, casting="same_kind")
