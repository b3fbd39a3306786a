"""Units of work in tables: what is read in one go, what is copied directly, where batches end."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Optional

import pytest

from ms_ckpt_ext.core.computing.operations import Fill
from ms_ckpt_ext.core.geometry.array import DTYPES, Region
from ms_ckpt_ext.core.geometry.strided import StridedCopy
from ms_ckpt_ext.core.planning.apply_rules import apply_rules
from ms_ckpt_ext.core.planning.io_units import (
    Batch,
    Direct,
    Extent,
    Landing,
    Limits,
    Place,
    Stretch,
    Taken,
    Target,
    Task,
)
from ms_ckpt_ext.core.planning.pieces import Placement, SourceTensor, TensorMeta, pieces, stored_whole
from ms_ckpt_ext.core.planning.recipes import Computation
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.rules import Concat, Part, Rename, Scale, Stack

LIMITS = Limits(tile=64, gap=8, direct=1 << 10, chunk=1 << 10)


def tensor(
    name: str, shape: tuple[int, ...], files: tuple[int, ...] = (0,), parts: Optional[tuple[int, ...]] = None
) -> SourceTensor:
    """Of bytes; where it lies in parts along its first axis, part n is in file n."""
    parts = parts or (1,) * len(shape)
    rest = (0,) * (len(shape) - 1)
    cells = {(n, *rest): (n,) for n in range(parts[0])} if prod(parts) > 1 else {(0,) * len(shape): files}
    return SourceTensor(TensorMeta(name, DTYPES["U8"], shape), name, (Placement(parts, cells, cells),))


def whole(source: SourceTensor, offset: int = 0, sink: int = 0) -> Task:
    """All of it, to one place."""
    region = Region.whole(source.meta.shape)
    return Task(source, (Target(region, (Landing(sink, (Extent(offset, region.size),)),)),))


def at(offsets: dict[str, int]) -> object:
    """Tensors of any length that begin there, in every file."""
    return lambda _file, name: (Extent(offsets[name], 1 << 20),)


def reads(batch: object) -> list[tuple[int, int, int]]:
    """(file, offset, bytes) of every read of a batch."""
    assert isinstance(batch, Batch)
    assert all(len(read.extents) == 1 for read in batch.reads)
    return [(read.file, *read.extents[0]) for read in batch.reads]


@pytest.mark.parametrize("at_first", [0, 5000])
def test_small_parameters_share_a_batch_until_it_is_half_full(at_first: int) -> None:
    """What is near in the file is one read; an array ends with every batch."""
    tasks = [whole(tensor(name, (size,)), 100 * n) for n, (name, size) in enumerate(zip("abcd", (10, 10, 20, 5)))]
    lying = {name: at_first + offset for name, offset in zip("abcd", (0, 18, 37, 57))}  # gaps of 8, 9 and 0 bytes
    units = list(schedule(tasks, at(lying), LIMITS))
    assert [reads(unit) for unit in units] == [[(0, at_first, 28), (0, at_first + 37, 20)], [(0, at_first + 57, 5)]]
    assert [unit.last for unit in units] == [True, True]
    first = units[0]
    assert isinstance(first, Batch)
    assert first.stretches == (
        Stretch(10, (Place(0, 0, 0, 10),)),
        Stretch(10, (Place(0, 100, 0, 10),)),
        Stretch(20, (Place(0, 200, 0, 20),)),
    )
    assert [(copy.stretch, copy.copy) for copy in first.reads[0].copies] == [
        (0, StridedCopy(10, (), 0, (), 0, ())),
        (1, StridedCopy(10, (), 18, (), 0, ())),
    ]


@pytest.mark.parametrize(("size", "batches"), [(31, [2]), (32, [1, 1]), (64, [1, 1])])
def test_a_batch_is_full_at_half_a_tile(size: int, batches: list[int]) -> None:
    tasks = [whole(tensor("a", (size,))), whole(tensor("b", (size,)), 100)]
    units = list(schedule(tasks, at({"a": 0, "b": 500}), LIMITS))
    assert [len(unit.stretches) for unit in units if isinstance(unit, Batch)] == batches


def seen_calls() -> int:
    """How often a box was asked for its pieces."""
    return pieces.cache_info().hits + pieces.cache_info().misses


@pytest.mark.parametrize(
    ("wanted", "limits", "is_seen"),
    [
        (whole(tensor("a", (4, 5))), LIMITS, False),
        (whole(tensor("a", ())), LIMITS, False),
        (whole(tensor("a", (64,))), LIMITS, False),
        (whole(tensor("a", (65,))), LIMITS, True),
        (whole(tensor("a", (40,))), LIMITS._replace(direct=41), False),
        (whole(tensor("a", (40,))), LIMITS._replace(direct=40), True),
        (whole(tensor("a", (4, 5), parts=(2, 1))), LIMITS, True),
        (Task(tensor("a", (4,)), (Target(Region((1,), (4,)), (Landing(0, (Extent(0, 3),)),)),)), LIMITS, True),
        (Task(tensor("a", (4,)), (Target(Region((0,), (3,)), (Landing(0, (Extent(0, 3),)),)),)), LIMITS, True),
    ],
)
def test_what_is_small_and_held_whole_is_not_looked_for_in_pieces(wanted: Task, limits: Limits, is_seen: bool) -> None:
    """There are tens of thousands of them."""
    before = seen_calls()
    assert list(schedule([wanted], at({"a": 0}), limits))
    assert (seen_calls() > before) == is_seen


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


@pytest.mark.parametrize(("rows", "batches"), [(16, [2]), (32, [2]), (34, [1, 1])])
def test_what_was_fused_shares_a_batch_up_to_a_tile_and_a_half(rows: int, batches: list[int]) -> None:
    """Rows of three bytes; the first half is enough for a batch that would end."""
    made = apply_rules({"f": tensor("f", (rows, 3))}, [Part("f", "up", 0, 2), Part("f", "gate", 1, 2)])
    units = list(schedule([whole(made["up"]), whole(made["gate"], 500)], at({"f": 0}), LIMITS))
    assert [len(unit.stretches) for unit in units if isinstance(unit, Batch)] == batches
    assert [unit.last for unit in units] == [True] * len(batches)


def test_the_rest_of_a_long_parameter_is_not_mixed_with_the_next_one() -> None:
    """What comes next goes to another worker, which may go on meanwhile."""
    units = list(schedule([whole(tensor("a", (70,))), whole(tensor("b", (5,)), 100)], at({"a": 0, "b": 70}), LIMITS))
    assert [(reads(unit), unit.last) for unit in units] == [
        ([(0, 0, 64)], False),
        ([(0, 64, 6)], True),
        ([(0, 70, 5)], True),
    ]


def test_what_is_computed_stands_beside_what_is_stored() -> None:
    """The operand has a stretch of its own; what is stored lies behind what is computed, in the file and the result."""
    held = {name: stored_whole(TensorMeta(name, DTYPES["F32"], (1,)), (0,)) for name in "ab"}
    made = apply_rules(held, [Scale("a", "s", 2.0), Concat(["s", "b"], "t")])["t"]
    target = Target(Region((0,), (2,)), (Landing(0, (Extent(0, 8),)),))
    lying = {"a": (Extent(0, 4),), "b": (Extent(500, 4),)}
    (unit,) = schedule([Task(made, (target,))], lambda _file, name: lying[name], LIMITS)
    assert reads(unit) == [(0, 0, 4), (0, 500, 4)]
    assert isinstance(unit, Batch)
    assert [stretch.nbytes for stretch in unit.stretches] == [8, 4]
    assert [(copy.stretch, copy.copy.target) for read in unit.reads for copy in read.copies] == [(1, 0), (0, 4)]
    ((operands, into, copy),) = [(each.operands, each.stretch, each.copy) for each in unit.computes]
    assert (operands, into, copy.target, copy.nbytes) == ((Taken(1, Region((0,), (1,))),), 0, 0, 4)


def test_parameters_that_are_made_of_one_tensor_share_reads() -> None:
    """What was fused: the batch of the first ends with the last."""
    held = {name: tensor(name, (4, 6)) for name in ("f", "g")}
    made = apply_rules(held, [Part("f", "up", 0, 2), Part("f", "gate", 1, 2), Rename("g", "h")])
    tasks = {name: whole(made[name]) for name in ("up", "gate", "h")}
    assert tasks["up"].shares(tasks["gate"])
    assert not tasks["up"].shares(tasks["h"])
    assert not tasks["h"].shares(tasks["up"])
    assert not tasks["h"].shares(tasks["h"]), "a stored one is read by itself"
    filled = SourceTensor(TensorMeta("z", DTYPES["U8"], (4,)), "", (), Computation(Fill(b"\x00"), ()))
    assert not whole(filled).shares(whole(filled)), "nothing is read for it"
    assert not tasks["up"].shares(whole(filled))
    both = {name: stored_whole(TensorMeta(name, DTYPES["U8"], (4, 6)), (0,)) for name in ("f", "g")}
    made = apply_rules(both, [Part("f", "a", 0, 2), Part("g", "b", 0, 2)])
    assert not whole(made["a"]).shares(whole(made["b"])), "they lie alike, but are two"


def test_what_is_longer_than_a_tile_is_read_in_tiles() -> None:
    """The last tile, which ends the array, says so; the others do not."""
    units = list(schedule([whole(tensor("a", (150,)), 7)], at({"a": 1000}), LIMITS))
    assert [reads(unit) for unit in units] == [[(0, 1000, 64)], [(0, 1064, 64)], [(0, 1128, 22)]]
    assert [unit.last for unit in units] == [False, False, True]
    assert [unit.stretches[0].places for unit in units if isinstance(unit, Batch)] == [
        (Place(0, 7, 0, 64),),
        (Place(0, 71, 0, 64),),
        (Place(0, 135, 0, 22),),
    ]


def test_long_runs_are_copied_directly_in_chunks() -> None:
    limits = LIMITS._replace(direct=100, chunk=60)
    units = list(schedule([whole(tensor("a", (150,)), 7, sink=2)], at({"a": 1000}), limits))
    assert units == [
        Direct(0, 1000, 2, 7, 60, False),
        Direct(0, 1060, 2, 67, 60, False),
        Direct(0, 1120, 2, 127, 30, True),
    ]
    assert sum(unit.nbytes for unit in units) == 150
    (short,) = schedule([whole(tensor("a", (99,)), 7)], at({"a": 1000}), limits._replace(tile=200))
    assert isinstance(short, Batch)


def test_a_direct_copy_crosses_the_seams_of_both_sides() -> None:
    source = tensor("a", (100,))
    landing = Landing(0, (Extent(0, 30), Extent(200, 70)))
    task = Task(source, (Target(Region((0,), (100,)), (landing,)),))
    lying = (Extent(10, 50), Extent(80, 50))
    units = list(schedule([task], lambda _file, _name: lying, LIMITS._replace(direct=100)))
    assert units == [
        Direct(0, 10, 0, 0, 30, False),
        Direct(0, 40, 0, 200, 20, False),
        Direct(0, 80, 0, 220, 50, True),
    ]


def test_two_places_share_what_is_read() -> None:
    region = Region((0,), (100,))
    landings = (Landing(0, (Extent(0, 100),)), Landing(1, (Extent(40, 100),)))
    task = Task(tensor("a", (100,)), (Target(region, landings),))
    (unit,) = schedule([task], at({"a": 0}), LIMITS._replace(direct=100, tile=100))
    assert isinstance(unit, Batch)
    assert unit.stretches == (Stretch(100, (Place(0, 0, 0, 100), Place(1, 40, 0, 100))),)


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
        ((2, 50), [Region((0, 0), (2, 8)), Region((1, 8), (2, 50))], [(0, 500, 8), (0, 550, 50)]),
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


@pytest.mark.parametrize(("size", "batches"), [(25, [2]), (31, [2]), (32, [1, 1]), (60, [1, 1])])
def test_slices_share_a_batch_until_it_is_half_full(size: int, batches: list[int]) -> None:
    box = Region((0,), (size,))
    tasks = [
        Task(tensor(name, (100,)), (Target(box, (Landing(0, (Extent(100 * n, size),)),)),))
        for n, name in enumerate("ab")
    ]
    units = list(schedule(tasks, at({"a": 0, "b": 500}), LIMITS))
    assert [len(unit.stretches) for unit in units if isinstance(unit, Batch)] == batches
    assert all(unit.last for unit in units)


def test_replicas_take_turns_by_bytes() -> None:
    for sizes, files in (((40, 33, 34, 50), [3, 5, 5, 3]), ((1, 64, 64), [3, 5, 3])):
        tasks = [whole(tensor(name, (size,), files=(3, 5))) for name, size in zip("abcd", sizes)]
        units = list(schedule(tasks, lambda _file, name: (Extent(1000 * ord(name), 64),), LIMITS))
        assert [file for unit in units for file, _, _ in reads(unit)] == files


def test_where_bytes_of_a_box_go() -> None:
    target = Target(Region((0,), (100,)), (Landing(0, (Extent(0, 30), Extent(200, 70))), Landing(1, (Extent(7, 100),))))
    assert target.places(10, 40) == (Place(0, 10, 0, 20), Place(0, 200, 20, 20), Place(1, 17, 0, 40))


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
