"""What goes wrong on one rank of a job is told to all of them, by name, and nothing is changed that is not reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ms_ckpt_ext.engine.integrity.digests import digest_file
from ms_ckpt_ext.engine.integrity.manifest import Manifest, write_manifest
from ms_ckpt_ext.formats.registry import read_index
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.told import Faults, assert_told

pytestmark = pytest.mark.msrun
WORKER = Path(__file__).with_name("fault_worker.py")
RANKS, VICTIM = 4, 1
ENDED = {"LoadError"}
FAULTS: Faults = {
    "gone before": ({"FileNotFoundReadError", "PeerError"}, "No such file or directory"),
    "gone": (ENDED, "No such file or directory"),
    "gone, direct": (ENDED, "No such file or directory"),
    "truncated": ({"TruncatedFileError", "PeerError"}, "rank_3/net.safetensors': the tensors end at byte"),
    "flipped": ({"ChecksumError"}, "parameter 'layers.0.wqkv.weight' in"),
    "flipped, direct": ({"ChecksumError"}, "parameter 'layers.0.wqkv.weight' in"),
    "no digests": ({"UsageError", "PeerError"}, "ms_ckpt_ext.digests.json"),
    "no strategy file": ({"FileNotFoundStrategyError", "PeerError"}, "nowhere.ckpt"),
    "another training strategy": ({"DisagreementError"}, "'source strategy' on rank 1"),
    "another target": ({"LayoutMismatchError", "PeerError"}, "check predict_strategy"),
    "another mode": ({"DisagreementError"}, "'mode' on rank 1"),
    "sink": (ENDED, "the device is lost"),
    "killed": (ENDED, "rank 1"),
}


def make_case(golden: Path, root: Path) -> Path:
    """Good shards with a manifest, and copies that are truncated, flipped, or without a manifest."""
    shards = golden / "dp2_tp4" / "shards"
    for name in ("good", "truncated", "flipped", "bare"):
        shutil.copytree(shards, root / name)
        files = {f"rank_{n}/net.safetensors": root / name / f"rank_{n}/net.safetensors" for n in range(8)}
        if name != "bare":
            digests = {file: digest_file(read_index(str(path))) for file, path in files.items()}
            write_manifest(str(root / name), Manifest(digests))
    victim = root / "truncated/rank_3/net.safetensors"
    victim.write_bytes(victim.read_bytes()[:-100])
    for rank in (2, 6):  # both replicas: whichever is read
        index = read_index(str(root / f"flipped/rank_{rank}/net.safetensors"))
        data = bytearray(Path(index.path).read_bytes())
        data[index.tensors["layers.0.wqkv.weight"].extents[0].offset + 9] ^= 2
        Path(index.path).write_bytes(data)
    case = {
        "source": root / "good",
        "trained": golden / "dp2_tp4/strategy.ckpt",
        "predicted": golden / "tp4/strategy.ckpt",
        "expected": golden / "tp4/shards",
        "other": golden / "dp2_tp4_zero/strategy.ckpt",
        "elsewhere": golden / "dp2_tp2/strategy.ckpt",
        **{name: root / name for name in ("truncated", "flipped", "bare")},
    }
    (root / "case.json").write_text(json.dumps(case, default=str))
    return root / "case.json"


@pytest.mark.parametrize("device", ["cpu", pytest.param("ascend", marks=pytest.mark.ascend)])
def test_every_rank_hears_of_every_fault(device: str, golden: Path, tmp_path: Path) -> None:
    """Twelve faults and a sound load in one job, then a kill -9 in the middle of a load."""
    if device == "ascend":
        emulator_or_skip()
    result = run_msrun(
        WORKER, make_case(golden, tmp_path), "kill", ranks=RANKS, device=device, tmp_path=tmp_path,
        expect_failure=True, env={"CANNEMU_ASYNC": "1"},
    )  # fmt: skip
    told = assert_told(result, FAULTS, RANKS, VICTIM)
    for rank in range(RANKS):
        lines = result.worker(rank).splitlines()
        assert "RECOVERED" in lines
    flipped = {fault["message"] for fault in told["flipped"]}
    assert len(flipped) == 1
    assert "found " in flipped.copy().pop() and "the manifest says " in flipped.pop()
