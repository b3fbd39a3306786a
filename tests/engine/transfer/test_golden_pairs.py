"""Every golden pair, from the slices of one job to those of the other, in a world of threads."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from ms_ckpt_ext.core.geometry.strategy import Strategy
from ms_ckpt_ext.formats.strategies.file import load_strategy
from tests.support.checkpoints import FULL, PAIRS, read_file
from tests.support.transfers import Moved, Side, golden_side, lower_bound, transfer

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden"


@cache
def strategy(case: str) -> Strategy:
    return load_strategy(GOLDEN / case / "strategy.ckpt")


def check(moved: list[Moved], source: Side, target: Side, full: str) -> None:
    for rank, held in enumerate(moved):
        expected = {name: stored.data for name, (stored, _) in target.get(rank, {}).items()}
        assert held.contents == expected, f"rank {rank}"
    shapes = {}
    for path in (GOLDEN / full).glob("*.safetensors"):
        shapes.update({name: stored.shape for name, stored in read_file(path).items()})
    least = lower_bound(source, target, shapes)
    sent = sum(sum(held.given.values()) for held in moved)
    received = sum(sum(held.prepared.plan.bytes_received()) for held in moved[:1])
    assert received == least, "payload that travels, and what no rank has itself"
    assert sent <= 1.05 * least + 16 * len(moved) ** 2 * len(moved[0].prepared.plan.rounds)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_ranks_that_do_both(pair: tuple[str, str]) -> None:
    one, other = pair
    source, target = (golden_side(GOLDEN, case, strategy(case)) for case in pair)
    world = max(strategy(one).world, strategy(other).world)
    check(transfer(source, target, world), source, target, FULL[one])


@pytest.mark.parametrize("pair", [("dp2_tp2", "tp4"), ("dp2_tp2_pp2_zero", "tp4_pp2"), ("dp3_tp8", "dp2_tp2")])
def test_other_ranks(pair: tuple[str, str]) -> None:
    one, other = pair
    source, target = (
        golden_side(GOLDEN, one, strategy(one)),
        golden_side(GOLDEN, other, strategy(other), strategy(one).world),
    )
    world = strategy(one).world + strategy(other).world
    check(transfer(source, target, world), source, target, FULL[one])
    overlapping = golden_side(GOLDEN, other, strategy(other), strategy(one).world - 2)
    check(transfer(source, overlapping, world), source, overlapping, FULL[one])
