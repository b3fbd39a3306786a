"""What goes wrong on one rank of a transfer, or of a resume from peers, is told to all, and nothing is half-written in
silence. A plan outlives what all ranks were told together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.chosen import long_one
from tests.harness.emulator import emulator_or_skip
from tests.harness.msrun import run_msrun
from tests.support.saved import save

pytestmark = [
    pytest.mark.msrun,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # fork of a process that has threads, in msrun's clients
]
WORKER = Path(__file__).with_name("transfer_fault_worker.py")
RANKS, VICTIM = 4, 1
FAULTS: dict[str, tuple[set[str], str]] = {
    "changed": ({"LayoutMismatchError", "PeerError"}, "and was "),
    "sink": ({"LoadError"}, "the device is lost"),
    "alive": ({"LoadError"}, "the device is lost"),
    "late": ({"TransportError", "PeerError"}, "rank 1"),
    "killed": ({"LoadError"}, "rank 1"),
}
"""Name -> errors that ranks may be told, and what every message says."""


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
    assert result.returncodes == tuple(-9 if rank == VICTIM else 0 for rank in range(RANKS)), result.tails()
    told: dict[str, list[dict[str, Any]]] = {}
    for rank in range(RANKS):
        lines = result.worker(rank).splitlines()
        assert lines.count("RECOVERED") == 3
        assert ("CLOSED" in lines) == (rank != VICTIM)
        for line in lines:
            if line.startswith("FAULT "):
                fault = json.loads(line[6:])
                told.setdefault(fault["name"], []).append(fault)
    for name, (kinds, text) in FAULTS.items():
        assert [fault["rank"] for fault in told[name]] == [r for r in range(RANKS) if (name, r) != ("killed", VICTIM)]
        for fault in told[name]:
            assert fault["error"] in kinds, fault
            assert text in fault["message"], fault
            assert fault["unreported"] == [], fault
            assert fault["seconds"] < 60, fault
            assert fault["error"] == "LoadError" or fault["changed"] == 0, fault
    assert {fault["changed"] > 0 for fault in told["alive"]} == {True, False}
    assert all(fault["changed"] == 0 for fault in told["alive"] if fault["rank"] != VICTIM), "good ones stay"
