"""A short campaign: every kind of job, and every kind of fault. `scripts/chaos` runs long ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.jobs import JOBS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chaos"
SKIPPED = 77


def test_jobs_under_faults(tmp_path: Path) -> None:
    told = tmp_path / "runs.json"
    command = [sys.executable, str(SCRIPT), "--seed", "1", "--runs", "40", "--json", str(told)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode == SKIPPED:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr
    ran = json.loads(told.read_text())
    assert len(ran) == 40
    assert {each["job"] for each in ran} == JOBS.keys()
    without_mounts = {name for name, fault in FAULTS.items() if "mounts" not in fault.needs}
    assert without_mounts <= {each["fault"] for each in ran} <= FAULTS.keys()
    assert {"right", "error", "killed"} == {each["outcome"] for each in ran}
    assert [path.name for path in tmp_path.iterdir()] == ["runs.json"]
