"""Stock merges do not wait for memory in tests, whatever else fills it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from tests.harness.stock_memory import let_stock_merge

ROOT = Path(__file__).resolve().parents[2]
FULL = """
import psutil
asked = psutil.virtual_memory
psutil.virtual_memory = lambda: asked()._replace(percent=97.0)
from tests.harness.stock_memory import let_stock_merge
let_stock_merge()
print(psutil.virtual_memory().percent)
"""


def test_no_memory_is_in_use_here() -> None:
    told = psutil.virtual_memory()
    assert told.percent == 0
    assert told.total > told.available > 0


def test_nor_where_it_is_full() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.0"]


def test_twice_is_once() -> None:
    let_stock_merge()
    assert psutil.virtual_memory().percent == 0
