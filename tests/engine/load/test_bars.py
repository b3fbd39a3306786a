"""What a load by 1,024 and by 8,192 ranks costs by default, counted: a transformer of 1.2 TB with its Adam states."""

from __future__ import annotations

import pytest

from ms_ckpt_ext import plan
from ms_ckpt_ext.api.dry_run.report import PlanReport
from ms_ckpt_ext.core.geometry.layout import Layout
from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
from tests.harness.chosen import long_one

HIDDEN, INNER, LAYERS = 8192, 28672, 100
WEIGHTS: dict[str, tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]] = {
    "attention.wqkv": ((3 * HIDDEN, HIDDEN), ((0,), ())),
    "attention.wo": ((HIDDEN, HIDDEN), ((), (0,))),
    "feed_forward.gate": ((INNER, HIDDEN), ((0,), ())),
    "feed_forward.up": ((INNER, HIDDEN), ((0,), ())),
    "feed_forward.down": ((HIDDEN, INNER), ((), (0,))),
    "attention_norm": ((HIDDEN,), ((),)),
    "ffn_norm": ((HIDDEN,), ((),)),
    "attention.q_norm": ((128,), ((),)),
}
"""Full shape, and which axis tensor parallelism cuts; norms lie whole on every rank of a stage."""
LISTED = [
    (f"{state}layers.{layer}.{name}.weight", layer * 8 // LAYERS, shape, cut)
    for layer in range(LAYERS)
    for name, (shape, cut) in WEIGHTS.items()
    for state in ("", "adam_m.", "adam_v.")
]


def strategy(data: int, sharded: bool) -> Strategy:
    """dp `data`, tp 8, pp 8; optimizer sharding cuts the matrices further."""
    items = []
    for name, stage, shape, cut in LISTED:
        shard = (1, -1) if sharded and len(shape) > 1 else (0, 0)
        items.append(LayoutItem(name, stage, Layout((data, 8), cut, *shard)))
    return Strategy.from_items(items, "a test")


def planned(ranks: int, groups: bool) -> PlanReport:
    """Trained with optimizer sharding, loaded without: every byte is wanted by ranks / 64 of them."""
    shapes = {name: {"dtype": "F32", "shape": shape} for name, _, shape, _ in LISTED}
    data = ranks // 64
    source, target = strategy(data, True), strategy(data, False)
    return plan(None, target, src_strategy=source, shapes=shapes, hardware=["atlas-800t-a2"], groups=groups)


@pytest.mark.parametrize(
    ("groups", "rounds", "messages"),
    [
        (True, 45, 745_376),  # 1,132 rounds and 16,781,096 messages with buckets of 64 MiB and a copy for every rank
        (False, 76, 1_147_016),  # a job that has no groups
    ],
)
def test_few_rounds_and_messages_without_optimizer_sharding(groups: bool, rounds: int, messages: int) -> None:
    report = planned(1024, groups)
    assert report.bucket == 600 << 20, "by default, of an Atlas 800T A2"
    assert len(report.rounds) == rounds <= 120
    assert report.cooperative["messages"].total == messages <= 16_781_096 // 10
    assert report.cooperative["received"].most > 17e9
    assert report.cooperative["staging"].most <= 2 * report.bucket


def test_few_rounds_and_messages_of_8192_ranks() -> None:
    """Run with MS_CKPT_EXT_E2E=all, as it takes a quarter of a minute."""
    long_one("1,024 ranks show the same")
    report = planned(8192, True)
    assert len(report.rounds) == 41 <= 120
    assert report.cooperative["messages"].total == 41_717_152 <= 1_171_966_500 // 10
    assert report.cooperative["staging"].most <= 2 * report.bucket
