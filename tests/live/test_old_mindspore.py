"""MindSpore before 2.8 cannot view an NPU's tensors as bytes: loads into them are refused before any is changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.emulator import too_old
from tests.harness.msrun import run_msrun

WORKER = Path(__file__).with_name("old_mindspore_worker.py")


@pytest.mark.msrun
@pytest.mark.ascend
@pytest.mark.skipif(too_old() is None, reason="no MindSpore before 2.8 is here: scripts/matrix.sh has one")
def test_every_load_is_refused_by_name(tmp_path: Path) -> None:
    run_msrun(WORKER, tmp_path, ranks=2, device="ascend", tmp_path=tmp_path, old=True)
