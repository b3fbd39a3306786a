"""Transfers between networks on ranks of the CPU and of the emulated Ascend: exact, and at the least cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext.core.geometry.layout import Layout
from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import MsrunResult, run_msrun
from tests.support.checkpoints import strategy_of
from tests.support.shards import Full, write

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
WORKER = Path(__file__).with_name("transfer_worker.py")
MIB = 1 << 20


def golden_case(golden: Path, source: str, target: str, give: Sequence[int], take: Sequence[int], **more: Any) -> Any:
    return {
        "name": f"{source} on {give} to {target} on {take}",
        "source": golden / source / "shards",
        "trained": golden / source / "strategy.ckpt",
        "predicted": golden / target / "strategy.ckpt",
        "expected": golden / target / "shards",
        "give": list(give),
        "take": list(take),
        **more,
    }


def on_four(golden: Path) -> list[Any]:
    """Four ranks: to themselves, also in another order, with a cast; and a strategy for too many, refused on all."""
    refused = golden_case(golden, "dp2_tp2", "tp4", range(4), range(3))
    return [
        golden_case(golden, "dp2_tp2", "tp4", range(4), range(4), options={"verify": "replicas"}),
        golden_case(golden, "tp4", "dp2_tp2", range(4), [3, 1, 0, 2], cast="BF16", options={"verify": "full"}),
        {**refused, "name": "refused", "error": "StrategyError", "says": "is for 4 ranks, and the target has 3"},
    ]


def on_eight(golden: Path) -> list[Any]:
    """Eight ranks: from four to the other four, to some of all, from some to all; pipelines, optimizer shards."""
    return [
        golden_case(golden, "tp4", "dp2_tp2", range(4), range(4, 8)),
        golden_case(golden, "tp4_pp2", "dp2_tp2", range(8), [2, 3, 6, 7]),
        golden_case(golden, "dp2_tp2", "dp2_tp2_pp2_zero", [1, 3, 5, 7], range(8)),
        golden_case(golden, "dp2_tp2_pp2_zero", "tp4", range(8), [5, 4, 1, 0], cast="BF16"),
    ]


def serving(root: Path, training: int, ranks: Sequence[int]) -> Any:
    """Queries (scaled), keys and values, gate and up, of training ranks, fused as two serving ranks want them."""
    rng = np.random.default_rng(0)
    root.mkdir()
    parts = {"q": 24, "k": 12, "v": 12, "gate": 36, "up": 36}
    full: Full = {
        f"layers.{n}.{p}": ("F32", rng.standard_normal((rows, 8), np.float32))
        for n in range(2)
        for p, rows in parts.items()
    }
    trained = strategy_of(dict.fromkeys(full, Layout((training,), ((0,), ()))), root / "trained.ckpt")
    full["step"] = "I64", np.array(7, np.int64)
    fused: Full = {}
    for n in range(2):
        q, k, v, gate, up = (full[f"layers.{n}.{p}"][1] for p in parts)
        q = q * np.float32(0.5)
        groups = [np.concatenate([a[g * len(a) // 6 : (g + 1) * len(a) // 6] for a in (q, k, v)]) for g in range(6)]
        fused[f"layers.{n}.qkv"] = "F32", np.concatenate(groups)
        fused[f"layers.{n}.gate_up"] = "F32", np.stack([gate, up], 1).reshape(-1, 8)
    predicted = strategy_of(dict.fromkeys(fused, Layout((2,), ((0,), ()))), root / "predicted.ckpt")
    fused["step"] = full["step"]
    write(trained, full, root / "source")
    write(predicted, fused, root / "expected")
    return {
        "name": "training to serving", "source": root / "source", "trained": root / "trained.ckpt",
        "predicted": root / "predicted.ckpt", "expected": root / "expected", "give": [*range(training)],
        "take": [*ranks], "rules": "fused",
    }  # fmt: skip


def counted(root: Path, *ways: tuple[list[int], list[int]]) -> list[Any]:
    """Matrices of 4 MiB, cut by rows to cut by columns, from some ranks to as many."""
    rng = np.random.default_rng(0)
    root.mkdir()
    full: Full = {f"w{n}": ("F32", rng.standard_normal((1024, 1024), np.float32)) for n in range(4)}
    cases = []
    for give, take in ways:
        here = root / f"{give}{take}"
        here.mkdir()
        cut = Layout((len(give),), ((0,), ()))
        trained = strategy_of(dict.fromkeys(full, cut), here / "trained.ckpt")
        turned = Layout((len(take) // 2, 2), ((), (0,))) if len(take) > 1 else Layout((1,), ((), (0,)))
        predicted = strategy_of(dict.fromkeys(full, turned), here / "predicted.ckpt")
        write(trained, full, here / "source")
        write(predicted, full, here / "expected")
        cases.append({
            "source": here / "source", "trained": here / "trained.ckpt", "predicted": here / "predicted.ckpt",
            "expected": here / "expected", "bucket": 2 * MIB, "counted": 3, "name": f"counted {give} to {take}",
            "give": give, "take": take,
        })  # fmt: skip
    return cases


def run(cases: list[Any], ranks: int, tmp_path: Path, device: str, **env: str) -> MsrunResult:
    (tmp_path / "cases.json").write_text(json.dumps(cases, default=str))
    arguments = (tmp_path / "cases.json", device)
    result = run_msrun(WORKER, *arguments, ranks=ranks, device=device, env=env or None, tmp_path=tmp_path)
    for rank in range(ranks):
        for case in cases:
            assert f"case {case['name']} is right" in result.worker(rank)
    return result


def check_counts(result: MsrunResult, cases: list[Any], ranks: int) -> None:
    """Nothing goes up or down, what travels is what ranks lack, memory is bounded and does not grow."""
    lines = [[line for line in result.worker(rank).splitlines() if line.startswith("COUNTS ")] for rank in range(ranks)]
    told = [[json.loads(line[7:]) for line in each] for each in lines]
    for number, case in enumerate(cases):
        counts = [each[number] for each in told]
        assert {(c["up"], c["down"]) for c in counts} == {(0, 0)}
        assert {c["growth"] for c in counts} == {0}
        kept = 1 / len(case["give"]) if case["give"] == case["take"] else 0
        least = 16 * MIB // min(2, len(case["take"])) * len(case["take"]) * (1 - kept)
        assert sum(c["received"] for c in counts) == least
        assert least * case["counted"] <= sum(c["link"] for c in counts) <= 1.05 * least * case["counted"]
        assert max(c["above"] for c in counts) <= 2 * case["bucket"] + 32 * MIB


def test_ranks_of_the_cpu(golden: Path, tmp_path: Path) -> None:
    run([*on_four(golden), serving(tmp_path / "serving", 2, [2, 3])], 4, tmp_path, "cpu")


@pytest.mark.ascend
@pytest.mark.parametrize("ahead", ["0", "1"])
def test_four_emulated_npus(golden: Path, tmp_path: Path, ahead: str) -> None:
    if ahead == "0":
        long_one("streams that do not run ahead hide faults")
    emulator_or_skip()
    measured = counted(tmp_path / "counted", ([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 1], [2, 3]))
    cases = [*measured, *on_four(golden), serving(tmp_path / "serving", 2, [2, 3])]
    result = run(cases, 4, tmp_path, "ascend", CANNEMU_ASYNC=ahead, CANNEMU_POISON=ahead)
    check_counts(result, measured, 4)


@pytest.mark.ascend
@pytest.mark.parametrize("ahead", ["0", "1"])
def test_eight_emulated_npus(golden: Path, tmp_path: Path, ahead: str) -> None:
    long_one("eight ranks")
    emulator_or_skip()
    measured = counted(tmp_path / "counted", ([0, 1, 2, 3], [4, 5, 6, 7]))
    cases = [*measured, *on_eight(golden), serving(tmp_path / "serving", 6, [6, 7])]
    result = run(cases, 8, tmp_path, "ascend", CANNEMU_ASYNC=ahead, CANNEMU_POISON=ahead)
    check_counts(result, measured, 8)


@pytest.mark.ascend
def test_one_emulated_npu(tmp_path: Path) -> None:
    """What moves on one device does not go through the host."""
    emulator_or_skip()
    measured = counted(tmp_path / "counted", ([0], [0]))
    result = run(measured, 1, tmp_path, "ascend", CANNEMU_ASYNC="1", CANNEMU_POISON="1")
    check_counts(result, measured, 1)
