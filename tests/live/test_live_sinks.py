"""Two ranks on the emulated Ascend: every kind of Parameter, and what a load costs, by the device's own count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms_ckpt_ext import convert, encrypt
from ms_ckpt_ext.core.geometry.layout import Layout
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.checkpoints import strategy_of
from tests.support.shards import Full, write

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.ascend,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
WORKER = Path(__file__).with_name("sink_worker.py")
MIB = 1 << 20
BUCKET = 8 * MIB
ROWS, COLUMNS, WHOLE = ((0,), ()), ((), (0,)), ((), ())


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
        "d.whole": ("BF16", rng.standard_normal((4, 6), np.float32).view(np.uint16)[:, 1::2].copy()),
        "global_step": ("I32", np.array([12345], np.int32)),
    }
    trained = {"a.f32": Layout((4,), ROWS), "b.f16": Layout((4,), ((0,),)), "c.bf16": Layout((4,), ROWS)}
    trained["d.whole"] = Layout((4,), ROWS)
    predicted = {"a.f32": Layout((2,), COLUMNS), "b.f16": Layout((2,), ((0,),)), "c.bf16": Layout((2,), COLUMNS)}
    predicted["d.whole"] = Layout((2,), WHOLE)
    make(tmp_path / "small", small, trained, predicted)
    source, key = tmp_path / "small" / "source", bytes(range(32))
    encrypt(source, tmp_path / "small" / "sealed", enc_key=key)
    convert(source, tmp_path / "small" / "sealed_ckpt", to="ckpt", enc_key=key)
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
    assert all("measured, and tiled, is right" in result.worker(rank) for rank in range(2))
    for case in ("without_init", "not_yet_sliced", "placed", "formats", "cast", "shared", "verified", "encrypted"):
        for mode in ("cooperative", "direct"):
            assert f"case {case} {mode} is right" in result.worker(0)


def check_counts(counts: dict[str, Any]) -> None:
    """One rank's counts: at most two collectives a round, and nothing through the host but what is read."""
    assert counts["rounds"] <= counts["collectives"] <= 2 * counts["rounds"] + 1
    assert counts["received"] <= counts["link"] <= 1.05 * counts["received"]
    assert counts["read"] <= counts["up"] <= counts["read"] + 64 * 1024
    assert counts["down"] <= 64 * 1024
    assert counts["allocated"] <= 2 * BUCKET + 32 * MIB
    assert counts["device"] <= 2 * BUCKET + 32 * MIB
