"""Saving and resuming by processes: notes without communication, one choice for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.msrun import run_msrun


@pytest.mark.msrun
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_ranks_skip_what_one_of_them_lost(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("resume_worker.py")
    result = run_msrun(worker, tmp_path / "checkpoint", ranks=2, tmp_path=tmp_path, supervised=True)
    assert all(f"rank {rank} is right" in result.worker(rank) for rank in range(2))
