"""What goes wrong on one rank of a transfer, or of a resume from peers, is told to all, and nothing is half-written
without an error. A plan can be run again after an error that all ranks were told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.saved import save
from tests.support.told import Faults, assert_told

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
WORKER = Path(__file__).with_name("transfer_fault_worker.py")
RANKS, VICTIM = 4, 1
FAULTS: Faults = {
    "changed": ({"LayoutMismatchError", "PeerError"}, "and was "),
    "sink": ({"LoadError"}, "the device is lost"),
    "alive": ({"LoadError"}, "the device is lost"),
    "late": ({"TransportError", "PeerError"}, "rank 1"),
    "killed": ({"LoadError"}, "rank 1"),
}


@pytest.mark.parametrize("kind", ["transfer", "alive"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("ascend", marks=pytest.mark.ascend)])
def test_every_rank_hears_of_every_fault(device: str, kind: str, golden: Path, tmp_path: Path) -> None:
    """Four faults and what goes on after them in one job, then a kill -9 in the middle."""
    if (device, kind) not in {("cpu", "alive"), ("ascend", "transfer")}:
        long_one("each is run on one of the two")
    if device == "ascend":
        emulator_or_skip()
    save(tmp_path / "saved", 3)
    case = {
        "trains": golden / "dp2_tp2/shards", "trained": golden / "dp2_tp2/strategy.ckpt",
        "serves": golden / "tp4/shards", "predicted": golden / "tp4/strategy.ckpt",
        "held": tmp_path / "made_3/shards", "held_by": tmp_path / "made_3/strategy.ckpt", "saved": tmp_path / "saved",
    }  # fmt: skip
    (tmp_path / "case.json").write_text(json.dumps(case, default=str))
    result = run_msrun(
        WORKER, tmp_path / "case.json", kind, ranks=RANKS, device=device, tmp_path=tmp_path, expect_failure=True,
        env={"CANNEMU_ASYNC": "1"},
    )  # fmt: skip
    told = assert_told(result, FAULTS, RANKS, VICTIM)
    for rank in range(RANKS):
        lines = result.worker(rank).splitlines()
        assert lines.count("RECOVERED") == 3
        assert ("CLOSED" in lines) == (rank != VICTIM)
    assert {fault["changed"] > 0 for fault in told["alive"]} == {True, False}
    assert all(fault["changed"] == 0 for fault in told["alive"] if fault["rank"] != VICTIM), "good ones stay"
