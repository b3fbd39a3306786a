"""Any layout to any other, rules on the way, any ranks: exact, at the least cost, and as it was predicted."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms_ckpt_ext.core.geometry.array import DTYPES, DType
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from ms_ckpt_ext.core.planning.pieces import TensorMeta
from ms_ckpt_ext.engine.load import estimate
from ms_ckpt_ext.engine.load.options import LoadOptions
from ms_ckpt_ext.engine.transfer.estimate import dry_transfer
from ms_ckpt_ext.rules import QKV
from tests.support.checkpoints import Stored
from tests.support.strategies import dtypes, pairs
from tests.support.transfers import CPU, Side, lower_bound, received, transfer


def cut(layout: Layout, array: np.ndarray, dtype: str, first: int, name: str = "w") -> Side:
    """The slices of all ranks of a layout, on the ranks from `first` on."""
    found = {}
    for rank in range(layout.devices):
        part = np.ascontiguousarray(array[layout.region(rank, array.shape).slices])
        found[first + rank] = {name: (Stored(dtype, part.shape, part.tobytes()), layout)}
    return found


def numbered(shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    return (
        np.random.default_rng(0)
        .integers(0, 256, (*shape[:-1], shape[-1] * dtype.bits // 8), np.uint8)
        .view(f"u{dtype.bits // 8}")
    )


@settings(max_examples=60, deadline=None)
@given(pairs(devices=8), dtypes, st.integers(0, 9), st.sampled_from([1, 2, 8]), st.integers(1, 3))
def test_any_layout(case: tuple, dtype: DType, first: int, hosts: int, seed: int) -> None:
    one, other, shape = case
    array = numbered(shape, dtype)
    source, target = cut(one, array, dtype.name, 0), cut(other, array, dtype.name, first)
    world = max(one.devices, first + other.devices)
    absent = set(range(world)) - source.keys() - target.keys()
    moved = transfer(source, target, world, host=lambda rank: str(rank * hosts // world))
    for rank, held in enumerate(moved):
        assert rank not in absent or held.contents == {}
        assert held.contents == {name: stored.data for name, (stored, _) in target.get(rank, {}).items()}
    assert sum(received(moved)) == lower_bound(source, target, {"w": shape})


def test_what_is_predicted_happens() -> None:
    one, other = Layout((2, 2), ((0,), ()), 1, -1), Layout((4,), ((), (0,)))
    array = numbered((64, 64), DTYPES["F32"])
    for first in (0, 4):
        moved = transfer(cut(one, array, "F32", 0), cut(other, array, "F32", first), 4 + first)
        strategies = [Strategy.from_items([LayoutItem("w", 0, each)], "s") for each in (one, other)]
        planned = estimate.of_shapes([TensorMeta("w", DTYPES["F32"], (64, 64))], strategies[0])
        options = LoadOptions(bucket_bytes=1 << 20)
        done, kept = dry_transfer(planned, *strategies, options, CPU, apart=bool(first))
        assert done.tally.received.tolist() == received(moved)
        assert done.tally.sent.tolist() == [held.prepared.bytes_sent(rank) for rank, held in enumerate(moved)]
        assert kept.tolist() == [held.prepared.bytes_local for held in moved]
        assert len(done.tally.rounds) == len(moved[0].prepared.plan.rounds)


def test_near_ranks_give() -> None:
    """Every server holds all of it, and lacks some on every rank: nothing crosses."""
    one, other = Layout((2, 2), ((0,), ())), Layout((4,), ((), ()))
    array = numbered((64, 64), DTYPES["F32"])
    moved = transfer(cut(one, array, "F32", 0), cut(other, array, "F32", 0), 4, host=lambda rank: str(rank // 2))
    for rank, held in enumerate(moved):
        assert held.contents == {"w": array.tobytes()}
        assert held.given[rank ^ 1] == array.nbytes // 2
        assert sum(held.given.values()) == array.nbytes // 2


def test_holders_share_the_sending() -> None:
    one, other = Layout((4,), ((), ())), Layout((4,), ((), ()))
    array = numbered((512, 64), DTYPES["F32"])
    moved = transfer(cut(one, array, "F32", 0), cut(other, array, "F32", 4), 8)
    sent = [sum(held.given.values()) for held in moved]
    assert sent[4:] == [0] * 4
    assert max(sent[:4]) <= 1.1 * array.nbytes


@pytest.mark.parametrize("first", [0, 3])
def test_a_rule_on_the_way(first: int) -> None:
    rng = np.random.default_rng(1)
    parts = {name: rng.standard_normal((rows, 4), np.float32) for name, rows in (("q", 12), ("k", 6), ("v", 6))}
    trained, served = Layout((3,), ((0,), ())), Layout((2,), ((0,), ()))
    source: dict = {}
    for name, array in parts.items():
        for rank, held in cut(trained, array, "F32", 0, name).items():
            source.setdefault(rank, {}).update(held)
    groups = [np.concatenate([a[g * len(a) // 6 : (g + 1) * len(a) // 6] for a in parts.values()]) for g in range(6)]
    target = cut(served, np.concatenate(groups), "F32", first, "qkv")
    moved = transfer(source, target, 3 + 2, rules=[QKV(["q", "k", "v"], "qkv", groups=6)])
    for rank, held in enumerate(moved):
        assert held.contents == {name: stored.data for name, (stored, _) in target.get(rank, {}).items()}


def test_a_hundred_runs_move_the_present_values() -> None:
    one, other = Layout((2,), ((0,), ())), Layout((2,), ((), (0,)))
    zeros = np.zeros((8, 8), np.float32)

    def fill(number: int, arrays: dict[str, np.ndarray]) -> None:
        arrays["w"].view(np.float32)[:] = number

    moved = transfer(cut(one, zeros, "F32", 0), cut(other, zeros, "F32", 0), 2, runs=100, between=fill)
    assert all(held.contents["w"] == np.full(prod((8, 4)), 99, np.float32).tobytes() for held in moved)


def test_tied_parameters_come_from_the_nearest_stage() -> None:
    """An embedding that two pipeline stages have, cut otherwise in each: whoever holds a row gives it, once."""
    array = numbered((8, 6), DTYPES["F32"])
    first, last = Layout((2,), ((0,), ())), Layout((2,), ((), ()))
    source = {**cut(first, array, "F32", 0), **cut(last, array, "F32", 2)}
    target = cut(Layout((4,), ((), ())), array, "F32", 0)
    moved = transfer(source, target, 4, host=lambda rank: "one")
    for held in moved:
        assert held.contents == {"w": array.tobytes()}
    assert received(moved) == [array.nbytes // 2] * 2 + [0, 0]


def test_scalars_and_nothing_at_all() -> None:
    scalar, empty = Stored("I64", (), np.array(7).tobytes()), Stored("F32", (0, 4), b"")
    source: Side = {rank: {"step": (scalar, None), "empty": (empty, None)} for rank in (0, 1)}
    target: Side = {rank: {"step": (scalar, None), "empty": (empty, None)} for rank in (1, 2)}
    moved = transfer(source, target, 3)
    assert [held.contents for held in moved] == [{}] + [{"step": scalar.data, "empty": b""}] * 2
    assert received(moved) == [0, 0, 8]
