"""Parts of exchanges that are worked out by hand, as columns."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from ms_ckpt_ext.core.exchange.demand import Demand, ExchangeLimits, Grid, Servers
from ms_ckpt_ext.core.exchange.parts import Parts, parts_of
from ms_ckpt_ext.core.geometry.array import DTYPES
from ms_ckpt_ext.core.geometry.layout import Cell
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.io_units import Extent
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta
from ms_ckpt_ext.rules import Concat

LIMITS = ExchangeLimits(bucket=1 << 10, chunk=16)
"""Parts have 16 bytes."""


def stored(shape: tuple[int, ...], parts: tuple[int, ...], holders: Mapping[Cell, tuple[int, ...]]) -> SourceTensor:
    """A tensor of bytes whose slices files hold."""
    return SourceTensor(TensorMeta("w", DTYPES["U8"], shape), "w", (Placement(parts, holders, holders),))


def whole_in(*files: int, size: int = 64) -> SourceTensor:
    """A vector that files hold."""
    return stored((size,), (1,), {(0,): files})


def boxes(wanted: Mapping[tuple[int, int], tuple[int, ...]]) -> Grid:
    """Ranges of a vector, and who wants them."""
    return Grid((), wanted, uneven=True)


def at_once(*where: int) -> tuple[Extent, ...]:
    """Extents of 64 bytes."""
    return tuple(Extent(offset, 64 // len(where)) for offset in where)


def parts(tensor: SourceTensor, *grids: Grid, where: tuple[Extent, ...] = at_once(0)) -> Parts:
    return parts_of([Demand("w", tensor, grids)], 8, lambda _file, _name: where, LIMITS)


def lists(*columns: np.ndarray) -> list[list[int]]:
    return [column.tolist() for column in columns]


def test_what_is_wanted_of_a_vector() -> None:
    """Two ranks want the first half, one all; another the third quarter but for a byte."""
    wanted = {(0, 32): (1, 4), (0, 64): (3,), (33, 48): (2,)}
    found = parts(whole_in(7), boxes(wanted), where=at_once(100))
    assert lists(found.demand, found.file, found.offset) == [[0] * 4, [7] * 4, [100, 116, 132, 148]]
    assert found.row.tolist() == [0, 1, 2, 3]
    assert (found.scattered, found.in_memory) == ({}, False)
    rows, members = found.rows, found.sets.members
    deliveries = [
        [(members[rows.ranks[entry]], int(rows.moved[entry])) for entry in range(low, high)]
        for low, high in zip(rows.start, rows.start[1:])
    ]
    assert deliveries == [
        [((1, 4), 16), ((3,), 16)],
        [((1, 4), 16), ((3,), 16)],
        [((3,), 16), ((2,), 15)],
        [((3,), 16)],
    ]
    assert [members[n] if n >= 0 else int(n) for n in rows.whole] == [(1, 3, 4), (1, 3, 4), -1, -1]
    assert rows.nbytes.tolist() == [16] * 4


@pytest.mark.parametrize(
    ("wanted", "alike"),
    [
        ({(0, 64): (0,)}, [0, 0, 0, 0]),
        ({(0, 64): (0,), (0, 32): (1,)}, [0, 0, 2, 2]),
        ({(0, 64): (0,), (8, 24): (1,)}, [0, 0, 2, 2]),  # half of a part counts as all of it
        ({(0, 64): (0,), (8, 25): (1,)}, [0, 0, 2, 2]),
        ({(0, 64): (0,), (8, 32): (1,)}, [0, 0, 2, 2]),
        ({(0, 64): (0,), (9, 32): (1,)}, [0, 1, 2, 2]),  # less than half does not
        ({(0, 32): (0,), (32, 64): (1,)}, [0, 0, 2, 2]),
    ],
)
def test_parts_that_the_same_ranks_want_most_of_are_alike(
    wanted: dict[tuple[int, int], tuple[int, ...]], alike: list[int]
) -> None:
    interest = parts(whole_in(0), boxes(wanted)).rows.interest.tolist()
    assert [interest.index(each) for each in interest] == alike


@pytest.mark.parametrize(
    ("where", "offsets", "scattered"),
    [
        (at_once(100, 500), [100, 116, 500, 516], {}),
        (at_once(500, 100), [100, 116, 500, 516], {}),
        (
            (Extent(100, 24), Extent(500, 40)),
            [100, 116, 508, 524],
            {1: (Extent(116, 8), Extent(500, 8))},
        ),
    ],
)
def test_slices_in_two_stretches(
    where: tuple[Extent, ...], offsets: list[int], scattered: dict[int, tuple[Extent, ...]]
) -> None:
    """Only the part that lies over the seam is scattered."""
    found = parts(whole_in(0), boxes({(0, 64): (0,)}), where=where)
    assert (found.offset.tolist(), found.scattered) == (offsets, scattered)


def test_scattered_parts_are_known_by_their_place_in_the_order_of_files() -> None:
    tensor = stored((128,), (2,), {(0,): (5,), (1,): (3,)})
    lying = {5: (Extent(100, 24), Extent(500, 40)), 3: at_once(0)}
    found = parts_of([Demand("w", tensor, (boxes({(0, 128): (0,)}),))], 8, lambda file, _name: lying[file], LIMITS)
    assert found.file.tolist() == [3] * 4 + [5] * 4
    assert found.scattered == {5: (Extent(116, 8), Extent(500, 8))}


@pytest.mark.parametrize(
    ("size", "files", "chosen"),
    [
        (128, (4,), [4] * 8),
        (128, (4, 9), [4] * 4 + [9] * 4),  # four chunks from each, in turn
        (192, (4, 9), [4] * 4 + [9] * 4 + [4] * 4),
        (192, (4, 9, 2), [4] * 4 + [9] * 4 + [2] * 4),
    ],
)
def test_copies_are_read_in_turn(size: int, files: tuple[int, ...], chosen: list[int]) -> None:
    found = parts(whole_in(*files, size=size), boxes({(0, size): (0,)}))
    by_offset = [int(file) for _, file in sorted(zip(found.offset.tolist(), found.file.tolist()))]
    assert by_offset == chosen


@pytest.mark.parametrize("offset", [0, 60, 127, 128, (1 << 15) - 64, (1 << 15) - 1, 1 << 15, 1 << 31, 1 << 40])
def test_offsets_are_as_wide_as_they_must_be(offset: int) -> None:
    """Where one table says where tensors lie, columns are as narrow as they may be."""
    demand = Demand("w", whole_in(0), (boxes({(0, 64): (0,)}),))
    found = parts_of([demand], 8, {"w": Extent(offset, 64)}, LIMITS)
    assert found.offset.tolist() == [offset + n for n in (0, 16, 32, 48)]


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 200, 300])
def test_any_number_of_parameters_that_are_alike(count: int) -> None:
    """They share their rows; where each lies is its own."""
    tensor, grids = whole_in(0, size=32), (boxes({(0, 32): (0, 1)}),)
    demands = [Demand(f"w{n}", tensor._replace(stored_name=f"w{n}"), grids) for n in range(count)]
    where = {f"w{n}": Extent(32 * n, 32) for n in range(count)}
    found = parts_of(demands, 8, where, LIMITS)
    assert found.row.tolist() == [0, 1] * count
    assert found.demand.tolist() == [n for n in range(count) for _ in range(2)]
    assert found.offset.tolist() == [16 * n for n in range(2 * count)]
    assert len(found.rows.cuts) == 2


@pytest.mark.parametrize("sizes", [(1, 130), (130, 1), (1, 130, 2, 300)])
def test_parameters_of_few_and_of_many_parts(sizes: tuple[int, ...]) -> None:
    """Rows of their own, numbered one after another, however many there are."""
    demands = [
        Demand(f"w{n}", whole_in(n, size=16 * size), (boxes({(0, 16 * size): (0,)}),)) for n, size in enumerate(sizes)
    ]
    found = parts_of(demands, 8, lambda _file, _name: (Extent(0, 16 * max(sizes)),), LIMITS)
    assert found.row.tolist() == list(range(sum(sizes)))
    assert found.demand.tolist() == [n for n, size in enumerate(sizes) for _ in range(size)]


def test_parameters_of_one_shape_are_cut_apart() -> None:
    """By the slices that there are, which boxes are wanted, and by how many ranks."""
    left, right = (stored((128,), (2,), {cell: (0,)}) for cell in ((0,), (1,)))
    wanted = [
        (left, {(0, 64): (0,)}, [0]),
        (left, {(32, 48): (0,)}, [32]),
        (right, {(64, 128): (0,)}, [0]),
        (left, {(0, 64): (0, 1, 2, 3)}, [0, 32]),  # four copies must fit 128 bytes
        (stored((128,), (1,), {(0,): (0,)}), {(64, 128): (0,)}, [64]),
    ]
    demands = [Demand(f"w{n}", tensor, (boxes(boxes_),)) for n, (tensor, boxes_, _) in enumerate(wanted)]
    limits = ExchangeLimits(bucket=1 << 10, chunk=128)
    found = parts_of(demands, 8, lambda _file, _name: (Extent(0, 128),), limits)
    assert [found.offset[found.demand == n].tolist() for n in range(5)] == [lying for *_, lying in wanted]


def test_where_what_a_parameter_is_made_of_lies() -> None:
    """Of two tensors in one file each slice has a place of its own."""
    source = {name: whole_in(0, size=16)._replace(stored_name=name) for name in "ab"}
    made = apply_rules(source, [Concat(["a", "b"], "t", axis=0)])["t"]
    lying = {"a": (Extent(100, 16),), "b": (Extent(500, 16),)}
    demand = Demand("t", made, (boxes({(0, 32): (0,)}),))
    found = parts_of([demand], 8, lambda _file, name: lying[name], LIMITS)
    assert found.offset.tolist() == [100, 500]


def test_what_two_ranks_want_whole() -> None:
    found = parts(whole_in(0, size=16), boxes({(0, 16): (2, 5)}))
    assert [found.sets.members[number] for number in found.rows.whole] == [(2, 5)]


def test_parameters_that_differ_in_who_wants_them_have_rows_of_their_own() -> None:
    tensor, wanted = whole_in(0, size=16), [(0,), (1,), (0,), (0, 1)]
    demands = [Demand(f"w{n}", tensor, (boxes({(0, 16): ranks}),)) for n, ranks in enumerate(wanted)]
    found = parts_of(demands, 8, lambda _file, _name: at_once(0), LIMITS)
    ranks = [found.sets.members[found.rows.ranks[found.rows.start[row]]] for row in found.row.tolist()]
    assert [ranks[number] for number in np.argsort(found.demand)] == wanted
    assert len(found.rows.cuts) == 3


def moved(servers: Servers, holders: tuple[int, ...], wanted: tuple[int, ...]) -> list[tuple[tuple[int, ...], ...]]:
    """Who gives, and who gets, part by part, of 16 bytes in the memory of `holders`."""
    demand = Demand("w", whole_in(*holders, size=16), (boxes({(0, 16): wanted}),))
    found = parts_of([demand], 8, lambda _file, _name: at_once(0), LIMITS, servers)
    rows = found.rows
    gets = [found.sets.members[rows.ranks[rows.start[row]]] for row in found.row.tolist()]
    assert found.in_memory == bool(found.file.size)
    return [*zip([found.holders[file] for file in found.file.tolist()], gets)]


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ((), [((0, 2), (1, 3))]),
        ((0, 0, 1, 1, 1, 1, 1, 1), [((0,), (1,)), ((2,), (3,))]),
    ],
)
def test_of_what_lies_in_memory_only_what_is_lacking_travels(
    servers: Servers, expected: list[tuple[tuple[int, ...], ...]]
) -> None:
    assert moved(servers, (0, 2), (0, 1, 2, 3)) == expected
    assert moved(servers, (0, 2), (0, 2)) == []


def test_nothing_is_wanted() -> None:
    found = parts_of([], 8, {}, LIMITS)
    assert lists(found.demand, found.row, found.file, found.offset, found.rows.interest) == [[], [], [], [], []]
    assert lists(found.rows.start, found.rows.ranks, found.rows.moved, found.rows.whole) == [[0], [], [], []]
