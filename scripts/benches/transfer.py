"""Transfers from network to network on 4 processes of the CPU: a plan run again, planned anew, and by storage."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benches.live import GOLDEN, ROOT, parse_loads, run_ranks

SOURCE, TARGET = "dp2_tp2", "tp4"
WAYS = {"run() of a plan": ("run", 100), "transfer, planned anew": ("anew", 10), "saved and loaded": ("storage", 5)}
"""How bytes come from one network into the other, and how often a start of the job does it."""


def transfer(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Move dp2 tp2 to tp4 on the same 4 ranks of the CPU."""
    with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
        case = _case(Path(work), arguments.size * (1 << 30))
        return [_row(name, case, Path(work), arguments.rounds) for name in WAYS]


def _case(root: Path, size: float) -> dict[str, Any]:
    """The golden case with its shapes scaled to `size` bytes."""
    from ms_ckpt_ext.formats.registry import read_index

    full = read_index(str(GOLDEN / "full" / "model.safetensors"))
    factor = max(1, round(math.sqrt(size / sum(entry.nbytes for entry in full.tensors.values()))))
    shapes = {name: [extent * factor for extent in entry.shape] for name, entry in full.tensors.items()}
    return {
        "trained": str(GOLDEN / SOURCE / "strategy.ckpt"),
        "predicted": str(GOLDEN / TARGET / "strategy.ckpt"),
        "saved": str(root / "saved"),
        "bytes": sum(entry.dtype.nbytes(math.prod(shapes[name])) for name, entry in full.tensors.items()),
        "tensors": {name: [entry.dtype.name, shapes[name]] for name, entry in full.tensors.items()},
    }


def _row(name: str, case: dict[str, Any], root: Path, rounds: int) -> dict[str, Any]:
    way, times = WAYS[name]
    worker = ROOT / "scripts" / "benches" / "transfer_rank.py"
    turns = [parse_loads(run_ranks(way, {**case, "times": times}, root, worker)) for _ in range(rounds)]
    later = [seconds for loads in turns for seconds in loads.seconds[1:]]
    return {
        "job": f"{SOURCE} to {TARGET}, {case['bytes'] / (1 << 30):.2f} GiB",
        "command": name,
        "times": times,
        "first s": round(statistics.median(loads.seconds[0] for loads in turns), 4),
        "later s": round(statistics.median(later), 4),
        "least": round(min(later), 4),
        "most": round(max(later), 4),
        "peak MiB": round(max(loads.peak for loads in turns) / (1 << 20)),
    }
