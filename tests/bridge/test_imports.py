"""How many modules of this package a load imports: only those that it has work for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("imports_worker.py")
NOT_NEEDED = (
    "cli",
    "engine.files",
    "engine.integrity",
    "formats.ckpt",
    "formats.crypto.keys",
    "core.planning.weight_rules",
)
MOST = {"load": 61, "resume": 66}
"""Without the `__init__` of folders. A third of them plan an exchange and its geometry, which every such load does."""


@pytest.mark.parametrize("what", sorted(MOST))
def test_a_cooperative_load_brings_in_what_it_needs(what: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, WORKER, what, tmp_path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    names = run.stdout.split()
    brought = [name for name in names if name.partition(".")[2].startswith(NOT_NEEDED)]
    assert not brought
    assert len(names) <= MOST[what], f"{len(names)}: {names}"
