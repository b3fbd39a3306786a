"""What is one read, and who makes it, of parts that are laid out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Optional

import numpy as np
import pytest

from ms_ckpt_ext.core.exchange.chunks import EVERYBODY, Chunks, FedGroup, Moving, chunks_of, concerning, moving
from ms_ckpt_ext.core.exchange.demand import ExchangeLimits, Servers, Ways
from ms_ckpt_ext.core.exchange.parts import Parts, Rows
from ms_ckpt_ext.core.exchange.ragged import ROWS_AT_ONCE, Sets, starts
from ms_ckpt_ext.core.exchange.slices import Cut
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.planning.io_units import Extent

LIMITS = ExchangeLimits(bucket=8 << 10, chunk=100)
ALONE = Ways(gather=False)


class Part(NamedTuple):
    """A part: where it lies, its bytes, and how many of them which ranks want; all of them, where that is not said."""

    file: int
    offset: int
    nbytes: int
    ranks: tuple[int, ...]
    others: tuple[tuple[tuple[int, ...], int], ...] = ()
    moved: Optional[int] = None
    demand: int = 0
    early: bool = False


def parts_of(parts: Sequence[Part], scattered: Sequence[int] = (), holders: Sequence[tuple[int, ...]] = ()) -> Parts:
    """Each with a row of its own, in the order of file and offset."""
    sets = Sets()
    wanted = [((part.ranks, part.nbytes if part.moved is None else part.moved), *part.others) for part in parts]
    assert sorted(parts, key=lambda part: part[:2]) == list(parts)
    whole = [sets.number(w[0][0]) if len(w) == 1 and w[0][1] == p.nbytes else -1 for p, w in zip(parts, wanted)]
    whole = [number if number < 0 or len(sets.members[number]) > 1 else -1 for number in whole]
    most = [max(moved for _, moved in each) for each in wanted]
    alike = [tuple((ranks, 2 * moved >= m) for ranks, moved in each) for each, m in zip(wanted, most)]
    cuts = tuple(Cut((part.nbytes,), 0, part.nbytes, (), True, DTYPES["U8"], part.early) for part in parts)
    rows = Rows(
        cuts,
        np.array([part.nbytes for part in parts], np.int64),
        np.array(whole, np.int32),
        starts(map(len, wanted)),
        np.array([sets.number(ranks) for each in wanted for ranks, _ in each], np.int32),
        np.array([moved for each in wanted for _, moved in each], np.int64),
        np.array([alike.index(each) for each in alike], np.int64),
    )
    count, column = (
        len(parts),
        (np.array(each, np.int64) for each in ([p.file for p in parts], [p.offset for p in parts])),
    )
    lying = {number: (Extent(parts[number].offset, 1), Extent(0, parts[number].nbytes - 1)) for number in scattered}
    demand = np.array([part.demand for part in parts], np.int64)
    return Parts(demand, np.arange(count), *column, lying, rows, sets, tuple(holders))


def read(chunks: Chunks) -> list[tuple[int, int, int]]:
    """(first part, bytes, reader) of every chunk."""
    return [*zip(chunks.start[:-1].tolist(), chunks.nbytes.tolist(), chunks.reader.tolist())]


def run(*sizes: int, ranks: tuple[int, ...] = (0,), file: int = 0) -> list[Part]:
    """Neighbours in a file."""
    return [Part(file, sum(sizes[:n]), size, ranks) for n, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("parts", "scattered", "expected"),
    [
        (run(50, 50), (), [0]),  # as long as a read may be
        (run(50, 51), (), [0, 1]),
        (run(50, 50, 50, 50, 50), (), [0, 2, 4]),
        (run(150, 30, 30), (), [0, 1]),  # a part is never cut
        (run(30, 150, 30), (), [0, 1, 2]),
        ([Part(0, 0, 10, (0,)), Part(0, 11, 10, (0,))], (), [0, 1]),  # a byte lies between them
        ([Part(0, 0, 10, (0,)), Part(1, 10, 10, (0,))], (), [0, 1]),
        ([*run(10, 10), *run(10, 10, file=1)], (), [0, 2]),
        ([Part(0, 10 * n, 10, (rank,)) for n, rank in enumerate((0, 1, 1, 0))], (), [0, 1, 3]),  # others want it
        ([Part(0, 10 * n, 10, (0, 1), moved=moved) for n, moved in enumerate((None, 5, 5))], (), [0, 1]),  # not whole
        (run(10, 10, 10, 10), (1,), [0, 1, 2]),  # in several stretches: by itself
        (run(10, 10, 10), (0,), [0, 1]),
        (run(10, 10, 10), (2,), [0, 2]),
        ([*run(10, 10), *run(10, 10, file=1)], (1,), [0, 1, 2]),
    ],
)
def test_neighbours_that_the_same_ranks_want_are_one_read(
    parts: list[Part], scattered: tuple[int, ...], expected: list[int]
) -> None:
    chunks = chunks_of(parts_of(parts, scattered), 2, LIMITS, None, ALONE)
    assert chunks.start.tolist() == [*expected, len(parts)]
    sizes = [part.nbytes for part in parts]
    assert chunks.nbytes.tolist() == [sum(sizes[a:b]) for a, b in zip(expected, [*expected[1:], len(sizes)])]
    assert chunks.file.tolist() == [parts[number].file for number in expected]


def test_more_parts_than_are_worked_on_at_once() -> None:
    """Two files come to a block, two behind it; chunks number as many as fill a block of theirs and more."""
    files = (ROWS_AT_ONCE - 10, 100, 1 << 17, 10)
    file = np.repeat(np.arange(4), files)
    offset = np.concatenate([np.arange(count) for count in files])
    offset[file == 2] *= 2
    offset[(file == 1) & (offset >= 50)] += 1
    count, behind = len(file), sum(files[:3])
    parts = parts_of([Part(0, 0, 1, (0, 1))])
    lying = {behind + 3: (Extent(0, 1), Extent(7, 1))}
    parts = replace(parts, demand=np.zeros(count, int), row=np.zeros(count, int), file=file, offset=offset)
    chunks = chunks_of(replace(parts, scattered=lying), 2, ExchangeLimits(16 << 20, 2 << 20), None, ALONE)
    starts = [0, files[0], files[0] + 50, *range(sum(files[:2]), behind), behind, behind + 3, behind + 4, count]
    assert chunks.start.tolist() == starts
    assert chunks.nbytes.tolist() == np.diff(starts).tolist()
    assert chunks.reader.tolist() == [0] + [1] * (len(starts) - 2), "who reads the longest reads nothing else"


def apart(*wanted: tuple[int, tuple[int, ...]]) -> list[Part]:
    """Parts that are no neighbours: bytes, and who wants all of it."""
    return [Part(0, 1000 * n, nbytes, ranks) for n, (nbytes, ranks) in enumerate(wanted)]


@pytest.mark.parametrize(
    ("parts", "readers"),
    [
        (apart((10, (0, 1)), (10, (0, 1)), (20, (0, 1))), [1, 1, 0]),  # the longest first
        (apart((30, (0,)), (10, (0, 1)), (10, (0, 1))), [0, 1, 1]),
        (apart((40, (0, 1, 2)), (30, (0, 1))), [1, 0]),  # who has less of a choice first
        (apart((10, (1, 0)), (5, (1, 0))), [0, 1]),
        # one of many: what each has read for others counts
        (apart(*((n + 1, (n,)) for n in range(5)), (2, (0, 1, 2, 3, 4))), [0, 1, 2, 3, 4, 0]),
        (apart(*((5 - n, (n,)) for n in range(5)), (2, (0, 1, 2, 3, 4))), [0, 1, 2, 3, 4, 4]),
        (apart((9, (0, 1, 2, 3, 4)), *((8, (0, 1, 2, 3, 4)) for _ in range(4))), [0, 1, 2, 3, 4]),
        (apart((9, (1, 2, 3, 4, 5)), (8, (0, 1, 2, 3, 4))), [1, 0]),
        (apart((9, (0, 1, 2, 3, 4)), (8, (0, 1, 2, 3, 5))), [0, 1]),
        (apart(*((9, (0, 1, 2, 3, 4)) for _ in range(6))), [0, 1, 2, 3, 4, 0]),
    ],
)
def test_the_reader_is_who_wants_it_and_has_least_to_read(parts: list[Part], readers: list[int]) -> None:
    chunks = chunks_of(parts_of(parts), 6, LIMITS, None, ALONE)
    assert chunks.reader.tolist() == readers
    assert chunks.groups == ()


@pytest.mark.parametrize(
    ("part", "seeing", "reader"),
    [
        (Part(0, 0, 10, (1,), (((2,), 6),)), None, 1),  # both want much of it
        (Part(0, 0, 10, (1,), (((2,), 4),)), None, 1),
        (Part(0, 0, 10, (2,), (((1,), 5),)), None, 1),  # half is enough
        (Part(0, 0, 10, (2,), (((1,), 4),)), None, 2),
        (Part(0, 0, 10, (2,), (((1,), 4),)), (0, 1), 1),  # the one that wants more does not see it
        (Part(0, 0, 10, (2,), (((1,), 4),)), (3,), 3),  # nor does any
        (Part(0, 0, 10, (1, 2)), (2, 3), 2),
    ],
)
def test_the_reader_wants_most_of_it_and_sees_its_file(
    part: Part, seeing: Optional[tuple[int, ...]], reader: int
) -> None:
    sees = None if seeing is None else {0: frozenset(seeing)}
    assert read(chunks_of(parts_of([part]), 4, LIMITS, sees, ALONE)) == [(0, 10, reader)]


def test_files_that_different_ranks_see() -> None:
    """The same wish, of two files."""
    parts = [Part(0, 0, 10, (0, 1)), Part(1, 0, 10, (0, 1)), Part(2, 0, 10, (0, 1))]
    sees = {0: frozenset({1}), 1: frozenset({0}), 2: frozenset({1})}
    assert chunks_of(parts_of(parts), 2, LIMITS, sees, ALONE).reader.tolist() == [1, 0, 1]


def test_wishes_of_different_ranks_for_files_that_different_ranks_see() -> None:
    """Some pair of ranks for every wish and every file."""
    wishes = ((0, 1), (2, 3), (4, 5))
    seen = ((0, 2, 4), (1, 3, 5))
    parts = [Part(file, 20 * n, 10, ranks) for file in range(2) for n, ranks in enumerate(wishes)]
    sees = {file: frozenset(ranks) for file, ranks in enumerate(seen)}
    assert chunks_of(parts_of(parts), 6, LIMITS, sees, ALONE).reader.tolist() == [0, 2, 4, 1, 3, 5]


WIDE = (0, 1, 2)


@pytest.mark.parametrize(
    ("ranks", "nbytes", "ways", "fed"),
    [
        (WIDE, 10, Ways(), True),  # all ranks: always
        (WIDE, 10, ALONE, False),
        ((0, 1), 129, Ways(groups=True), True),
        ((0, 1), 128, Ways(groups=True), False),  # no more than a bucket
        ((0, 1), 129, Ways(), False),
        ((0, 1), 129, Ways(known=frozenset({(0, 1)})), True),
        ((0, 1), 129, Ways(known=frozenset({(0, 2)})), False),
    ],
)
def test_groups_that_are_fed(ranks: tuple[int, ...], nbytes: int, ways: Ways, fed: bool) -> None:
    parts = parts_of([Part(0, 0, nbytes, ranks)])
    chunks = chunks_of(parts, 3, ExchangeLimits(128, 100), None, ways)
    assert chunks.reader.tolist() == [3 if fed else 0]
    assert chunks.groups == ((FedGroup(parts.sets.number(ranks)),) if fed else ())


def test_ranks_that_want_other_things_as_well_are_no_group() -> None:
    parts = [Part(0, 0, 500, (0, 1)), Part(0, 600, 10, (1,))]
    assert chunks_of(parts_of(parts), 3, ExchangeLimits(128, 100), None, Ways(groups=True)).groups == ()


@pytest.mark.parametrize(
    ("ways", "seeing", "root"),
    [
        (Ways(), (0, 1, 2), EVERYBODY),
        (Ways(broadcast=True), (0, 1, 2), EVERYBODY),
        (Ways(broadcast=True), (1, 2), 1),
        (Ways(), (1, 2), None),
        (Ways(broadcast=True), (3,), None),  # who reads it is not of the group
    ],
)
def test_who_reads_for_a_group(ways: Ways, seeing: tuple[int, ...], root: Optional[int]) -> None:
    parts = parts_of([Part(0, 0, 500, WIDE)])
    ways = ways._replace(groups=True)
    chunks = chunks_of(parts, 4, ExchangeLimits(128, 100), {0: frozenset(seeing)}, ways)
    number = parts.sets.number(WIDE)
    assert chunks.groups == (() if root is None else (FedGroup(number, root),))
    assert chunks.reader.tolist() == [seeing[0] if root is None else 4]


def test_groups_are_numbered_behind_the_ranks_in_the_order_of_their_ranks() -> None:
    parts = parts_of([*apart((500, (2, 3)), (500, (0, 1)), (10, (1, 2))), Part(1, 0, 500, (0, 1))])
    sees = {0: frozenset(range(4)), 1: frozenset({1})}
    ways = Ways(broadcast=True, known=frozenset({(0, 1), (2, 3)}))
    chunks = chunks_of(parts, 4, ExchangeLimits(128, 100), sees, ways)
    assert chunks.groups == ()  # (1, 2) makes them differ
    parts = parts_of([*apart((500, (2, 3)), (500, (0, 1))), Part(1, 0, 500, (0, 1))])
    chunks = chunks_of(parts, 4, ExchangeLimits(128, 100), sees, ways)
    left, right = parts.sets.number((0, 1)), parts.sets.number((2, 3))
    assert chunks.groups == (FedGroup(left), FedGroup(left, 1), FedGroup(right))
    assert chunks.reader.tolist() == [6, 4, 5]


def test_numbers_of_groups_behind_as_many_ranks_as_a_byte_counts() -> None:
    everyone = tuple(range(127))
    parts = parts_of([Part(0, 0, 10, everyone), Part(1, 0, 10, everyone)])
    sees = {0: frozenset(everyone), 1: frozenset({5})}
    chunks = chunks_of(parts, 127, LIMITS, sees, Ways(broadcast=True))
    assert chunks.groups == (FedGroup(0), FedGroup(0, 5))
    assert chunks.reader.tolist() == [127, 128]


def test_what_lies_in_several_stretches_no_group_gathers() -> None:
    chunks = chunks_of(parts_of([Part(0, 0, 500, WIDE)], scattered=(0,)), 3, LIMITS, None, Ways())
    assert (chunks.groups, chunks.reader.tolist()) == ((), [0])


def test_of_what_lies_in_memory_a_holder_gives_and_nothing_is_read() -> None:
    parts = parts_of([Part(0, 0, 10, (1,)), Part(1, 0, 20, (0,))], holders=[(0, 2), (2,)])
    chunks = chunks_of(parts, 3, LIMITS, None, ALONE)
    assert chunks.reader.tolist() == [0, 2]
    assert (chunks.nbytes.tolist(), chunks.staged.tolist()) == ([10, 20], [0, 0])


def test_what_concerns_a_rank_is_what_it_reads_or_gets() -> None:
    parts = parts_of(apart((10, (1,)), (10, (1, 2)), (10, (0,)), (40, (0, 2))))
    chunks = chunks_of(parts, 4, LIMITS, None, ALONE)
    assert chunks.reader.tolist() == [1, 1, 0, 2]
    assert [concerning(chunks, rank).tolist() for rank in range(4)] == [
        [False, False, True, True],
        [True, True, False, False],
        [False, True, False, True],
        [False] * 4,
    ]


@pytest.mark.parametrize(
    ("ranks", "servers", "moves"),
    [
        ((0,), (), (False, False)),  # the reader itself
        ((0, 1), (), (True, False)),
        ((0, 1), (0, 0, 1, 1), (True, False)),  # all on the reader's server
        ((0, 2), (0, 0, 1, 1), (True, False)),
        ((0, 2, 3), (0, 0, 1, 1), (True, True)),  # 2 or 3 sends it on to the other
        ((0, 1, 2, 3), (0, 0, 1, 1), (True, True)),
        ((0, 1, 2, 3), (0, 0, 0, 1), (True, False)),
    ],
)
def test_whether_anything_is_sent_and_sent_on(ranks: tuple[int, ...], servers: Servers, moves: Sequence[bool]) -> None:
    chunks = chunks_of(parts_of([Part(0, 0, 10, ranks)]), 4, LIMITS, None, ALONE)
    assert chunks.reader.tolist() == [0]
    assert moving(chunks, 4, np.array([0]), servers) == Moving((moves[0],), (moves[1],))
    assert moving(chunks, 4, np.array([2]), servers) == Moving((False, False, moves[0]), (False, False, moves[1]))


def test_something_is_sent_on_inside_the_first_server_as_well() -> None:
    chunks = chunks_of(parts_of([Part(0, 0, 10, (0, 1))]), 4, LIMITS, {0: frozenset({2})}, ALONE)
    assert moving(chunks, 4, np.array([0]), (0, 0, 1, 1)) == Moving((True,), (True,))


def test_what_groups_are_fed_is_no_all_to_all() -> None:
    chunks = chunks_of(parts_of([Part(0, 0, 10, (0, 1))]), 2, LIMITS, None, Ways())
    assert moving(chunks, 2, np.array([0]), (0, 1)) == Moving((False,), (False,))


def test_what_is_nothing() -> None:
    chunks = chunks_of(parts_of([]), 2, LIMITS, None, Ways())
    assert (chunks.start.tolist(), chunks.reader.tolist(), chunks.groups) == ([0], [], ())
    assert moving(chunks, 2, np.empty(0, np.int64), (0, 1)) == Moving((), ())
    assert concerning(chunks, 0).tolist() == []
