"""Real training on emulated NPUs, continued under other layouts: the losses that follow are those of one long run.

Few of these run by default; `scripts/e2e.sh` (MS_CKPT_EXT_E2E=all) runs all of them.
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from ms_ckpt_ext import unified_safetensors
from ms_ckpt_ext.formats.registry import read_index
from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import ROOT, MsrunResult, run_msrun
from tests.support.checkpoints import read_file

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.ascend,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DEMO = ROOT / "tests" / "cann_emulator" / "train_demo.py"
WEIGHTS = ("net.up.w", "net.up.b", "net.down.w", "net.down.b")
SECONDS = 240


class Trained(NamedTuple):
    """The uninterrupted run: 4 ranks, data parallel 2, tensor parallel 2, optimizer sharding."""

    root: Path
    losses: Mapping[int, float]


class Case(NamedTuple):
    """A way to go on. `exact`: the same layout, so not a bit may differ."""

    layout: str
    ranks: int
    format: str
    by: str
    mode: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        level = "-O1" if "O1" in self.options else ""
        return f"to_{self.layout.replace(',', '_')}-{self.format}-{self.by}-{self.mode}{level}"

    @property
    def exact(self) -> bool:
        return self.layout == "2,2"

    @property
    def in_ci(self) -> bool:
        return self == CASES[0]


LAYOUTS: list[tuple[str, int, tuple[str, ...]]] = [
    ("1,2", 2, ()),
    ("2,1", 2, ("--opt-shard",)),
    ("2,2", 4, ("--opt-shard",)),
    ("1,4", 4, ()),
    ("2,4", 8, ("--opt-shard",)),
    ("1,2,2", 4, ("--micro", "2")),
    ("2,1,2", 4, ("--opt-shard", "--micro", "2")),
    ("2,1", 2, ("--opt-shard", "--jit-level", "O1")),
]
WAYS = [
    ("safetensors", "resume", "cooperative"),
    ("ckpt", "resume", "auto"),
    ("safetensors", "dropin", "direct"),
    ("ckpt", "dropin", "cooperative"),
]
CASES = [Case(layout, ranks, *way, options) for layout, ranks, options in LAYOUTS for way in WAYS]


def losses(result: MsrunResult, ranks: int) -> dict[int, float]:
    """Step -> loss. With a pipeline, only the last stage has it."""
    found: dict[int, set[float]] = {}
    for rank in range(ranks):
        for step, loss in re.findall(rf"^LOSS {rank} (\d+) (\S+)", result.worker(rank), re.MULTILINE):
            found.setdefault(int(step), set()).add(float.fromhex(loss))
    single = {step: {loss for loss in values if loss} for step, values in found.items()}
    assert all(len(values) == 1 for values in single.values()), found
    return {step: values.pop() for step, values in single.items()}


def ulps(one: float, other: float) -> int:
    """How many float32 values lie between two positive ones."""
    (a,), (b,) = (struct.unpack("<i", struct.pack("<f", value)) for value in (one, other))
    return abs(int(a) - int(b))


def demo(ranks: int, tmp_path: Path, *args: object) -> MsrunResult:
    return run_msrun(DEMO, *args, ranks=ranks, tmp_path=tmp_path, device="ascend", timeout=SECONDS, supervised=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    emulator_or_skip()
    root = tmp_path_factory.mktemp("trained")
    out = root / "out"
    result = demo(4, root, "2,2", out, "--opt-shard", "--steps", 6, "--save-at", 3, "--record")
    return Trained(out, losses(result, 4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_goes_on(case: Case, trained: Trained, tmp_path: Path) -> None:
    if not case.in_ci:
        long_one()
    source = trained.root if case.by == "resume" else trained.root / "step3"
    result = demo(
        case.ranks, tmp_path, case.layout, tmp_path / "out", "--steps", 6, "--start", 3, "--resume", source,
        "--by", case.by, "--format", case.format, "--mode", case.mode, *case.options,
    )  # fmt: skip
    found = losses(result, case.ranks)
    assert sorted(found) == [4, 5, 6]
    apart = {step: ulps(found[step], trained.losses[step]) for step in found}
    assert max(apart.values()) <= (0 if case.exact else 2), apart
    if case.by == "resume":
        lines = [re.search(r"^RESUMED .*$", result.worker(rank), re.MULTILINE) for rank in range(case.ranks)]
        assert all(line and f"step3/net.{case.format} 3 " in line[0] for line in lines), lines


@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (1, 2), (2, 1)])
def test_weights_alone_are_served(dp: int, tp: int, trained: Trained, tmp_path: Path) -> None:
    """The output is that of the trained weights; optimizer states never left the storage, and replicas share."""
    long_one()
    result = demo(
        dp * tp, tmp_path, f"{dp},{tp}", tmp_path / "out", "--serve", "--resume", trained.root,
        "--format", "safetensors", "--mode", "cooperative",
    )  # fmt: skip
    shards = [read_index(str(path)) for path in sorted(trained.root.glob("step3/rank_*/net.safetensors"))]
    weights = sum(shard.tensors[name].nbytes for shard in shards for name in WEIGHTS)
    truth = expected(trained, tmp_path / "merged")
    read = 0
    for rank in range(dp * tp):
        told = re.search(r"^SERVED \d+ \S+ 3 cooperative (\d+)$", result.worker(rank), re.MULTILINE)
        assert told, result.worker(rank)
        read += int(told[1])
        output = re.search(rf"^OUTPUT {rank} ([0-9a-f]+)$", result.worker(rank), re.MULTILINE)
        assert output
        found = np.frombuffer(bytes.fromhex(output[1]), np.float32).reshape(16, 16)
        np.testing.assert_allclose(found, truth, rtol=0, atol=2e-6)
    states = sum(entry.nbytes for shard in shards for entry in shard.tensors.values()) - weights
    print(f"dp{dp} tp{tp}: read {read} bytes of {weights} of weights and {states} of other things")
    assert read == weights


def expected(trained: Trained, merged: Path) -> Any:
    """The network in numpy, with the weights merged from the shards."""
    for shard in trained.root.glob("step3/rank_*/net.safetensors"):  # without the .ckpt files beside them
        copy = merged.with_name("shards") / shard.parent.name
        copy.mkdir(parents=True)
        shutil.copy(shard, copy)
    unified_safetensors(merged.with_name("shards"), trained.root / "strategy", merged)
    held = read_file(merged / "part0.safetensors")
    w = {name: np.frombuffer(held[name].data, np.float32).reshape(held[name].shape) for name in WEIGHTS}
    x = np.random.default_rng(1000).standard_normal((16, 16)).astype(np.float32)
    hidden = np.maximum(x @ w["net.up.w"].T + w["net.up.b"], 0)
    return hidden @ w["net.down.w"].T + w["net.down.b"]
