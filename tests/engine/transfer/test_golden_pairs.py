"""Every golden pair, from the slices of one job to those of the other, in a world of threads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.harness.chosen import long_one
from tests.support.checkpoints import FULL, PAIRS, read_file
from tests.support.transfers import Moved, Side, golden_side, lower_bound, received, transfer

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden"


@cache
def side(case: str, first: int = 0) -> Side:
    return golden_side(GOLDEN, case, strategy(case), first)


@cache
def shapes(full: str) -> dict[str, tuple[int, ...]]:
    held = read_file(GOLDEN / full / "model.safetensors")
    return {name: stored.shape for name, stored in held.items()}


@cache
def strategy(case: str) -> Strategy:
    return load_strategy(GOLDEN / case / "strategy.ckpt")


def check(moved: list[Moved], source: Side, target: Side, full: str) -> None:
    for rank, held in enumerate(moved):
        expected = {name: stored.data for name, (stored, _) in target.get(rank, {}).items()}
        assert held.contents == expected, f"rank {rank}"
    least = lower_bound(source, target, shapes(full))
    sent = sum(sum(held.given.values()) for held in moved)
    assert sum(received(moved)) == least, "payload that travels, and what no rank has itself"
    assert sent <= 1.05 * least + 16 * len(moved) ** 2 * len(moved[0].prepared.plan.rounds)


OFTEN = {*(PAIRS[number] for number in range(0, len(PAIRS), 5)), ("dp2_tp4_layout", "dp2_tp4_layout")}
"""Every case as a source, and as a target."""


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_ranks_that_do_both(pair: tuple[str, str]) -> None:
    if pair not in OFTEN:
        long_one("every case is a source and a target in others")
    one, other = pair
    source, target = (side(case) for case in pair)
    world = max(strategy(one).world, strategy(other).world)
    check(transfer(source, target, world), source, target, FULL[one])


@pytest.mark.parametrize("pair", [("dp2_tp2", "tp4"), ("dp2_tp2_pp2_zero", "tp4_pp2"), ("dp3_tp8", "dp2_tp2")])
def test_other_ranks(pair: tuple[str, str]) -> None:
    one, other = pair
    world = strategy(one).world + strategy(other).world
    for first in (strategy(one).world, strategy(one).world - 2):
        source, target = side(one), side(other, first)
        check(transfer(source, target, world), source, target, FULL[one])
