"""Planning for many ranks: it should cost what the distinct slices cost."""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.measure import ROOT, measure, python

PARAMETERS = 600
PLANNING = """
import time, sys
begin = time.perf_counter()
from ms_ckpt_ext.engine.source.catalog import open_catalog
from ms_ckpt_ext.engine.files.merge import MergeOptions, merge_job
from ms_ckpt_ext.engine.files.job import tasks_of
from ms_ckpt_ext.core.planning.io_units import Limits
from ms_ckpt_ext.core.planning.schedule import schedule
from ms_ckpt_ext.formats.strategies.file import load_strategy
source, strategy = sys.argv[1:]
imported = time.perf_counter()
strategy = load_strategy(strategy)
catalog = open_catalog(source, strategy)
opened = time.perf_counter()
job = merge_job(catalog, "nowhere", MergeOptions())
units = sum(1 for _ in schedule(tasks_of(job.outputs), catalog.stored, Limits()))
print("PLAN", opened - imported, time.perf_counter() - opened, units)
"""


def plan(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """dp2 to dp16, tp8 pp8 with optimizer sharding, 600 parameters (weights and Adam states), small tensors."""
    results = []
    for copies in (2, 4, 8, 16):
        with tempfile.TemporaryDirectory(dir=arguments.dir) as work:
            root = Path(work)
            ranks, slices = make_source(copies, root)
            rounds = [_one_round(root) for _ in range(arguments.rounds)]
            median = {key: statistics.median(turn[key] for turn in rounds) for key in rounds[0]}
            results.append(
                {"ranks": ranks, "parameters": PARAMETERS, "distinct slices": slices}
                | {"strategy and headers s": round(median["headers"], 2), "planning s": round(median["planning"], 2)}
                | {"µs per slice": round(median["planning"] / slices * 1e6, 1), "units": int(median["units"])}
                | {"whole merge s": round(median["merge"], 2), "peak MiB": round(median["peak"] / (1 << 20))}
            )
    return results


def make_source(copies: int, root: Path) -> tuple[int, int]:
    """A checkpoint of dp`copies` tp8 pp8; returns (ranks, distinct slices)."""
    import numpy as np

    from ms_ckpt_ext.core.geometry.array import DTYPES
    from ms_ckpt_ext.core.geometry.layout import Layout
    from ms_ckpt_ext.core.geometry.strategy import LayoutItem, Strategy
    from ms_ckpt_ext.formats import safetensors
    from ms_ckpt_ext.formats.index import TensorSpec
    from ms_ckpt_ext.formats.strategies.file import save_strategy

    layouts = [Layout((copies, 8), ((0,), ()), 8, -1), Layout((copies, 8), ((), (0,)), 8, -1)]
    kinds = ("", "adam_m.", "adam_v.")
    names = [f"{kind}layers.{n}.weight" for n in range(PARAMETERS // len(kinds)) for kind in kinds]
    items = [LayoutItem(name, n // 75, layouts[n % 2]) for n, name in enumerate(names)]
    strategy = Strategy.from_items(items, "the benchmark")
    save_strategy(strategy, root / "strategy.ckpt")
    slices = 0
    for rank in range(strategy.world):
        specs = []
        for name in strategy.names_of(rank):
            layout = strategy.layout(name, rank)
            assert layout is not None
            specs.append(TensorSpec(name, DTYPES["F32"], layout.slice_shape((128, 16))))
        slices += len(specs)
        laid = safetensors.layout(specs, {"format": "ms"})
        (root / "source" / f"rank_{rank}").mkdir(parents=True)
        data = np.random.default_rng(rank).bytes(laid.size - len(laid.literals[0][1]))
        (root / "source" / f"rank_{rank}" / "net.safetensors").write_bytes(laid.literals[0][1] + data)
    return strategy.world, slices


def _one_round(root: Path) -> dict[str, float]:
    source, strategy, out = str(root / "source"), str(root / "strategy.ckpt"), str(root / "out")
    command = [sys.executable, "-c", PLANNING, source, strategy]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    shutil.rmtree(out, ignore_errors=True)
    merge = f"from ms_ckpt_ext import unified_safetensors as f; f({source!r}, {strategy!r}, {out!r})"
    turn = measure(python(merge))
    headers, planning, units = map(float, told[1:])
    return {"headers": headers, "planning": planning, "units": units, "merge": turn.seconds, "peak": turn.peak}
