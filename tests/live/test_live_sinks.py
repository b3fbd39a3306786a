"""Two ranks on the emulated Ascend: every kind of Parameter, and what a load costs, by the device's own count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext.core.dtype import DTYPES
from ms_ckpt_ext.core.layout import Layout
from ms_ckpt_ext.core.strategy import Strategy
from ms_ckpt_ext.formats import safetensors
from ms_ckpt_ext.formats.index import TensorSpec
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.jobs.support import strategy_of

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.ascend,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
WORKER = Path(__file__).with_name("sink_worker.py")
MIB = 1 << 20
BUCKET = 8 * MIB
ROWS, COLUMNS, WHOLE = ((0,), ()), ((), (0,)), ((), ())
Full = dict[str, tuple[str, np.ndarray]]
"""Name -> dtype of the file, and the array (raw uint16 for BF16)."""


def write(strategy: Strategy, full: Full, root: Path) -> None:
    """`rank_N/net.safetensors`; what the strategy does not list lies whole on every rank."""
    for rank in range(strategy.world):
        held = {}
        for name, (dtype, array) in full.items():
            layout = strategy.layout(name, rank)
            part = array if layout is None else array[layout.region(rank, array.shape).slices]
            held[name] = TensorSpec(name, DTYPES[dtype], part.shape), np.ascontiguousarray(part).tobytes()
        laid = safetensors.layout([spec for spec, _ in held.values()], {"format": "ms"})
        data = b"".join(held[name][1] for name in laid.tensors)
        (root / f"rank_{rank}").mkdir(parents=True)
        (root / f"rank_{rank}/net.safetensors").write_bytes(laid.literals[0][1] + data)


def make(root: Path, full: Full, trained: dict[str, Layout], predicted: dict[str, Layout]) -> None:
    root.mkdir()
    write(strategy_of(trained, root / "trained.ckpt"), full, root / "source")
    write(strategy_of(predicted, root / "predicted.ckpt"), full, root / "expected")
    (root / "shapes.json").write_text(json.dumps({name: array.shape for name, (_, array) in full.items()}))


def test_every_kind_of_parameter_and_every_cost(tmp_path: Path) -> None:
    emulator_or_skip()
    rng = np.random.default_rng(0)
    small: Full = {
        "a.f32": ("F32", rng.standard_normal((64, 64), np.float32)),
        "b.f16": ("F16", rng.standard_normal((8,)).astype(np.float16)),
        "c.bf16": ("BF16", rng.standard_normal((4, 6), np.float32).view(np.uint16)[:, 1::2].copy()),
        "global_step": ("I32", np.array([12345], np.int32)),
    }
    trained = {"a.f32": Layout((4,), ROWS), "b.f16": Layout((4,), ((0,),)), "c.bf16": Layout((4,), ROWS)}
    predicted = {"a.f32": Layout((2,), COLUMNS), "b.f16": Layout((2,), ((0,),)), "c.bf16": Layout((2,), COLUMNS)}
    make(tmp_path / "small", small, trained, predicted)
    large: Full = {f"w{n}": ("F32", rng.standard_normal((2048, 1024), np.float32)) for n in range(5)}
    wide = {name: Layout((4,), ROWS) for name in large}
    cuts = [COLUMNS, COLUMNS, ROWS, COLUMNS, WHOLE]
    make(tmp_path / "large", large, wide, {name: Layout((2,), cut) for name, cut in zip(large, cuts)})
    result = run_msrun(
        WORKER, tmp_path, BUCKET, ranks=2, device="ascend", env={"CANNEMU_ASYNC": "1"}, tmp_path=tmp_path
    )
    told = [json.loads(line[7:]) for rank in range(2) for line in result.worker(rank).splitlines()
            if line.startswith("COUNTS ")]  # fmt: skip
    print(told)
    for counts in told:
        check_counts(counts)
    assert sum(counts["read"] for counts in told) == 5 * 8 * MIB
    assert sum(counts["link"] for counts in told) <= 1.05 * (3 * 4 + 8) * MIB
    for case in ("without_init", "not_yet_sliced", "cast", "shared"):
        for mode in ("cooperative", "direct"):
            assert f"case {case} {mode} is right" in result.worker(0)


def check_counts(counts: dict[str, Any]) -> None:
    """One rank's: at most two collectives a round, and nothing through the host but what is read."""
    assert counts["rounds"] <= counts["collectives"] <= 2 * counts["rounds"] + 1
    assert counts["received"] <= counts["link"] <= 1.05 * counts["received"]
    assert counts["read"] <= counts["up"] <= counts["read"] + 64 * 1024
    assert counts["down"] <= 64 * 1024
    assert counts["allocated"] <= 2 * BUCKET + 32 * MIB
    assert counts["device"] <= 2 * BUCKET + 32 * MIB
