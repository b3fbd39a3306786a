"""Units of work in tables: what is copied directly, what shares a batch, where batches end."""

from __future__ import annotations

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
from ms_ckpt_ext.rules import Concat, Part, Rename, Scale

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
    assert not tasks["up"].shares(whole(held["f"])) and not whole(held["f"]).shares(tasks["up"])
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


def test_where_bytes_of_a_box_go() -> None:
    target = Target(Region((0,), (100,)), (Landing(0, (Extent(0, 30), Extent(200, 70))), Landing(1, (Extent(7, 100),))))
    assert target.places(10, 40) == (Place(0, 10, 0, 20), Place(0, 200, 20, 20), Place(1, 17, 0, 40))
