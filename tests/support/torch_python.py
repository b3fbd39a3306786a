"""A Python that has torch and transformers, which the tests' own environment lacks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import ROOT

VARIABLE = "MS_CKPT_EXT_TORCH_PYTHON"
needs_torch = pytest.mark.skipif(
    VARIABLE not in os.environ,
    reason=f"{VARIABLE} names no Python with torch and transformers; scripts/e2e.sh makes one",
)


def transformers(what: str, where: Path) -> Any:
    """What tests/e2e/transformers_worker.py says."""
    worker = ROOT / "tests/e2e/transformers_worker.py"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [os.environ[VARIABLE], str(worker), what, str(where)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])
