"""Reads of a batch in tables: what of a file is read in one go, and the copies that it carries."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.strided import StridedCopy
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.io_units import Batch, Extent, Landing, Target, Task
from ms_ckpt_ext.core.planning.pieces import TensorMeta, stored_whole
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.rules import Stack
from tests.core.planning.test_schedule import LIMITS, at, reads, tensor, whole


def test_small_parameters_come_from_the_first_placement_that_holds_them() -> None:
    source = tensor("a", (4,))
    (first,), (cut,) = source.placements, tensor("a", (4,), parts=(2,)).placements
    other = first._replace(holders={(0,): (7,)})
    for placements, files in (
        ((first, other), [0]),
        ((first._replace(holders={}), other), [7]),
        ((cut, other), [0, 1]),
        ((other, cut), [7]),
        ((cut._replace(holders={(1,): (1,)}), other), [7, 1]),
    ):
        (unit,) = schedule([whole(source._replace(placements=placements))], at({"a": 0}), LIMITS)
        assert [file for file, *_ in reads(unit)] == files


def test_reads_of_neighbours_end_at_a_tile() -> None:
    """A batch has room for more, and what lies next to each other could be one read."""
    for sizes, found in (
        ((31, 33), [(0, 1000, 64)]),
        ((31, 34), [(0, 1000, 31), (0, 1031, 34)]),
        ((10, 11, 10, 33), [(0, 1000, 64)]),
        ((10, 11, 10, 34), [(0, 1000, 31), (0, 1031, 34)]),
    ):
        lying = {name: 1000 + sum(sizes[:n]) for n, name in zip(range(len(sizes)), "abcd")}
        tasks = [whole(tensor(name, (size,)), 100 * n) for n, (name, size) in enumerate(zip("abcd", sizes))]
        (unit,) = schedule(tasks, at(lying), LIMITS)
        assert reads(unit) == found


@pytest.mark.parametrize(
    ("width", "found"),
    [
        (40, [[(0, 0, 8), (0, 40, 8), (0, 80, 8)]]),  # 32 bytes between runs: they are read one by one
        (16, [[(0, 0, 40)]]),  # 8 bytes between them are read over
        (17, [[(0, 0, 8), (0, 17, 8), (0, 34, 8)]]),
        (9, [[(0, 0, 26)]]),
    ],
)
def test_columns_are_read_over_short_gaps(width: int, found: list[list[tuple[int, int, int]]]) -> None:
    region = Region((0, 0), (3, 8))
    task = Task(tensor("a", (3, width)), (Target(region, (Landing(0, (Extent(0, 24),)),)),))
    units = list(schedule([task], at({"a": 0}), LIMITS._replace(tile=256)))
    assert [reads(unit) for unit in units] == found


@pytest.mark.parametrize("offset", [0, 5000])
def test_long_gaps_are_read_over_where_little_of_a_read_is_one(offset: int) -> None:
    """Of 90 bytes 80 are wanted: one read, though a gap is longer than others may be."""
    region = Region((0, 0), (2, 40))
    task = Task(tensor("a", (2, 50)), (Target(region, (Landing(0, (Extent(0, 80),)),)),))
    units = list(schedule([task], at({"a": offset}), LIMITS._replace(tile=256)))
    assert [reads(unit) for unit in units] == [[(0, offset, 90)]]


@pytest.mark.parametrize(
    ("shape", "boxes", "found"),
    [
        # four fifths are wanted, and one byte less than that
        ((2, 30), [Region((0, 0), (2, 20))], [(0, 500, 50)]),
        ((2, 31), [Region((0, 0), (2, 20))], [(0, 500, 20), (0, 531, 20)]),
        # the share counts from where the first copy begins, though the last one wants all that it spans
        ((2, 30), [Region((0, 0), (2, 4)), Region((1, 4), (2, 30))], [(0, 500, 4), (0, 530, 30)]),
        # eight bytes between eight that are wanted are no long gap, however long the read
        ((6, 12), [Region((0, 0), (6, 4)), Region((0, 4), (6, 8))], [(0, 500, 68)]),
        ((6, 13), [Region((0, 0), (6, 4)), Region((0, 4), (6, 8))], [(0, 500, 60), (0, 565, 8)]),
    ],
)
def test_how_much_of_a_read_may_be_gaps(
    shape: tuple[int, int], boxes: list[Region], found: list[tuple[int, int, int]]
) -> None:
    targets = [Target(box, (Landing(0, (Extent(100 * n, box.size),)),)) for n, box in enumerate(boxes)]
    (unit,) = schedule([Task(tensor("a", shape), tuple(targets))], at({"a": 500}), LIMITS)
    assert reads(unit) == found


def test_a_read_begins_where_the_first_copy_of_it_does() -> None:
    """Columns of all rows, and a row in the middle that ends sooner."""
    boxes = Region((0, 0), (4, 2)), Region((1, 0), (2, 8))
    targets = [Target(box, (Landing(0, (Extent(100 * n, box.size),)),)) for n, box in enumerate(boxes)]
    (unit,) = schedule([Task(tensor("a", (4, 8)), tuple(targets))], at({"a": 500}), LIMITS)
    assert reads(unit) == [(0, 500, 26)]
    assert isinstance(unit, Batch)
    assert [(copy.stretch, copy.copy.source, copy.copy.nbytes) for copy in unit.reads[0].copies] == [
        (0, 0, 8),
        (1, 8, 8),
    ]


def test_replicas_take_turns_by_bytes() -> None:
    for sizes, files in (((40, 33, 34, 50), [3, 5, 5, 3]), ((1, 64, 64), [3, 5, 3])):
        tasks = [whole(tensor(name, (size,), files=(3, 5))) for name, size in zip("abcd", sizes)]
        units = list(schedule(tasks, lambda _file, name: (Extent(1000 * ord(name), 64),), LIMITS))
        assert [file for unit in units for file, _, _ in reads(unit)] == files


def test_slices_of_several_files_fill_one_stretch() -> None:
    (unit,) = schedule([whole(tensor("a", (8, 4), parts=(2, 1)))], at({"a": 100}), LIMITS)
    assert reads(unit) == [(0, 100, 16), (1, 100, 16)]
    assert isinstance(unit, Batch)
    assert [copy.copy.target for read in unit.reads for copy in read.copies] == [0, 16]


def test_a_scattered_source_is_one_read_of_its_extents() -> None:
    """Or several, where columns of it lie far apart."""
    lying = (Extent(10, 20), Extent(50, 40))

    def found(*boxes: Region, shape: tuple[int, ...]) -> Sequence[tuple[Extent, ...]]:
        targets = [Target(box, (Landing(n, (Extent(0, box.size),)),)) for n, box in enumerate(boxes)]
        (unit,) = schedule([Task(tensor("a", shape), tuple(targets))], lambda _file, _name: lying, LIMITS)
        assert isinstance(unit, Batch)
        return [read.extents for read in unit.reads]

    assert found(Region((0,), (60,)), shape=(60,)) == [(Extent(10, 20), Extent(50, 40))]
    assert found(Region((20,), (60,)), shape=(60,)) == [(Extent(50, 40),)]
    assert found(Region((20,), (30,)), Region((30,), (60,)), shape=(60,)) == [(Extent(50, 40),)]
    assert found(Region((0, 0), (2, 10)), shape=(2, 30)) == [(Extent(10, 10),), (Extent(60, 10),)]
    assert found(Region((0, 0), (2, 10)), shape=(2, 18)) == [(Extent(10, 20), Extent(50, 8))]


def test_copies_of_one_form_at_even_distances_are_one() -> None:
    """Three rows that are three targets of one task would be three; in one target they are one."""
    stacked = Task(tensor("a", (4, 4, 4)), (Target(Region((0, 0, 0), (4, 4, 2)), (Landing(0, (Extent(0, 32),)),)),))
    (unit,) = schedule([stacked], at({"a": 0}), LIMITS)
    assert isinstance(unit, Batch)
    assert [copy.copy for copy in unit.reads[0].copies] == [StridedCopy(2, (16,), 0, (4,), 0, (2,))]


@pytest.mark.parametrize(
    ("offsets", "copies"),
    [
        ((0, 10), [StridedCopy(4, (2,), 0, (10,), 0, (4,))]),
        ((0, 10, 20), [StridedCopy(4, (3,), 0, (10,), 0, (4,))]),
        ((700, 710, 720), [StridedCopy(4, (3,), 0, (10,), 0, (4,))]),
        ((0, 4), [StridedCopy(8, (), 0, (), 0, ())]),
        ((0, 10, 21), [StridedCopy(4, (2,), 0, (10,), 0, (4,)), StridedCopy(4, (), 21, (), 8, ())]),
        ((10, 0), [StridedCopy(4, (2,), 0, (10,), 4, (-4,))]),
    ],
)
def test_stacked_rows_at_even_distances_are_one_copy(offsets: tuple[int, ...], copies: list[StridedCopy]) -> None:
    lying = {f"e.{n}": offset for n, offset in enumerate(offsets)}
    made = apply_rules({name: tensor(name, (4,)) for name in lying}, [Stack("e.{n}", "t")])["t"]
    (unit,) = schedule([whole(made)], at(lying), LIMITS)
    assert isinstance(unit, Batch)
    assert [copy.copy for copy in unit.reads[0].copies] == copies


def test_what_a_read_brings_anyhow_is_not_read_twice() -> None:
    """An element is longer than a tile here, and two targets want it."""
    box = Region((0,), (1,))
    source = stored_whole(TensorMeta("a", DTYPES["F32"], (1,)), (0,))
    task = Task(source, tuple(Target(box, (Landing(n, (Extent(0, 4),)),)) for n in range(2)))
    (unit,) = schedule([task], at({"a": 500}), LIMITS._replace(tile=1))
    assert reads(unit) == [(0, 500, 4)]
